"""What ONNX Runtime makes of static layers when it loads them: products of integers, not floats made on every run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from quantized_models import actions, decibels, samples, tensors
from small_models import build, context

from graphopt.model_io import model_bytes
from graphopt.runner import run_pass
from graphopt_passes.quant import Quant

Shape = tuple[int, ...]
PLAIN: dict[str, object] = {"equalize": False, "smooth": False, "min_sqnr": -99.0, "min_output_sqnr": -99.0}
FEED_FORWARD = "[one] a = MatMul(x, w)  [bias] b = Add(c, a)  [act] r = Relu(b)  [two] d = MatMul(r, v)  y = Add(d, e)"
WEIGHTS: dict[str, Shape] = {"w": (32, 64), "c": (64,), "v": (64, 32), "e": (32,)}


def quantize(model: ir.Model, **options: object) -> dict[str, str]:
    return actions(run_pass(Quant(**{**PLAIN, **options}), context(model, calibration=samples(model))).result)  # type: ignore[arg-type]


def loaded(model: ir.Model, folder: Path) -> list[str]:
    """Operators of a model after ONNX Runtime optimized it."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimized.onnx"), 3
    onnxruntime.InferenceSession(model_bytes(model), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]


@pytest.mark.parametrize("options", [{}, {"per_channel": False}, {"bias_correction": False}])
@pytest.mark.parametrize("sizes", ["4,32", "2,4,32"])
def test_products_and_the_vectors_added_to_them_are_computed_on_integers(
    sizes: str, options: dict[str, object], tmp_path: Path
) -> None:
    signature = f"(float[{sizes}] x) => (float[{sizes}] y)"
    model, original = build(signature, FEED_FORWARD, WEIGHTS), build(signature, FEED_FORWARD, WEIGHTS)
    assert quantize(model, **options)["one"] == "int8, calibrated ranges"
    kinds = loaded(model, tmp_path)
    assert kinds.count("QGemm") == 2
    assert "DequantizeLinear" not in kinds
    assert decibels(original, model) > 27


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", ["", ", b"])
def test_a_gemm_is_computed_on_integers(transposed: int, bias: str, tmp_path: Path) -> None:
    signature, body = "(float[N,32] x) => (float[N,64] y)", f"[it] y = Gemm<transB = {transposed}>(x, w{bias})"
    weights: dict[str, Shape] = {"w": (64, 32) if transposed else (32, 64), **({"b": (64,)} if bias else {})}
    model, original = build(signature, body, weights), build(signature, body, weights)
    quantize(model)
    assert "QGemm" in loaded(model, tmp_path)
    assert decibels(original, model) > 30


def test_a_channel_of_tiny_weights_does_not_keep_the_others_off_integers(tmp_path: Path) -> None:
    signature, body = "(float[4,32] x) => (float[4,64] y)", "[one] a = MatMul(x, w)  y = Add(a, c)"
    shapes: dict[str, Shape] = {"w": (32, 64), "c": (64,)}
    model, original = build(signature, body, shapes), build(signature, body, shapes)
    for one in (model, original):
        value = one.graph.initializers["w"]
        array = np.array(value.const_value.numpy())  # type: ignore[union-attr]
        array[:, 5] *= 1e-12
        value.const_value = ir.tensor(array, name="w")
    quantize(model)
    assert "QGemm" in loaded(model, tmp_path)
    assert decibels(original, model) > 27


def test_layers_of_equal_width_share_their_zero_points() -> None:
    signature = "(float[4,64] x) => (float[4,64] y)"
    body = "[one] a = Gemm(x, w)  [two] b = Gemm(a, v)  [three] y = Gemm<transB = 1>(b, u)"
    model = build(signature, body, {"w": (64, 64), "v": (64, 64), "u": (64, 64)})
    quantize(model)
    zeros = [name for name, tensor in tensors(model).items() if tensor.dtype == ir.DataType.INT8 and tensor.size == 64]
    assert zeros == ["weight_zeros"]
    assert len(tuple(model.graph.initializers["weight_zeros"].uses())) == 3


def test_a_product_that_stays_one_has_no_zero_points() -> None:
    model = build("(float[4,32] x) => (float[4,64] y)", "[it] y = MatMul(x, w)", {"w": (32, 64)})
    quantize(model)
    assert "weight_zeros" not in tensors(model)


@pytest.mark.parametrize(
    ("signature", "body", "shape"),
    [
        ("(float[4,32] x) => (float[4,64] y, float[4,64] a)", "[it] a = MatMul(x, w)  y = Add(a, c)", (64,)),
        ("(float[4,32] x) => (float[4,64] y, float[4,64] z)", "[it] a = MatMul(x, w) z = Relu(a) y = Add(a, c)", (64,)),
        ("(float[4,32] x) => (float[4,64] y)", "[it] a = MatMul(x, w)  y = Add(a, c)", (4, 64)),
        ("(float[4,32] x) => (float[4,64] y)", "[it] a = MatMul(x, w)  y = Add(a, c)", (1,)),
    ],
    ids=["an output", "read twice", "a matrix", "one number"],
)
def test_what_is_no_bias_of_the_product_stays_float(signature: str, body: str, shape: Shape) -> None:
    shapes: dict[str, Shape] = {"w": (32, 64), "c": shape}
    model, original = build(signature, body, shapes), build(signature, body, shapes)
    assert quantize(model, bias_correction=False)["it"] == "int8, calibrated ranges"
    assert "c" in tensors(model)
    assert decibels(original, model) > 27


def test_a_vector_that_two_products_add_is_rounded_for_each(tmp_path: Path) -> None:
    signature = "(float[4,32] x) => (float[4,64] y, float[4,64] z)"
    body = "[one] a = MatMul(x, w)  y = Add(a, c)  [two] b = MatMul(x, v)  z = Add(c, b)"
    shapes: dict[str, Shape] = {"w": (32, 64), "v": (32, 64), "c": (64,)}
    model, original = build(signature, body, shapes), build(signature, body, shapes)
    quantize(model)
    assert loaded(model, tmp_path).count("QGemm") == 2
    assert decibels(original, model) > 27


def test_a_shared_weight_stays_one_where_every_bias_fits() -> None:
    signature = "(float[4,32] x) => (float[4,32] y)"
    body = "[one] a = MatMul(x, w)  b = Add(a, c)  r = Relu(b)  [two] d = MatMul(r, w)  y = Add(d, e)"
    model = build(signature, body, {"w": (32, 32), "c": (32,), "e": (32,)})
    quantize(model)
    matrices = [name for name, tensor in tensors(model).items() if len(tensor.shape) == 2]
    assert matrices == ["w_q"]


GEMMS: dict[str, tuple[str, dict[str, Shape]]] = {
    "alpha": ("[it] y = Gemm<alpha = 0.5>(x, w, b)", {"w": (32, 64), "b": (64,)}),
    "negative alpha": ("[it] y = Gemm<alpha = -2.0, transB = 1>(x, w, b)", {"w": (64, 32), "b": (64,)}),
    "alpha alone": ("[it] y = Gemm<alpha = 0.5>(x, w)", {"w": (32, 64)}),
    "beta": ("[it] y = Gemm<beta = 3.0>(x, w, b)", {"w": (32, 64), "b": (64,)}),
    "no beta": ("[it] y = Gemm<beta = 0.0>(x, w, b)", {"w": (32, 64), "b": (64,)}),
    "a row": ("[it] y = Gemm(x, w, b)", {"w": (32, 64), "b": (1, 64)}),
    "one number": ("[it] y = Gemm<beta = 0.5>(x, w, b)", {"w": (32, 64), "b": (1,)}),
    "a column": ("[it] y = Gemm<alpha = 2.0>(x, w, b)", {"w": (32, 64), "b": (4, 1)}),
    "a matrix": ("[it] y = Gemm<beta = 0.5>(x, w, b)", {"w": (32, 64), "b": (4, 64)}),
    "a computed bias": ("c = Exp(b)  [it] y = Gemm<alpha = 2.0, beta = 0.5>(x, w, c)", {"w": (32, 64), "b": (64,)}),
    "two of one weight": (
        "[it] h = Gemm<alpha = 0.5>(x, w, b)  [two] y = Gemm<alpha = 2.0>(h, w)", {"w": (32, 32), "b": (32,)}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", GEMMS)
def test_any_gemm_is_computed_on_integers(case: str, tmp_path: Path) -> None:
    body, weights = GEMMS[case]
    signature = f"(float[4,32] x) => (float[4,{32 if 'two' in case else 64}] y)"
    model, original = build(signature, body, weights), build(signature, body, weights)
    assert quantize(model)["it"] == "int8, calibrated ranges"
    kinds = loaded(model, tmp_path)
    assert kinds.count("QGemm") == (2 if "two" in case else 1)
    assert "DequantizeLinear" not in kinds
    assert decibels(original, model) > 27
    assert "w" not in tensors(model)


def test_a_gemm_that_is_left_alone_keeps_its_form() -> None:
    body, weights = GEMMS["alpha"]
    model = build("(float[4,32] x) => (float[4,64] z)", f"{body}  [other] z = MatMul(y, v)", {**weights, "v": (64, 64)})
    quantize(model, skip=("it",))
    gemm = next(node for node in model.graph if node.op_type == "Gemm")
    assert gemm.attributes.get_float("alpha", 1.0) == 0.5


@pytest.mark.parametrize("order", ["a, c", "c, a"])
def test_what_a_product_adds_is_no_layer_of_its_own(order: str) -> None:
    shapes: dict[str, Shape] = {"w": (32, 64), "c": (64,), "d": (4, 64)}
    body = f"[one] a = MatMul(x, w)  [bias] b = Add({order})  [more] y = Add(b, d)"
    model = build("(float[4,32] x) => (float[4,64] y)", body, shapes)
    done = quantize(model)
    assert "bias" not in done
    assert done["more"] == "skipped: Add stays in float"
