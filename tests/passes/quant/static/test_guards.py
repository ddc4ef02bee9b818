"""Layers that spoil the outputs step back, and only they."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from quantized_models import actions, decibels, samples
from small_models import build, context

from graphopt.pass_base import PassResult
from graphopt.runner import run_pass
from graphopt_passes.quant import Quant

WEIGHTS = {"w1": (32, 32), "w2": (32, 32), "w3": (32, 32)}
PLAIN: dict[str, object] = {"equalize": False, "smooth": False, "bias_correction": False, "min_sqnr": -99.0}


def magnified(factor: float) -> ir.Model:
    """Three layers; what the second makes wrong is added to the output many times over."""
    body = """[first] a = MatMul(x, w1)  [second] b = MatMul(x, w2)  c = Mul(b, k)  d = Sub(c, e)  f = Add(a, d)
      [third] y = MatMul(f, w3)"""
    model = build("(float[N,32] x, float[N,32] e) => (float[N,32] y)", body, {**WEIGHTS, "k": (1,)})
    value = model.graph.initializers["k"]
    value.const_value = ir.tensor(np.array([factor], np.float32), name="k")
    return model


def quantize(model: ir.Model, **options: object) -> PassResult:
    ctx = context(model, calibration=samples(model))
    return run_pass(Quant(**{**PLAIN, **options}), ctx).result  # type: ignore[arg-type]


def test_a_layer_that_makes_most_of_the_noise_steps_back_alone() -> None:
    quiet = "  ".join(f"[l{i}] a{i} = MatMul(x, w{i})" for i in range(5))
    body = f"s = Mul(x, big)  {quiet}  [loud] b = MatMul(s, v)  y = Sum(a0, a1, a2, a3, a4, b)"
    shapes = {**{f"w{i}": (32, 32) for i in range(5)}, "v": (32, 32), "big": (32,)}
    model = build("(float[N,32] x) => (float[N,32] y)", body, shapes)
    big, weight = np.ones(32, np.float32), np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
    big[0], weight[0] = 300, 0  # one channel that no weight reads fills the grid
    for name, array in (("big", big), ("v", weight / 4)):
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    original = model.clone()
    done = actions(quantize(model))
    assert {done[f"l{i}"] for i in range(5)} == {"int8, calibrated ranges"}
    assert done["loud"].startswith("weights in int8, arithmetic in float: ")
    assert decibels(original, model) > 25


@pytest.mark.parametrize("limit", [10.0, 30.0, 45.0])
def test_the_outputs_keep_the_limit(limit: float) -> None:
    model, original = magnified(1.0), magnified(1.0)
    result = quantize(model, min_output_sqnr=limit)
    if result.modified:
        assert float(result.metrics["output_sqnr_db"]) >= limit
        assert decibels(original, model) > limit - 3


def test_what_nothing_can_save_stays_float() -> None:
    result = quantize(magnified(1.0), min_output_sqnr=75.0)
    assert not result.modified
    assert {name for name, action in actions(result).items() if action.startswith("skipped: ")} >= {"first", "third"}


def test_class_scores_may_be_noisier() -> None:
    body = "[one] a = MatMul(x, w1)  [two] b = MatMul(a, w2)"
    plain = build("(float[N,32] x) => (float[N,32] y)", f"{body}  y = Identity(b)", {"w1": (32, 32), "w2": (32, 32)})
    scores = build("(float[N,32] x) => (float[N,32] y)", f"{body}  y = Softmax(b)", {"w1": (32, 32), "w2": (32, 32)})
    level = float(quantize(scores.clone(), min_output_sqnr=-99.0).metrics["output_sqnr_db"])
    assert quantize(scores, min_output_sqnr=level + 7).metrics["layers_static"] == 2
    level = float(quantize(plain.clone(), min_output_sqnr=-99.0).metrics["output_sqnr_db"])
    assert quantize(plain, min_output_sqnr=level + 7).metrics.get("layers_static", 0) != 2
