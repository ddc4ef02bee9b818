"""Attention operators and experts: heads and experts that are zero can leave."""

from __future__ import annotations

import numpy as np
import pytest
from operator_cases import Case, assert_budget_is_exact, assert_exact, units_of
from small_models import channel_groups

TOKENS = "(float[N,7,16] x) => (float[N,7,5] y)"


QKV = "[query] q = MatMul(x, wq) [key] k = MatMul(x, wk) [value] v = MatMul(x, wv) "


def weights(heads: int, shared: int, size: int = 4, **more: object) -> dict:
    return {
        "wq": (16, heads * size), "wk": (16, shared * size), "wv": (16, shared * size), "wo": (heads * size, 5), **more
    }  # fmt: skip


OUT = " [out] y = MatMul(o, wo)"
COUNT = (
    " s = Shape(x) z = Constant<value_ints=[0]>() i = Constant<value_ints=[1]>() b = Slice(s, z, i)"
    " six = Constant<value=int32[1] {6}>() lengths = Expand(six, b) total = Constant<value=int32 {7}>()"
)
TABLES = {"cos": (9, 2), "sin": (9, 2), "at": np.arange(7, dtype=np.int64).reshape(1, 7)}


def integers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(-9, 9, shape).astype(np.int8)


def far(experts: int) -> np.ndarray:
    """Offsets of a router that never chooses the first expert: only then can it leave unnoticed."""
    return np.array([-1e4, *np.zeros(experts - 1)], dtype=np.float32)


CASES: dict[str, Case] = {
    "attention of the standard": Case(
        TOKENS, QKV + "o = Attention<q_num_heads=3,kv_num_heads=3>(q, k, v)" + OUT, weights(3, 3),
        {"query": 3}, opset=23,
    ),
    "attention of the standard, grouped": Case(
        TOKENS, QKV + "o = Attention<q_num_heads=6,kv_num_heads=3,is_causal=1>(q, k, v)" + OUT, weights(6, 3),
        {"query": 3}, opset=23,
    ),
    "attention of the standard, four axes": Case(
        TOKENS,
        QKV + "tq = Constant<value_ints=[0,0,4,4]>() tk = Constant<value_ints=[0,0,2,4]>()"
        " q1 = Reshape(q, tq) k1 = Reshape(k, tk) v1 = Reshape(v, tk) q2 = Transpose<perm=[0,2,1,3]>(q1)"
        " k2 = Transpose<perm=[0,2,1,3]>(k1) v2 = Transpose<perm=[0,2,1,3]>(v1)"
        " a = Attention(q2, k2, v2, mask) t = Transpose<perm=[0,2,1,3]>(a)"
        " to = Constant<value_ints=[0,0,16]>() o = Reshape(t, to)" + OUT,
        weights(4, 2, mask=(1, 4, 7, 7)), {"query": 2}, opset=23,
    ),
    "rotary embedding of the standard": Case(
        TOKENS,
        QKV + "p = Expand(at, e) r = RotaryEmbedding<num_heads=3>(q, cos, sin, p)"
        " o = Attention<q_num_heads=3,kv_num_heads=3>(r, k, v)" + OUT,
        weights(3, 3, **TABLES, e=np.array([2, 7])), {"query": 3}, opset=23,
    ),
    "multi-head attention": Case(
        TOKENS, QKV + "o = com.microsoft.MultiHeadAttention<num_heads=3>(q, k, v)" + OUT, weights(3, 3),
        {"query": 3},
    ),
    "multi-head attention with a bias": Case(
        TOKENS,
        QKV + "o = com.microsoft.MultiHeadAttention<num_heads=3>(q, k, v, bias, , scores)" + OUT,
        weights(3, 3, bias=(36,), scores=(1, 3, 7, 7)), {"query": 3},
    ),
    "grouped queries": Case(
        TOKENS,
        QKV + COUNT + " o = com.microsoft.GroupQueryAttention<num_heads=4,kv_num_heads=2>"
        "(q, k, v, , , lengths, total)" + OUT,
        weights(4, 2, size=8), {"query": 2},
    ),
    "grouped queries, packed": Case(
        TOKENS,
        "[packed] p = MatMul(x, wp) " + COUNT + " o = com.microsoft.GroupQueryAttention<num_heads=4,kv_num_heads=2>"
        "(p, , , , , lengths, total)" + OUT,
        {"wp": (16, 64), "wo": (32, 5)}, {"packed": 2},
    ),
    "attention that projects": Case(
        TOKENS,
        "[first] h = MatMul(x, w1) r = Relu(h) [heads] o = com.microsoft.Attention<num_heads=3>(r, w2, b2)" + OUT,
        {"w1": (16, 8), "w2": (8, 36), "b2": (36,), "wo": (12, 5)}, {"first": 8, "heads": 3},
    ),
    "attention that projects to other sizes": Case(
        TOKENS,
        "[heads] o = com.microsoft.Attention<num_heads=3,qkv_hidden_sizes=[12,12,6]>(x, w2, b2)" + OUT,
        {"w2": (16, 30), "b2": (30,), "wo": (6, 5)}, {"heads": 3},
    ),
    "rotary embedding": Case(
        TOKENS,
        QKV + "p = Expand(at, e) r = com.microsoft.RotaryEmbedding(q, p, cos, sin)"
        " o = com.microsoft.MultiHeadAttention<num_heads=3>(r, k, v)" + OUT,
        weights(3, 3, **TABLES, e=np.array([2, 7])), {"query": 3},
    ),
    "quantized attention": Case(
        TOKENS,
        "a, b, c = DynamicQuantizeLinear(x) [heads] o = com.microsoft.QAttention<num_heads=3>"
        "(a, w2, b2, b, scale, , c, zero)" + OUT,
        {
            "w2": integers(16, 36), "b2": (36,), "scale": np.full(36, 0.01, np.float32), "zero": np.zeros(36, np.int8),
            "wo": (12, 5),
        }, {"heads": 3},
    ),
    "experts": Case(
        "(float[N,16] x) => (float[N,5] y)",
        '[router] g = Gemm(x, router, offset) [moe] o = com.microsoft.MoE<k=2,activation_type="relu">'
        "(x, g, w1, b1, w2, b2)" + OUT,
        {
            "router": (16, 8), "offset": far(8), "w1": (8, 12, 16), "b1": (8, 12), "w2": (8, 16, 12), "b2": (8, 16),
            "wo": (16, 5),
        }, {"router": 8, "moe": 12},
    ),
    "experts with gates": Case(
        "(float[N,16] x) => (float[N,5] y)",
        '[router] g = Gemm(x, router, offset) [moe] o = com.microsoft.MoE<k=2,activation_type="swiglu",swiglu_fusion=1>'
        "(x, g, w1, b1, w2, b2)" + OUT,
        {
            "router": (16, 8), "offset": far(8), "w1": (8, 24, 16), "b1": (8, 24), "w2": (8, 16, 12), "b2": (8, 16),
            "wo": (16, 5),
        }, {"router": 8, "moe": 12},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_heads_that_can_leave_are_found(name: str) -> None:
    assert units_of(CASES[name].model()) == CASES[name].free


@pytest.mark.parametrize("name", CASES)
def test_the_budget_foresees_the_cost(name: str) -> None:
    assert_budget_is_exact(CASES[name].model())


@pytest.mark.parametrize("name", CASES)
def test_heads_that_are_zero_can_leave(name: str) -> None:
    model = CASES[name].model()
    groups = [group for group in channel_groups(model).free if group.units > 1]
    assert_exact(model, [(group, [0]) for group in groups])


def test_heads_of_packed_queries_keys_and_values_are_found() -> None:
    body = (
        "[packed] p = MatMul(x, wp) t = Constant<value_ints=[0,0,3,3,4]>() q = Reshape(p, t)"
        " o = com.microsoft.MultiHeadAttention<num_heads=3>(q)" + OUT
    )
    assert units_of(Case(TOKENS, body, {"wp": (16, 36), "wo": (12, 5)}, {}).model()) == {"packed": 3}
