"""Weights that integers cannot carry, and what is said of them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from small_models import build, context

from graphopt.pass_base import PassResult
from graphopt.reference import Reference
from graphopt.runner import run_pass
from graphopt_passes.quant import Quant

OPTIONS = ({}, {"mode": "dynamic"}, {"mode": "weight"}, {"bits": 4}, {"bits": "auto"}, {"dtype": "fp8"})


def layer(rows: int, columns: int) -> ir.Model:
    signature = f"(float[N,{rows}] x) => (float[N,{columns}] y)"
    return build(signature, "[layer] y = MatMul(x, w)", {"w": (rows, columns)})


def run(model: ir.Model, **options: object) -> PassResult:
    return run_pass(Quant(**options), context(model)).result  # type: ignore[arg-type]


def reasons(result: PassResult, site: str) -> list[str]:
    return [change.action for change in result.changes if change.site == site and not change.done]


@pytest.mark.parametrize("options", (*OPTIONS, {"dtype": "bf16"}))
@pytest.mark.parametrize(("rows", "columns"), [(0, 64), (64, 0)])
def test_an_empty_weight_is_left_alone(rows: int, columns: int, options: dict[str, object]) -> None:
    result = run(layer(rows, columns), **options)
    assert not result.modified
    assert reasons(result, "layer") == ["skipped: its weight is empty"]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_weight_that_holds_infinities_is_left_alone(options: dict[str, object]) -> None:
    model = layer(64, 64)
    value = model.graph.initializers["w"]
    assert value.const_value is not None
    weight = value.const_value.numpy().copy()
    weight[3, 5] = -np.inf
    value.const_value = ir.tensor(weight, name="w")
    result = run(model, **options)
    assert not result.modified
    assert "skipped: its weight holds infinities" in reasons(result, "layer")


@pytest.mark.parametrize(("dtype", "stored"), [("bf16", "bfloat16"), ("fp8", "float8e4m3fn")])
@pytest.mark.parametrize("options", (*OPTIONS, {"dtype": "bf16"}))
def test_a_weight_that_is_stored_in_a_narrow_float_is_not_narrowed_again(
    dtype: str, stored: str, options: dict[str, object]
) -> None:
    model = layer(64, 64)
    assert run(model, dtype=dtype).modified
    result = run(model, **options)
    assert not result.modified
    (reason,) = reasons(result, "layer")
    assert reason in (
        f"skipped: its weight is stored in {stored} already",
        "skipped: already quantized (weight-only float8)",
    )


def test_bf16_says_of_small_weights_why_they_stay() -> None:
    result = run(layer(8, 8), dtype="bf16")
    assert reasons(result, "layer") == ["skipped: so few weights that a Cast would cost more than bf16 saves"]


def test_a_model_with_weights_outside_its_inputs_is_raised_from_before_ir_version_4() -> None:
    body = """
    a = MatMul(x, w)
    [norm] y = BatchNormalization(a, s, b, m, v)
    """
    shapes = {"w": (64, 64), **dict.fromkeys(("s", "b", "m", "v"), (64,))}
    model = build("(float[N,64] x) => (float[N,64] y)", body, shapes, opset=7)
    variance = model.graph.initializers["v"]
    assert variance.const_value is not None
    variance.const_value = ir.tensor(np.abs(variance.const_value.numpy()) + 1, name="v")
    model.ir_version = 3
    before = Reference(model.clone())
    assert run(model).modified
    after, rng = Reference(model), np.random.default_rng(0)
    for _ in range(4):
        feed = {"x": rng.standard_normal((4, 64)).astype(np.float32)}
        exact, got = before.run(feed)["y"], after.run(feed)["y"]
        assert np.square(exact - got).sum() < 1e-2 * np.square(exact).sum()
