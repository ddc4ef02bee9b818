"""The state of the channel-group analysis.

Every axis of every value holds one atom per index. Rules unite atoms that live or die together, and pin those that
must stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import onnx_ir as ir

from graphopt.analyses.channels.partition import Indices, Partition
from graphopt.analyses.channels.shape_values import AxisName, Content, constant_content, reads
from graphopt.analyses.channels.tables import IndexTable, Mean, SizeTable
from graphopt.analyses.constants import Constants
from graphopt.analyses.shapes import Shapes

__all__ = ["AxisMaps", "Kind", "Role"]

Role = Literal["output", "input", "scale", "variance", "other"]
"""What an axis of a weight is to the node that reads it: `output` where the node makes these channels, `input` where
it consumes them, `scale` and `variance` of a normalization, `other` for biases, slopes and everything else."""

Kind = Literal["channels", "neurons", "groups", "heads", "hidden units", "experts"]
"""What the units of a group are called; where several fit, the later one."""

_CARRIERS = frozenset({"Transpose", "Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "DequantizeLinear"})


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

    def is_zero(self, value: ir.Value | None) -> bool:
        """Whether a value is zero wherever the weights of a channel are."""
        return value is not None and (self.key(value) in self.zeros or self.constants.of(value) is not None)

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
