"""Attention in one kernel equals NumPy's, for any sizes, strides, masks and blocks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from kernel_runner import run, runnable

from graphopt.targets import Isa
from graphopt_backends.kernels.attention import Attention
from graphopt_backends.kernels.expression import Expression, call, number, operand

ISAS = runnable()
pytestmark = pytest.mark.skipif(not ISAS, reason="this CPU runs none of the kernels")
few = settings(
    max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)
isas = st.sampled_from(ISAS or [None])
SCALED = call("mul", operand(0), number(0.3))

_RANDOM = np.random.default_rng(3)


def _expected(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | float = 0.0) -> np.ndarray:
    scores = np.einsum("bqhd,bkhd->bhqk", q.astype(np.float64), k.astype(np.float64)) * np.float32(0.3) + mask
    weights = np.exp(scores - np.maximum(scores.max(-1, keepdims=True), -1e300))
    with np.errstate(invalid="ignore"):
        return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v.astype(np.float64))


def _sides(heads: int, queries: int, keys: int, depth: int, width: int) -> tuple[np.ndarray, ...]:
    """Heads lie side by side, as products leave them."""
    shapes = ((2, queries, heads, depth), (2, keys, heads, depth), (2, keys, heads, width))
    return tuple(_RANDOM.standard_normal(shape).astype(np.float32) * 2 for shape in shapes)


def _kernel(isa: Isa, q: np.ndarray, k: np.ndarray, v: np.ndarray, **more: object) -> Attention:
    (batch, queries, heads, depth), (_, keys, _, width) = q.shape, v.shape

    def steps(rows: int, columns: int) -> tuple[int, int, int]:
        return rows * heads * columns, columns, heads * columns

    kernel = Attention(
        isa, (batch, heads), queries, keys, depth, width, steps(queries, depth), steps(keys, depth),
        steps(keys, width), steps(queries, width), SCALED,
    )  # fmt: skip
    return replace(kernel, **more)


@few
@given(isas, st.integers(1, 3), st.integers(1, 70), st.integers(1, 90), st.integers(1, 40), st.integers(1, 40))
def test_heads_that_lie_side_by_side(isa: Isa, heads: int, queries: int, keys: int, depth: int, width: int) -> None:
    q, k, v = _sides(heads, queries, keys, depth, width)
    got = run(_kernel(isa, q, k, v), [q, k, v], np.empty((2, queries, heads, width), np.float32))
    np.testing.assert_allclose(got, _expected(q, k, v), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("keys", [300, 517])
def test_sums_so_far_are_scaled_after_each_block_of_keys(isa: Isa, keys: int) -> None:
    q, k, v = _sides(1, 37, keys, 16, 20)
    k *= np.linspace(0.1, 3, keys, dtype=np.float32)[:, None, None]  # the greatest scores come late
    small = replace(isa, level1_bytes=8 << 10)
    got = run(_kernel(small, q, k, v), [q, k, v], np.empty((2, 37, 1, 20), np.float32))
    np.testing.assert_allclose(got, _expected(q, k, v), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize(("queries", "keys", "offset"), [(40, 40, 0), (33, 70, 37), (50, 23, 0), (130, 130, 0)])
def test_keys_behind_a_query_are_not_seen(isa: Isa, queries: int, keys: int, offset: int) -> None:
    q, k, v = _sides(2, queries, keys, 8, 8)
    hidden = np.where(np.tri(queries, keys, offset, dtype=bool), 0, -np.inf)
    small = replace(isa, level1_bytes=8 << 10)
    got = run(_kernel(small, q, k, v, causal=offset), [q, k, v], np.empty_like(q))
    np.testing.assert_allclose(got, _expected(q, k, v, hidden), rtol=1e-5, atol=1e-5)


@few
@given(isas, st.sampled_from(["keys", "both", "turned"]), st.integers(1, 40), st.integers(1, 60))
def test_masks_of_any_strides_are_added(isa: Isa, kind: str, queries: int, keys: int) -> None:
    q, k, v = _sides(2, queries, keys, 12, 9)
    mask = _RANDOM.standard_normal((2, 1, queries, keys)).astype(np.float32) * 3
    steps = (queries * keys, 0, keys, 1)
    if kind == "keys":
        mask = mask[:, :, :1].copy()
        steps = (keys, 0, 0, 1)
    stored = mask
    if kind == "turned":
        stored, steps = np.ascontiguousarray(mask.swapaxes(2, 3)), (queries * keys, 0, 1, queries)
    kernel = _kernel(isa, q, k, v, scores=call("add", SCALED, operand(1)), operands=(steps,))
    got = run(kernel, [q, k, v, stored], np.empty((2, queries, 2, 9), np.float32))
    np.testing.assert_allclose(got, _expected(q, k, v, mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("zero", [True, False])
def test_a_query_without_keys_has_zeros_or_no_number(isa: Isa, zero: bool) -> None:
    q, k, v = _sides(1, 20, 50, 8, 8)
    seen = _RANDOM.random((20, 50)) < 0.3
    seen[[0, 7, 19]] = False
    hidden = call("not", call("equal", operand(1), number(0)))
    scores = Expression("where", "float32", (hidden, SCALED, number(float("-inf"))))
    kernel = _kernel(isa, q, k, v, scores=scores, operands=((0, 0, 50, 1),), empty_is_zero=zero)
    got = run(kernel, [q, k, v, seen.astype(np.float32)], np.empty_like(q))
    expected = _expected(q, k, v, np.where(seen, 0, -np.inf))
    np.testing.assert_allclose(got, np.nan_to_num(expected) if zero else expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_rows_masked_by_the_least_float_are_means(isa: Isa) -> None:
    q, k, v = _sides(1, 16, 40, 8, 8)
    mask = np.full((2, 40), np.finfo(np.float32).min)
    kernel = _kernel(isa, q, k, v, scores=call("add", SCALED, operand(1)), operands=((40, 0, 0, 1),))
    got = run(kernel, [q, k, v, mask], np.empty_like(q))
    np.testing.assert_allclose(got, np.broadcast_to(v.mean(1, keepdims=True), q.shape), rtol=1e-5, atol=1e-5)
