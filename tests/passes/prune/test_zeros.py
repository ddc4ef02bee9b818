"""Sums over channels lose only channels that bring nothing, and channels may come down to one."""

from __future__ import annotations

import operator_cases
import pytest
from small_models import Shape, assert_removal_is_exact, build, channel_groups

TOKENS = "(float[N,7,8] x) => (float[N,7,5] y)"
SEQUENCE = "(float[7,N,8] x) => (float[7,N,5] y)"
HIDDEN = "[one] h = MatMul(x, w1) "
ADDED = " axis = Constant<value_ints=[-1]>() s = ReduceSum(k, axis) t = Tanh(s) m = Mul(h, t) [two] y = MatMul(m, w2)"
WEIGHTS: dict[str, Shape] = {"w1": (8, 6), "w2": (6, 5)}
RECURRENT: dict[str, Shape] = {"w1": (1, 6, 8), "w3": (1, 6, 6), "w2": (6, 5)}
NOT_ZERO = {
    "a quotient": "one = Constant<value_float=1.0>() e = Exp(h) z = Tanh(h) f = Add(z, one) k = Div(one, f)",
    "a number spread": "half = Constant<value_float=0.5>() n = Constant<value_ints=[1,1,6]>() w = Expand(half, n)"
    " k = Add(h, w)",
    "a number repeated": "half = Constant<value_floats=[0.5]>() n = Constant<value_ints=[6]>() w = Tile(half, n)"
    " k = Add(h, w)",
    "a number spread and turned": "half = Constant<value_float=0.5>() n = Constant<value_ints=[1,1,6]>()"
    " w = Expand(half, n) z = Neg(w) k = Sub(h, z)",
    "a number to the power of channels": "two = Constant<value_float=2.0>() k = Pow(two, h)",
}
ZERO = {
    "a quotient": "one = Constant<value_float=2.0>() k = Div(h, one)",
    "a weight for every sample": "b = Shape<start=0,end=1>(x) n = Constant<value_ints=[1,6]>()"
    " f = Concat<axis=0>(b, n) w = Expand(w3, f) k = Add(h, w)",
    "a weight for two samples": "n = Constant<value_ints=[2,1,6]>() w = Expand(w3, n) k = Add(h, w)",
    "repeated channels": "n = Constant<value_ints=[1,1,2]>() k = Tile(h, n)",
}


@pytest.mark.parametrize("form", NOT_ZERO)
def test_a_sum_keeps_channels_that_are_not_zero_without_weights(form: str) -> None:
    model = build(TOKENS, HIDDEN + NOT_ZERO[form] + ADDED, WEIGHTS)
    assert [group.name for group in channel_groups(model).free] == []


@pytest.mark.parametrize("form", ZERO)
def test_a_sum_loses_channels_that_are_zero_without_weights(form: str) -> None:
    model = build(TOKENS, HIDDEN + ZERO[form] + ADDED, {**WEIGHTS, "w3": (1, 1, 6)})
    (group,) = channel_groups(model).free
    assert_removal_is_exact(model, [(group, [1, 4])])


@pytest.mark.parametrize(("activation", "free"), [("Tanh", ["RNN_0"]), ("Sigmoid", [])])
def test_hidden_units_are_zero_where_their_activation_makes_nothing_of_nothing(
    activation: str, free: list[str]
) -> None:
    body = f'r = RNN<hidden_size=6,activations=["{activation}"]>(x, w1, w3) n = Constant<value_ints=[1]>()'
    model = build(SEQUENCE, f"{body} h = Squeeze(r, n) k = Identity(h)" + ADDED, RECURRENT)
    groups = channel_groups(model).free
    assert [group.name for group in groups] == free
    assert_removal_is_exact(model, [(group, [0, 3]) for group in groups])


@pytest.mark.parametrize(("bias", "free"), [((6,), ["one", "two"]), ((1,), ["one"])])
def test_a_bias_for_all_outputs_of_a_gemm_stays(bias: Shape, free: list[str]) -> None:
    body = """[one] g = Gemm(x, w1) r = Relu(g) [two] h = Gemm(r, w3, b) k = Identity(h)"""
    weights = {"w1": (8, 4), "w3": (4, 6), "b": bias, "w2": (6, 5)}
    model = build("(float[N,8] x) => (float[N,5] y)", body + ADDED.replace("[two]", "[three]"), weights)
    groups = channel_groups(model).free
    assert [group.name for group in groups] == free
    assert_removal_is_exact(model, [(group, [0, 3]) for group in groups])


@pytest.mark.parametrize("opset", [11, 17])
def test_a_squeeze_of_every_axis_of_size_1_leaves_a_single_channel_alone(opset: int) -> None:
    body = "a = Conv(x, w1) p = GlobalAveragePool(a) s = Squeeze(p) y = MatMul(s, w2)"
    model = build("(float[2,3,8,8] x) => (float[2,5] y)", body, {"w1": (8, 3, 3, 3), "w2": (8, 5)}, opset)
    (group,) = channel_groups(model).free
    assert_removal_is_exact(model, [(group, list(range(1, 8)))])


def test_numbers_too_large_to_compute_end_a_chain_of_sizes() -> None:
    body = """big = Constant<value_floats=[3e38]>() many = Constant<value_floats=[20.0]>() p = Pow(big, many)
        f = Floor(p) i = Cast<to=7>(f) h = MatMul(x, w1) y = MatMul(h, w2)"""
    (group,) = channel_groups(build(TOKENS, body, WEIGHTS)).free
    assert group.units == 6


COMPUTED = {
    "a vector": "a = Constant<value_ints=[0]>() u = Unsqueeze(f, a) c = Mul(u, u)",
    "a column": "a = Constant<value_ints=[0,1]>() u = Unsqueeze(f, a) z = Sub(u, u)"
    " c = Concat<axis=0>(u, z, u, z, z, z, u)",
    "a column of its own": "a = Constant<value_ints=[0,1,2]>() u = Unsqueeze(f, a) z = Sub(u, u)"
    " c = Concat<axis=1>(u, z, u, z, z, z, u)",
}


@pytest.mark.parametrize("form", COMPUTED)
def test_numbers_that_were_computed_from_sizes_keep_their_shape(form: str) -> None:
    body = f"""h = MatMul(x, w1) s = Shape(h) last = Constant<value_int=-1>() n = Gather(s, last) f = Cast<to=1>(n)
        {COMPUTED[form]} q = Mul(h, c) y = MatMul(q, w2)"""
    model = build(TOKENS, body, WEIGHTS)
    (group,) = channel_groups(model).free
    assert_removal_is_exact(model, [(group, [1, 4])])


def test_a_transpose_of_unknown_rank_says_nothing_of_its_output() -> None:
    body = """h = MatMul(x, w1) s = com.microsoft.Unheard(h) t = Transpose<perm=[2,0,1]>(s)
        zero = Constant<value=int64 {0}>() g = Gather(t, zero) y = MatMul(g, w2)"""
    assert channel_groups(operator_cases.build(TOKENS, body, WEIGHTS)).free == ()
