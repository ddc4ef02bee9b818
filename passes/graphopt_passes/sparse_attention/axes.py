"""Bringing values from one order of axes into another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.analyses.attention import Axes, Axis
from graphopt_passes.sparse_attention.writer import Writer

__all__ = ["Sizes", "arranged", "atoms"]


@dataclass(frozen=True)
class Sizes:
    """Sizes along axes; that of the batch is what is left.

    Attributes:
        heads: Heads of the value.
        kv_heads: Heads of keys and values.
        length: `[1]`, of the sequence.
        width: Of a head.
    """

    heads: int
    kv_heads: int
    length: ir.Value
    width: int

    def of(self, axis: Axis) -> int | ir.Value:
        """Size of an axis."""
        known: dict[Axis, int | ir.Value] = {
            "batch": -1,
            "head": self.heads,
            "kv_head": self.kv_heads,
            "group": self.heads // self.kv_heads,
            "length": self.length,
            "width": self.width,
            "batch*head": -1,
            "head*width": self.heads * self.width,
            "one": 1,
        }
        return known[axis]


def atoms(axes: Sequence[Axis], *, groups: Sequence[Axis] = ("head",)) -> list[Axis]:
    """Axes one by one, those of size 1 left out.

    Args:
        axes: The axes.
        groups: What heads are written as.
    """
    found: list[Axis] = []
    for axis in axes:
        parts: list[Axis] = (
            ["batch", "head"] if axis == "batch*head" else ["head", "width"] if axis == "head*width" else [axis]
        )
        for part in parts:
            found += groups if part == "head" else () if part == "one" else (part,)
    return found


def arranged(
    writer: Writer, value: ir.Value, axes: Axes, wanted: Axes, sizes: Sizes, groups: Sequence[Axis] = ("head",)
) -> ir.Value:
    """A value with other axes; those that it lacks get size 1.

    Args:
        writer: Writes the nodes.
        value: The value.
        axes: What lies along its axes.
        wanted: What is to lie along them.
        sizes: Of the axes.
        groups: What its heads are written as where they are split.
    """
    have, want = atoms(axes, groups=groups), atoms(wanted, groups=groups)
    if have != list(axes):
        value = writer.reshaped(value, [sizes.of(axis) for axis in have])
    present: list[Axis] = [axis for axis in want if axis in have]
    value = writer.transposed(value, [have.index(axis) for axis in present])
    if present == list(wanted):
        return value
    missing = [i for i, axis in enumerate(wanted) if axis == "one" or (axis in want and axis not in have)]
    if [axis for i, axis in enumerate(wanted) if i not in missing] == present:
        return writer.unsqueezed(value, *missing)
    return writer.reshaped(value, [1 if i in missing else sizes.of(axis) for i, axis in enumerate(wanted)])
