"""Criteria that look at what channels say on calibration data, where layers read them.

activation  mean magnitude |x| (Molchanov et al., Pruning Convolutional Neural Networks, 2017)
apoz        share of the values that are not zero behind the activation function: one less the average percentage of
            zeros (Hu et al., Network Trimming, 2016)
wanda       |W| |x|: magnitudes of the weights that read a channel times its root mean square (Sun et al., A Simple and
            Effective Pruning Approach for Large Language Models, 2023), summed over a layer and averaged over all that
            read it
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analyses import CONSTANTS, LINEAR_LAYERS, LinearInput, MomentsAnalysis
from graphopt.analyses.channels import ChannelGroup, Place
from graphopt.analyses.real_weights import real_weight
from graphopt.analyses.unit_uses import unit_uses
from graphopt.criterion_base import Criterion, activity, axis_sums, per_unit
from graphopt.pass_base import Context
from graphopt_passes.prune.criteria.weights import balanced

__all__ = ["Activation", "AveragePercentageOfZeros", "Wanda"]


class Activation(Criterion):
    """Mean magnitude of what a channel says where it is read."""

    name: ClassVar[str] = "activation"
    needs_data: ClassVar[bool] = True

    def scores(self, model: ir.Model, groups: Sequence[ChannelGroup], ctx: Context) -> list[np.ndarray | None]:
        """Judge by magnitudes."""
        return [
            _finite(balanced([one.magnitude for one in seen if one.count], group)) if seen else None
            for group, seen in zip(groups, activity(groups, ctx), strict=True)
        ]


class AveragePercentageOfZeros(Criterion):
    """How often a channel is not zero where it is read; channels that never are zero are judged by l2."""

    name: ClassVar[str] = "apoz"
    needs_data: ClassVar[bool] = True

    def scores(self, model: ir.Model, groups: Sequence[ChannelGroup], ctx: Context) -> list[np.ndarray | None]:
        """Judge by zeros, in the activations that have some."""
        found = [[1 - one.share_of_zeros for one in seen if one.zeros.any()] for seen in activity(groups, ctx)]
        return [balanced(shares, group) if shares else None for group, shares in zip(groups, found, strict=True)]


class Wanda(Criterion):
    """Magnitudes of the weights that read a channel times how loud it is."""

    name: ClassVar[str] = "wanda"
    needs_data: ClassVar[bool] = True

    def scores(self, model: ir.Model, groups: Sequence[ChannelGroup], ctx: Context) -> list[np.ndarray | None]:
        """Judge by products, with the channels' root mean square over all positions."""
        uses = [[use for use in unit_uses(group, ctx) if use.layer is not None] for group in groups]
        layers = dict.fromkeys(use.layer for found in uses for use in found if use.layer is not None)
        if not layers:
            return [None] * len(groups)
        moments = ctx.fact(MomentsAnalysis(layers=tuple(layers), pairs=False, windows=False))
        linear = ctx.fact(LINEAR_LAYERS)
        scores: list[np.ndarray | None] = []
        for group, found in zip(groups, uses, strict=True):
            shares: list[np.ndarray] = []
            for use in found:
                seen = moments.of(use.layer)
                if seen is not None and seen.finite and use.weight is not None and use.layer is not None:
                    products = loudness(use.weight, linear.reads[use.layer], seen.norms, ctx)
                    shares += [] if products is None else [products]
            scores.append(balanced(shares, group) if shares else None)
        return scores


def loudness(place: Place, layer: LinearInput, norms: np.ndarray, ctx: Context) -> np.ndarray | None:
    """`[units]` sum of |W| |x| over the weights of one layer that read each unit.

    Args:
        place: Where the units sit on the weight, among its inputs.
        layer: What the layer reads.
        norms: `[groups, channels]` root mean square of each channel.
        ctx: Holds the constants.

    Returns:
        None where the weight has another layout than the channels.
    """
    if place.size == norms.size:
        return per_unit(axis_sums(place, ctx) * norms.reshape(-1), place)
    weight = real_weight(place.value, ctx.fact(CONSTANTS))
    if place.axis != 1 or place.size != layer.channels or weight.shape[0] % layer.groups:
        return None
    rows = np.abs(weight.astype(np.float64)).reshape(layer.groups, -1, place.size, math.prod(weight.shape[2:]))
    return per_unit((rows.sum(axis=(1, 3)) * norms).sum(axis=0), place)


def _finite(scores: np.ndarray) -> np.ndarray | None:
    return scores if np.isfinite(scores).all() else None
