from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest
from small_models import IMAGE, build, context

from graphopt.analyses import CHANNEL_GROUPS, COST, LayerMoments
from graphopt.calibration import Dataset
from graphopt.errors import OptionError
from graphopt.pass_base import Context
from graphopt.testing import check_pass
from graphopt_passes.prune import Prune
from graphopt_passes.prune.allocation.budget import ladder
from graphopt_passes.prune.allocation.search import Outcome, search
from graphopt_passes.prune.allocation.sensitivity import cost_curve, held_out, is_affordable, make_up, sensitivity

BODY = """
    [first] a = Conv<pads=[1,1,1,1]>(x, w1, b1) r = Relu(a)
    [branch] c = Conv(r, w2) s = Add(c, r)
    [depth] d = Conv<group=8>(s, w3) [mix] m = Conv(d, w4) n = Relu(m) p = GlobalAveragePool(n) f = Flatten(p)
    [last] y = Gemm<transB=1>(f, head)
"""
WEIGHTS: dict[str, tuple[int, ...]] = {
    "w1": (8, 3, 3, 3), "b1": (8,), "w2": (8, 8, 1, 1), "w3": (8, 1, 3, 3), "w4": (16, 8, 1, 1), "head": (5, 16)
}  # fmt: skip


def samples(count: int = 48) -> Dataset:
    rng = np.random.default_rng(5)
    images = [rng.standard_normal((1, 3, 8, 8)).astype(np.float32) for _ in range(count)]
    return Dataset("drawn", None, lambda: ({"x": image} for image in images), stacked=True)


def with_data(model: ir.Model) -> Context:
    return context(model, calibration=samples(), rng=np.random.default_rng(3))


def measured(model: ir.Model) -> tuple[list[str], list[np.ndarray]]:
    ctx = with_data(model)
    groups = ctx.fact(CHANNEL_GROUPS).free
    ladders = [ladder(group.units, 1) for group in groups]
    worth = [np.arange(1.0, group.units + 1) for group in groups]
    return [group.name for group in groups], sensitivity(model, groups, worth, ladders, ctx)


def scale(model: ir.Model, name: str, units: Sequence[int], factor: float) -> None:
    array = model.graph.initializers[name].const_value.numpy().copy()
    array[list(units)] *= factor
    model.graph.initializers[name].const_value = ir.tensor(array, name=name)


def test_what_the_outputs_do_not_see_costs_nothing() -> None:
    model = build(IMAGE, BODY, WEIGHTS)
    scale(model, "w4", range(12), 0.0)
    names, costs = measured(model)
    assert names == ["first", "mix"]
    assert costs[1][:9] == pytest.approx(0.0, abs=1e-6)
    assert costs[1][-1] > 1e-4
    assert costs[0][4] > 1e-3
    for cost in costs:
        assert cost[0] == 0
        assert (np.diff(cost) >= 0).all()


def test_what_others_can_tell_is_made_up_for() -> None:
    model = build(IMAGE, BODY, WEIGHTS)
    array = model.graph.initializers["w4"].const_value.numpy().copy()
    array[:8] = array[8:]
    model.graph.initializers["w4"].const_value = ir.tensor(array, name="w4")
    copies = measured(model)[1][1]
    alone = measured(build(IMAGE, BODY, WEIGHTS))[1][1]
    assert copies[8] < 0.5 * alone[8]


def test_measuring_leaves_the_model_as_it_is() -> None:
    model = build(IMAGE, BODY, WEIGHTS)
    before = ir.to_onnx_text(model)
    measured(model)
    assert ir.to_onnx_text(model) == before


def test_inputs_that_stay_tell_what_those_that_go_told() -> None:
    rng = np.random.default_rng(0)
    free = rng.standard_normal((500, 3)) + 2.0
    x = np.column_stack([free, free @ [[1.0], [-2.0], [0.5]] + 0.7])
    moments = LayerMoments(500, x.mean(axis=0)[None], np.square(x).sum(axis=0)[None], (x.T @ x)[None])
    weight = rng.standard_normal((4, 2))
    changed, offset = make_up(weight, np.array([3]), moments)
    assert (changed[3] == 0).all()
    np.testing.assert_allclose(x @ changed + offset, x @ weight, atol=0.1)
    means_only = LayerMoments(500, moments.mean, moments.squares, None)
    changed, offset = make_up(weight, np.array([3]), means_only)
    np.testing.assert_allclose((x @ changed + offset).mean(axis=0), (x @ weight).mean(axis=0), atol=1e-9)
    assert (make_up(weight, np.array([3]), None)[1] == 0).all()


def test_a_curve_has_the_measured_level_and_the_predicted_shape() -> None:
    predicted = np.array([0.0, 1.0, 3.0, 6.0, 10.0])
    curve = cost_curve(np.arange(5), predicted, [(2, 0.3)])
    np.testing.assert_allclose(curve, predicted / 10)
    curve = cost_curve(np.arange(5), predicted, [(1, 0.1), (4, 10.0)])
    assert curve[[0, 1, 4]] == pytest.approx([0.0, 0.1, 10.0])
    assert (np.diff(curve) > 0).all()
    assert (cost_curve(np.arange(5), predicted, [(2, 0.0)]) == 0).all()
    assert cost_curve(np.arange(5), np.zeros(5), [(2, 0.5)])[2] == pytest.approx(0.5)


def test_every_fourth_sample_is_held_out() -> None:
    seen, held = held_out(samples(12))
    assert (len(list(seen.feeds())), len(list(held.feeds()))) == (9, 3)
    few = samples(5)
    assert held_out(few) == (few, few)


def test_only_small_models_are_measured_at_all_depths() -> None:
    model = build(IMAGE, BODY, WEIGHTS)
    groups = context(model).fact(CHANNEL_GROUPS).free
    assert is_affordable(groups, with_data(model))
    assert not is_affordable(groups, context(model))
    assert not is_affordable([groups[0]] * 1_000_000, with_data(model))


def test_the_outcome_of_removing_nothing_is_nothing_and_grows() -> None:
    model = build(IMAGE, BODY, WEIGHTS)
    ctx = with_data(model)
    groups = ctx.fact(CHANNEL_GROUPS).free
    orders = [np.arange(group.units) for group in groups]
    outcome = Outcome(groups, orders, samples(), refitted=True, ctx=ctx)
    assert outcome.of([0, 0]) == 0
    assert 0 < outcome.of([1, 0]) < outcome.of([5, 8])
    raw = Outcome(groups, orders, samples(), refitted=False, ctx=ctx)
    assert outcome.of([4, 0]) < raw.of([4, 0])


def test_a_search_finds_the_group_that_is_dearer_than_it_looks() -> None:
    wanted, asked = [1, 3, 0], list[tuple[int, ...]]()

    def plan(costs: Sequence[np.ndarray]) -> list[int]:
        cheapest_first = np.argsort([cost[1] for cost in costs], kind="stable")
        left, found = 4, [0, 0, 0]
        for group in cheapest_first:
            found[group] = min(3, left)
            left -= found[group]
        return found

    def outcome(tried: Sequence[int]) -> float:
        asked.append(tuple(tried))
        return float(np.abs(np.subtract(tried, wanted)).sum())

    tables = [np.array([0.0, cost]) for cost in (1.0, 2.0, 3.0)]
    assert search([tables], plan, outcome, 0, np.random.default_rng(0)) == [3, 1, 0]
    found = search([tables], plan, outcome, 8, np.random.default_rng(0))
    assert found == wanted
    assert len(asked) <= 1 + 1 + 8


@pytest.mark.parametrize("scope", ["sensitivity", "search", "auto"])
def test_every_scope_meets_the_ratio_and_the_contract_of_passes(scope: str) -> None:
    model = build(IMAGE, BODY, WEIGHTS)
    whole, ctx = context(model).fact(COST).macs, with_data(model)
    step = Prune(ratio=0.4, scope=scope, trials=2)  # type: ignore[arg-type]
    step.requires(model, ctx)
    result = step.run(model, ctx)
    assert context(model).fact(COST).macs == pytest.approx(0.6 * whole, abs=0.04 * whole)
    assert result.metrics["achieved"] == pytest.approx(0.4, abs=0.04)


def test_measuring_without_samples_is_refused() -> None:
    with pytest.raises(OptionError, match=r"prune\.scope: search needs samples; give --calibration, or use uniform"):
        check_pass(Prune(scope="search"), build(IMAGE, BODY, WEIGHTS))


def test_a_ratio_that_pinned_layers_forbid_is_explained() -> None:
    body = "[a] a = Conv(x, w1) r = Relu(a) [b] y = Conv(r, w2)"
    model = build("(float[N,3,8,8] x) => (float[N,64,8,8] y)", body, {"w1": (8, 3, 1, 1), "w2": (64, 8, 1, 1)})
    result = Prune(ratio=0.6, skip=("a",)).run(model, context(model))
    assert result.metrics["ratio_missed"] == (
        "at most 0.00 of the macs can be removed: layers that are pinned or skipped hold 100%, "
        "and of every group an eighth stays"
    )
    assert result.notes == (result.metrics["ratio_missed"],)
