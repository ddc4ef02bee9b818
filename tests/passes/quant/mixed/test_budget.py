"""Choosing from a table, against brute force."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt_passes.quant.mixed.budget import within_noise, within_size
from graphopt_passes.quant.mixed.table import Option, Table, Unit
from graphopt_passes.quant.sites import Site, Weight

rows = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 40)), max_size=3)


def table(drawn: list[list[tuple[int, int]]], *, outputs: bool = True) -> Table:
    units: list[Unit] = []
    for i, options in enumerate(drawn):
        site = Site(f"s{i}", f"s{i}", "MatMul", (Weight(1, "w", 1, (4, 4)),))
        found = [Option(f"o{j}", saved, noise, noise if outputs else None) for j, (saved, noise) in enumerate(options)]
        units.append(Unit((site,), tuple(found)))
    return Table(tuple(units), outputs)


def every_choice(drawn: list[list[tuple[int, int]]]) -> list[tuple[int, int]]:
    """(saved, noise) of all choices."""
    every = itertools.product(*([(0, 0), *options] for options in drawn))
    return [(sum(o[0] for o in choice), sum(o[1] for o in choice)) for choice in every]


@settings(max_examples=100, deadline=None)
@given(st.lists(rows, min_size=1, max_size=4), st.integers(0, 100))
def test_within_a_size_there_is_no_less_noise(drawn: list[list[tuple[int, int]]], saved: int) -> None:
    found = within_size(table(drawn), saved)
    noises = [noise for s, noise in every_choice(drawn) if s >= saved]
    assert found.reached == bool(noises)
    if noises:
        assert found.cost == min(noises)
    else:
        assert found.saved == max(s for s, _ in every_choice(drawn))


@settings(max_examples=100, deadline=None)
@given(st.lists(rows, min_size=1, max_size=4), st.integers(0, 100))
def test_within_a_noise_nothing_saves_more(drawn: list[list[tuple[int, int]]], limit: int) -> None:
    found = within_noise(table(drawn), limit)
    assert found.cost <= limit
    assert found.saved == max(saved for saved, noise in every_choice(drawn) if noise <= limit)


@pytest.mark.parametrize("outputs", [True, False])
def test_options_are_given_by_unit_and_none_stands_for_float(*, outputs: bool) -> None:
    found = within_size(table([[(10, 1)], [(10, 5)], []], outputs=outputs), 10)
    assert [option and option.label for option in found.options] == ["o0", None, None]
    assert (found.saved, found.cost) == (10, 1)
