"""Models that ONNX Runtime's tools have quantized prune like others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from operator_cases import assert_exact, build, run, units_of
from small_models import IMAGE, channel_groups, context, feeds

from graphopt.analyses import COST
from graphopt.calibration import Dataset
from graphopt.criterion_base import weight_sums, weights_of
from graphopt.model_io import load_model
from graphopt_passes.prune import Prune

BODY = """
    [conv] a = Conv<pads=[1,1,1,1]>(x, w1, b1) r = Relu(a)
    [branch] b = Conv<pads=[1,1,1,1]>(r, w2, b2) s = Add(r, b) m = MaxPool<kernel_shape=[2,2],strides=[2,2]>(s)
    [point] p = Conv(m, w3, b3) q = Relu(p) [other] o = Conv(m, w4) c = Concat<axis=1>(q, o)
    [depth] d = Conv<group=48>(c, w5, b5) t = LeakyRelu(d) g = GlobalAveragePool(t) f = Flatten(g)
    [hidden] h = Gemm(f, w6, b6) u = Relu(h) [last] y = MatMul(u, w9)
"""
WEIGHTS = {
    "w1": (32, 3, 3, 3), "b1": (32,), "w2": (32, 32, 3, 3), "b2": (32,), "w3": (32, 32, 1, 1), "b3": (32,),
    "w4": (16, 32, 1, 1), "w5": (48, 1, 3, 3), "b5": (48,), "w6": (48, 64), "b6": (64,), "w9": (64, 5),
}  # fmt: skip
UNITS = [32, 32, 16, 64]


class Samples(CalibrationDataReader):
    """Four batches of two random images."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.batches: Iterator = iter([{"x": rng.standard_normal((2, 3, 8, 8), dtype=np.float32)} for _ in range(4)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def static(form: QuantFormat, weights: QuantType, *, per_channel: bool) -> Callable[[Path, Path], None]:
    def quantize(source: Path, target: Path) -> None:
        quantize_static(
            source, target, Samples(), quant_format=form, per_channel=per_channel, activation_type=QuantType.QUInt8,
            weight_type=weights,
        )  # fmt: skip

    return quantize


def dynamic(source: Path, target: Path) -> None:
    quantize_dynamic(source, target, per_channel=True, op_types_to_quantize=["Conv", "MatMul"])


FORMS: dict[str, Callable[[Path, Path], None]] = {
    "nodes around, per channel": static(QuantFormat.QDQ, QuantType.QInt8, per_channel=True),
    "nodes around, per tensor": static(QuantFormat.QDQ, QuantType.QUInt8, per_channel=False),
    "operators, per channel": static(QuantFormat.QOperator, QuantType.QInt8, per_channel=True),
    "operators, per tensor": static(QuantFormat.QOperator, QuantType.QUInt8, per_channel=False),
    "dynamic": dynamic,
}


@pytest.fixture(params=FORMS)
def quantized(request: pytest.FixtureRequest, tmp_path: Path) -> ir.Model:
    ir.save(build(IMAGE, BODY, WEIGHTS), tmp_path / "float.onnx")
    FORMS[request.param](tmp_path / "float.onnx", tmp_path / "quantized.onnx")
    return load_model(tmp_path / "quantized.onnx")


def test_channels_are_those_of_the_float_model(quantized: ir.Model) -> None:
    assert list(units_of(quantized).values()) == UNITS


def test_channels_that_are_zero_can_leave(quantized: ir.Model) -> None:
    assert_exact(quantized, [(group, [1, group.units - 1]) for group in channel_groups(quantized).free])


def test_pruning_reaches_its_ratio_and_slices_integers_and_scales(quantized: ir.Model) -> None:
    ctx = context(quantized)
    before = ctx.fact(COST).macs
    result = Prune(ratio=0.3).run(quantized, ctx)
    assert abs(context(quantized).fact(COST).macs / before - 0.7) < 0.025
    assert abs(float(result.metrics["achieved"]) - 0.3) < 0.025
    tensors = {name: value.const_value for name, value in quantized.graph.initializers.items() if value.const_value}
    assert tensors["w2_quantized"].shape[0] < 32
    for name in ("w2_scale", "w2_zero_point"):
        assert tensors[name].size in (1, tensors["w2_quantized"].shape[0])
    assert run(quantized, feeds(quantized, 1))[0]["y"].shape == (2, 5)


def test_pruning_with_samples_runs(quantized: ir.Model) -> None:
    images = np.random.default_rng(0).standard_normal((16, 1, 3, 8, 8), dtype=np.float32)
    data = Dataset("noise", None, lambda: ({"x": image} for image in images), stacked=True)
    result = Prune(ratio=0.3).run(quantized, context(quantized, calibration=data))
    assert abs(float(result.metrics["achieved"]) - 0.3) < 0.025
    assert np.isfinite(run(quantized, feeds(quantized, 1))[0]["y"]).all()


def test_weights_count_as_the_numbers_that_they_stand_for(quantized: ir.Model) -> None:
    plain = build(IMAGE, BODY, WEIGHTS)

    def sums(model: ir.Model, group: int, weight: str) -> np.ndarray:
        places = weights_of(channel_groups(model).free[group], "output")
        return weight_sums(next(place for place in places if place.value.startswith(weight)), context(model))

    for group, weight in ((0, "w2"), (3, "w6")):
        found, wanted = sums(quantized, group, weight), sums(plain, group, weight)
        np.testing.assert_allclose(found / found.mean(), wanted / wanted.mean(), rtol=0.02)
