from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from quantized_models import actions, decibels, kinds, optimized, samples, tensors
from small_models import build, context

from graphopt.analyses.quantized import find_quantized
from graphopt.pass_base import PassResult
from graphopt.plugins import load_plugins
from graphopt.reference import Reference
from graphopt.runner import run_pass
from graphopt.targets import IntegerRules, Target
from graphopt_passes.fold import Fold
from graphopt_passes.quant import Quant

AT_LOAD = Target(name="here", integers=IntegerRules(weights_at_load=True))
LAYERS = {
    "conv": (
        "(float[N,8,6,6] x) => (float[N,16,4,4] y)",
        "[it] y = Conv(x, w, b)",
        {"w": (16, 8, 3, 3), "b": (16,)},
    ),
    "transposed": ("(float[N,8,4,4] x) => (float[N,16,6,6] y)", "[it] y = ConvTranspose(x, w)", {"w": (8, 16, 3, 3)}),
    "lstm": (
        "(float[5,N,16] x) => (float[5,1,N,32] y)",
        "[it] y = LSTM<hidden_size = 32>(x, w, r, b)",
        {"w": (1, 128, 16), "r": (1, 128, 32), "b": (1, 256)},
    ),
    "gru": (
        "(float[5,N,16] x) => (float[5,2,N,32] y)",
        '[it] y = GRU<hidden_size = 32, direction = "bidirectional">(x, w, r)',
        {"w": (2, 96, 16), "r": (2, 96, 32)},
    ),
    "left": ("(float[128,N] x) => (float[64,N] y)", "[it] y = MatMul(w, x)", {"w": (64, 128)}),
    "batch": ("(float[4,N,32] x) => (float[4,N,64] y)", "[it] y = MatMul(x, w)", {"w": (4, 32, 64)}),
}


def stored(name: str, target: Target, opset: int = 17) -> tuple[ir.Model, PassResult]:
    model = build(*LAYERS[name], opset)
    return model, run_pass(Quant(mode="weight"), context(model, target=target)).result


@pytest.mark.parametrize("name", LAYERS)
def test_weights_are_computed_at_load_and_are_the_same_numbers(name: str) -> None:
    model, result = stored(name, AT_LOAD)
    other, _ = stored(name, Target(name="elsewhere"))
    assert actions(result)["it"] == "weights in int8, arithmetic in float"
    assert "DequantizeLinear" not in kinds(model)
    assert kinds(other).count("DequantizeLinear") == kinds(model).count("Cast")
    assert decibels(build(*LAYERS[name]), model) > 25
    left, right = Reference(model), Reference(other)
    for feed in samples(model, 4).feeds():
        np.testing.assert_allclose(left.run(feed)["y"], right.run(feed)["y"], rtol=1e-4, atol=1e-5)
    assert not {"Cast", "Mul"} & set(optimized(model))
    assert all(value.uses() for value in model.graph.initializers.values())
    assert {str(layer) for layer in find_quantized(model).values()} == {"weight-only int8"}


def test_a_matrix_on_the_right_keeps_its_integers_which_runtimes_multiply_with() -> None:
    for body in ("[it] y = MatMul(x, w)", "[it] y = Gemm(x, w)"):
        model = build("(float[N,64] x) => (float[N,32] y)", body, {"w": (64, 32)})
        run_pass(Quant(mode="weight"), context(model, target=AT_LOAD))
        assert "DequantizeLinear" in kinds(model)


def test_a_loop_reads_weights_that_were_computed_outside() -> None:
    body = """
      yes = Constant<value = bool {1}>()  three = Constant<value = int64 {3}>()
      y = Loop(three, yes, x) <body = b (int64 i, bool t, float[2,8,4,4] s) => (bool u, float[2,8,4,4] o) {
        u = Identity(t)  [it] h = Conv<pads = [1,1,1,1]>(s, w)  o = Tanh(h)
      }>"""
    signature, weights = "(float[2,8,4,4] x) => (float[2,8,4,4] y)", {"w": (8, 8, 3, 3)}
    model = build(signature, body, weights)
    run_pass(Quant(mode="weight"), context(model, target=AT_LOAD))
    assert {"Cast", "Mul"} <= {node.op_type for node in model.graph}
    assert decibels(build(signature, body, weights), model) > 15


def test_layers_that_share_a_weight_share_what_is_made_of_it() -> None:
    body = "h = Conv<pads = [1,1,1,1]>(x, w)  y = Conv<pads = [1,1,1,1]>(h, w)"
    model = build("(float[N,8,4,4] x) => (float[N,8,4,4] y)", body, {"w": (8, 8, 3, 3)})
    run_pass(Quant(mode="weight"), context(model, target=AT_LOAD))
    assert kinds(model).count("Mul") == 1
    assert sorted(tensors(model)) == ["w_factor", "w_q"]


def test_fold_leaves_weights_kept_in_8_bits() -> None:
    model, _ = stored("conv", AT_LOAD)
    result = run_pass(Fold(), context(model)).result
    assert not result.modified
    assert any("a weight kept in 8 bits" in change.action for change in result.changes)


def test_the_portable_target_computes_weights_at_load() -> None:
    model, _ = stored("conv", load_plugins().targets.resolve("ort"))
    assert kinds(model) == ["Cast", "Conv", "Mul"]
