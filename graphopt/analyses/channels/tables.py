"""What the rules tell whoever removes channels: numbers in the graph that must be brought up to date."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from graphopt.analyses.channels.partition import Indices
from graphopt.analyses.channels.shape_values import AxisName

__all__ = ["IndexTable", "Mean", "SizeTable", "Span"]


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
        output: Name of the node's first output that is not left out, which finds the node.
        slot: An attribute's name, or the index of a constant input.
        numbers: The whole list as it should be written, before any removal; None: as the graph computes it.
        spans: Position in the list -> the span whose remaining length belongs there.
        scalar: True: the attribute is one integer, not a list.
        drops: Attributes that contradict the list and go once it is written.
        reads: Axes whose sizes the numbers were computed from; once one changes, what is computed is no longer meant.
        dtype: Type of the constant input.
        shape: Its shape, None for a vector.
    """

    output: str
    slot: str | int
    numbers: tuple[int | None, ...]
    spans: tuple[tuple[int, Span], ...]
    scalar: bool = False
    drops: tuple[str, ...] = ()
    reads: tuple[AxisName, ...] = ()
    dtype: ir.DataType = ir.DataType.INT64
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class IndexTable:
    """Positions of an axis that a constant input lists; those that leave are struck off, the others renumbered.

    Attributes:
        output: Name of the node's first output that is not left out, which finds the node.
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
        output: Name of the node's first output that is not left out, which finds it: a ReduceMean or a normalization.
        value: What it reads.
        axis: The axis.
    """

    output: str
    value: str
    axis: int
