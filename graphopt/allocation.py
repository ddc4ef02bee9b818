"""One budget for all techniques: pick one setting per site so that the cost is least and enough is saved.

A site is a table of options, each with what it saves (bytes, multiply-accumulates, time) and what it costs (error).
"Leave alone" is always among them. The problem is the multiple-choice knapsack (Sinha and Zoltners, 1979).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.errors import UsageError

__all__ = ["Allocation", "Site", "allocate"]

_STEPS = 10_000
_BISECTIONS = 200
Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class Site:
    """The options of one site.

    Attributes:
        name: What errors call it.
        saving: `[options]`, in the unit of the budget.
        cost: `[options]`, in one unit for all sites.
    """

    name: str
    saving: Floats
    cost: Floats


@dataclass(frozen=True)
class Allocation:
    """One option per site.

    Attributes:
        choice: Index of the chosen option of each site.
        saving: Saved in all.
        cost: Cost in all.
        reached: The saving that was asked for is reached; False: no choice reaches it, and the largest is given.
        optimal: No cheaper choice exists; False: the search was cut off, and this is the best it saw.
    """

    choice: tuple[int, ...]
    saving: float
    cost: float
    reached: bool
    optimal: bool


def allocate(sites: Sequence[Site], target: float) -> Allocation:
    """Choose one option per site: least total cost with a total saving of at least `target`.

    The Lagrangian relaxation gives a bound and a first choice; branch and bound closes the gap, up to a fixed number
    of steps. The result depends on the tables alone.

    Args:
        sites: The tables.
        target: Saving to reach; 0 or less is reached by leaving everything alone, unless an option costs less.

    Raises:
        UsageError: A table is empty, ragged or not finite, or lacks an option that saves 0 at no cost.
    """
    for site in sites:
        _check(site)
    most = tuple(_cheapest_of_largest(site) for site in sites)
    if sum(float(site.saving.max()) for site in sites) < target:
        return _report(sites, most, reached=False, optimal=True)
    price = _price(sites, target)
    first = _repaired(sites, _at_price(sites, price, generous=True), target)
    choice, optimal = _branch_and_bound(sites, target, price, first)
    return _report(sites, choice, reached=True, optimal=optimal)


def _check(site: Site) -> None:
    saving, cost = site.saving, site.cost
    if saving.ndim != 1 or saving.shape != cost.shape or not len(saving):
        raise UsageError(f"site {site.name!r}", f"saving {saving.shape} and cost {cost.shape} are not one list each")
    if not (np.isfinite(saving).all() and np.isfinite(cost).all()):
        raise UsageError(f"site {site.name!r}", "saving and cost must be finite")
    if not ((saving == 0) & (cost == 0)).any():
        raise UsageError(f"site {site.name!r}", "lacks the option to leave it alone", "add saving 0 at cost 0")


def _report(sites: Sequence[Site], choice: tuple[int, ...], *, reached: bool, optimal: bool) -> Allocation:
    saving = sum(float(site.saving[i]) for site, i in zip(sites, choice, strict=True))
    cost = sum(float(site.cost[i]) for site, i in zip(sites, choice, strict=True))
    return Allocation(choice, saving, cost, reached, optimal)


def _cheapest_of_largest(site: Site) -> int:
    return int(np.lexsort((site.cost, -site.saving))[0])


def _at_price(sites: Sequence[Site], price: float, *, generous: bool) -> tuple[int, ...]:
    """The best option of each site when a unit of saving is worth `price`; ties go to the larger saving if generous."""
    sign = -1.0 if generous else 1.0
    return tuple(int(np.lexsort((sign * site.saving, site.cost - price * site.saving))[0]) for site in sites)


def _total(sites: Sequence[Site], choice: Sequence[int]) -> float:
    return sum(float(site.saving[i]) for site, i in zip(sites, choice, strict=True))


def _price(sites: Sequence[Site], target: float) -> float:
    """The lowest price of a unit of saving at which the target is reached: the Lagrange multiplier."""
    if _total(sites, _at_price(sites, 0.0, generous=True)) >= target:
        return 0.0
    low, high = 0.0, 1.0
    while _total(sites, _at_price(sites, high, generous=True)) < target and high < 1e300:
        low, high = high, 2 * high
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        reached = _total(sites, _at_price(sites, middle, generous=True)) >= target
        low, high = (low, middle) if reached else (middle, high)
    return high


def _repaired(sites: Sequence[Site], choice: tuple[int, ...], target: float) -> tuple[int, ...]:
    """Reach the target if rounding left it open, then give back what is not needed, dearest first."""
    if _total(sites, choice) < target:
        choice = tuple(_cheapest_of_largest(site) for site in sites)
    while True:
        spare = _total(sites, choice) - target
        best: tuple[float, int, int] | None = None
        for i, (site, chosen) in enumerate(zip(sites, choice, strict=True)):
            for other in np.flatnonzero(site.saving[chosen] - site.saving <= spare):
                gain = float(site.cost[chosen] - site.cost[other])
                if gain > 0 and (best is None or gain > best[0]):
                    best = gain, i, int(other)
        if best is None:
            return choice
        changed = (*choice[: best[1]], best[2], *choice[best[1] + 1 :])
        if _total(sites, changed) < target:  # rounding of the sum
            return choice
        choice = changed


def _branch_and_bound(
    sites: Sequence[Site], target: float, price: float, first: tuple[int, ...]
) -> tuple[tuple[int, ...], bool]:
    """Depth-first search, best options first, cut by the Lagrangian bound of what is left."""
    count = len(sites)
    reduced = [site.cost - price * site.saving for site in sites]
    orders = [np.argsort(values, kind="stable") for values in reduced]
    bound, reach = np.zeros(count + 1), np.zeros(count + 1)
    for i in reversed(range(count)):
        bound[i] = bound[i + 1] + reduced[i].min()
        reach[i] = reach[i + 1] + sites[i].saving.max()
    best, best_cost = first, sum(float(site.cost[i]) for site, i in zip(sites, first, strict=True))
    stack: list[tuple[tuple[int, ...], float, float]] = [((), 0.0, 0.0)]
    steps = 0
    while stack:
        steps += 1
        if steps > _STEPS:
            return best, False
        chosen, saving, cost = stack.pop()
        depth = len(chosen)
        if saving + reach[depth] < target or cost + bound[depth] + price * (target - saving) >= best_cost:
            continue
        if depth == count:
            if cost < best_cost and _total(sites, chosen) >= target:
                best, best_cost = chosen, cost
            continue
        for option in orders[depth][::-1]:
            step = float(sites[depth].saving[option]), float(sites[depth].cost[option])
            stack.append(((*chosen, int(option)), saving + step[0], cost + step[1]))
    return best, True
