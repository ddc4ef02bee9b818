"""What single channels of activations do on the calibration data, streamed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analyses.streaming import stream
from graphopt.pass_base import Analysis, Context

__all__ = ["ChannelStatistics", "ChannelStatisticsAnalysis"]

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class ChannelStatistics:
    """Range and power of each channel of one activation, `[channels]` each.

    Attributes:
        low: Least value.
        high: Greatest value.
        square: Mean square.
    """

    low: Array
    high: Array
    square: Array

    @property
    def finite(self) -> bool:
        """No infinity and no NaN was seen."""
        return bool(np.isfinite(self.low).all() and np.isfinite(self.high).all() and np.isfinite(self.square).all())

    def scaled(self, factors: Array) -> ChannelStatistics:
        """The same for an activation whose channels are multiplied by positive factors."""
        return replace(self, low=self.low * factors, high=self.high * factors, square=self.square * factors**2)


@dataclass(frozen=True)
class ChannelStatisticsAnalysis(Analysis[Mapping[str, ChannelStatistics]]):
    """Run calibration data through the model and look at some activations channel by channel.

    Attributes:
        values: Names, each with the axis that its channels are on.
        samples: How many samples to use at most.
    """

    name: ClassVar[str] = "channel statistics"
    values: tuple[tuple[str, int], ...] = ()
    samples: int = 64

    def compute(self, model: ir.Model, ctx: Context) -> Mapping[str, ChannelStatistics]:
        """Stream the samples.

        Raises:
            DataError: There is no calibration data.
            ModelError: ONNX Runtime cannot run the model on it.
        """
        sums: dict[str, _Sums] = {}
        axes = dict(self.values)
        for seen in stream(model, list(axes), ctx, "looking at channels", self.samples):
            for name, array in seen.values.items():
                axis = axes[name] % max(1, array.ndim)
                if array.ndim and array.size:
                    sums.setdefault(name, _Sums(array.shape[axis])).add(array, axis)
        return {name: found.statistics() for name, found in sums.items()}


class _Sums:
    def __init__(self, channels: int) -> None:
        self.low, self.high = np.full(channels, math.inf), np.full(channels, -math.inf)
        self.squares, self.count = np.zeros(channels), 0

    def add(self, array: Array, axis: int) -> None:
        rows = array.reshape(math.prod(array.shape[:axis]), array.shape[axis], -1)
        self.low = np.minimum(self.low, rows.min(axis=(0, 2)))
        self.high = np.maximum(self.high, rows.max(axis=(0, 2)))
        with np.errstate(all="ignore"):  # what is not finite shows in the sums
            self.squares += np.einsum("nci,nci->c", rows, rows, dtype=np.float64, casting="unsafe")
        self.count += rows.shape[0] * rows.shape[2]

    def statistics(self) -> ChannelStatistics:
        return ChannelStatistics(self.low, self.high, self.squares / max(1, self.count))
