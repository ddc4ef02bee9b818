"""Criteria that look at weights alone.

l1, l2      norm of the weights that make a channel (Li et al., Pruning Filters for Efficient ConvNets, 2017), behind a
            batch norm as it scales them, averaged over all layers that share the channel (the group norm of DepGraph,
            Fang et al., 2023), times that of the weights that read it
bn-scale    size of a normalization's scale (Liu et al., Network Slimming, 2017)
fpgm        distance from the other filters of the layer: one near their geometric median can be replaced by them (He et
            al., Filter Pruning via Geometric Median, 2019)
random      the control that a criterion has to beat
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analyses import CONSTANTS
from graphopt.analyses.channels import ChannelGroup, Place
from graphopt.analyses.moments import spread_out
from graphopt.criterion_base import Criterion, per_unit, weight_parts, weight_sums, weights_of
from graphopt.pass_base import Context

__all__ = ["L1", "L2", "BatchNormScale", "GeometricMedian", "Random", "balanced"]

_DISTANCES = 1 << 24
_LEAST_COMPARED = 256


class L1(Criterion):
    """Sum of the magnitudes of the weights that make a channel, times that of those that read it."""

    name: ClassVar[str] = "l1"
    power: ClassVar[int] = 1

    def scores(self, model: ir.Model, groups: Sequence[ChannelGroup], ctx: Context) -> list[np.ndarray]:
        """Judge by norms; of mean 1 in each group."""
        return [self._norm(group, ctx) for group in groups]

    def _norm(self, group: ChannelGroup, ctx: Context) -> np.ndarray:
        made = balanced([self._size(place, ctx) * _gain(place, ctx) for place in weights_of(group, "output")], group)
        read = balanced([self._size(place, ctx) for place in weights_of(group, "input")], group)
        return balanced([made * read], group)

    def _size(self, place: Place, ctx: Context) -> np.ndarray:
        return weight_sums(place, ctx, lambda part: np.abs(part) ** self.power) ** (1 / self.power)


class L2(L1):
    """Euclidean norm of the weights that make a channel, times that of those that read it."""

    name: ClassVar[str] = "l2"
    power: ClassVar[int] = 2


class BatchNormScale(Criterion):
    """Size of the scale that a normalization gives a channel; groups without one are judged by l2."""

    name: ClassVar[str] = "bn-scale"

    def scores(self, model: ir.Model, groups: Sequence[ChannelGroup], ctx: Context) -> list[np.ndarray | None]:
        """Judge by scales."""
        found = [[weight_sums(place, ctx) for place in weights_of(group, "scale")] for group in groups]
        return [balanced(scales, group) if scales else None for group, scales in zip(groups, found, strict=True)]


class GeometricMedian(Criterion):
    """Distance of a channel's filter from all others of its layer; the one nearest to their median goes first.

    Layers of more than 4,096 channels compare each with some of the others, evenly spread.
    """

    name: ClassVar[str] = "fpgm"

    def scores(self, model: ir.Model, groups: Sequence[ChannelGroup], ctx: Context) -> list[np.ndarray | None]:
        """Judge by distances."""
        found = [[_distances(place, ctx) for place in weights_of(group, "output")] for group in groups]
        return [balanced(sums, group) if sums else None for group, sums in zip(groups, found, strict=True)]


class Random(Criterion):
    """Random numbers: the control that a criterion has to beat."""

    name: ClassVar[str] = "random"

    def scores(self, model: ir.Model, groups: Sequence[ChannelGroup], ctx: Context) -> list[np.ndarray]:
        """Throw dice."""
        return [ctx.rng.random(group.units) for group in groups]


def balanced(found: Sequence[np.ndarray], group: ChannelGroup) -> np.ndarray:
    """Mean over layers, each brought to a mean of 1 first; all 1 where nothing is known."""
    means = [values / values.mean() for values in found if values.mean() > 0]
    return np.mean(means, axis=0) if means else np.ones(group.units)


def _distances(place: Place, ctx: Context) -> np.ndarray:
    """`[units]` sum of the distances to the other filters of a layer."""
    units = len(place.positions)
    others = spread_out(units, max(_LEAST_COMPARED, _DISTANCES // units))
    squares, products = np.zeros(units), np.zeros((units, len(others)))
    for part in weight_parts(place, ctx):
        squares += np.square(part).sum(axis=1)
        products += part @ part[others].T
    distances = squares[:, None] + squares[others] - 2 * products
    distances[others, np.arange(len(others))] = 0.0
    return np.sqrt(np.maximum(distances, 0.0)).sum(axis=1)


def _gain(place: Place, ctx: Context) -> np.ndarray | float:
    """What a batch norm that alone reads a convolution multiplies its channels by; `[units]`, or 1."""
    constants = ctx.fact(CONSTANTS)
    for norm in _following_norms(constants.names.value(place.value)):
        scale, variance = constants.of(norm.inputs[1]), constants.of(norm.inputs[4])
        if scale is not None and variance is not None and scale.size == place.size:
            spread = variance.numpy().astype(np.float64) + norm.attributes.get_float("epsilon", 1e-5)
            return per_unit(np.abs(scale.numpy().astype(np.float64)) / np.sqrt(spread), place)
    return 1.0


def _following_norms(weight: ir.Value | None) -> Iterator[ir.Node]:
    readers = [] if weight is None else list(weight.consumers())
    outputs = list(readers[0].outputs[0].consumers()) if len(readers) == 1 and readers[0].op_type == "Conv" else []
    if len(outputs) == 1 and outputs[0].op_type == "BatchNormalization":
        yield outputs[0]
