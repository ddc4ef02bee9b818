"""What a rule sees of one node, and how it says what belongs together.

An axis that a node touches and its rule does not mention is pinned: silence is never permission.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy

import onnx_ir as ir

from graphopt.analyses.channels.axis_maps import AxisMaps, Kind, Role
from graphopt.analyses.channels.partition import Indices
from graphopt.analyses.channels.shape_values import AxisName, Content, numbers, reads
from graphopt.analyses.channels.tables import IndexTable, SizeTable, Span

__all__ = ["NodeView"]


class NodeView:
    """One node as its rule sees it.

    Args:
        maps: The state to work on.
        node: The node.
        label: Its name in reports.
        opset: Version of the operator set.
    """

    def __init__(self, maps: AxisMaps, node: ir.Node, label: str, opset: int) -> None:
        self.maps, self.node, self.label, self.opset = maps, node, label, opset
        self.inputs: tuple[ir.Value | None, ...] = tuple(node.inputs)
        self.reason = f"pinned by {node.op_type} {label!r}"
        self._settled: set[AxisName] = set()
        self._understood: set[str] = set()
        self._inner: list[ir.Value] = []

    def input(self, index: int) -> ir.Value | None:
        """An input, None where it is absent."""
        return self.inputs[index] if index < len(self.inputs) else None

    def with_inputs(self, *indices: int) -> NodeView:
        """The same node with some of its inputs only, in this order, for the rule of an operator that takes these."""
        other = copy(self)
        other.inputs = tuple(self.input(index) for index in indices)
        return other

    def declare(self, output: ir.Value, sizes: Sequence[int | None]) -> None:
        """State the shape of an output that shape inference knows nothing of; None for sizes that are open."""
        name = self.key(output)
        if name and self.maps.of(output) is None:
            self.maps.axes[name] = [None if size is None else self.maps.partition.new(size) for size in sizes]

    def rank(self, value: ir.Value | None) -> int | None:
        """Rank of a value, None if unknown or absent."""
        axes = None if value is None else self.maps.of(value)
        return None if axes is None else len(axes)

    def atoms(self, value: ir.Value | None, axis: int) -> Indices | None:
        """Atoms of an axis, None if it is dynamic or unknown."""
        axes = None if value is None else self.maps.of(value)
        return axes[axis] if axes is not None and -len(axes) <= axis < len(axes) else None

    def sizes(self, value: ir.Value | None) -> list[int | None] | None:
        """Sizes of the axes, None for dynamic ones."""
        axes = None if value is None else self.maps.of(value)
        return None if axes is None else [None if atoms is None else len(atoms) for atoms in axes]

    def adopt(self, output: ir.Value, axis: int, size: int) -> Indices | None:
        """Atoms of an output's axis; where shape inference gave up, the rule's size is taken."""
        axes = self.maps.of(output)
        if axes is None or not -len(axes) <= axis < len(axes) or output.producer() is not self.node:
            return self.atoms(output, axis)
        if axes[axis] is None:
            axes[axis] = self.maps.partition.new(size)
        return axes[axis]

    def adopt_rank(self, output: ir.Value, rank: int) -> None:
        """Take the rank that the rule knows where shape inference gave up."""
        if self.maps.of(output) is None and output.producer() is self.node:
            self.maps.axes[self.key(output)] = [None] * rank

    def period(self, value: ir.Value | None, axis: int) -> Indices | None:
        """Atoms that an open axis repeats: of `batch * heads`, the heads."""
        rank = self.rank(value)
        return None if value is None or not rank else self.maps.periods.get((self.key(value), axis % rank))

    def settle(self, value: ir.Value, axis: int) -> None:
        """Say that the rule has taken care of an axis; all others are pinned."""
        self._settled.add((self.key(value), axis % (self.rank(value) or 1)))

    def link(self, a: ir.Value | None, a_axis: int, b: ir.Value | None, b_axis: int) -> bool:
        """Say that two axes are the same index for index; False, and nothing said, where that cannot be."""
        left, right = self.atoms(a, a_axis), self.atoms(b, b_axis)
        if left is not None and right is None and b is not None:
            right = self.adopt(b, b_axis, len(left))
        if right is not None and left is None and a is not None:
            left = self.adopt(a, a_axis, len(right))
        if left is None and right is None and a is not None and b is not None:
            return self._link_open(a, a_axis, b, b_axis)
        if a is None or b is None or left is None or right is None or len(left) != len(right):
            return False
        self.tie(left, right)
        self.settle(a, a_axis)
        self.settle(b, b_axis)
        return True

    def _link_open(self, a: ir.Value, a_axis: int, b: ir.Value, b_axis: int) -> bool:
        """Two axes of one open size: the second takes the name of the first, and what it repeats."""
        ranks = self.rank(a), self.rank(b)
        if not ranks[0] or not ranks[1]:
            return False
        first, second = (self.key(a), a_axis % ranks[0]), (self.key(b), b_axis % ranks[1])
        if b.producer() is self.node:
            self.maps.symbols[second] = str(self.maps.size(a, a_axis))
        elif a.producer() is self.node:
            self.maps.symbols[first] = str(self.maps.size(b, b_axis))
        periods = self.maps.periods
        known = periods.get(first, periods.get(second))
        if known is None:
            return False
        left, right = periods.setdefault(first, known), periods.setdefault(second, known)
        if len(left) != len(right):
            return False
        self.tie(left, right)
        self.settle(a, a_axis)
        self.settle(b, b_axis)
        return True

    def tie(self, left: Indices, right: Indices) -> None:
        """Say that `left[i]` and `right[i]` live or die together."""
        self.maps.partition.unite(left, right)

    def role(self, value: ir.Value | None, axis: int, role: Role) -> None:
        """Record what an axis of a weight is; `output` makes its channels worth removing."""
        rank = self.rank(value)
        if value is None or rank is None:
            return
        self.maps.roles.setdefault((self.key(value), axis % rank), []).append((role, self.label))
        if (origin := self.maps.origin(value)) is not None:
            self.maps.origins[self.key(value)] = origin
            source = self.maps.origin_axis(value, axis % rank)
            if source is not None and source[0] != self.key(value):
                self.maps.roles.setdefault(source, []).append((role, self.label))
        atoms = self.atoms(value, axis)
        if role == "output" and atoms is not None:
            self.maps.partition.mark(atoms)

    def key(self, value: ir.Value) -> str:
        """What a value is called in this analysis."""
        return self.maps.key(value)

    def is_zero(self, value: ir.Value | None) -> bool:
        """Whether a value is zero wherever the weights of a channel are."""
        return self.maps.is_zero(value)

    def call(self, atoms: Indices | None, kind: Kind) -> None:
        """Say what these units are."""
        if atoms is not None:
            self.maps.kinds.append((atoms, kind))

    def stack(self, weight: ir.Value, axis: int) -> None:
        """Say that a weight is a stack of weights along an axis, one for each head or expert."""
        atoms = self.atoms(weight, axis)
        if atoms is not None and len(atoms) > 1:
            self.role(weight, axis, "output")
            self.maps.stacks.append(atoms)

    def content(self, index: int) -> Content | None:
        """Entries of a small input; the rule answers for the axes that they were read from."""
        value = self.input(index)
        if value is not None:
            self._understood.add(self.key(value))
        return self.maps.content(value)

    def numbers(self, index: int) -> tuple[int, ...] | None:
        """An input as numbers, None if one is unknown; what was computed from sizes stays as it is now."""
        content = self.content(index)
        found = numbers(content)
        if content is None or found is None:
            self.maps.pin_axes(reads(content), self.reason)
        elif reads(content):
            self.state_sizes(index, found, (), shape=content.shape, reads=reads(content))
        return found

    def state_sizes(
        self,
        slot: str | int,
        numbers: Sequence[int | None],
        spans: Sequence[tuple[int, Span]],
        *,
        scalar: bool = False,
        drops: tuple[str, ...] = (),
        reads: tuple[AxisName, ...] = (),
        shape: tuple[int, ...] | None = None,
    ) -> None:
        """Record numbers of this node that follow the channels, or that must not follow them."""
        output = self._finder()
        value = self.input(slot) if isinstance(slot, int) else None
        dtype = (None if value is None else self.maps.shapes.dtype(value)) or ir.DataType.INT64
        table = SizeTable(output, slot, tuple(numbers), tuple(spans), scalar, drops, reads, dtype, shape)
        self.maps.tables.append(table)

    def refuse_mixed(self, shape: Sequence[int | None], reads: Sequence[AxisName], axes: Iterable[int]) -> bool:
        """Pin what a requested shape is made of, and axes of the output, where it cannot be written anew.

        Where, which merges stated sizes and computed ones (None), comes with opset 9.
        """
        if None not in shape or self.opset >= 9:
            return False
        self.maps.pin_axes(reads, self.reason)
        for axis in axes:
            self.maps.pin(self.atoms(self.node.outputs[0], axis), self.reason)
        return True

    def span(self, value: ir.Value, axis: int, start: int = 0, stop: int | None = None, unit: int = 1) -> Span:
        """Part of an axis of known size."""
        atoms = self.atoms(value, axis)
        end = stop if stop is not None else 0 if atoms is None else len(atoms)
        return Span(self.key(value), axis % (self.rank(value) or 1), start, end, unit)

    def state_indices(self, slot: int, numbers: Indices, value: ir.Value, axis: int) -> None:
        """Record a constant input that lists positions of an axis."""
        output = self._finder()
        self.maps.indices.append(IndexTable(output, slot, numbers, self.key(value), axis))

    def _finder(self) -> str:
        """Name of the first output that is not left out."""
        return next((self.key(output) for output in self.node.outputs if output.name), "")

    def answer_for(self, values: Sequence[ir.Value]) -> None:
        """Take in what goes in and out of the subgraphs of this node; what the rule does not mention is pinned."""
        self._inner += values

    def follow(self, value: ir.Value) -> None:
        """Say that sizes which went into a value are followed further."""
        self._understood.add(self.key(value))

    def finish(self, *, content_kept: bool) -> None:
        """Pin what the rule did not mention; numbers that were computed from sizes stay as they are.

        Args:
            content_kept: The output's content is known, so that what was read from shapes is still followed.
        """
        for value in (*self.node.inputs, *self.node.outputs, *self._inner):
            if value is None:
                continue
            for axis, atoms in enumerate(self.maps.of(value) or ()):
                if (self.key(value), axis) not in self._settled:
                    self.maps.pin(atoms if atoms is not None else self.period(value, axis), self.reason)
        if content_kept:
            return
        for index, value in enumerate(self.node.inputs):
            if value is not None and self.key(value) not in self._understood:
                self.numbers(index)
        for value in self._inner:
            if self.key(value) not in self._understood:
                self.maps.pin_axes(reads(self.maps.contents.get(self.key(value))), self.reason)
