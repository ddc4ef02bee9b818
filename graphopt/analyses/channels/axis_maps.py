"""The state of the channel-group analysis, and what a rule sees of it.

Every axis of every value holds one atom per index. Rules unite atoms that live or die together, and pin those that
must stay. An axis that a node touches and its rule does not mention is pinned: silence is never permission.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Literal

import onnx_ir as ir

from graphopt.analyses.channels.partition import Indices, Partition
from graphopt.analyses.channels.shape_values import AxisName, Content, constant_content, numbers, reads
from graphopt.analyses.constants import Constants
from graphopt.analyses.shapes import Shapes

__all__ = ["AxisMaps", "IndexTable", "Kind", "Mean", "NodeView", "Role", "SizeTable", "Span"]

Role = Literal["output", "input", "scale", "variance", "other"]
"""What an axis of a weight is to the node that reads it: `output` where the node makes these channels, `input` where
it consumes them, `scale` and `variance` of a normalization, `other` for biases, slopes and everything else."""

Kind = Literal["channels", "neurons", "groups", "heads", "hidden units", "experts"]
"""What the units of a group are called; where several fit, the later one."""

_CARRIERS = frozenset({"Transpose", "Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "DequantizeLinear"})


@dataclass(frozen=True)
class Span:
    """Part of an axis; what is left of it is a size that some node states.

    Attributes:
        value: Name of the value.
        axis: The axis.
        start: First position.
        stop: Position behind the last.
        unit: Positions that count as one, such as those of an attention head.
    """

    value: str
    axis: int
    start: int
    stop: int
    unit: int = 1


@dataclass(frozen=True)
class SizeTable:
    """Numbers that a node states and that depend on how many channels there are.

    Attributes:
        output: Name of the node's first output, which finds the node.
        slot: An attribute's name, or the index of a constant input.
        numbers: The whole list as it should be written, before any removal; None: as the graph computes it.
        spans: Position in the list -> the span whose remaining length belongs there.
        scalar: True: the attribute is one integer, not a list.
        drops: Attributes that contradict the list and go once it is written.
        reads: Axes whose sizes the numbers were computed from; once one changes, what is computed is no longer meant.
        dtype: Type of the constant input.
    """

    output: str
    slot: str | int
    numbers: tuple[int | None, ...]
    spans: tuple[tuple[int, Span], ...]
    scalar: bool = False
    drops: tuple[str, ...] = ()
    reads: tuple[AxisName, ...] = ()
    dtype: ir.DataType = ir.DataType.INT64


@dataclass(frozen=True, eq=False)
class IndexTable:
    """Positions of an axis that a constant input lists; those that leave are struck off, the others renumbered.

    Attributes:
        output: Name of the node's first output, which finds the node.
        slot: Index of the constant input.
        numbers: The list, a vector or a single number, as it is before any removal.
        value: Name of the value that is indexed.
        axis: The axis of it.
    """

    output: str
    slot: int
    numbers: Indices
    value: str
    axis: int


@dataclass(frozen=True)
class Mean:
    """A mean over an axis that channels are on; it is taken over fewer once some have left.

    Attributes:
        output: Name of the node's first output, which finds the node: a ReduceMean or a normalization.
        value: What it reads.
        axis: The axis.
    """

    output: str
    value: str
    axis: int


@dataclass
class AxisMaps:
    """Atoms of all axes of a graph, their partition, and what rules found."""

    shapes: Shapes
    constants: Constants
    functions: frozenset[tuple[str, str, str]] = frozenset()
    partition: Partition = field(default_factory=Partition)
    axes: dict[str, list[Indices | None]] = field(default_factory=dict[str, "list[Indices | None]"])
    contents: dict[str, Content | None] = field(default_factory=dict[str, "Content | None"])
    reasons: list[str] = field(default_factory=list[str])
    pinned: list[tuple[Indices, int]] = field(default_factory=list["tuple[Indices, int]"])
    roles: dict[AxisName, list[tuple[Role, str]]] = field(default_factory=dict["AxisName", "list[tuple[Role, str]]"])
    tables: list[SizeTable] = field(default_factory=list[SizeTable])
    indices: list[IndexTable] = field(default_factory=list["IndexTable"])
    origins: dict[str, str] = field(default_factory=dict[str, str])
    zeros: set[str] = field(default_factory=set[str])
    kinds: list[tuple[Indices, Kind]] = field(default_factory=list["tuple[Indices, Kind]"])
    means: list[Mean] = field(default_factory=list["Mean"])
    periods: dict[AxisName, Indices] = field(default_factory=dict["AxisName", Indices])
    symbols: dict[AxisName, str] = field(default_factory=dict["AxisName", str])
    routers: list[tuple[Indices, str]] = field(default_factory=list["tuple[Indices, str]"])
    stacks: list[Indices] = field(default_factory=list["Indices"])
    floors: list[tuple[Indices, int]] = field(default_factory=list["tuple[Indices, int]"])
    numbered: dict[str, Indices] = field(default_factory=dict[str, "Indices"])

    def of(self, value: ir.Value) -> list[Indices | None] | None:
        """Atoms of each axis, None for a dynamic axis; None where even the rank is unknown."""
        name = self.key(value)
        if name not in self.axes:
            tensor = self.constants.of(value)
            dims = self.shapes.of(value) if tensor is None else tuple(tensor.shape.numpy())
            if dims is None:
                return None
            self.axes[name] = [self.partition.new(dim) if isinstance(dim, int) else None for dim in dims]
        return self.axes[name]

    def key(self, value: ir.Value) -> str:
        """What a value is called here; its name, in the main graph."""
        return self.constants.names.key(value)

    def size(self, value: ir.Value, axis: int) -> int | str:
        """Length of an axis, or a name that open axes of one length share."""
        axes = self.of(value)
        atoms = None if axes is None else axes[axis]
        if atoms is not None:
            return len(atoms)
        name = self.key(value), axis % len(axes or [0])
        if name not in self.symbols:
            dims = self.shapes.of(value)
            dim = dims[name[1]] if dims is not None and name[1] < len(dims) else None
            self.symbols[name] = dim if isinstance(dim, str) else f"{name[0]}:{name[1]}"
        return self.symbols[name]

    def axis_size(self, name: AxisName) -> int | str:
        """The same, of an axis that content was read from."""
        atoms = self.axes[name[0]][name[1]]
        return len(atoms) if atoms is not None else self.symbols.get(name, f"{name[0]}:{name[1]}")

    def origin(self, value: ir.Value) -> str | None:
        """Name of the constant that a value is made from by operators with one tensor each, None if there is none."""
        while self.constants.of(value) is None:
            producer = value.producer()
            first = producer.inputs[0] if producer is not None and producer.op_type in _CARRIERS else None
            if first is None:
                return None
            value = first
        return self.key(value)

    def origin_axis(self, value: ir.Value, axis: int) -> AxisName | None:
        """The axis of a constant that an axis is, behind operators that keep axes whole; None where one does not."""
        while self.constants.of(value) is None:
            producer = value.producer()
            first = producer.inputs[0] if producer is not None else None
            rank = len(self.of(value) or ())
            if producer is None or first is None or not rank:
                return None
            if producer.op_type == "Transpose":
                axis = (producer.attributes.get_ints("perm", None) or tuple(reversed(range(rank))))[axis]
            elif producer.op_type not in ("Cast", "DequantizeLinear", "Identity"):
                return None
            value = first
        return self.key(value), axis

    def content(self, value: ir.Value | None) -> Content | None:
        """Entries of a small tensor, None if it is not one that shape arithmetic knows."""
        if value is None:
            return None
        name = self.key(value)
        if name not in self.contents:
            tensor = self.constants.of(value)
            self.contents[name] = None if tensor is None else constant_content(tensor)
        return self.contents[name]

    def pin(self, atoms: Indices | None, reason: str) -> None:
        """Keep these atoms, for the reason that was given first."""
        if atoms is None or not len(atoms):
            return
        if not self.reasons or self.reasons[-1] != reason:
            self.reasons.append(reason)
        self.pinned.append((atoms, len(self.reasons) - 1))

    def pin_axes(self, names: Sequence[AxisName], reason: str) -> None:
        """Keep the axes whose sizes were read."""
        for value, axis in names:
            self.pin(self.axes[value][axis], reason)

    def pin_value(self, value: ir.Value, reason: str) -> None:
        """Keep a value as it is, and everything that its content was read from."""
        for atoms in self.of(value) or ():
            self.pin(atoms, reason)
        self.pin_axes(reads(self.contents.get(self.key(value))), reason)


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
        left, right = self.maps.periods.get(first), self.maps.periods.get(second)
        if left is None and right is None:
            return False
        if left is None or right is None:
            left = right = self.maps.periods[first] = self.maps.periods[second] = left if right is None else right
        if left is None or right is None or len(left) != len(right):
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
        return value is not None and (self.key(value) in self.maps.zeros or self.maps.constants.of(value) is not None)

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
            self.state_sizes(index, found, (), scalar=not content.ndim, reads=reads(content))
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
    ) -> None:
        """Record numbers of this node that follow the channels, or that must not follow them."""
        output = self.key(self.node.outputs[0])
        value = self.input(slot) if isinstance(slot, int) else None
        dtype = (None if value is None else self.maps.shapes.dtype(value)) or ir.DataType.INT64
        table = SizeTable(output, slot, tuple(numbers), tuple(spans), scalar, drops, reads, dtype)
        self.maps.tables.append(table)

    def span(self, value: ir.Value, axis: int, start: int = 0, stop: int | None = None, unit: int = 1) -> Span:
        """Part of an axis of known size."""
        atoms = self.atoms(value, axis)
        end = stop if stop is not None else 0 if atoms is None else len(atoms)
        return Span(self.key(value), axis % (self.rank(value) or 1), start, end, unit)

    def state_indices(self, slot: int, numbers: Indices, value: ir.Value, axis: int) -> None:
        """Record a constant input that lists positions of an axis."""
        output = self.key(self.node.outputs[0])
        self.maps.indices.append(IndexTable(output, slot, numbers, self.key(value), axis))

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
