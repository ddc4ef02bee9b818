"""The state of the channel-group analysis, and what a rule sees of it.

Every axis of every value holds one atom per index. Rules unite atoms that live or die together, and pin those that
must stay. An axis that a node touches and its rule does not mention is pinned: silence is never permission.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import onnx_ir as ir

from graphopt.analyses._partition import Indices, Partition
from graphopt.analyses._shape_values import AxisName, Content, constant_content, numbers, reads
from graphopt.analyses.constants import Constants
from graphopt.analyses.shapes import Shapes

__all__ = ["AxisMaps", "NodeView", "Role", "SizeTable", "Span"]

Role = Literal["output", "input", "scale", "variance", "other"]
"""What an axis of a weight is to the node that reads it: `output` where the node makes these channels, `input` where
it consumes them, `scale` and `variance` of a normalization, `other` for biases, slopes and everything else."""

_CARRIERS = frozenset({"Transpose", "Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "DequantizeLinear"})


@dataclass(frozen=True)
class Span:
    """Part of an axis; what is left of it is a size that some node states."""

    value: str
    axis: int
    start: int
    stop: int


@dataclass(frozen=True)
class SizeTable:
    """Numbers that a node states and that depend on how many channels there are.

    Attributes:
        output: Name of the node's first output, which finds the node.
        slot: An attribute's name, or the index of a constant input.
        numbers: The whole list as it should be written, before any removal.
        spans: Position in the list -> the span whose remaining length belongs there.
        scalar: True: the attribute is one integer, not a list.
        drops: Attributes that contradict the list and go once it is written.
    """

    output: str
    slot: str | int
    numbers: tuple[int, ...]
    spans: tuple[tuple[int, Span], ...]
    scalar: bool = False
    drops: tuple[str, ...] = ()


@dataclass
class AxisMaps:
    """Atoms of all axes of a graph, their partition, and what rules found."""

    shapes: Shapes
    constants: Constants
    partition: Partition = field(default_factory=Partition)
    axes: dict[str, list[Indices | None]] = field(default_factory=dict[str, "list[Indices | None]"])
    contents: dict[str, Content | None] = field(default_factory=dict[str, "Content | None"])
    reasons: list[str] = field(default_factory=list[str])
    pinned: list[tuple[Indices, int]] = field(default_factory=list["tuple[Indices, int]"])
    roles: dict[AxisName, list[tuple[Role, str]]] = field(default_factory=dict["AxisName", "list[tuple[Role, str]]"])
    tables: list[SizeTable] = field(default_factory=list[SizeTable])
    origins: dict[str, str] = field(default_factory=dict[str, str])

    def of(self, value: ir.Value) -> list[Indices | None] | None:
        """Atoms of each axis, None for a dynamic axis; None where even the rank is unknown."""
        name = value.name or ""
        if name not in self.axes:
            tensor = self.constants.of(value)
            dims = self.shapes.of(value) if tensor is None else tuple(tensor.shape.numpy())
            if dims is None:
                return None
            self.axes[name] = [self.partition.new(dim) if isinstance(dim, int) else None for dim in dims]
        return self.axes[name]

    def origin(self, value: ir.Value) -> str | None:
        """Name of the constant that a value is made from by operators with one tensor each, None if there is none."""
        while self.constants.of(value) is None:
            producer = value.producer()
            first = producer.inputs[0] if producer is not None and producer.op_type in _CARRIERS else None
            if first is None:
                return None
            value = first
        return value.name or ""

    def content(self, value: ir.Value | None) -> Content | None:
        """Entries of a small tensor, None if it is not one that shape arithmetic knows."""
        if value is None:
            return None
        name = value.name or ""
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
        self.pin_axes(reads(self.contents.get(value.name or "")), reason)


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
        self.reason = f"pinned by {node.op_type} {label!r}"
        self._settled: set[AxisName] = set()
        self._understood: set[str] = set()

    def input(self, index: int) -> ir.Value | None:
        """An input, None where it is absent."""
        return self.node.inputs[index] if index < len(self.node.inputs) else None

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

    def settle(self, value: ir.Value, axis: int) -> None:
        """Say that the rule has taken care of an axis; all others are pinned."""
        self._settled.add((value.name or "", axis % (self.rank(value) or 1)))

    def link(self, a: ir.Value | None, a_axis: int, b: ir.Value | None, b_axis: int) -> bool:
        """Say that two axes are the same index for index; False, and nothing said, where that cannot be."""
        left, right = self.atoms(a, a_axis), self.atoms(b, b_axis)
        if left is not None and right is None and b is not None:
            right = self.adopt(b, b_axis, len(left))
        if a is None or b is None or left is None or right is None or len(left) != len(right):
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
        self.maps.roles.setdefault((value.name or "", axis % rank), []).append((role, self.label))
        if (origin := self.maps.origin(value)) is not None:
            self.maps.origins[value.name or ""] = origin
        atoms = self.atoms(value, axis)
        if role == "output" and atoms is not None:
            self.maps.partition.mark(atoms)

    def content(self, index: int) -> Content | None:
        """Entries of a small input; the rule answers for the axes that they were read from."""
        value = self.input(index)
        if value is not None:
            self._understood.add(value.name or "")
        return self.maps.content(value)

    def numbers(self, index: int) -> tuple[int, ...] | None:
        """An input as numbers, None if one is unknown; sizes that went into them can no longer change."""
        content = self.content(index)
        self.maps.pin_axes(reads(content), self.reason)
        return numbers(content)

    def state_sizes(
        self,
        slot: str | int,
        numbers: Sequence[int],
        spans: Sequence[tuple[int, Span]],
        *,
        scalar: bool = False,
        drops: tuple[str, ...] = (),
    ) -> None:
        """Record numbers of this node that follow the channels."""
        output = self.node.outputs[0].name or ""
        self.maps.tables.append(SizeTable(output, slot, tuple(numbers), tuple(spans), scalar, drops))

    def span(self, value: ir.Value, axis: int, start: int = 0, stop: int | None = None) -> Span:
        """Part of an axis of known size."""
        atoms = self.atoms(value, axis)
        end = stop if stop is not None else 0 if atoms is None else len(atoms)
        return Span(value.name or "", axis % (self.rank(value) or 1), start, end)

    def finish(self, *, content_kept: bool) -> None:
        """Pin what the rule did not mention.

        Args:
            content_kept: The output's content is known, so that what was read from shapes is still followed.
        """
        for value in (*self.node.inputs, *self.node.outputs):
            if value is None:
                continue
            for axis, atoms in enumerate(self.maps.of(value) or ()):
                if (value.name or "", axis) not in self._settled:
                    self.maps.pin(atoms, self.reason)
            if not content_kept and (value.name or "") not in self._understood:
                self.maps.pin_axes(reads(self.maps.contents.get(value.name or "")), self.reason)
