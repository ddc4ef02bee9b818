"""How many units each group loses, so that a budget is met."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from graphopt.analyses import CONSTANTS, LINEAR_LAYERS
from graphopt.analyses.channels import ChannelGroup
from graphopt.pass_base import Context
from graphopt_passes.prune.allocation.budget import Budget, Measure

__all__ = ["plan_global", "plan_uniform", "score_costs", "why_missed", "writers"]

Ladders = Sequence[Sequence[int]]
Floats = np.ndarray[Any, np.dtype[np.float64]]

_ROUNDS = 6
_CLOSE = 1e-4
_NEAR = 0.02
_PARTS = 129


def plan_uniform(budget: Budget, ladders: Ladders, units: Sequence[int], target: float) -> list[int]:
    """Take the same fraction from every group, then settle single steps so that `target` is hit.

    Args:
        budget: The cost model.
        ladders: What each group may lose, ascending from 0.
        units: How many units each group has.
        target: Cost to come down to.
    """
    rungs = [np.array(steps) for steps in ladders]

    def at(fraction: float) -> list[int]:
        return [int(steps[np.argmin(np.abs(steps - fraction * n))]) for steps, n in zip(rungs, units, strict=True)]

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if budget.after(at(middle)) > target else (low, middle)
    return _settled(budget, ladders, min((at(low), at(high)), key=lambda p: abs(budget.after(p) - target)), target)


def plan_global(budget: Budget, ladders: Ladders, costs: Sequence[Floats], target: float) -> list[int]:
    """Take units wherever they cost least for what they save, then settle single steps so that `target` is hit.

    A group goes down its ladder as long as a step costs less than its price: what the step saves times the price of a
    saving (the Lagrangian of the multiple-choice knapsack, on the convex hull of each table). What a unit saves depends
    on what is left of the layers around it, so the savings are taken anew at each plan until plan and savings agree.

    Args:
        budget: The cost model.
        ladders: What each group may lose, ascending from 0.
        costs: `[rungs]` what losing that many costs.
        target: Cost to come down to.
    """
    rungs = [np.array(steps) for steps in ladders]
    prices = [_rising(np.diff(cost), np.diff(steps)) for steps, cost in zip(rungs, costs, strict=True)]
    plan, ones = [0] * len(ladders), np.ones(len(ladders))
    savings = -budget.changes(plan, ones)
    for _ in range(_ROUNDS):
        plan = _at_common_price(budget, rungs, prices, savings, target)
        fresh = -budget.changes(plan, ones)
        if np.allclose(fresh, savings, rtol=1e-3):
            break
        savings = np.sqrt(savings * fresh)  # halfway, or two groups in one layer would take turns
    return _settled(budget, ladders, plan, target)


def score_costs(shared: Sequence[int], worth: Sequence[Floats], ladders: Ladders) -> list[Floats]:
    """What going down each ladder costs by scores alone, `[rungs]` a group: a shared channel is missed by all layers.

    Args:
        shared: How many layers share each group's units, see `writers`.
        worth: `[units]` scores of each.
        ladders: What each group may lose, ascending from 0.
    """
    sums = [np.concatenate([[0.0], np.cumsum(np.sort(scores))]) for scores in worth]
    return [count * total[np.array(steps)] for count, total, steps in zip(shared, sums, ladders, strict=True)]


def writers(groups: Sequence[ChannelGroup], ctx: Context) -> list[int]:
    """How many layers share the units of each group: all that make them, but for depthwise filters.

    Such a filter hands on each unit by itself. Were it counted, what is inside a block of a MobileNet would seem twice
    as dear as the narrow layers between the blocks.
    """
    names, linear = ctx.fact(CONSTANTS).names, ctx.fact(LINEAR_LAYERS)
    nodes = {label: node for node, label in names.labels.items()}

    def count(group: ChannelGroup) -> int:
        carried = {place.value for place in group.places if not place.constant}
        inputs = {place.value for place in group.places if place.constant and place.role == "input"}
        mixing = {label for value in inputs for label in linear.weights.get(value, ())}
        reads = {label: {names.key(v) for v in nodes[label].inputs if v is not None} for label in group.producers}
        return sum(label in mixing or not carried & read or bool(inputs & read) for label, read in reads.items())

    return [max(1, count(group)) for group in groups]


def why_missed(budget: Budget, ladders: Ladders, plan: Sequence[int], target: float, of: Measure) -> str | None:
    """Why a plan is more than 2 % of the whole away from its target, in a sentence; None where it is not.

    Args:
        budget: The cost model.
        ladders: What each group may lose, ascending from 0.
        plan: What each loses.
        target: What the model should cost.
        of: What is counted.
    """
    cost = budget.after(plan)
    if abs(cost - target) <= _NEAR * budget.whole:
        return None
    least = budget.after([steps[-1] for steps in ladders])
    if cost > target and least > target - _NEAR * budget.whole:
        held = budget.fixed / budget.whole
        return (
            f"at most {1 - least / budget.whole:.2f} of the {of} can be removed: layers that are pinned or skipped "
            f"hold {held:.0%}, and of every group an eighth stays"
        )
    most = max((b - a for steps in ladders for a, b in pairwise(steps)), default=0)
    near = f"{1 - cost / budget.whole:.2f} of the {of} is as close as rounding allows"
    return f"{near}: up to {most} units leave at a time"


def _rising(costs: Floats, units: np.ndarray[Any, Any]) -> Floats:
    """Cost of a unit at each step; steps that cost more than the next are taken together with it."""
    alone = np.asarray(costs / units, dtype=np.float64)
    if (np.diff(alone) >= 0).all():
        return alone
    blocks: list[tuple[float, float, int]] = []
    for cost, width in zip(costs.tolist(), units.tolist(), strict=True):
        block = cost, float(width), 1
        while blocks and blocks[-1][0] * block[1] > block[0] * blocks[-1][1]:
            last = blocks.pop()
            block = last[0] + block[0], last[1] + block[1], last[2] + block[2]
        blocks.append(block)
    return np.repeat([cost / width for cost, width, _ in blocks], [steps for _, _, steps in blocks])


def _at_common_price(
    budget: Budget,
    rungs: Sequence[np.ndarray[Any, Any]],
    prices: Sequence[Floats],
    savings: Floats,
    target: float,
) -> list[int]:
    """The plan nearest to the target among those in which all groups pay the same price for a saving."""
    paid = [each / max(float(saving), 1e-300) for each, saving in zip(prices, savings, strict=True)]

    def at(price: float) -> list[int]:
        return [int(steps[np.searchsorted(each, price, side="right")]) for steps, each in zip(rungs, paid, strict=True)]

    every = np.sort(np.concatenate([[-np.inf], *paid]))
    low, high = 0, len(every) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if budget.after(at(every[middle])) <= target else (middle + 1, high)
    less, more = at(every[max(0, low - 1)]), at(every[low])
    return min(_between(rungs, less, more), key=lambda plan: abs(budget.after(plan) - target))


def _between(rungs: Sequence[np.ndarray[Any, Any]], less: Sequence[int], more: Sequence[int]) -> Iterator[list[int]]:
    """Plans on the way from one to another: where a price is that of many steps, part of them are taken."""
    first, last = (
        np.array([np.searchsorted(steps, n) for steps, n in zip(rungs, plan, strict=True)]) for plan in (less, more)
    )
    for part in np.linspace(0.0, 1.0, _PARTS):
        between = np.rint(first + part * (last - first)).astype(np.int64).tolist()
        yield [int(steps[i]) for steps, i in zip(rungs, between, strict=True)]


def _settled(budget: Budget, ladders: Ladders, plan: Sequence[int], target: float) -> list[int]:
    """Move single groups by one rung each, and again while the target is far, as long as that comes closer to it."""
    found = _moved_beside(budget, ladders, plan, target)
    while found != plan and abs(budget.after(found) - target) > _NEAR * budget.whole:
        plan, found = found, _moved_beside(budget, ladders, found, target)
    return found


def _moved_beside(budget: Budget, ladders: Ladders, plan: Sequence[int], target: float) -> list[int]:
    """Move single groups to the rungs beside theirs, as long as that comes closer to the target."""
    now, cost = np.array(plan, dtype=np.int64), budget.after(plan)
    at = [steps.index(n) for steps, n in zip(ladders, plan, strict=True)]
    beside = [
        (steps[max(0, i - 1)], steps[i], steps[min(i + 1, len(steps) - 1)])
        for steps, i in zip(ladders, at, strict=True)
    ]
    near = np.array(beside, dtype=np.int64).reshape(-1, 3)
    while abs(cost - target) > _CLOSE * budget.whole:
        reached = np.stack([cost + budget.changes(now, near[:, side] - now) for side in range(3)])
        side, group = np.unravel_index(int(np.argmin(np.abs(reached - target))), reached.shape)
        if abs(reached[side, group] - target) >= abs(cost - target) * (1 - 1e-9):
            break
        now[group], cost = near[group, side], float(reached[side, group])
    return now.tolist()
