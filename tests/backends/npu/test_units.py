"""Operators that become one operation on integers together."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from quantized_models import samples
from small_models import build, context

from graphopt.model_io import ShapeBinding
from graphopt.runner import run_pass
from graphopt_backends._lower import lower
from graphopt_backends.npu.operators import refusal
from graphopt_backends.npu.targets import TARGETS
from graphopt_backends.npu.units import Unit, find_units
from graphopt_passes.quant import Quant

NPU = next(target for target in TARGETS if target.default)

BODIES = {
    "bias behind a product": "m = MatMul(x, w) y = Add(m, b)",
    "bias in front": "m = MatMul(x, w) y = Add(b, m)",
    "and an activation": "m = MatMul(x, w) a = Add(m, b) y = Relu(a)",
}


def units_of(body: str) -> tuple[list[Unit], list[str]]:
    model: ir.Model = build("(float[1,6,24] x) => (float[1,6,16] y)", body, {"w": (24, 16), "b": (16,)})
    run_pass(Quant(), context(model, calibration=samples(model), target=NPU))
    found, reasons = find_units(lower(model, ShapeBinding(), "npu").model.graph)
    return list(found.values()), [why for node, why in reasons.items() if node.op_type != "Cast"]


@pytest.mark.parametrize("name", BODIES)
def test_a_product_takes_its_bias_along(name: str) -> None:
    (unit,), reasons = units_of(BODIES[name])
    assert unit.kind == "MatMul"
    wanted = ["MatMul", "Add", "Relu"] if "Relu" in BODIES[name] else ["MatMul", "Add"]
    assert [node.op_type for node in unit.nodes] == wanted
    bias = unit.inputs[2]
    assert bias is not None
    assert np.size(bias.real) == 16
    assert not reasons
    assert refusal(unit, "u55") == ""


def test_a_sum_of_two_activations_is_a_sum() -> None:
    units, _ = units_of("m = MatMul(x, w) n = MatMul(x, w) y = Add(m, n)")
    assert [unit.kind for unit in units] == ["MatMul", "MatMul", "Add"]
