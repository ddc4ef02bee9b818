from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from drawn_networks import networks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import IMAGE, build, context

from graphopt.analyses import CHANNEL_GROUPS, CONSTANTS, COST, ChannelGroup, Cost
from graphopt.analyses.channels import Place
from graphopt.analyses.cost import MacTerm, NodeCost
from graphopt.model_io import load_model
from graphopt_passes.prune.allocation.budget import Budget, Facts, Measure, ladder, step_of, unit_width
from graphopt_passes.prune.allocation.plan import plan_global, plan_uniform, score_costs, why_missed, writers
from graphopt_passes.prune.removal import remove

MEASURES: tuple[Measure, ...] = ("macs", "params", "bytes")


def budget_of(model: ir.Model, of: Measure) -> tuple[Budget, tuple[ChannelGroup, ...]]:
    ctx = context(model)
    groups = ctx.fact(CHANNEL_GROUPS).free
    return Budget(Facts(ctx.fact(COST), ctx.fact(CONSTANTS)), groups, of), groups


def amount(model: ir.Model, of: Measure) -> int:
    cost = context(model).fact(COST)
    return {"macs": cost.macs, "params": cost.params, "bytes": cost.weight_bytes}[of]


def stated(model: ir.Model, of: Measure) -> int:
    """Size of the lists of sizes, to which removing channels may add."""
    tensors = [t for t in context(model).fact(CONSTANTS).tensors.values() if t.dtype == ir.DataType.INT64]
    return {"macs": 0, "params": sum(t.size for t in tensors), "bytes": sum(t.nbytes for t in tensors)}[of]


def cut(model: ir.Model, groups: tuple[ChannelGroup, ...], plan: list[int]) -> None:
    removals = [(group, list(range(lost))) for group, lost in zip(groups, plan, strict=True) if lost]
    remove(model, context(model).fact(CHANNEL_GROUPS), removals)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(networks(), st.data())
def test_what_is_promised_is_what_the_pruned_model_costs(model: ir.Model, data: st.DataObject) -> None:
    budgets = {of: budget_of(model, of) for of in MEASURES}
    groups = budgets["macs"][1]
    plan = [data.draw(st.integers(0, group.units - 1)) for group in groups]
    for of, (budget, _) in budgets.items():
        assert budget.whole == pytest.approx(amount(model, of))
    lists = {of: stated(model, of) for of in MEASURES}
    cut(model, groups, plan)
    for of, (budget, _) in budgets.items():
        written = stated(model, of) - lists[of]
        assert budget.after(plan) == pytest.approx(amount(model, of) - written, rel=1e-9), of


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(networks(), st.sampled_from(MEASURES), st.data())
def test_changes_of_single_groups_agree_with_the_whole_sum(model: ir.Model, of: Measure, data: st.DataObject) -> None:
    budget, groups = budget_of(model, of)
    plan = [data.draw(st.integers(0, group.units - 1)) for group in groups]
    more = [data.draw(st.integers(-lost, group.units - 1 - lost)) for group, lost in zip(groups, plan, strict=True)]
    found = budget.changes(plan, more)
    assert found.shape == (len(groups),)
    for i, step in enumerate(more):
        changed = [*plan[:i], plan[i] + step, *plan[i + 1 :]]
        assert found[i] == pytest.approx(budget.after(changed) - budget.after(plan), abs=1e-6 * budget.whole)


HEADS = """
    q = MatMul(x, wq) qs = Reshape(q, split) qt = Transpose<perm=[0,2,1,3]>(qs)
    k = MatMul(x, wk) ks = Reshape(k, split) kt = Transpose<perm=[0,2,3,1]>(ks)
    v = MatMul(x, wv) vs = Reshape(v, split) vt = Transpose<perm=[0,2,1,3]>(vs)
    s = MatMul(qt, kt) p = Softmax<axis=-1>(s) c = MatMul(p, vt) ct = Transpose<perm=[0,2,1,3]>(c)
    j = Reshape(ct, join) y = MatMul(j, wo)
"""
CASES = {
    "grouped convolution": (
        IMAGE,
        """a = Conv(x, w1) b = Conv<group=4>(a, w2) r = Relu(b) c = Conv(r, w3) p = GlobalAveragePool(c)
        f = Flatten(p) y = Gemm<transB=1>(f, head)""",
        {"w1": (16, 3, 3, 3), "w2": (24, 4, 3, 3), "w3": (8, 24, 1, 1), "head": (5, 8)},
    ),
    "transposed convolution": (
        "(float[N,3,8,8] x) => (float[N,5,16,16] y)",
        "a = Conv(x, w1) r = Relu(a) b = ConvTranspose<strides=[2,2]>(r, w2) s = Relu(b) y = Conv(s, w3)",
        {"w1": (8, 3, 1, 1), "w2": (8, 12, 2, 2), "w3": (5, 12, 1, 1)},
    ),
    "Gemm on transposed inputs": (
        "(float[7,3] x) => (float[7,5] y)",
        """t = Transpose<perm=[1,0]>(x) a = Gemm<transA=1>(t, w1) r = Relu(a) u = Transpose<perm=[1,0]>(r)
        y = Gemm<transA=1,transB=1>(u, w2)""",
        {"w1": (3, 12), "w2": (5, 12)},
    ),
    "two activations": (
        "(float[2,9,6] x) => (float[2,9,9] y)",
        "a = MatMul(x, w1) b = MatMul(x, w2) t = Transpose<perm=[0,2,1]>(b) y = MatMul(a, t)",
        {"w1": (6, 16), "w2": (6, 16)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("of", MEASURES)
def test_terms_of_every_linear_operator_are_exact(case: str, of: Measure) -> None:
    model = build(*CASES[case])
    budget, groups = budget_of(model, of)
    assert groups
    plan = [group.units // 2 for group in groups]
    cut(model, groups, plan)
    assert budget.after(plan) == amount(model, of)


def test_attention_costs_what_its_heads_cost() -> None:
    weights = dict.fromkeys(("wq", "wk", "wv", "wo"), (12, 12))
    text = "split = Constant<value_ints=[0,0,4,3]>() join = Constant<value_ints=[0,0,12]>()" + HEADS
    model = build("(float[2,9,12] x) => (float[2,9,12] y)", text, weights)
    budget, groups = budget_of(model, "macs")
    heads = [i for i, group in enumerate(groups) if unit_width(group) == 3]
    assert heads, [group.kind for group in groups]
    plan = [int(i in heads) for i in range(len(groups))]
    cut(model, groups, plan)
    assert budget.after(plan) == amount(model, "macs")


@pytest.mark.parametrize(("units", "step", "expected"), [(8, 1, 7), (8, 4, 4), (16, 8, 8), (2, 1, 1), (1, 1, 0)])
def test_a_ladder_leaves_an_eighth_and_at_least_one(units: int, step: int, expected: int) -> None:
    steps = ladder(units, step)
    assert steps[0] == 0
    assert steps == sorted(set(steps))
    assert steps[-1] == expected
    assert all((units - lost) % step == 0 for lost in steps[1:])


@pytest.mark.parametrize(
    ("units", "asked", "liked", "width", "step"),
    [(64, 0, 8, 1, 8), (12, 0, 16, 1, 2), (12, 8, 16, 1, 8), (12, 0, 16, 64, 1), (12, 32, 1, 16, 2), (12, 0, 0, 1, 1)],
)
def test_steps_follow_what_was_asked_then_the_target_and_the_width_of_a_unit(
    units: int, asked: int, liked: int, width: int, step: int
) -> None:
    assert step_of(units, asked, liked, width) == step


def chain(*channels: int) -> ir.Model:
    """A chain of 3x3 convolutions."""
    lines, weights, inside = list[str](), dict[str, tuple[int, ...]](), 3
    for i, outside in enumerate(channels):
        weights[f"w{i}"] = (outside, inside, 3, 3)
        lines.append(f"a{i} = Conv<pads=[1,1,1,1]>({f'r{i - 1}' if i else 'x'}, w{i}) r{i} = Relu(a{i})")
        inside = outside
    lines.append(f"p = GlobalAveragePool(r{len(channels) - 1}) f = Flatten(p) y = Gemm<transB=1>(f, head)")
    return build(IMAGE, "\n".join(lines), {**weights, "head": (5, inside)})


@pytest.mark.parametrize("of", MEASURES)
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.7])
def test_plans_hit_their_target(of: Measure, ratio: float) -> None:
    budget, groups = budget_of(chain(32, 48, 64, 40), of)
    ladders, target = [ladder(group.units, 1) for group in groups], budget.whole * (1 - ratio)
    worth = [np.random.default_rng(i).random(group.units) for i, group in enumerate(groups)]
    for plan in (
        plan_uniform(budget, ladders, [group.units for group in groups], target),
        plan_global(budget, ladders, score_costs([1] * len(groups), worth, ladders), target),
    ):
        assert all(lost in steps for lost, steps in zip(plan, ladders, strict=True))
        assert budget.after(plan) == pytest.approx(target, abs=0.01 * budget.whole)


def test_units_go_where_they_cost_least_for_what_they_save() -> None:
    budget, _ = budget_of(chain(16, 16, 16), "macs")
    ladders = [ladder(16, 1)] * 3
    worth = [np.ones(16), np.full(16, 1e-3), np.ones(16)]
    plan = plan_global(budget, ladders, score_costs([1, 1, 1], worth, ladders), 0.8 * budget.whole)
    assert plan[1] > 3
    assert plan[::2] == [0, 0]


def test_a_depthwise_filter_shares_no_units_and_residual_layers_do() -> None:
    body = """
        a = Conv(x, expand) r = Relu(a) d = Conv<group=8, pads=[1,1,1,1]>(r, depthwise) s = Relu(d)
        b = Conv(s, project) e = Conv(b, w) t = Add(b, e)
        p = GlobalAveragePool(t) f = Flatten(p) y = Gemm<transB=1>(f, head)"""
    weights = {
        "expand": (8, 3, 1, 1), "depthwise": (8, 1, 3, 3), "project": (4, 8, 1, 1), "w": (4, 4, 1, 1), "head": (5, 4),
    }  # fmt: skip
    ctx = context(build(IMAGE, body, weights))
    inside, stream = ctx.fact(CHANNEL_GROUPS).free
    assert len(inside.producers) == len(stream.producers) == 2
    assert writers([inside, stream], ctx) == [1, 2]


def test_a_dear_step_before_cheap_ones_is_taken_with_them() -> None:
    budget, _ = budget_of(chain(16, 16), "macs")
    ladders = [ladder(16, 4), ladder(16, 4)]
    costs = [np.array([0.0, 5.0, 5.1, 5.2]), np.array([0.0, 3.0, 9.0, 30.0])]
    target = budget.after([12, 0])
    assert plan_global(budget, ladders, costs, target) == [12, 0]


def test_what_cannot_be_reached_is_approached_and_explained() -> None:
    budget, groups = budget_of(chain(8, 8), "macs")
    ladders = [ladder(group.units, 1) for group in groups]
    worth = [np.ones(group.units) for group in groups]
    for plan in (
        plan_uniform(budget, ladders, [8, 8], 0.0),
        plan_global(budget, ladders, score_costs([1] * len(groups), worth, ladders), 0.0),
    ):
        assert plan == [7, 7]
    most = 1 - budget.after([7, 7]) / budget.whole
    assert str(why_missed(budget, ladders, [7, 7], 0.0, "macs")).startswith(
        f"at most {most:.2f} of the macs can be removed: layers that are pinned or skipped hold 0%"
    )
    assert why_missed(budget, ladders, [7, 7], budget.after([7, 7]), "macs") is None


def test_a_target_between_two_rungs_is_missed_because_of_rounding() -> None:
    budget, _ = budget_of(chain(8), "macs")
    ladders, target = [ladder(8, 4)], 0.8 * budget.whole
    plan = plan_global(budget, ladders, [np.array([0.0, 1.0])], target)
    reason = why_missed(budget, ladders, plan, target, "macs")
    assert str(reason).endswith("is as close as rounding allows: up to 4 units leave at a time")


def wide_chain(channels: list[int]) -> tuple[Budget, list[ChannelGroup]]:
    """A chain of 1x1 convolutions, its groups written down: to find them takes longer than to plan."""
    weights, inside = dict[str, tuple[int, ...]](), 3
    for i, outside in enumerate(channels):
        weights[f"w{i}"], inside = (outside, inside, 1, 1), outside
    terms = [MacTerm(64 * a * b, ((f"w{i}", 0), (f"w{i}", 1))) for i, (a, b, *_) in enumerate(weights.values())]
    nodes = {f"g{i}": NodeCost(f"g{i}", "Conv", term.amount, 0, 0, 0, (term,)) for i, term in enumerate(terms)}
    groups = []
    for i, size in enumerate(channels):
        positions = np.arange(size)[:, None]
        places = tuple(
            Place(value, axis, size, positions, constant=True, role=role)
            for value, axis, role in ((f"w{i}", 0, "output"), (f"w{i + 1}", 1, "input"))
        )
        groups.append(ChannelGroup(f"g{i}", size, places, (f"g{i}",), None))
    return Budget(Facts(Cost(nodes, 0, 0), context(chain(8)).fact(CONSTANTS)), groups, "macs"), groups


@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_planning_many_wide_layers_takes_seconds(scope: str) -> None:
    start = time.process_time()
    budget, groups = wide_chain([2048, 1024] * 150)
    ladders = [ladder(group.units, 1) for group in groups]
    worth = [np.random.default_rng(i).random(group.units) * (i + 1) for i, group in enumerate(groups)]
    if scope == "uniform":
        plan = plan_uniform(budget, ladders, [group.units for group in groups], 0.5 * budget.whole)
    else:
        plan = plan_global(budget, ladders, score_costs([1] * len(groups), worth, ladders), 0.5 * budget.whole)
    assert time.process_time() - start < 5
    assert budget.after(plan) == pytest.approx(0.5 * budget.whole, rel=0.001)


@pytest.mark.parametrize("case", ["cifar10_resnet20", "mobilenet_v2", "minilm", "yunet_n320", "tiny_kws"])
@pytest.mark.parametrize("of", ["macs", "params"])
def test_real_models_cost_what_was_promised(case: str, of: Measure, zoo: Callable[[str], Path]) -> None:
    model = load_model(zoo(case) / "model.onnx")
    budget, groups = budget_of(model, of)
    plan = [group.units // 3 for group in groups]
    lists = stated(model, of)
    cut(model, groups, plan)
    assert budget.after(plan) == pytest.approx(amount(model, of) - stated(model, of) + lists, rel=1e-4)
