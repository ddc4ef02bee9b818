"""Weights that several nodes read: their uses are tied, and channels that are zero leave without a trace."""

from __future__ import annotations

import pytest
from small_models import IMAGE, Shape, assert_removal_is_exact, build, channel_groups

HEAD = "g = GlobalAveragePool(%s) f = Flatten(g) [last] y = Gemm<transB=1>(f, head)"


SHARED: dict[str, tuple[str, str, dict[str, Shape], set[tuple[str, ...]]]] = {
    "a convolution's weight used twice": (
        "[stem] a = Conv(x, w1) [one] b = Conv(a, w2) r = Relu(b) [two] d = Conv(r, w2)" + HEAD % "d", IMAGE,
        {"w1": (8, 3, 1, 1), "w2": (8, 8, 1, 1), "head": (5, 8)},
        {("stem", "one", "two")},
    ),
    "a matrix read by two Gemms": (
        """
        [one] a = Gemm(x, w1) r = Relu(a) [left] p = Gemm(r, w2) [right] q = Gemm(a, w2)
        s = Mul(p, q) y = Gemm(s, w3)
        """,
        "(float[N,3] x) => (float[N,5] y)",
        {"w1": (3, 8), "w2": (8, 6), "w3": (6, 5)},
        {("one",), ("left", "right")},
    ),
    "a matrix that two Gemms read from either side": (
        "[down] a = Gemm(x, w1) [code] b = Gemm(a, w2) r = Relu(b) [back] d = Gemm<transB=1>(r, w2) y = Gemm(d, w3)",
        "(float[N,3] x) => (float[N,5] y)",
        {"w1": (3, 8), "w2": (8, 6), "w3": (8, 5)},
        {("down", "back"), ("code",)},
    ),
    "an embedding table that the head reads transposed": (
        """
        e = Gather(table, x) [up] u = MatMul(e, w1) r = Relu(u) [down] d = MatMul(r, w2) s = Add(d, e)
        t = Transpose<perm=[1,0]>(table) [logits] y = MatMul(s, t)
        """,
        "(int64[N,7] x) => (float[N,7,11] y)",
        {"table": (11, 6), "w1": (6, 9), "w2": (9, 6)},
        {("down",), ("up",)},
    ),
    "a bias that two convolutions share": (
        "[one] a = Conv(x, w1, b1) [two] d = Conv(x, w2, b1) r = Relu(d) [three] e = Conv(a, w3) "
        "[four] k = Conv(r, w4) s = Add(e, k)" + HEAD % "s",
        IMAGE,
        {"w1": (8, 3, 1, 1), "w2": (8, 3, 1, 1), "b1": (8,), "w3": (6, 8, 1, 1), "w4": (6, 8, 1, 1), "head": (5, 6)},
        {("one", "two"), ("three", "four")},
    ),
    "a scale that two norms share": (
        "[one] a = Conv(x, w1) m = BatchNormalization(a, n1, n2, n3, var) [two] d = Conv(m, w2) "
        "k = BatchNormalization(d, n1, n2, n3, var)" + HEAD % "k",
        IMAGE,
        {"w1": (8, 3, 1, 1), "w2": (8, 8, 1, 1), "n1": (8,), "n2": (8,), "n3": (8,), "var": (8,), "head": (5, 8)},
        {("one", "two")},
    ),
    "a weight read as it is and by arithmetic": (
        "axes = Constant<value_ints=[1,2,3]>() row = Constant<value_ints=[1,8,1,1]>() "
        "[one] a = Conv(x, w1) k = ReduceSum<keepdims=1>(w2, axes) j = Reshape(k, row) m = Mul(a, j) "
        "[two] d = Conv(m, w2)" + HEAD % "d",
        IMAGE,
        {"w1": (8, 3, 1, 1), "w2": (8, 8, 1, 1), "head": (5, 8)},
        {("one", "two")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SHARED)
def test_a_weight_that_several_nodes_read_ties_them_and_stays_exact(case: str) -> None:
    body, signature, weights, expected = SHARED[case]
    model = build(signature, body, weights)
    groups = channel_groups(model).free
    assert {group.producers for group in groups} == expected
    assert_removal_is_exact(model, [(group, [0, group.units - 2]) for group in groups])
