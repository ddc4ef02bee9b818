"""BatchNormalization and arithmetic per channel, folded into linear layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest


def weight(*shape: int, seed: int = 0, dtype: type = np.float32) -> np.ndarray:
    return np.asarray(np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


NORM = {name: weight(6, seed=i) for i, name in enumerate("sbmv")}
NORM["v"] = np.abs(NORM["v"]) + np.float32(0.1)
NORM_INPUTS = "float[6] s, float[6] b, float[6] m, float[6] v"


def norm_model(bench: Any, linear: str, data: str, kernel: str, output: str, **arrays: np.ndarray) -> ir.Model:
    body = f"""g ({data} x, {kernel} w, {NORM_INPUTS}) => ({output} y) {{
      {linear} \n y = BatchNormalization(h, s, b, m, v) }}"""
    return bench.with_weights(bench.model(body), **arrays, **NORM)


@pytest.mark.parametrize(
    ("linear", "data", "kernel", "output", "shape"),
    [
        ("h = Conv <pads = [1,1,1,1]> (x, w)", "float[N,4,5,5]", "float[6,4,3,3]", "float[N,6,5,5]", (6, 4, 3, 3)),
        ("h = Conv <group = 2> (x, w)", "float[N,4,5,5]", "float[6,2,3,3]", "float[N,6,3,3]", (6, 2, 3, 3)),
        ("h = Conv <group = 6> (x, w)", "float[N,6,9]", "float[6,1,3]", "float[N,6,7]", (6, 1, 3)),
        ("h = ConvTranspose (x, w)", "float[N,4,5,5]", "float[4,6,3,3]", "float[N,6,7,7]", (4, 6, 3, 3)),
        ("h = ConvTranspose <group = 2> (x, w)", "float[N,4,5]", "float[4,3,3]", "float[N,6,7]", (4, 3, 3)),
        ("h = Gemm (x, w)", "float[N,4]", "float[4,6]", "float[N,6]", (4, 6)),
        ("h = Gemm <transB = 1, alpha = 0.5> (x, w)", "float[N,4]", "float[6,4]", "float[N,6]", (6, 4)),
    ],
)
def test_fold_merges_batchnorm_into_the_layer_before(
    bench: Any, linear: str, data: str, kernel: str, output: str, shape: tuple[int, ...]
) -> None:
    model = norm_model(bench, linear, data, kernel, output, w=weight(*shape))
    bench.check(model)
    assert bench.operators(model) == [linear.split(" = ")[1].split(" ")[0]]
    assert [value.name for value in model.graph.initializers.values()] == ["w", "y_bias"]


def test_fold_turns_the_shift_of_a_bare_matmul_into_an_add(bench: Any) -> None:
    model = norm_model(bench, "h = MatMul(x, w)", "float[N,4]", "float[4,6]", "float[N,6]", w=weight(4, 6))
    bench.check(model)
    assert bench.operators(model) == ["MatMul", "Add"]


def test_fold_uses_the_bias_behind_a_matmul(bench: Any) -> None:
    body = f"""g (float[N,4] x, float[4,6] w, float[6] k, {NORM_INPUTS}) => (float[N,6] y) {{
      a = MatMul(x, w) \n h = Add(k, a) \n y = BatchNormalization(h, s, b, m, v) }}"""
    model = bench.with_weights(bench.model(body), w=weight(4, 6), k=weight(6), **NORM)
    bench.check(model)
    assert bench.operators(model) == ["MatMul", "Add"]


def test_fold_scales_the_bias_of_gemm_by_beta_once(bench: Any) -> None:
    body = f"""g (float[N,4] x, float[4,6] w, float[6] k, {NORM_INPUTS}) => (float[N,6] y) {{
      h = Gemm <alpha = 2.0, beta = 0.25> (x, w, k) \n y = BatchNormalization(h, s, b, m, v) }}"""
    model = bench.with_weights(bench.model(body), w=weight(4, 6), k=weight(6), **NORM)
    bench.check(model)
    assert "beta" not in model.graph[0].attributes


@pytest.mark.parametrize(
    ("reader", "kernel", "output", "shape"),
    [
        ("y = Conv (n, w)", "float[5,6,3,3]", "float[N,5,3,3]", (5, 6, 3, 3)),
        ("y = Conv <group = 3> (n, w)", "float[9,2,3,3]", "float[N,9,3,3]", (9, 2, 3, 3)),
        ('y = Conv <auto_pad = "VALID"> (n, w)', "float[5,6,3,3]", "float[N,5,3,3]", (5, 6, 3, 3)),
    ],
)
def test_fold_merges_batchnorm_into_the_conv_after(
    bench: Any, reader: str, kernel: str, output: str, shape: tuple[int, ...]
) -> None:
    body = f"""g (float[N,6,5,5] x, {kernel} w, {NORM_INPUTS}) => ({output} y) {{
      h = Relu(x) \n n = BatchNormalization(h, s, b, m, v) \n {reader} }}"""
    model = bench.with_weights(bench.model(body), w=weight(*shape), **NORM)
    bench.check(model)
    assert bench.operators(model) == ["Relu", "Conv"]


@pytest.mark.parametrize("transposed", [0, 1])
def test_fold_merges_batchnorm_into_the_gemm_after(bench: Any, transposed: int) -> None:
    shape = (5, 6) if transposed else (6, 5)
    body = f"""g (float[N,6] x, float[{shape[0]},{shape[1]}] w, float[5] k, {NORM_INPUTS}) => (float[N,5] y) {{
      h = Relu(x) \n n = BatchNormalization(h, s, b, m, v)
      y = Gemm <transB = {transposed}, alpha = 0.5, beta = 2.0> (n, w, k) }}"""
    model = bench.with_weights(bench.model(body), w=weight(*shape), k=weight(5), **NORM)
    bench.check(model)
    assert bench.operators(model) == ["Relu", "Gemm"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("h = Conv(x, w) \n y = BatchNormalization(h, s, b, m, v) \n z = Neg(h)", "'h' before it is also read by 'z'"),
        ("z = Conv(x, w) \n y = BatchNormalization(z, s, b, m, v)", "'z' before it feeds an output of the model"),
        ("k = Neg(x) \n z = Conv(k, w) \n y = BatchNormalization(k, s, b, m, v)", "no linear layer computes its input"),
        ("h = Abs(w2) \n z = Conv(x, h) \n q = Conv(x, h) \n y = BatchNormalization(q, s, b, m, v)", "is not constant"),
        (
            "n = BatchNormalization(x, s, b, m, v) \n y = Conv <pads = [1,1,1,1]> (n, w) \n z = Neg(x)",
            "pads with zeros",
        ),
        (
            "n = BatchNormalization(x, s, b, m, v) \n y = Relu(n) \n z = Neg(x)",
            "no Conv or Gemm alone reads its output",
        ),
    ],
)
def test_fold_refuses_a_batchnorm_with_its_reason(bench: Any, body: str, reason: str) -> None:
    inputs = f"float[N,6,5,5] x, float[6,6,3,3] w, float[6,6,3,3] w2, {NORM_INPUTS}"
    model = bench.model(f"g ({inputs}) => (float y, float z) {{ {body} }}")
    for output in model.graph.outputs:
        output.shape = None
    result = bench.check(bench.with_weights(model, w=weight(6, 6, 3, 3), **NORM))
    assert "BatchNormalization" in bench.operators(model)
    assert any(reason in text for text in bench.reasons(result).values()), bench.reasons(result)


def test_fold_refuses_a_batchnorm_in_training(bench: Any) -> None:
    body = f"""g (float[2,4,5,5] x, float[6,4,3,3] w, {NORM_INPUTS}) => (float[2,6,3,3] y) {{
      h = Conv(x, w) \n y = BatchNormalization <training_mode = 1> (h, s, b, m, v) }}"""
    model = bench.with_weights(bench.model(body), w=weight(6, 4, 3, 3), **NORM)
    assert "training mode" in bench.reasons(bench.fold(model))["y"]


def test_fold_refuses_a_weight_that_would_overflow(bench: Any) -> None:
    norm = {name: array.astype(np.float16) for name, array in NORM.items()}
    norm["s"], norm["v"] = np.full(6, 60000, np.float16), np.full(6, 0.0001, np.float16)
    inputs = "float16[N,4] x, float16[4,6] w, float16[6] s, float16[6] b, float16[6] m, float16[6] v"
    body = f"""g ({inputs}) => (float16[N,6] y) {{
      h = Gemm(x, w) \n y = BatchNormalization(h, s, b, m, v) }}"""
    model = bench.with_weights(bench.model(body), w=weight(4, 6, dtype=np.float16), **norm)
    assert "overflow FLOAT16" in bench.reasons(bench.fold(model))["y"]


SHARED = f"""g (float[N,6,5,5] x, float[6,6,3,3] w, {NORM_INPUTS}) => (float[N,6,3,3] y, float[N,6,3,3] z) {{
  h = Conv(x, w) \n y = BatchNormalization(h, s, b, m, v) \n z = Conv(x, w) }}"""


def test_fold_gives_a_shared_weight_its_own_copy(bench: Any) -> None:
    model = bench.with_weights(bench.model(SHARED), w=weight(6, 6, 3, 3), **NORM)
    bench.check(model)
    assert bench.operators(model) == ["Conv", "Conv"]
    assert model.graph[0].inputs[1] is not model.graph[1].inputs[1]


def test_fold_refuses_to_copy_a_large_shared_weight(bench: Any) -> None:
    model = bench.with_weights(bench.model(SHARED), w=weight(6, 6, 3, 3), **NORM)
    result = bench.check(model, limit=100)
    assert "is shared, and a copy has" in bench.reasons(result)["y"]


@pytest.mark.parametrize(
    ("node", "constant", "kept"),
    [
        ("y = Mul(h, k)", "float[6,1,1]", 1),
        ("y = Mul(k, h)", "float[1,6,1,1]", 1),
        ("y = Add(h, k)", "float[6,1,1]", 1),
        ("y = Sub(h, k)", "float", 1),
        ("y = Sub(k, h)", "float[6,1,1]", 1),
        ("y = Div(h, k)", "float[1]", 1),
        ("y = Div(k, h)", "float[6,1,1]", 2),
        ("y = Mul(h, k)", "float[3]", 2),
        ("y = Add(h, k)", "float[1,1,6,1,1]", 2),
    ],
)
def test_fold_merges_arithmetic_per_channel(bench: Any, node: str, constant: str, kept: int) -> None:
    model = bench.model(
        f"g (float[N,4,5,5] x, float[6,4,3,3] w, {constant} k) => (float y) {{ h = Conv(x, w) \n {node} }}"
    )
    model.graph.outputs[0].shape = None
    shape = [int(d) for d in constant[6:-1].split(",")] if "[" in constant else []
    result = bench.check(
        bench.with_weights(
            model, w=weight(6, 4, 3, 3), k=np.abs(weight(*shape, seed=5)).astype(np.float32) + np.float32(0.5)
        )
    )
    assert len(model.graph) == kept
    assert (kept == 2) == bool(bench.reasons(result))


def test_fold_scales_a_batched_matmul_along_its_last_axis(bench: Any) -> None:
    model = bench.model(
        "g (float[N,T,4] x, float[4,6] w, float[6] k) => (float[N,T,6] y) { h = MatMul(x, w) \n y = Mul(h, k) }"
    )
    bench.check(bench.with_weights(model, w=weight(4, 6), k=weight(6)))
    assert bench.operators(model) == ["MatMul"]


def test_fold_leaves_the_bias_of_a_matmul_alone(bench: Any) -> None:
    model = bench.model(
        "g (float[N,4] x, float[4,6] w, float[6] k) => (float[N,6] y) { h = MatMul(x, w) \n y = Add(h, k) }"
    )
    assert not bench.check(bench.with_weights(model, w=weight(4, 6), k=weight(6))).modified


def test_fold_without_batchnorm_leaves_weights_alone(bench: Any) -> None:
    model = norm_model(
        bench, "h = Conv (x, w)", "float[N,4,5,5]", "float[6,4,3,3]", "float[N,6,3,3]", w=weight(6, 4, 3, 3)
    )
    assert not bench.fold(model, batchnorm=False).modified


def test_fold_computes_large_weights_only_when_they_are_written(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt_passes.fold._linear.LARGE", 100)
    model = norm_model(
        bench, "h = Conv (x, w)", "float[N,4,5,5]", "float[6,4,3,3]", "float[N,6,3,3]", w=weight(6, 4, 3, 3)
    )
    bench.check(model)
    assert isinstance(model.graph.initializers["w"].const_value, ir.LazyTensor)


def test_fold_keeps_metadata_and_doc_strings(bench: Any) -> None:
    model = bench.model(
        "g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { k = Neg(w) \n h = Add(x, k) \n y = Identity(h) }"
    )
    model.graph[0].outputs[0].metadata_props["origin"] = "layer 1"
    model.graph[1].metadata_props["layer"] = "add"
    model.graph[1].doc_string = "adds"
    bench.check(model)
    node = model.graph[0]
    assert (node.metadata_props["layer"], node.doc_string) == ("add", "adds")
    assert model.graph.initializers["k"].metadata_props["origin"] == "layer 1"
