"""How much each unit of a group matters, from weights alone.

l1, l2      norm of the weights that make a channel (Li et al., Pruning Filters, 2017), behind a batch norm as it
            scales them, averaged over all layers that share the channel (group norm of DepGraph, Fang et al., 2023)
bn-scale    size of the batch norm's scale (Liu et al., Network Slimming, 2017); l2 where a group has none
random      the baseline that a criterion has to beat
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from graphopt.analyses import Constants
from graphopt.analyses.channels import ChannelGroup, Place

__all__ = ["Criterion", "scores"]

Criterion = Literal["l2", "l1", "bn-scale", "random", "taylor"]


def scores(
    model: ir.Model, constants: Constants, group: ChannelGroup, criterion: Criterion, rng: np.random.Generator
) -> np.ndarray:
    """What each unit is worth; the mean over a group is 1, so that groups can be compared.

    Args:
        model: The model.
        constants: Its constants.
        group: A group that can lose units.
        criterion: How to judge.
        rng: Used by `random` only.

    Returns:
        float64 `[units]`, not negative.
    """
    if criterion == "random":
        return rng.random(group.units) * 2
    scales = [_sizes(constants, place, 1) for place in group.places if place.constant and place.role == "scale"]
    if criterion == "bn-scale" and scales:
        return _balanced(scales, group.units)
    power = 1 if criterion == "l1" else 2
    read = [_sizes(constants, place, power) for place in group.places if place.constant and place.role == "input"]
    made = _balanced(list(_norms(model, constants, group, power)), group.units)
    return _balanced([made * _balanced(read, group.units)], group.units)


def _balanced(found: Sequence[np.ndarray], units: int) -> np.ndarray:
    """Mean over layers, each brought to a mean of 1 first; all 1 where nothing is known."""
    means = [values / values.mean() for values in found if values.mean() > 0]
    return np.mean(means, axis=0) if means else np.ones(units)


def _norms(model: ir.Model, constants: Constants, group: ChannelGroup, power: int) -> Iterator[np.ndarray]:
    """Norm of the weights that make each unit, one array per layer."""
    for place in group.places:
        if place.constant and place.role == "output":
            norms = _sizes(constants, place, power)
            norm = _following_norm(model.graph.initializers.get(place.value))
            if norm is not None:
                norms = norms * _per_unit(_gain(constants, norm), place)
            yield norms


def _sizes(constants: Constants, place: Place, power: int) -> np.ndarray:
    """`[units]`: norm of the slices of each unit, all copies together."""
    array = np.abs(constants.tensors[place.value].numpy().astype(np.float64)) ** power
    sums = array.sum(axis=tuple(axis for axis in range(array.ndim) if axis != place.axis))
    return _per_unit(sums, place) ** (1 / power)


def _per_unit(values: np.ndarray, place: Place) -> np.ndarray:
    return values[place.positions].sum(axis=1)


def _following_norm(weight: ir.Value | None) -> ir.Node | None:
    """The batch norm that alone reads the layer of a weight."""
    readers = [] if weight is None else list(weight.consumers())
    outputs = list(readers[0].outputs[0].consumers()) if len(readers) == 1 and readers[0].op_type == "Conv" else []
    return outputs[0] if len(outputs) == 1 and outputs[0].op_type == "BatchNormalization" else None


def _gain(constants: Constants, norm: ir.Node) -> np.ndarray:
    """What a batch norm multiplies each channel by."""
    scale, variance = constants.of(norm.inputs[1]), constants.of(norm.inputs[4])
    if scale is None or variance is None:
        return np.ones(1)
    epsilon = norm.attributes.get_float("epsilon", 1e-5)
    return np.abs(scale.numpy().astype(np.float64)) / np.sqrt(variance.numpy().astype(np.float64) + epsilon)
