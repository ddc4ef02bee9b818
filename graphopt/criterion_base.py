"""The contract between pruning and a criterion, which says how much each unit of a channel group is worth.

A criterion is a class with a name and one method. What it wants to know of units it asks for by place:

    weights_of(group, "output")     constants that make the units; "input": that read them; "scale": that scale them
    weight_parts(place, ctx)        their slices, `[units, elements]`, in parts that fit into memory
    weight_sums(place, ctx)         or only the sum of a function of the elements of each unit
    activity(groups, ctx)           what units say on the calibration data where they are read
    ctx.fact(MOMENTS)               second moments of what linear layers read

Plugins bring criteria through the hook `graphopt_criteria`; they are spelled like the built-in ones.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analyses.activity import ActivityAnalysis, AxisActivity
from graphopt.analyses.channels import ChannelGroup, Place
from graphopt.analyses.constants import CONSTANTS
from graphopt.analyses.real_weights import real_weight
from graphopt.analyses.unit_uses import unit_uses
from graphopt.errors import PassError
from graphopt.pass_base import Context

__all__ = [
    "RESERVED", "Array", "Criterion", "activity", "axis_sums", "judge", "per_unit", "weight_parts", "weight_sums",
    "weights_of",
]  # fmt: skip

Array = np.ndarray[Any, np.dtype[Any]]

RESERVED = frozenset({"auto", "taylor"})
"""Names that no criterion may have."""

_PART_BYTES = 32 << 20


class Criterion(abc.ABC):
    """Base of all criteria; stateless, one instance serves every call.

    Attributes:
        name: Spelling in `prune{criterion=...}`: lower case, dashed.
        needs_data: It looks at calibration data, so that asking for it without is an error.
        comparable: Scores are shares of what layers compute, so that units of different groups compare: pruning takes
            them wherever they cost least. False: only units of one group compare; each group is brought to a mean of 1.
    """

    name: ClassVar[str]
    needs_data: ClassVar[bool] = False
    comparable: ClassVar[bool] = False

    @abc.abstractmethod
    def scores(self, model: ir.Model, groups: Sequence[ChannelGroup], ctx: Context) -> Sequence[Array | None]:
        """Say what the units of each group are worth.

        Args:
            model: The model; it must not change.
            groups: Groups that can lose units.
            ctx: Facts, calibration data and random numbers.

        Returns:
            For each group `[units]`, finite and not negative, larger for units to keep; units leave in ascending
            order. None where there is nothing to go by: then the norms of the weights decide.
        """


def judge(criterion: Criterion, model: ir.Model, groups: Sequence[ChannelGroup], ctx: Context) -> list[Array | None]:
    """Ask a criterion, check what it says and bring it to scale.

    Returns:
        For each group float64 `[units]`: of mean 1, or as they are where the criterion's scores are comparable.

    Raises:
        PassError: The criterion breaks its contract.
    """
    found = criterion.scores(model, groups, ctx)
    if len(found) != len(groups):
        raise PassError(f"criterion {criterion.name}", f"returns {len(found)} scores for {len(groups)} groups")
    return [_checked(criterion, group, scores) for group, scores in zip(groups, found, strict=True)]


def _checked(criterion: Criterion, group: ChannelGroup, scores: Array | None) -> Array | None:
    if scores is None:
        return None
    array: Array = np.asarray(scores, dtype=np.float64)
    subject = f"criterion {criterion.name}"
    if array.shape != (group.units,):
        raise PassError(subject, f"gives {group.units} units of {group.name!r} scores of shape {array.shape}")
    if not np.isfinite(array).all() or (array < 0).any():
        raise PassError(subject, f"gives units of {group.name!r} scores that are negative or not finite")
    if criterion.comparable:
        return array
    mean = float(array.mean())
    return array / mean if mean > 0 else np.ones(group.units)


def weights_of(group: ChannelGroup, role: str) -> list[Place]:
    """Where the units sit on constants of one role: `output`, `input`, `scale`, `variance` or `other`."""
    return [place for place in group.places if place.constant and place.role == role]


def weight_parts(place: Place, ctx: Context) -> Iterator[Array]:
    """Read the slices of units from a constant, part by part; quantized ones as the real numbers they stand for.

    Yields:
        float64 `[units, elements]`, all copies of a unit in its row; every element comes once.
    """
    for slab in _slabs(place, ctx):
        rows = np.moveaxis(slab, place.axis, 0).reshape(place.size, -1)
        yield rows[place.positions].reshape(len(place.positions), -1).astype(np.float64)


def weight_sums(place: Place, ctx: Context, function: Callable[[Array], Array] = np.abs) -> Array:
    """`[units]` sum of a function of the elements of each unit."""
    return per_unit(axis_sums(place, ctx, function), place)


def axis_sums(place: Place, ctx: Context, function: Callable[[Array], Array] = np.abs) -> Array:
    """`[size]` sum of a function of the elements at each index of the axis, float64."""
    sums: Array = np.zeros(place.size)
    for slab in _slabs(place, ctx):
        others = tuple(axis for axis in range(slab.ndim) if axis != place.axis)
        sums += function(slab.astype(np.float64)).sum(axis=others)
    return sums


def per_unit(values: Array, place: Place) -> Array:
    """`[units]`: sum of the values `[size]` at the copies of each unit."""
    return values[place.positions].sum(axis=1)


def activity(groups: Sequence[ChannelGroup], ctx: Context, samples: int = 256) -> list[list[AxisActivity]]:
    """Look at the units of groups on the calibration data, where they are read.

    Args:
        groups: The groups; the data is run once for all of them.
        ctx: Holds the data.
        samples: How many samples to use at most.

    Returns:
        For each group one entry per activation of the main graph that is read, its arrays `[units]`; empty where
        units are read inside subgraphs only.

    Raises:
        DataError: There is no calibration data.
        ModelError: ONNX Runtime cannot run the model.
    """
    places = [_read_places(group, ctx) for group in groups]
    axes = {(place.value, place.axis): place.size for found in places for place in found}
    seen = ctx.fact(ActivityAnalysis(tuple(axes.items()), samples))
    return [[_of_units(seen[place.value, place.axis], place) for place in found] for found in places]


def _read_places(group: ChannelGroup, ctx: Context) -> list[Place]:
    """Activations of the main graph at which the units of a group are read, each once."""
    inside = {output for node in ctx.model.graph for output in node.outputs}
    uses = (use for use in unit_uses(group, ctx) if use.value in inside)
    return list({(use.place.value, use.place.axis): use.place for use in uses}.values())


def _of_units(seen: AxisActivity, place: Place) -> AxisActivity:
    arrays = (per_unit(array, place) for array in (seen.sums, seen.sizes, seen.squares, seen.zeros))
    return AxisActivity(seen.count * place.positions.shape[1], *arrays)


def _slabs(place: Place, ctx: Context) -> Iterator[Array]:
    """A constant in parts that have the axis of its units whole."""
    array = real_weight(place.value, ctx.fact(CONSTANTS))
    others = [axis for axis in range(array.ndim) if axis != place.axis]
    if not others:
        yield array
        return
    along = max(others, key=lambda axis: array.shape[axis])
    length = array.shape[along]
    step = max(1, _PART_BYTES * length // max(1, 8 * array.size))
    for start in range(0, length, step):
        yield array[(*(slice(None),) * along, slice(start, start + step))]
