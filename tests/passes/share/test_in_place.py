"""Targets whose own compiler codes weights: they stay weights, of few values."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from quantized_models import samples
from small_models import build, context

from graphopt.reference import Reference
from graphopt.runner import run_pass
from graphopt_backends.npu.targets import TARGETS
from graphopt_passes.quant import Quant
from graphopt_passes.share import Share

NPU = next(target for target in TARGETS if target.default)


def model_of() -> ir.Model:
    weights = {"w": (16, 8, 3, 3), "b": (16,), "v": (24, 16, 3, 3)}
    body = "h = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(h) y = Conv<pads=[1,1,1,1]>(r, v)"
    return build("(float[1,8,9,9] x) => (float[1,24,9,9] y)", body, weights)


def values(model: ir.Model, dtype: ir.DataType, least: int = 1000) -> list[int]:
    """Distinct values of each large weight."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return [len(np.unique(t.numpy())) for t in tensors if t is not None and t.dtype == dtype and t.size >= least]


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("data", [False, True], ids=["no data", "data"])
def test_weights_become_few_values_and_the_graph_stays(bits: int, data: bool) -> None:
    model, whole = model_of(), model_of()
    ctx = context(model, calibration=samples(model) if data else None, target=NPU)
    result = run_pass(Share(bits=bits), ctx).result
    assert sum(change.done for change in result.changes) == 2
    assert [node.op_type for node in model.graph] == [node.op_type for node in whole.graph]
    assert all(count <= 2**bits for count in values(model, ir.DataType.FLOAT))
    for feed in samples(model).feeds(4):
        before, after = Reference(whole).run(feed)["y"], Reference(model).run(feed)["y"]
        assert np.square(after - before).sum() < (0.2 if bits == 2 else 0.03) * np.square(before).sum()


def test_integers_of_few_values_are_few() -> None:
    model = model_of()
    ctx = context(model, calibration=samples(model), target=NPU)
    run_pass(Quant(), ctx)
    assert min(values(model, ir.DataType.INT8)) > 64
    model = model_of()
    ctx = context(model, calibration=samples(model), target=NPU)
    run_pass(Share(bits=4), ctx)
    run_pass(Quant(), context(model, calibration=samples(model), target=NPU))
    assert max(values(model, ir.DataType.INT8)) <= 16


def test_other_targets_get_codes() -> None:
    model = model_of()
    run_pass(Share(bits=4), context(model, calibration=samples(model)))
    assert "Gather" in {node.op_type for node in model.graph}
