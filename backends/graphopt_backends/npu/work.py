"""What the lowering of every operator uses: tensors by ONNX value, and the steps that many have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt_backends.npu.emitter import Emitter, Order, Placed, Refusal
from graphopt_backends.npu.tosa import DType, Tensor
from graphopt_backends.npu.units import Grid, Operand, Unit

__all__ = ["Work", "channels_last", "exact", "plain"]

Array = np.ndarray[Any, np.dtype[Any]]


def plain(rank: int) -> Order:
    """Axes as ONNX has them."""
    return tuple(range(rank))


def channels_last(rank: int) -> Order:
    """The second axis moved to the end."""
    return (0, *range(2, rank), 1) if rank > 2 else plain(rank)


def exact(number: Any) -> Fraction:
    """A floating-point number as the fraction that it is."""
    return Fraction(float(number))


@dataclass
class Work:
    """A graph that grows.

    Attributes:
        emitter: Adds operations.
        values: How ONNX values lie in the graph.
    """

    emitter: Emitter
    values: dict[ir.Value, Placed] = field(default_factory=dict[ir.Value, Placed])
    _arranged: dict[tuple[Tensor, Order, Order], Tensor] = field(
        default_factory=dict[tuple[Tensor, Order, Order], Tensor]
    )

    @property
    def family(self) -> str:
        """`u55`, `u65` or `u85`."""
        return self.emitter.family

    def placed(self, operand: Operand) -> Placed:
        """How an operand lies; constants lie as in ONNX.

        Raises:
            Refusal: It is a constant that is on no grid, or on one with a scale for each channel.
        """
        array = operand.array
        if array is None:
            return self.values[operand.value]
        if operand.grid is None:
            raise Refusal("a constant operand of it is float")
        if operand.grid.axis is not None:
            raise Refusal("a constant operand of it has a scale for each channel")
        return Placed(self.emitter.constant(array, operand.grid.dtype), plain(array.ndim))

    def read(self, operand: Operand, order: Order) -> Tensor:
        """An operand with its axes in a given order; transposed once for all that want it so."""
        placed = self.placed(operand)
        data = placed.tensor.data
        if data is not None:
            return self.emitter.constant(data.transpose(order), placed.tensor.dtype)
        key = placed.tensor, placed.order, order
        if key not in self._arranged:
            self._arranged[key] = self.emitter.arrange(placed, order)
        return self._arranged[key]

    def centred(self, tensor: Tensor, grid: Grid, ratio: Fraction = Fraction(1)) -> Tensor:
        """`(x - zero_point) * ratio` in 32 bits."""
        return self.emitter.rescale(tensor, ratio, "int32", zero_in=grid.zero_point)

    def rounded(self, unit: Unit, sums: Tensor, steps: Fraction | Sequence[Fraction]) -> Tensor:
        """Sums in 32 bits (or 48) made the integers of a unit's result, its activation applied.

        Args:
            unit: Its first result is meant.
            sums: Integers without a zero point.
            steps: What 1 of them stands for; one number, or one for each index of the last axis.
        """
        grid = _grid(unit)
        ratios = steps / grid.step if isinstance(steps, Fraction) else [step / grid.step for step in steps]
        found = self.emitter.rescale(sums, ratios, _narrow(grid), zero_out=grid.zero_point)
        return self.emitter.clamp(found, *unit.limits)

    def regridded(self, tensor: Tensor, before: Grid, unit: Unit, index: int = 0) -> Tensor:
        """Integers of one grid made those of a unit's result, its activation applied."""
        after = unit.grids[index]
        assert after is not None
        if not before.matches(after):
            ratio = before.step / after.step
            tensor = self.emitter.rescale(tensor, ratio, _narrow(after), before.zero_point, after.zero_point)
        return self.emitter.clamp(tensor, *unit.limits) if index == 0 else tensor

    def put(self, value: ir.Value, tensor: Tensor, order: Order) -> None:
        """Say how an ONNX value lies."""
        self.values[value] = Placed(tensor, order)


def _grid(unit: Unit) -> Grid:
    grid = unit.grids[0]
    assert grid is not None
    return grid


def _narrow(grid: Grid) -> DType:
    if grid.dtype == "int32":
        raise Refusal("its result is in 32 bits")
    return grid.dtype
