from __future__ import annotations

import numpy as np
import pytest

from graphopt_passes.lowrank._factors import Problem
from graphopt_passes.lowrank.ranks import Rounding, Setting, Table, by_budget, by_ratio, costs_of, table_of, trials
from graphopt_passes.lowrank.schemes import Geometry


def table(*errors: float, whole: int = 100) -> Table:
    """Settings that save 10, 20, ... of `whole`."""
    settings = [Setting("product", (20 - i,), 10 * (i + 1), error) for i, error in enumerate(errors)]
    return Table(whole, tuple(settings))


def test_ranks_below_one_that_loses_too_much_are_not_looked_at() -> None:
    rng = np.random.default_rng(3)
    problem, geometry = Problem(rng.standard_normal((48, 40))), Geometry(48, 40)
    every = table_of(geometry, problem, "params", Rounding(1, 1), ("product",))
    some = table_of(geometry, problem, "params", Rounding(1, 1), ("product",), most_error=0.4)
    assert some.within(0.4) == every.within(0.4)
    assert len(some.settings) == len(some.within(0.4).settings) + 1
    assert len(some.settings) < len(every.settings)


def test_two_settings_of_a_layer_are_tried_one_far_below_the_ratio() -> None:
    errors = [0.01 * 2**i for i in range(9)]
    assert [setting.saved for setting in trials(table(*errors), 0.2)] == [20, 60]
    assert [setting.saved for setting in trials(table(*errors[:3]), 0.2)] == [20]
    assert [setting.saved for setting in trials(table(*errors[:3]), 0.5)] == [30]  # the most that there is
    assert trials(table(), 0.5) == []


def test_costs_are_what_was_measured_and_in_proportion_elsewhere() -> None:
    one = table(0.01, 0.02, 0.03, 0.04, 0.08)
    first, _, _, last, _ = one.settings
    costs = costs_of(one, [(last, 0.4), (first, 0.05)])  # 5 and 10 per error
    assert costs == pytest.approx([0.05, 0.02 * (5 + 5 / 3), 0.03 * (5 + 10 / 3), 0.4, 0.8])
    assert costs_of(one, []).tolist() == [0.01, 0.02, 0.03, 0.04, 0.08]


def test_more_error_never_costs_less() -> None:
    one = table(0.01, 0.02, 0.03, 0.04)
    costs = costs_of(one, [(one.settings[0], 0.1), (one.settings[-1], 0.01)])
    assert (np.diff(costs) >= 0).all()
    assert costs[0] == pytest.approx(0.1)


def test_a_budget_is_taken_where_outputs_lose_least() -> None:
    tables = [table(0.1, 0.2, 0.3, 0.4), table(0.1, 0.2, 0.3, 0.4)]
    costs = [costs_of(one, [(one.settings[1], lost)]) for one, lost in zip(tables, (0.01, 0.5), strict=True)]
    chosen = by_budget(tables, 40, costs)
    assert [setting.saved if setting else 0 for setting in chosen] == [40, 0]


def test_a_layer_that_breaks_down_gives_less() -> None:
    tables = [table(0.1, 0.2, 0.3, 0.4), table(0.1, 0.2, 0.3, 0.4)]
    steady, breaking = (
        costs_of(one, [(one.settings[1], 0.02), (one.settings[3], lost)])
        for one, lost in zip(tables, (0.04, 4.0), strict=True)
    )
    chosen = by_budget(tables, 60, [steady, breaking])
    assert [setting.saved if setting else 0 for setting in chosen] == [40, 20]


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6])
def test_a_ratio_is_met_by_every_layer_at_the_least_error(ratio: float) -> None:
    rng = np.random.default_rng(0)
    geometry = Geometry(48, 40)
    found = table_of(geometry, Problem(rng.standard_normal((48, 40))), "params", Rounding(1, 1), ("product",))
    (setting,) = by_ratio([found], ratio)
    assert setting is not None
    rank = setting.ranks[0]
    assert rank * 88 <= (1 - ratio) * 48 * 40 < (rank + 1) * 88
    assert setting.error == min(each.error for each in found.settings if each.saved >= ratio * 48 * 40)
