"""Chosen integers keep the limit of kernels that add two products of uint8 and int8 in 16 bits."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from rewritten_models import data
from text_models import build

from graphopt.pass_base import Context
from graphopt.runner import run_pass
from graphopt.targets import IntegerRules, Target
from graphopt_passes.quant import Quant
from graphopt_passes.quant._maths import pair_reach

NARROW = Target(name="ort", integers=IntegerRules(weight_bits=7))
MODELS = {
    "MatMul": ("g (float[B,96] x) => (float[B,40] y) { y = MatMul(x, w) }", (96, 40), 1),
    "Gemm": ("g (float[B,96] x) => (float[B,40] y) { y = Gemm<transB = 1>(x, w) }", (40, 96), 0),
    "Conv": ("g (float[2,12,8,8] x) => (float[2,40,6,6] y) { y = Conv(x, w) }", (40, 12, 3, 3), 0),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("rounding", ["gptq", "adaround"])
def test_chosen_integers_never_saturate_sixteen_bits(kind: str, rounding: str) -> None:
    text, shape, axis = MODELS[kind]
    model = build(text, w=shape)
    quant = Quant(mode="static", rounding=rounding, min_sqnr=-99.0, min_output_sqnr=-99.0, smooth=False)  # type: ignore[arg-type]
    result = run_pass(quant, Context(model, NARROW, calibration=data(model))).result
    assert any("weights rounded by" in change.action for change in result.changes)
    stored = [v.const_value for v in model.graph.initializers.values()]
    weights = [t.numpy() for t in stored if t is not None and t.dtype == ir.DataType.INT8 and t.size > 1000]
    assert len(weights) == 1
    assert pair_reach(np.moveaxis(weights[0], axis, 0).astype(np.float64)).max() <= 128
