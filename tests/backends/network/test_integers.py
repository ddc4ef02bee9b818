"""Quantized networks run on integers, at most one step from ONNX Runtime."""

from __future__ import annotations

import io

import numpy as np
import onnx_ir as ir
import pytest
from kernel_runner import AVX512, runnable
from network_runner import run_network
from text_models import build as model_of

from graphopt.model_io import ShapeBinding
from graphopt.reference import Reference
from graphopt_backends._lower import lower
from graphopt_backends.kernels.expression import call, clip, number, operand, parameter, quantized, simplified
from graphopt_backends.network.convert import convert
from graphopt_backends.network.integers import Grid, real
from graphopt_backends.network.weights import Weights

pytestmark = pytest.mark.skipif(AVX512 not in runnable(), reason="this CPU has no VNNI")
_STEP = 0.06
_NETWORK = """
g (float[1,5,12,12] x) => (float[1,24,5,5] y) {
    xq = QuantizeLinear(x, sx, zx)
    xr = DequantizeLinear(xq, sx, zx)
    w1r = DequantizeLinear<axis=0>(w1, s1)
    b1r = DequantizeLinear<axis=0>(b1, sb1)
    a = Conv<pads=[1,1,1,1]>(xr, w1r, b1r)
    b = Relu(a)
    bq = QuantizeLinear(b, sy, z0)
    br = DequantizeLinear(bq, sy, z0)
    p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(br)
    pq = QuantizeLinear(p, sy, z0)
    pr = DequantizeLinear(pq, sy, z0)
    w2r = DequantizeLinear<axis=0>(w2, s2)
    c = Conv<pads=[1,1,1,1], group=24>(pr, w2r)
    cq = QuantizeLinear(c, sy, zx)
    cr = DequantizeLinear(cq, sy, zx)
    d = Add(cr, pr)
    dq = QuantizeLinear(d, sy, zx)
    dr = DequantizeLinear(dq, sy, zx)
    w3r = DequantizeLinear<axis=0>(w3, s1)
    e = Conv(dr, w3r)
    eq = QuantizeLinear(e, sy, zx)
    y = DequantizeLinear(eq, sy, zx)
}"""


def _model() -> ir.Model:
    random = np.random.default_rng(3)

    def integers(*shape: int) -> np.ndarray:
        return random.integers(-127, 128, shape).astype(np.int8)

    s1, s2 = (random.uniform(0.002, 0.006, 24).astype(np.float32) for _ in range(2))
    sx = np.float32(0.03)
    model = ir.from_onnx_text(
        '<ir_version: 9, opset_import: ["" : 17]>' + _NETWORK.replace(
            "float[1,5,12,12] x)",
            "float[1,5,12,12] x, float sx, uint8 zx, float sy, uint8 z0, int8[24,5,3,3] w1, float[24] s1, "
            "int32[24] b1, float[24] sb1, int8[24,1,3,3] w2, float[24] s2, int8[24,24,2,2] w3)",
        )
    )  # fmt: skip
    weights = {
        "sx": sx, "zx": np.uint8(131), "sy": np.float32(_STEP), "z0": np.uint8(0), "w1": integers(24, 5, 3, 3),
        "s1": s1, "b1": random.integers(-999, 999, 24).astype(np.int32), "sb1": sx * s1, "w2": integers(24, 1, 3, 3),
        "s2": s2, "w3": integers(24, 24, 2, 2),
    }  # fmt: skip
    for value in list(model.graph.inputs):
        if value.name in weights:
            model.graph.inputs.remove(value)
            value.const_value = ir.tensor(np.asarray(weights[value.name]), name=value.name)
            model.graph.register_initializer(value)
    return model


def test_a_network_of_integers_is_one_step_from_onnx_runtime() -> None:
    model = _model()
    reference = Reference(model.clone(), threads=1, optimize=False)
    for seed in range(4):
        feed = {"x": np.random.default_rng(seed).standard_normal((1, 5, 12, 12)).astype(np.float32)}
        got, ran = run_network(model, AVX512, feed)
        expected = reference.run(feed)["y"]
        assert np.abs(got["y"] - expected).max() <= 1.01 * _STEP
        assert (got["y"] == expected).mean() > 0.98
        assert ran == ["Loops", "Conv", "Pool", "Depthwise", "Conv", "Loops"]


def test_everything_between_the_kernels_is_bytes() -> None:
    network = convert(lower(_model(), ShapeBinding(), "x86").model, AVX512, Weights(io.BytesIO()))
    inside = [call_.views[-1].dtype for call_ in network.calls[:-1]]
    assert inside == ["uint8"] * 5


@pytest.mark.parametrize(
    ("mean", "shape", "result", "kernel"),
    [
        ("GlobalAveragePool(r)", "1,19,7,5", "1,19,1,1", "Reduce"),
        ("AveragePool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(r)", "1,19,7,5", "1,19,4,3", "Pool"),
        ("AveragePool<kernel_shape=[2,2]>(r)", "2,16,6,6", "2,16,5,5", "Pool"),
        ("ReduceMean<axes=[2,3]>(r)", "2,40,9,8", "2,40,1,1", "Reduce"),
    ],
)
def test_means_of_bytes_read_bytes(mean: str, shape: str, result: str, kernel: str) -> None:
    model = model_of(
        f"""g (float[{shape}] x) => (float[{result}] y) {{
            q = QuantizeLinear(x, s, z) r = DequantizeLinear(q, s, z)
            m = {mean}
            n = QuantizeLinear(m, t, z) y = DequantizeLinear(n, t, z)
        }}""",
        s=np.float32(0.03), z=np.uint8(131), t=np.float32(0.02),
    )  # fmt: skip
    reference = Reference(model.clone(), threads=1, optimize=False)
    for seed in range(4):
        x = np.random.default_rng(seed).standard_normal([int(size) for size in shape.split(",")]).astype(np.float32)
        got, ran = run_network(model, AVX512, {"x": x})
        expected = reference.run({"x": x})["y"]
        assert np.abs(got["y"] - expected).max() <= 1.01 * 0.02
        assert (got["y"] == expected).mean() > 0.9
        assert kernel in ran
    network = convert(lower(model, ShapeBinding(), "x86").model, AVX512, Weights(io.BytesIO()))
    read = next(call_.views[0] for call_ in network.calls if type(call_.kernel).__name__ == kernel)
    assert read.dtype == "uint8"


def test_a_border_that_counts_is_zeros_and_not_bytes() -> None:
    model = model_of(
        """g (float[1,3,5,5] x) => (float[1,3,5,5] y) {
            q = QuantizeLinear(x, s, z) r = DequantizeLinear(q, s, z)
            y = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>(r)
        }""",
        s=np.float32(0.03), z=np.uint8(131),
    )  # fmt: skip
    reference = Reference(model.clone(), threads=1, optimize=False)
    for seed in range(4):
        feed = {"x": np.random.default_rng(seed).standard_normal((1, 3, 5, 5)).astype(np.float32)}
        np.testing.assert_allclose(run_network(model, AVX512, feed)[0]["y"], reference.run(feed)["y"], atol=1e-6)


def test_weights_in_a_form_no_kernel_reads_are_floats() -> None:
    model = model_of(
        "g (float[2,6] x) => (float[2,3] y) { r = DequantizeLinear<axis=1>(w, s) y = MatMul(x, r) }",
        w=np.zeros((6, 3), np.int64), s=np.float32([0.5, 0.25, 2.0]),
    )  # fmt: skip
    weight = np.arange(-9, 9, dtype=np.int8).reshape(6, 3)
    model.graph.initializers["w"].const_value = ir.tensor(weight, name="w")
    model.graph.initializers["w"].dtype = ir.DataType.INT8
    feed = {"x": np.random.default_rng(0).standard_normal((2, 6)).astype(np.float32)}
    got, _ = run_network(model, AVX512, feed)
    np.testing.assert_allclose(got["y"], feed["x"] @ (weight * np.float32([0.5, 0.25, 2.0])), rtol=1e-5, atol=1e-5)


def test_an_epilogue_of_a_relu_and_a_rounding_is_one_factor_and_two_limits() -> None:
    x = call("mul", operand(0), parameter(0.5))
    found = simplified(quantized(clip(x, 0, None), 0.25, 3, "uint8"))
    factor = call("mul", operand(0), parameter(2.0))
    limited = call("min", call("max", factor, number(0)), parameter(252))
    assert found.args[0].args[0].args[0] == limited


def test_a_rounding_in_the_middle_of_an_epilogue_needs_no_bytes() -> None:
    inner = quantized(operand(0), 0.5, 7, "uint8")
    found = simplified(real(inner, Grid(0.5, 7, "uint8")))
    assert str(found) == "mul(round(min(max(mul(%0, 2), -7), 248)), 0.5)"
    other = simplified(real(inner, Grid(0.5, 8, "uint8")))
    assert "uint8" in str(other)
