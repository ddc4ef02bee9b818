"""Rounding by data where kernels add the products of two neighbouring weights in 16 bits."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from quantized_models import samples
from small_models import build, context

from graphopt_passes.quant._maths import pair_reach, quantize_weight, weight_scales
from graphopt_passes.quant.adjust.prepared import prepared_weight
from graphopt_passes.quant.adjust.rounding import Rounding, round_weights
from graphopt_passes.quant.sites import find_sites


@pytest.mark.parametrize("how", ["gptq", "adaround"])
def test_paired_weights_gain_by_rounding_and_do_not_saturate(how: Rounding) -> None:
    rng = np.random.default_rng(0)
    mixing = (rng.standard_normal((32, 32)) + 1).astype(np.float32)
    model = build(
        "(float[N,32] x) => (float[N,24] y)", "a = MatMul(x, m)\n[one] y = MatMul(a, w)", {"m": (32, 32), "w": (32, 24)}
    )
    weight = rng.standard_normal((32, 24)).astype(np.float32)
    for name, array in (("m", mixing), ("w", weight)):
        model.graph.initializers[name].const_value = ir.Tensor(array, name=name)
    ctx = context(model, calibration=samples(model))
    site = next(site for site in find_sites(model)[0] if site.name == "one")
    change = round_weights(model, [site], how, ctx, bits=lambda site, node: 7, per_channel=True)[0]
    assert change.done and float(change.details["expected_gain_db"]) > 0
    integers = prepared_weight(model.graph.initializers["w"], 1, 7)
    assert integers is not None
    assert pair_reach(integers.T.astype(np.float64)).max() <= 128
    scales = weight_scales(weight, 1, 7)
    assert np.abs(integers.astype(int)).max() > 63, "single weights keep all their bits"
    assert (integers != quantize_weight(weight, scales, 1, 7)).any()
