"""How much activations say along an axis, on the calibration data: streamed, a few numbers per index.

Of larger activations some 30,000 positions are looked at, evenly spread over space and samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analyses.moments import spread_out
from graphopt.analyses.streaming import needed_samples, stream
from graphopt.analyses.windows import position_rows
from graphopt.pass_base import Analysis, Context

__all__ = ["ActivityAnalysis", "AxisActivity"]

Array = np.ndarray[Any, np.dtype[Any]]
AxisName = tuple[str, int]

_POSITIONS = 30_000
_CHUNK = 1 << 20


@dataclass(eq=False)
class AxisActivity:
    """What the elements at each index of an axis are like.

    Attributes:
        count: Elements seen at each index; 0 if the activation did not turn up.
        sums: `[size]` of the elements.
        sizes: `[size]` sums of their magnitudes.
        squares: `[size]` sums of their squares.
        zeros: `[size]` how many were exactly zero.
    """

    count: int
    sums: Array
    sizes: Array
    squares: Array
    zeros: Array

    @classmethod
    def empty(cls, size: int) -> AxisActivity:
        """Nothing seen yet, of an axis of this length."""
        return cls(0, *(np.zeros(size) for _ in range(4)))

    def add(self, activation: Array, axis: int, most: int) -> None:
        """Count an activation, its positions thinned evenly down to `most`."""
        chosen = spread_out(activation.size // len(self.sums), most)
        for part in np.array_split(chosen, len(chosen) * len(self.sums) // _CHUNK + 1):
            values = position_rows(activation, axis, part).astype(np.float64)
            self.count += len(part)
            with np.errstate(all="ignore"):  # what is not finite shows in the sums
                self.sums += values.sum(axis=0)
                self.sizes += np.abs(values).sum(axis=0)
                self.squares += np.square(values).sum(axis=0)
            self.zeros += (values == 0).sum(axis=0)

    @property
    def mean(self) -> Array:
        """`[size]` mean of the elements."""
        return self.sums / max(1, self.count)

    @property
    def magnitude(self) -> Array:
        """`[size]` mean magnitude."""
        return self.sizes / max(1, self.count)

    @property
    def power(self) -> Array:
        """`[size]` mean square."""
        return self.squares / max(1, self.count)

    @property
    def share_of_zeros(self) -> Array:
        """`[size]` from 0 to 1."""
        return self.zeros / max(1, self.count)


@dataclass(frozen=True)
class ActivityAnalysis(Analysis[Mapping[AxisName, AxisActivity]]):
    """Run the calibration data through the model and look at some axes of its activations.

    Attributes:
        axes: Name and axis of each activation: inputs, or values that nodes of the main graph compute.
        samples: How many samples to use at most.
    """

    name: ClassVar[str] = "activity"
    axes: tuple[tuple[AxisName, int], ...] = ()
    samples: int = 256

    def compute(self, model: ir.Model, ctx: Context) -> Mapping[AxisName, AxisActivity]:
        """Stream the calibration data.

        Raises:
            DataError: There is no calibration data.
            ModelError: ONNX Runtime cannot run the model on it.
        """
        data = needed_samples(ctx, "the activity of channels needs")
        found = {axis: AxisActivity.empty(size) for axis, size in self.axes}
        if not found:
            return found
        names = list(dict.fromkeys(name for name, _ in found))
        samples = sum(1 for _ in data.feeds(self.samples))
        for seen in stream(model, names, ctx, "measuring activity", self.samples):
            for (name, axis), activity in found.items():
                if name in seen.values:
                    activity.add(seen.values[name], axis, math.ceil(_POSITIONS * seen.samples / samples))
        return found
