"""Norms, means and sums over channels."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from small_models import assert_removal_is_exact, build, channel_groups, context, feeds, zero

from graphopt.analyses import CHANNEL_GROUPS
from graphopt.reference import Reference
from graphopt_passes.prune.removal import remove

TOKENS = "(float[N,7,8] x) => (float[N,7,5] y)"
IMAGE = "(float[N,3,8,8] x) => (float[N,5] y)"

ROOT_MEAN_SQUARES = {
    "operator": ("n = RMSNormalization<epsilon=0.01>(a, g)", 23),
    "power, root, division": (
        """two = Constant<value_float=2.0>() e = Constant<value_float=0.01>() s = Pow(a, two)
        m = ReduceMean<axes=[-1]>(s) v = Add(m, e) r = Sqrt(v) d = Div(a, r) n = Mul(d, g)""",
        17,
    ),
    "product, reciprocal": (
        """axis = Constant<value_ints=[-1]>() e = Constant<value_float=0.01>() s = Mul(a, a)
        m = ReduceMean(s, axis) v = Add(e, m) r = Sqrt(v) i = Reciprocal(r) d = Mul(a, i) n = Mul(g, d)""",
        18,
    ),
    "one over the root": (
        """e = Constant<value_float=0.01>() one = Constant<value_float=1.0>() s = Mul(a, a)
        m = ReduceMean<axes=[2]>(s) v = Add(m, e) r = Sqrt(v) i = Div(one, r) d = Mul(a, i) n = Mul(d, g)""",
        17,
    ),
    "no scale": (
        """e = Constant<value_float=0.01>() s = Mul(a, a)
        m = ReduceMean<axes=[-1]>(s) v = Add(m, e) r = Sqrt(v) n = Div(a, r)""",
        17,
    ),
    "epsilon that others read": (
        """e = Constant<value_float=0.01>() s = Mul(a, a) m = ReduceMean<axes=[-1]>(s) v = Add(m, e) r = Sqrt(v)
        d = Div(a, r) p = Mul(d, g) n = Mul(p, e)""",
        17,
    ),
    "norm": ("n = LpNormalization<axis=-1>(a)", 17),
    "sum of absolutes": ("s = ReduceL1<axes=[-1]>(a) n = Div(a, s)", 17),
}


@pytest.mark.parametrize("form", list(ROOT_MEAN_SQUARES))
def test_a_root_mean_square_over_fewer_channels_is_exact(form: str) -> None:
    lines, opset = ROOT_MEAN_SQUARES[form]
    weights = {"w1": (8, 6), "w2": (6, 5)} | ({"g": (6,)} if "g)" in lines or "(g" in lines else {})
    model = build(TOKENS, f"[up] a = MatMul(x, w1) {lines} y = MatMul(n, w2)", weights, opset)
    (group,) = channel_groups(model).free
    assert_removal_is_exact(model, [(group, [1, 4])])


def centre(model: ir.Model, name: str, left: list[int]) -> None:
    """Take the mean over the columns that stay away from a weight: its output then has the mean zero."""
    value = model.graph.initializers[name]
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    array[:, left] -= array[:, left].mean(axis=1, keepdims=True)
    value.const_value = ir.tensor(array, name=name)


@pytest.mark.parametrize(
    "lines",
    [
        "n = LayerNormalization<axis=-1,epsilon=0.01>(a, g, b)",
        """two = Constant<value_float=2.0>() e = Constant<value_float=0.01>() m = ReduceMean<axes=[-1]>(a) c = Sub(a, m)
        s = Pow(c, two) q = ReduceMean<axes=[-1]>(s) v = Add(q, e) r = Sqrt(v) d = Div(c, r)
        p = Mul(d, g) n = Add(p, b)""",
    ],
    ids=["operator", "decomposed"],
)
def test_a_layer_normalization_is_exact_where_the_mean_is_zero(lines: str) -> None:
    body = f"[up] a = MatMul(x, w1) {lines} y = MatMul(n, w2)"
    model = build(TOKENS, body, {"w1": (8, 6), "g": (6,), "b": (6,), "w2": (6, 5)})
    (group,) = channel_groups(model).free
    zero(model, group, [0, 3])
    centre(model, "w1", [1, 2, 4, 5])
    assert_removal_is_exact(model, [(group, [0, 3])])
    operators = [node.op_type for node in model.graph if node.op_type != "Constant"]
    assert operators.count("Mul") <= 1, "what runtimes fuse keeps its form"


@pytest.mark.parametrize("form", ["SkipSimplifiedLayerNormalization", "SkipLayerNormalization"])
def test_a_norm_fused_with_the_sum_before_it_follows(form: str) -> None:
    body = f"""
        [up] a = MatMul(x, w1) [other] b = MatMul(x, w3)
        n, mean, spread, s = com.microsoft.{form}<epsilon=0.01>(a, b, g) t = Add(n, s) y = MatMul(t, w2)
    """
    model = build(TOKENS, body, {"w1": (8, 6), "w3": (8, 6), "g": (6,), "w2": (6, 5)})
    model.graph.opset_imports["com.microsoft"] = 1
    (group,) = channel_groups(model).free
    assert group.producers == ("up", "other")
    zero(model, group, [2, 5])
    for name in ("w1", "w3"):
        centre(model, name, [0, 1, 3, 4])
    assert_removal_is_exact(model, [(group, [2, 5])])


def test_a_scale_that_two_norms_share_is_corrected_once_for_each() -> None:
    body = "[up] a = MatMul(x, w1) m = RMSNormalization(a, g) n = RMSNormalization(m, g) y = MatMul(n, w2)"
    model = build(TOKENS, body, {"w1": (8, 6), "g": (6,), "w2": (6, 5)}, opset=23)
    (group,) = channel_groups(model).free
    assert_removal_is_exact(model, [(group, [2])])


@pytest.mark.parametrize(
    "line",
    ["ReduceSum<keepdims=0>(r, one)", "ReduceMean<axes=[1],keepdims=0>(r)", "ReduceL2<axes=[1],keepdims=0>(r)",
     "ReduceSumSquare<axes=[1],keepdims=0>(r)", "ReduceMean<axes=[1,2],keepdims=0>(r)"],
)  # fmt: skip
def test_adding_over_channels_is_exact(line: str) -> None:
    body = f"""
        one = Constant<value_ints=[1]>() to = Constant<value_ints=[-1,8]>()
        [conv] a = Conv(x, w1) r = Relu(a) s = {line} f = Reshape(s, to) [last] z = MatMul(f, w2)
        y = ReduceMax<axes=[1],keepdims=1>(z)
    """
    model = build("(float[1,3,8,8] x) => (float[M,1] y)", body, {"w1": (6, 3, 1, 1), "w2": (8, 5)})
    group = channel_groups(model).free[0]
    assert group.name == "conv"
    assert_removal_is_exact(model, [(group, [0, 5])])


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("a = Conv(x, w1) s = Sigmoid(a) m = ReduceMean<axes=[1]>(s)", "pinned by ReduceMean 'it'"),
        ("a = Conv(x, w1) s = Add(a, one) m = ReduceMean<axes=[1]>(s)", "pinned by ReduceMean 'it'"),
        ("a = Conv(x, w1) s = Clip(a, one) m = ReduceSum(s, axis)", "pinned by ReduceSum 'it'"),
        ("a = Conv(x, w1) s = Exp(a) m = ReduceL2<axes=[1]>(s)", "pinned by ReduceL2 'it'"),
        ("a = Conv(x, w1) m = ReduceMax<axes=[1]>(a)", "pinned by ReduceMax 'it'"),
    ],
)
def test_what_is_not_zero_without_weights_cannot_leave_a_sum(body: str, reason: str) -> None:
    at = body.rindex("m =")
    lines = f"one = Constant<value_float=1.0>() axis = Constant<value_ints=[1]>() [conv] {body[:at]} [it] {body[at:]}"
    model = build("(float[N,3,8,8] x) => (float[N,M] y)", f"{lines} y = Flatten(m)", {"w1": (4, 3, 1, 1)})
    (group,) = channel_groups(model).groups
    assert group.pin == reason


def test_whole_groups_of_a_group_normalization_leave() -> None:
    body = """
        apart = Constant<value_ints=[0,3,-1]>() again = Constant<value_ints=[0,6,8,8]>()
        [conv] a = Conv(x, w1) r = Reshape(a, apart) i = InstanceNormalization(r, one, none) b = Reshape(i, again)
        c = Mul(b, scale) d = Add(c, shift) e = Relu(d) g = GlobalAveragePool(e) f = Flatten(g)
        y = Gemm<transB=1>(f, head)
    """
    weights = {"w1": (6, 3, 1, 1), "one": (3,), "none": (3,), "scale": (6, 1, 1), "shift": (6, 1, 1), "head": (5, 6)}
    model = build(IMAGE, body, weights)
    (group,) = channel_groups(model).free
    assert group.units == 3
    assert {p.value: p.positions.shape[1] for p in group.places if p.constant} == {
        "w1": 2, "one": 1, "none": 1, "scale": 2, "shift": 2, "head": 2,
    }  # fmt: skip
    assert_removal_is_exact(model, [(group, [1])])


def test_a_product_of_two_activations_may_lose_what_is_zero_on_one_side_only_if_it_is_zero() -> None:
    body = """
        [left] a = MatMul(x, w1) [right] b = MatMul(x, w2) s = %s t = Transpose<perm=[0,2,1]>(b)
        p = MatMul(s, t) y = MatMul(p, w3)
    """
    weights = {"w1": (8, 6), "w2": (8, 6), "w3": (7, 5)}
    model = build(TOKENS, body % "Relu(a)", weights)
    (group,) = channel_groups(model).free
    assert group.producers == ("left", "right")
    assert_removal_is_exact(model, [(group, [0, 2])])
    both = build(
        TOKENS,
        body.replace("Transpose", "Exp(b) u = Transpose").replace("(b)\n", "(t)\n").replace(", t)", ", u)") % "Exp(a)",
        weights,
    )
    assert {group.pin for group in channel_groups(both).groups[:2]} == {"pinned by MatMul 'MatMul_5'"}


def test_the_correction_of_a_mean_uses_what_is_left_of_all_groups() -> None:
    body = """
        [left] a = Conv(x, w1) [right] b = Conv(x, w2) c = Concat<axis=1>(a, b) m = ReduceMean<axes=[1],keepdims=1>(c)
        z = Sub(c, b2) k = Mul(c, m) g = GlobalAveragePool(k) f = Flatten(g) y = Gemm<transB=1>(f, head)
    """
    weights = {"w1": (4, 3, 1, 1), "w2": (2, 3, 1, 1), "b2": (1, 6, 1, 1), "head": (5, 6)}
    model = build(IMAGE, body, weights)
    left, right = channel_groups(model).free
    for group, units in ((left, [0, 1]), (right, [1])):
        zero(model, group, units)
    expected = [Reference(model).run(feed)["y"] for feed in feeds(model)]
    remove(model, context(model).fact(CHANNEL_GROUPS), [(left, [0, 1]), (right, [1])])
    for feed, wanted in zip(feeds(model), expected, strict=True):
        np.testing.assert_allclose(Reference(model).run(feed)["y"], wanted, atol=1e-5 * np.abs(wanted).max())
