"""Ranges of activations on the calibration data, streamed: memory does not grow with the number of samples.

Every value has a histogram of fixed size whose bin width is a power of two. When a sample falls outside, neighbouring
bins are merged and the width doubles, so that no count is ever approximated and the order of samples does not matter
beyond the first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from graphopt.analyses.constants import CONSTANTS
from graphopt.analyses.shapes import SHAPES
from graphopt.analyses.streaming import expose, stream
from graphopt.errors import DataError
from graphopt.pass_base import Analysis, Context

__all__ = ["RANGES", "Histogram", "Method", "Ranges", "RangesAnalysis", "expose"]

BINS = 2048
Array = np.ndarray[Any, np.dtype[Any]]
Method = Literal["minmax", "percentile", "mse", "entropy"]

_CHUNK = 1 << 20
_MSE_STEPS = 64
_ENTROPY_STEPS = 256
_ENTROPY_FLOOR = 1e-4  # share of the rounded distribution spread evenly, so that no bin is impossible
_LEAST_WIDTH = 2.0**-126


@dataclass
class Histogram:
    """Counts of one value's elements in `BINS` bins of width `width`, the first starting at `first * width`.

    Attributes:
        low: Least finite element; infinite before the first.
        high: Greatest finite element.
        count: Finite elements seen.
        dropped: Infinite and NaN elements, which are not counted.
        first: Index of the first bin on the grid of multiples of `width`.
        width: Width of a bin, a power of two; 0 before the first element.
        counts: int64[BINS].
    """

    low: float = math.inf
    high: float = -math.inf
    count: int = 0
    dropped: int = 0
    first: int = 0
    width: float = 0.0
    counts: Array = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def add(self, values: Array) -> None:
        """Count the elements of an array of any shape, which may be empty, constant or hold infinities."""
        flat = values.reshape(-1)
        for begin in range(0, flat.size, _CHUNK):
            self._add_chunk(flat[begin : begin + _CHUNK].astype(np.float32, copy=False))

    def _add_chunk(self, values: Array) -> None:
        low, high = float(values.min()), float(values.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            finite = values[np.isfinite(values)]
            self.dropped += values.size - finite.size
            if not finite.size:
                return
            values, low, high = finite, float(finite.min()), float(finite.max())
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.count += values.size
        self._widen()
        index = np.floor(values.astype(np.float64) / self.width).astype(np.int64) - self.first
        self.counts += np.bincount(index, minlength=BINS)

    def _widen(self) -> None:
        """Make the grid hold [low, high]: a finer start for the first samples, merged bins afterwards."""
        if not self.width:
            span = max(self.high - self.low, 2.0**-20 * max(abs(self.low), abs(self.high)))
            self.width = max(_LEAST_WIDTH, 2.0 ** math.ceil(math.log2(2 * span / BINS))) if span else _LEAST_WIDTH
            self.first = math.floor(self.low / self.width) - BINS // 4
        while not self._fits():
            used = np.flatnonzero(self.counts)
            bounds = (math.floor(self.low / self.width), math.floor(self.high / self.width))
            if bounds[1] - bounds[0] < BINS:  # wide enough, but in the wrong place
                self._move(bounds[0], used)
            else:
                self._merge(used)

    def _fits(self) -> bool:
        return (
            math.floor(self.low / self.width) >= self.first and math.floor(self.high / self.width) < self.first + BINS
        )

    def _move(self, first: int, used: Array) -> None:
        moved = np.zeros(BINS, np.int64)
        moved[used + (self.first - first)] = self.counts[used]
        self.first, self.counts = first, moved

    def _merge(self, used: Array) -> None:
        merged, first = np.zeros(BINS, np.int64), self.first // 2
        np.add.at(merged, (used + self.first) // 2 - first, self.counts[used])
        self.first, self.counts, self.width = first, merged, 2 * self.width

    def centres(self) -> tuple[Array, Array]:
        """Centres of the bins that hold something, and their counts; float64[n], int64[n]."""
        used = np.flatnonzero(self.counts)
        centres = (used + self.first + 0.5) * self.width
        return np.clip(centres, self.low, self.high), self.counts[used]

    def power(self) -> float:
        """Mean square of the elements, to the precision of the bins."""
        centres, counts = self.centres()
        return float((centres**2 * counts).sum() / self.count) if self.count else 0.0

    def minmax(self) -> tuple[float, float]:
        """Least and greatest element; (0, 0) where nothing was seen."""
        return (self.low, self.high) if self.count else (0.0, 0.0)

    def percentile(self, percent: float = 99.99) -> tuple[float, float]:
        """Range that leaves `100 - percent` percent of the elements outside, half of them at each end."""
        if not self.count:
            return 0.0, 0.0
        used = np.flatnonzero(self.counts)
        below, outside = np.cumsum(self.counts[used]), self.count * (1 - percent / 100) / 2
        first = used[int(np.searchsorted(below, outside, side="right").clip(0, used.size - 1))]
        last = used[int(np.searchsorted(below, self.count - outside, side="left").clip(0, used.size - 1))]
        low = max(self.low, float(first + self.first) * self.width)
        return low, min(self.high, float(last + self.first + 1) * self.width)

    def mse(self, levels: int = 255, *, symmetric: bool = False) -> tuple[float, float]:
        """Range whose uniform grid of `levels` steps has the least mean square error; zero is on the grid.

        Both ends shrink in turn until neither helps: what is clipped is weighed against finer steps for the rest.
        """
        low, high = (min(x, 0.0) if i == 0 else max(x, 0.0) for i, x in enumerate(self.minmax()))
        if not self.count or low == high:
            return low, high
        if symmetric:
            reach = max(-low, high)
            best = min(_shrunk(reach), key=lambda r: self.noise(-r, r, levels))
            return max(low, -best), min(high, best)
        for _ in range(2):
            high = min(_shrunk(high), key=lambda x: self.noise(low, x, levels))
            low = min(_shrunk(low), key=lambda x: self.noise(x, high, levels))
        return low, high

    def entropy(self, levels: int = 255, *, symmetric: bool = False) -> tuple[float, float]:
        """Range whose rounded distribution of magnitudes tells least from the true one by Kullback and Leibler.

        As TensorRT calibrates (Migacz, "8-bit Inference with TensorRT", 2017): what lies outside falls into the last
        bin that is kept, and the bins within one step become equal. Elements of the bin at zero, which costs
        nothing, count like their neighbours.
        """
        low, high = (min(x, 0.0) if i == 0 else max(x, 0.0) for i, x in enumerate(self.minmax()))
        used = np.flatnonzero(self.counts)
        index = used + self.first
        index = np.where(index >= 0, index, -index - 1)
        merged = 2 ** max(0, math.ceil(math.log2((int(index.max(initial=0)) + 1) / BINS)))  # far from zero: less fine
        counts = np.bincount(index // merged, self.counts[used])
        steps = levels if not symmetric and (low == 0 or high == 0) else (levels + 1) // 2
        if len(counts) <= steps:
            return low, high
        counts[0] = counts[1]
        ends = np.unique(np.linspace(steps, len(counts), _ENTROPY_STEPS).astype(np.int64))
        best = min(ends.tolist(), key=lambda end: _divergence(counts, end, steps))
        reach = float(best * merged * self.width)
        return max(low, -reach), min(high, reach)

    def noise(self, low: float, high: float, levels: int = 255) -> float:
        """Mean square error of rounding the elements to `levels` equal steps from `low` to `high`."""
        if not self.count:
            return 0.0
        centres, counts = self.centres()
        step = max((high - low) / levels, _LEAST_WIDTH)
        inside = np.clip(centres, low, high)
        # within a bin elements spread evenly; a step finer than the bins rounds as the uniform law says
        rounding = step**2 / 12 if step < self.width else np.square(np.rint(inside / step) * step - inside)
        rounding = np.where(inside == 0, 0.0, rounding)
        return float(((np.square(centres - inside) + rounding) * counts).sum() / self.count)

    def range(self, method: Method, levels: int = 255, *, symmetric: bool = False) -> tuple[float, float]:
        """Range by the method of that name."""
        if method == "percentile":
            return self.percentile()
        if method == "entropy":
            return self.entropy(levels, symmetric=symmetric)
        return self.mse(levels, symmetric=symmetric) if method == "mse" else self.minmax()


@dataclass(frozen=True)
class Ranges:
    """Histograms by value name, and how many samples they were made from."""

    histograms: Mapping[str, Histogram]
    runs: int

    def of(self, value: ir.Value | None) -> Histogram | None:
        """The histogram of a value; None where none was asked for."""
        return None if value is None else self.histograms.get(value.name or "")


@dataclass(frozen=True)
class RangesAnalysis(Analysis[Ranges]):
    """Run the calibration data through the model and keep a histogram of every float value of the main graph.

    Attributes:
        values: Names of the values wanted; None: all.
    """

    name: ClassVar[str] = "ranges"
    values: tuple[str, ...] | None = None

    def compute(self, model: ir.Model, ctx: Context) -> Ranges:
        """Stream the calibration data.

        Raises:
            DataError: There is no calibration data.
            ModelError: ONNX Runtime cannot run the model on it.
        """
        if ctx.calibration is None:
            raise DataError("calibration", "activation ranges need samples", "give --calibration")
        histograms = {name: Histogram() for name in self._wanted(model, ctx)}
        runs = 0
        for seen in stream(model, list(histograms), ctx, "calibrating"):
            runs = seen.batch + 1
            for name, array in seen.values.items():
                histograms[name].add(array)
        return Ranges(histograms, runs)

    def _wanted(self, model: ir.Model, ctx: Context) -> tuple[str, ...]:
        if self.values is not None:
            return self.values
        shapes, constants = ctx.fact(SHAPES), ctx.fact(CONSTANTS)
        outputs = (output for node in model.graph for output in node.outputs)
        floats = (v for v in (*model.graph.inputs, *outputs) if shapes.dtype(v) == ir.DataType.FLOAT)
        return tuple(v.name for v in floats if v.name and constants.of(v) is None)


def _shrunk(end: float) -> list[float]:
    return [end * (1 - i / _MSE_STEPS) for i in range(_MSE_STEPS * 3 // 4)]


def _divergence(counts: Array, end: int, steps: int) -> float:
    """How far the first `end` bins rounded to `steps` equal steps are from all bins cut at `end`, in nats."""
    kept = counts[:end]
    true = kept.copy()
    true[-1] += counts[end:].sum()
    if not kept.any():
        return math.inf
    step = np.arange(end) * steps // end
    filled = np.maximum(np.bincount(step, kept > 0, steps), 1)
    rounded = np.where(kept > 0, (np.bincount(step, kept, steps) / filled)[step], 0.0)
    rounded = (1 - _ENTROPY_FLOOR) * rounded / rounded.sum() + _ENTROPY_FLOOR / end
    true = true / true.sum()
    present = true > 0
    return float((true[present] * np.log(true[present] / rounded[present])).sum())


RANGES = RangesAnalysis()
