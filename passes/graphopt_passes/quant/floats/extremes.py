"""How far activations reach on the calibration data: less than their histograms, and found much faster."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analyses import CONSTANTS, SHAPES
from graphopt.analyses.streaming import stream
from graphopt.pass_base import Analysis, Context

__all__ = ["EXTREMES", "Extremes", "ExtremesAnalysis"]

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Extremes:
    """What is known of one value; infinities and NaN do not count.

    Attributes:
        low: Least element, infinite before the first.
        high: Greatest element.
        count: Number of elements.
        power: Sum of their squares.
    """

    low: float = math.inf
    high: float = -math.inf
    count: int = 0
    power: float = 0.0

    @property
    def reach(self) -> float:
        """Greatest magnitude; 0 if nothing was seen."""
        return max(-self.low, self.high) if self.count else 0.0

    @property
    def rms(self) -> float:
        """Root of the mean square; 0 if nothing was seen."""
        return math.sqrt(self.power / self.count) if self.count else 0.0

    def add(self, values: Array) -> None:
        """Take the elements of a float array of any shape into account."""
        flat = values.reshape(-1)
        power = float(np.vdot(flat, flat)) if flat.size else 0.0
        if not math.isfinite(power):  # not finite, or squares that float32 cannot hold
            flat = flat[np.isfinite(flat)].astype(np.float64)
            power = float(np.vdot(flat, flat))
        if flat.size:
            self.low, self.high = min(self.low, float(flat.min())), max(self.high, float(flat.max()))
            self.count += flat.size
            self.power += power


@dataclass(frozen=True)
class ExtremesAnalysis(Analysis[Mapping[str, Extremes]]):
    """Run the calibration data through the model and look at every float value of the main graph, by name."""

    name: ClassVar[str] = "extremes"

    def compute(self, model: ir.Model, ctx: Context) -> Mapping[str, Extremes]:
        """Stream the calibration data.

        Raises:
            DataError: There is no calibration data.
            ModelError: ONNX Runtime cannot run the model on it.
        """
        shapes, constants = ctx.fact(SHAPES), ctx.fact(CONSTANTS)
        values = (*model.graph.inputs, *(output for node in model.graph for output in node.outputs))
        floats = [v for v in values if shapes.dtype(v) == ir.DataType.FLOAT and constants.of(v) is None]
        found = {v.name: Extremes() for v in floats if v.name}
        for seen in stream(model, list(found), ctx, "calibrating"):
            for name, array in seen.values.items():
                found[name].add(array)
        return found


EXTREMES = ExtremesAnalysis()
