from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.allocation import Site, allocate
from graphopt.errors import UsageError

numbers = st.integers(0, 40)


@st.composite
def tables(draw: st.DrawFn) -> list[Site]:
    sites: list[Site] = []
    for i in range(draw(st.integers(1, 5))):
        options = draw(st.lists(st.tuples(numbers, numbers), min_size=0, max_size=4))
        saving, cost = zip((0, 0), *options, strict=True)
        sites.append(Site(f"s{i}", np.array(saving, dtype=float), np.array(cost, dtype=float)))
    return sites


def brute_force(sites: list[Site], target: float) -> float | None:
    costs = [
        sum(float(site.cost[i]) for site, i in zip(sites, choice, strict=True))
        for choice in itertools.product(*(range(len(site.saving)) for site in sites))
        if sum(float(site.saving[i]) for site, i in zip(sites, choice, strict=True)) >= target
    ]
    return min(costs, default=None)


@settings(max_examples=300, deadline=None)
@given(tables(), st.integers(0, 150))
def test_the_choice_is_as_cheap_as_the_best_that_brute_force_finds(sites: list[Site], target: int) -> None:
    found, best = allocate(sites, target), brute_force(sites, target)
    assert found.reached == (best is not None)
    if best is None:
        assert found.saving == sum(site.saving.max() for site in sites)
    else:
        assert found.optimal
        assert found.saving >= target
        assert found.cost == pytest.approx(best)


def test_leaving_everything_alone_is_chosen_when_nothing_must_be_saved() -> None:
    site = Site("a", np.array([0.0, 5.0]), np.array([0.0, 1.0]))
    assert allocate([site, site], 0).choice == (0, 0)


def test_no_sites_reach_nothing() -> None:
    assert allocate([], 0).reached
    assert not allocate([], 1).reached


def test_many_sites_come_within_a_hundredth_of_the_lagrangian_bound() -> None:
    rng = np.random.default_rng(3)
    sites = []
    for i in range(60):
        saving = np.arange(32) * rng.uniform(1, 9)
        sites.append(Site(f"s{i}", saving, np.concatenate([[0.0], np.cumsum(np.sort(rng.exponential(size=31)))])))
    target = 0.4 * sum(site.saving.max() for site in sites)
    found = allocate(sites, target)
    prices = np.linspace(0, 2, 2001)
    bound = max(
        price * target + sum(float((site.cost - price * site.saving).min()) for site in sites) for price in prices
    )
    assert found.reached
    assert bound <= found.cost <= 1.01 * bound


def test_the_same_tables_give_the_same_choice() -> None:
    rng = np.random.default_rng(5)
    sites = [Site(f"s{i}", np.array([0.0, *rng.random(9)]), np.array([0.0, *rng.random(9)])) for i in range(30)]
    assert allocate(sites, 9.0) == allocate(sites, 9.0)


@pytest.mark.parametrize(
    ("saving", "cost", "message"),
    [
        ([1.0, 2.0], [0.0, 1.0], "lacks the option to leave it alone"),
        ([0.0, np.nan], [0.0, 1.0], "must be finite"),
        ([0.0, 1.0], [0.0], "not one list each"),
        ([], [], "not one list each"),
    ],
)
def test_a_bad_table_is_named(saving: list[float], cost: list[float], message: str) -> None:
    with pytest.raises(UsageError, match=f"site 'here': .*{message}"):
        allocate([Site("here", np.array(saving), np.array(cost))], 1.0)
