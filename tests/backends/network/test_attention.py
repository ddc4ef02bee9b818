"""What exporters write for attention becomes one kernel, and equals ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from kernel_runner import runnable
from network_runner import run_network
from text_models import build as model_of

from graphopt.reference import Reference
from graphopt.targets import Isa

ISAS = runnable()
isas = pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)

Check = Callable[..., None]

HEADS = """
    q0 = Reshape(q, split)
    q1 = Transpose<perm=[0,2,1,3]>(q0)
    k0 = Reshape(k, split)
    v0 = Reshape(v, split)
    v1 = Transpose<perm=[0,2,1,3]>(v0)
"""
JOINED = """
    o1 = Transpose<perm=[0,2,1,3]>(o0)
    y = Reshape(o1, joined)
"""
INPUTS = "float[2,21,24] q, float[2,21,24] k, float[2,21,24] v"
SHAPES = {"split": np.array([2, 21, 3, 8]), "joined": np.array([2, 21, 24])}


def _feed(model: ir.Model, seed: int) -> dict[str, np.ndarray]:
    random, found = np.random.default_rng(seed), dict[str, np.ndarray]()
    for value in model.graph.inputs:
        drawn = random.standard_normal([int(size) for size in value.shape or ()]).astype(np.float32)
        found[str(value.name)] = drawn > -1 if value.dtype == ir.DataType.BOOL else drawn
    return found


@pytest.fixture
def check() -> Check:
    """Compile a model once and compare four runs."""

    def run(text: str, isa: Isa, kernels: list[str] | None = None, opset: int = 20, **weights: np.ndarray) -> None:
        model = model_of(text, opset, **weights)
        reference = Reference(model.clone(), threads=1)
        for seed in range(4):
            feed = _feed(model, seed)
            got, ran = run_network(model, isa, feed, tasks=1)
            for name, expected in reference.run(feed).items():
                np.testing.assert_allclose(got[name], expected, rtol=1e-4, atol=1e-4)
            assert kernels is None or ran == kernels

    return run


@isas
def test_scores_with_a_mask_for_keys_are_one_kernel(check: Check, isa: Isa) -> None:
    check(
        f"""
        g ({INPUTS}, float[2,1,1,21] m) => (float[2,21,24] y) {{
            {HEADS}
            k1 = Transpose<perm=[0,2,3,1]>(k0)
            s0 = MatMul(q1, k1)
            s1 = Div(s0, root)
            s2 = Add(s1, m)
            p = Softmax<axis=-1>(s2)
            o0 = MatMul(p, v1)
            {JOINED}
        }}""",
        isa, ["Attention", "Loops"], root=np.float32(2.8), **SHAPES,
    )  # fmt: skip


@isas
def test_factors_of_both_sides_and_rows_without_numbers_as_torch_writes_them(check: Check, isa: Isa) -> None:
    check(
        f"""
        g ({INPUTS}, bool[2,1,21,21] seen) => (float[2,21,24] y) {{
            {HEADS}
            k1 = Transpose<perm=[0,2,3,1]>(k0)
            q2 = Mul(q1, factor)
            k2 = Mul(k1, factor)
            s0 = MatMul(q2, k2)
            m = Where(seen, zero, hidden)
            s1 = Add(s0, m)
            p = Softmax<axis=-1>(s1)
            n = IsNaN(p)
            p1 = Where(n, zero, p)
            o0 = MatMul(p1, v1)
            {JOINED}
        }}""",
        isa, ["Loops", "Attention", "Loops"], factor=np.float32(0.59), zero=np.float32(0),
        hidden=np.float32(-np.inf), **SHAPES,
    )  # fmt: skip


@isas
@pytest.mark.parametrize("form", ["added", "chosen"])
def test_a_constant_triangle_is_no_mask_that_is_read(check: Check, isa: Isa, form: str) -> None:
    triangle = np.tri(21, dtype=bool)
    mask = triangle if form == "chosen" else np.where(triangle, 0, -np.inf).astype(np.float32)
    masked = "Where(mask, s0, hidden)" if form == "chosen" else "Add(s0, mask)"
    text = f"""
        g ({INPUTS}) => (float[2,21,24] y) {{
            {HEADS}
            k1 = Transpose<perm=[0,2,3,1]>(k0)
            s0 = MatMul(q1, k1)
            s1 = {masked}
            p = Softmax<axis=-1>(s1)
            o0 = MatMul(p, v1)
            {JOINED}
        }}"""
    check(text, isa, ["Attention", "Loops"], mask=mask, hidden=np.float32(-1e30), **SHAPES)


@isas
def test_repeated_keys_and_values_are_read_where_they_are(check: Check, isa: Isa) -> None:
    check(
        """
        g (float[2,6,21,8] q, float[2,3,21,8] k, float[2,3,21,8] v) => (float[2,6,21,8] y) {
            k0 = Unsqueeze(k, axes)
            k1 = Expand(k0, wide)
            k2 = Reshape(k1, joined)
            k3 = Transpose<perm=[0,1,3,2]>(k2)
            v0 = Unsqueeze(v, axes)
            v1 = Expand(v0, wide)
            v2 = Reshape(v1, joined)
            s = MatMul(q, k3)
            p = Softmax<axis=-1>(s)
            y = MatMul(p, v2)
        }""",
        isa, ["Attention"], axes=np.array([2]), wide=np.array([2, 3, 2, 21, 8]), joined=np.array([2, 6, 21, 8]),
    )  # fmt: skip


@isas
def test_masks_of_shifted_windows_are_read_behind_a_reshape(check: Check, isa: Isa) -> None:
    random = np.random.default_rng(1)
    bias, shifted = (random.standard_normal(s).astype(np.float32) for s in ((1, 3, 9, 9), (1, 4, 1, 9, 9)))
    check(
        """
        g (float[8,3,9,16] q, float[8,3,9,16] k, float[8,3,9,16] v) => (float[8,3,9,16] y) {
            k1 = Transpose<perm=[0,1,3,2]>(k)
            s0 = MatMul(q, k1)
            s1 = Add(s0, bias)
            s2 = Reshape(s1, windows)
            s3 = Add(s2, shifted)
            s4 = Reshape(s3, back)
            p = Softmax<axis=-1>(s4)
            y = MatMul(p, v)
        }""",
        isa, ["Attention"], bias=bias, shifted=shifted, windows=np.array([2, 4, 3, 9, 9]),
        back=np.array([8, 3, 9, 9]),
    )  # fmt: skip


@isas
def test_scores_that_are_read_twice_stay_what_they_are(check: Check, isa: Isa) -> None:
    check(
        """
        g (float[2,9,16] q, float[2,16,9] k, float[2,9,16] v) => (float[2,9,16] y, float[2,9,9] p) {
            s = MatMul(q, k)
            p = Softmax<axis=-1>(s)
            y = MatMul(p, v)
        }""",
        isa, ["Batched", "Softmax", "Batched"],
    )  # fmt: skip


@isas
def test_a_softmax_of_a_product_with_a_weight_is_no_attention(check: Check, isa: Isa) -> None:
    check(
        """
        g (float[9,16] q, float[11,5] v) => (float[9,5] y) {
            s = MatMul(q, w)
            p = Softmax<axis=-1>(s)
            y = MatMul(p, v)
        }""",
        isa, ["Gemm", "Softmax", "Batched"], w=np.ones((16, 11), np.float32),
    )  # fmt: skip


@isas
@pytest.mark.parametrize("attributes", ["is_causal=1", "softcap=2.0", "scale=0.2"])
def test_the_operator_with_shared_keys_and_side_by_side_heads(check: Check, isa: Isa, attributes: str) -> None:
    check(
        f"""
        g (float[2,18,24] q, float[2,18,12] k, float[2,18,6] v) => (float[2,18,12] y) {{
            y = Attention<q_num_heads=4, kv_num_heads=2, {attributes}>(q, k, v)
        }}""",
        isa, ["Attention", "Loops"], opset=23,
    )  # fmt: skip


@isas
@pytest.mark.parametrize("mask", ["float[18,25] m", "bool[2,1,18,25] m"])
def test_the_operator_with_masks(check: Check, isa: Isa, mask: str) -> None:
    check(
        f"""
        g (float[2,4,18,8] q, float[2,4,25,8] k, float[2,4,25,5] v, {mask}) => (float[2,4,18,5] y) {{
            y = Attention(q, k, v, m)
        }}""",
        isa, None, opset=23,
    )  # fmt: skip
