"""What a model costs as a function of how many units each group gives up, without touching the model.

The cost is a sum of terms, each a product of lengths of axes: a layer's multiply-accumulates, a weight's elements. An
axis shrinks by a fixed number of positions for every unit of a group on it, so the sum is exact for any plan, and so is
the change when single groups give up more or less.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from graphopt.analyses import Constants, Cost
from graphopt.analyses.channels import ChannelGroup

__all__ = ["Budget", "Facts", "Measure", "ladder", "step_of", "unit_width"]

AxisName = tuple[str, int]
Measure = Literal["macs", "params", "bytes"]
Numbers = Sequence[int] | np.ndarray[Any, np.dtype[Any]]

_LEAST_KEPT = 1 / 8
_SMALL_LAYER_STEPS = 4


@dataclass(frozen=True)
class Facts:
    """What is known about a model."""

    cost: Cost
    constants: Constants


class Budget:
    """Cost of the whole model by units removed.

    Args:
        facts: What is known about it.
        groups: The groups that may lose units.
        of: What is counted.

    Attributes:
        whole: Cost of the model as it is.
        fixed: The part of it that no group can change.
    """

    def __init__(self, facts: Facts, groups: Sequence[ChannelGroup], of: Measure) -> None:
        places = [(i, place) for i, group in enumerate(groups) for place in group.places]
        movable = {(place.value, place.axis) for _, place in places}
        terms = list(_mac_terms(facts.cost) if of == "macs" else _weight_terms(facts.constants, of))
        counted = [(amount, [axis for axis in axes if axis in movable]) for amount, axes in terms]
        self.fixed = math.fsum(amount for amount, axes in counted if not axes)
        counted = [(amount, axes) for amount, axes in counted if axes]
        self.whole = self.fixed + math.fsum(amount for amount, _ in counted)
        index = {axis: i for i, axis in enumerate(dict.fromkeys(axis for _, axes in counted for axis in axes))}
        held = [(index[key], i, p) for i, p in places if (key := (p.value, p.axis)) in index]
        self._amounts = np.array([amount for amount, _ in counted])
        self._factors = np.array([index[axis] for _, axes in counted for axis in axes], dtype=np.int64)
        self._starts = _starts([len(axes) for _, axes in counted])
        sizes = {axis: place.size for axis, _, place in held}
        self._sizes = np.array([sizes[axis] for axis in range(len(index))], dtype=np.float64)
        self._share_axis = np.array([axis for axis, _, _ in held], dtype=np.int64)
        self._share_group = np.array([group for _, group, _ in held], dtype=np.int64)
        self._share_copies = np.array([place.positions.shape[1] for _, _, place in held], dtype=np.float64)
        self._touches = self._incidence(counted, index, len(groups))

    def _incidence(
        self, terms: Sequence[tuple[float, Sequence[AxisName]]], index: dict[AxisName, int], groups: int
    ) -> tuple[np.ndarray[Any, Any], ...]:
        """Which factor of which term each group changes, by how much a unit, sorted by group and term."""
        on_axis: list[list[tuple[int, float]]] = [[] for _ in index]
        for axis, group, copies in zip(self._share_axis, self._share_group, self._share_copies, strict=True):
            on_axis[axis].append((int(group), float(copies)))
        found = sorted(
            (group, term, index[axis], copies)
            for term, (_, axes) in enumerate(terms)
            for axis in axes
            for group, copies in on_axis[index[axis]]
        )
        pairs = [(group, term) for group, term, _, _ in found]
        first = [i for i, pair in enumerate(pairs) if i == 0 or pair != pairs[i - 1]]
        owner = np.array([pairs[i][0] for i in first], dtype=np.int64)
        term = np.array([pairs[i][1] for i in first], dtype=np.int64)
        group_of, axis = (np.array([row[k] for row in found], dtype=np.int64) for k in (0, 2))
        share = np.array([row[3] for row in found]) / self._sizes[axis]
        self._groups = groups
        return group_of, axis, share, np.array(first, dtype=np.int64), owner, term

    def _kept(self, removed: Numbers) -> np.ndarray[Any, Any]:
        lost = self._share_copies * np.asarray(removed, dtype=np.float64)[self._share_group]
        return 1.0 - np.bincount(self._share_axis, lost, len(self._sizes)) / self._sizes

    def _terms(self, kept: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if not len(self._amounts):
            return self._amounts
        return self._amounts * np.multiply.reduceat(kept[self._factors], self._starts)

    def after(self, removed: Numbers) -> float:
        """Cost once group i has lost `removed[i]` units."""
        return self.fixed + float(self._terms(self._kept(removed)).sum())

    def changes(self, removed: Numbers, more: Numbers) -> np.ndarray[Any, Any]:
        """What each group alone changes the cost by.

        Args:
            removed: `[groups]` units lost already.
            more: `[groups]` units that each group loses on top; negative: gets back.

        Returns:
            `[groups]` float64: cost with that one group changed, less the cost as it is.
        """
        group_of, axis, share, first, owner, term = self._touches
        if not len(first):
            return np.zeros(self._groups)
        kept = self._kept(removed)
        ratio = 1.0 - share * np.asarray(more, dtype=np.float64)[group_of] / kept[axis]
        factor = np.multiply.reduceat(ratio, first)
        return np.bincount(owner, self._terms(kept)[term] * (factor - 1.0), self._groups)


def _starts(lengths: Sequence[int]) -> np.ndarray[Any, Any]:
    return np.cumsum([0, *lengths[:-1]], dtype=np.int64) if lengths else np.zeros(0, dtype=np.int64)


def _mac_terms(cost: Cost) -> Iterator[tuple[float, list[AxisName]]]:
    for node in cost.nodes.values():
        for term in node.terms:
            yield float(term.amount), list(term.axes)


def _weight_terms(constants: Constants, of: Measure) -> Iterator[tuple[float, list[AxisName]]]:
    for name, tensor in constants.tensors.items():
        amount = tensor.size if of == "params" else tensor.nbytes
        yield float(amount), [(name, axis) for axis in range(len(tensor.shape))]


def unit_width(group: ChannelGroup) -> int:
    """Channels that one unit is in every layer that makes it: 64 for a head of 64."""
    widths = [place.positions.shape[1] for place in group.places if place.constant and place.role == "output"]
    return math.gcd(*widths) if widths else 1


def step_of(units: int, round_to: int, target_round_to: int, width: int = 1) -> int:
    """Units that leave at a time.

    Args:
        units: How many there are.
        round_to: Channels that were asked for; 0: what the target likes.
        target_round_to: Channels that the target likes; halved until a small layer has four steps.
        width: Channels of a unit; wide units need less rounding, or none.
    """
    if round_to:
        return round_to // math.gcd(round_to, width)
    step = max(1, target_round_to) // math.gcd(max(1, target_round_to), width)
    while step > 1 and step * _SMALL_LAYER_STEPS > units:
        step //= 2
    return step


def ladder(units: int, step: int, least: int = 1) -> list[int]:
    """All numbers of units that a group may lose, ascending from 0: multiples of `step` remain, an eighth at least."""
    least = max(least, math.ceil(units * _LEAST_KEPT))
    return [0, *(units - kept for kept in range((units - 1) // step * step, 0, -step) if kept >= least)]
