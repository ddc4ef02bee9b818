"""Quantized graphs in every spelling run on the same kernels, and give what ONNX Runtime gives."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest
from kernel_program import ISAS, command_of
from kernel_runner import AVX512, runnable
from network_runner import run_network
from text_models import build as model_of

from graphopt.model_io import ShapeBinding
from graphopt.reference import Reference
from graphopt.targets import Isa
from graphopt_backends._lower import lower
from graphopt_backends.network.passing import pass_on
from graphopt_backends.network.signs import choose_signs

pytestmark = pytest.mark.skipif(AVX512 not in runnable(), reason="this CPU has no VNNI")
_RANDOM = np.random.default_rng(8)


def _bytes(dtype: str, *shape: int) -> np.ndarray:
    return _RANDOM.integers(*((-127, 128) if dtype == "int8" else (0, 256)), shape).astype(dtype)


def _compare(model: ir.Model, shape: tuple[int, ...], step: float, isa: Isa = AVX512, few: float = 0.02) -> list[str]:
    """Four inputs give ONNX Runtime's results: at most one step away, and that seldom; returns the kernels."""
    reference, ran = Reference(model.clone(), threads=1, optimize=False), list[str]()
    for seed in range(4):
        feed = {"x": np.random.default_rng(seed).standard_normal(shape).astype(np.float32)}
        got, ran = run_network(model, isa, feed)
        for name, expected in reference.run(feed).items():
            assert np.abs(got[name] - expected).max() <= 1.01 * step
            assert (np.abs(got[name] - expected) > 0.01 * step).mean() <= few
    return ran


_DYNAMIC = """
g (float[1,9,33] x) => (float[1,9,21] y) {
    xq, s, z = DynamicQuantizeLinear(x)
    p = MatMulInteger(xq, w, z, wz)
    r = Cast<to=1>(p)
    scale = Mul(s, ws)
    m = Mul(r, scale)
    a = Add(m, b)
    y = Relu(a)
}"""


@pytest.mark.parametrize(("dtype", "zeros"), [("int8", 0), ("uint8", 90)])
def test_dynamic_quantization_is_two_kernels_and_a_product(dtype: str, zeros: int) -> None:
    weights: Mapping[str, np.ndarray] = {
        "w": _bytes(dtype, 33, 21), "wz": np.asarray(zeros, dtype), "b": _RANDOM.standard_normal(21).astype(np.float32),
        "ws": _RANDOM.uniform(0.001, 0.002, 21).astype(np.float32),
    }  # fmt: skip
    ran = _compare(model_of(_DYNAMIC, **weights), (1, 9, 33), step=0.02)
    products = ["Gemm", "Gemm"] if zeros else ["Gemm"]  # one for the sums of activations, where weights are no bytes
    assert ran == ["Range", "Round", "Loops", *products]


@pytest.mark.parametrize(
    ("group", "channels", "dtype", "zero"), [(1, 5, "uint8", 90), (2, 6, "uint8", 128), (6, 6, "int8", 0)]
)
def test_a_dynamic_convolution_fills_its_border_with_the_zero_point(
    group: int, channels: int, dtype: str, zero: int
) -> None:
    text = f"""
    g (float[1,{channels},7,8] x) => (float[1,6,7,8] y) {{
        xq, s, z = DynamicQuantizeLinear(x)
        p = ConvInteger<pads=[1,1,1,1], group={group}>(xq, w, z, wz)
        r = Cast<to=1>(p)
        scale = Mul(s, ws)
        y = Mul(r, scale)
    }}"""
    model = model_of(
        text, w=_bytes(dtype, 6, channels // group, 3, 3), wz=np.asarray(zero, dtype), ws=np.float32(0.002)
    )
    ran = _compare(model, (1, channels, 7, 8), step=0.02)
    assert ("Depthwise" if group == 6 else "Conv") in ran


_WEIGHTS = """
g (float[3,33] x) => (float[3,10] y) {
    xq = QuantizeLinear(x, sx, zx)
    xr = DequantizeLinear(xq, sx, zx)
    wr = DequantizeLinear<axis=1>(w, sw, zw)
    m = MatMul(xr, wr)
    yq = QuantizeLinear(m, sy, zx)
    y = DequantizeLinear(yq, sy, zx)
}"""


@pytest.mark.parametrize(("device", "activation"), [("avx2", "int8"), ("avx512", "uint8"), ("avx512-vnni", "int8")])
def test_weights_have_zero_points_and_any_sign(device: str, activation: str) -> None:
    isa = ISAS[device]
    if command_of(isa) is None:
        pytest.skip(f"nothing runs {device} here")
    zeros = _RANDOM.integers(0, 256, 10).astype(np.uint8)
    model = model_of(
        _WEIGHTS, w=_bytes("uint8", 33, 10), zw=zeros, sw=_RANDOM.uniform(0.001, 0.003, 10).astype(np.float32),
        sx=np.float32(0.03), zx=np.asarray(7, activation), sy=np.float32(0.05),
    )  # fmt: skip
    _compare(model, (3, 33), step=0.05, isa=isa)


_FACTOR = """
g (float[1,5,6,6] x) => (float[1,8,6,6] y) {
    r = Cast<to=1>(w)
    f = Mul(r, s)
    y = Conv<pads=[1,1,1,1]>(x, f)
}"""


def test_weights_that_are_cast_and_multiplied_are_dequantized_ones() -> None:
    scale = _RANDOM.uniform(0.001, 0.01, (8, 1, 1, 1)).astype(np.float32)
    model = model_of(_FACTOR, w=_bytes("int8", 8, 5, 3, 3), s=scale)
    assert set(_compare(model, (1, 5, 6, 6), step=1e-4)) == {"Conv", "Transpose"}


_CHANNELS = """
g (float[2,4,3,3] x) => (float[2,4,3,3] y) {
    a = Relu(x)
    q = QuantizeLinear<axis=1>(a, s, z)
    r = DequantizeLinear<axis=1>(q, s, z)
    y = Neg(r)
}"""


@pytest.mark.parametrize("dtype", ["int8"])
def test_activations_have_a_grid_for_each_channel(dtype: str) -> None:
    model = model_of(_CHANNELS, s=np.float32([0.1, 0.02, 0.3, 0.05]), z=np.array([0, 3, 9, 100], dtype))
    _compare(model, (2, 4, 3, 3), step=0.3)


_LOOKUP = """
g (int64[2,3] x) => (float[2,3,8] y) {
    r = DequantizeLinear<axis=1>(w, s)
    y = Gather(r, x)
}"""


@pytest.mark.parametrize("columns", [1, 8])
def test_rows_of_a_table_are_looked_up_as_integers(columns: int) -> None:
    scale = _RANDOM.uniform(0.01, 0.1, columns).astype(np.float32)
    model = model_of(_LOOKUP, w=_bytes("int8", 20, 8), s=scale if columns > 1 else scale[0])
    feed = {"x": np.array([[1, 19, 0], [7, 7, 3]])}
    got, ran = run_network(model, AVX512, feed)
    np.testing.assert_array_equal(got["y"], Reference(model, threads=1, optimize=False).run(feed)["y"])
    assert ran[0] == "Lookup"


_FUSED = """
g (float[1,6,8,8] x) => (float[1,10,8,8] y) {
    xq = QuantizeLinear(x, sx, zx)
    a = QLinearConv<pads=[1,1,1,1]>(xq, sx, zx, w, sw, zw, sy, zy, b)
    c = com.microsoft.QLinearAdd(a, sy, zy, a, sy, zy, sc, zx)
    y = DequantizeLinear(c, sc, zx)
}"""
_ELEMENTWISE = """
g (float[3,50] x) => (float[3,50] y) {
    d = QuantizeLinear(x, sc, zx)
    e = com.microsoft.QLinearLeakyRelu<alpha=0.1>(d, sc, zx, sc, zx)
    f = com.microsoft.QLinearSigmoid(e, sc, zx, se, ze)
    g = com.microsoft.QLinearMul(e, sc, zx, f, se, ze, sc, zx)
    y = DequantizeLinear(g, sc, zx)
}"""


def test_operators_of_integers_are_those_of_a_dequantized_graph() -> None:
    sx, sw = np.float32(0.03), _RANDOM.uniform(0.002, 0.006, 10).astype(np.float32)
    model = model_of(
        _FUSED, sx=sx, zx=np.uint8(120), w=_bytes("int8", 10, 6, 3, 3), sw=sw, zw=np.zeros(10, np.int8),
        sy=np.float32(0.05), zy=np.uint8(110), b=_RANDOM.integers(-999, 999, 10).astype(np.int32),
        sc=np.float32(0.08),
    )  # fmt: skip
    model.opset_imports["com.microsoft"] = 1
    assert "Conv" in _compare(model, (1, 6, 8, 8), step=0.08, few=0.03)


def test_element_by_element_operators_of_integers_are_loops() -> None:
    model = model_of(
        _ELEMENTWISE, sc=np.float32(0.08), zx=np.uint8(120), se=np.float32(1 / 256), ze=np.uint8(0)
    )  # fmt: skip
    model.opset_imports["com.microsoft"] = 1
    assert set(_compare(model, (3, 50), step=0.08, few=0.03)) == {"Loops"}


_SCORES = """
g (float[2,3,9,16] x) => (float[2,3,9,16] y) {
    q = QuantizeLinear(x, sa, za)
    r = DequantizeLinear(q, sa, za)
    t = Transpose<perm=[0,1,3,2]>(r)
    s = MatMul(r, t)
    sq = QuantizeLinear(s, sb, zb)
    sr = DequantizeLinear(sq, sb, zb)
    p = Softmax<axis=-1>(sr)
    pq = QuantizeLinear(p, sc, zc)
    pr = DequantizeLinear(pq, sc, zc)
    m = MatMul(pr, r)
    mq = QuantizeLinear(m, sa, za)
    y = DequantizeLinear(mq, sa, za)
}"""


@pytest.mark.parametrize("isa", runnable(), ids=lambda isa: isa.name)
@pytest.mark.parametrize(("dtype", "zero"), [("uint8", 120), ("int8", -3)])
def test_attention_on_integers_multiplies_them(isa: Isa, dtype: str, zero: int) -> None:
    model = model_of(
        _SCORES, sa=np.float32(0.03), za=np.asarray(zero, dtype), sb=np.float32(0.2), zb=np.asarray(zero, dtype),
        sc=np.float32(1 / 255), zc=np.asarray(0 if dtype == "uint8" else -128, dtype),
    )  # fmt: skip
    ran = _compare(model, (2, 3, 9, 16), step=0.03, isa=isa, few=0.03)
    assert ran.count("ByteProducts") == 2


_INTEGERS = """
g (float[2,9,13] x) => (int32[2,9,9] y) {
    q = QuantizeLinear(x, s, a)
    t = Transpose<perm=[0,2,1]>(q)
    y = MatMulInteger(q, t, a, b)
}"""


@pytest.mark.parametrize("isa", runnable(), ids=lambda isa: isa.name)
@pytest.mark.parametrize(("dtype", "zeros"), [("uint8", (120, 7)), ("int8", (0, 0))])
def test_products_of_computed_integers_are_exact(isa: Isa, dtype: str, zeros: tuple[int, int]) -> None:
    a, b = (np.asarray(zero, dtype) for zero in zeros)
    model = model_of(_INTEGERS, s=np.float32(0.02), a=a, b=b)
    assert "ByteProducts" in _compare(model, (2, 9, 13), step=0.0, isa=isa, few=0.0)


_SIGNS = """
g (float[1,6,8,8] x) => (float[1,4,4,4] y) {
    xq = QuantizeLinear(x, s, z)
    xr = DequantizeLinear(xq, s, z)
    p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(xr)
    pq = QuantizeLinear(p, s, z)
    pr = DequantizeLinear(pq, s, z)
    wr = DequantizeLinear(w, sw)
    m = Conv(pr, wr)
    yq = QuantizeLinear(m, s, z)
    y = DequantizeLinear(yq, s, z)
}"""


@pytest.mark.parametrize(
    ("device", "given", "wanted"),
    [("avx512-vnni", "int8", "uint8"), ("cortex-a76", "uint8", "int8"), ("neoverse-v1", "uint8", "uint8")],
)
def test_integers_have_the_sign_that_the_cpu_multiplies(device: str, given: str, wanted: str) -> None:
    model = model_of(
        _SIGNS, s=np.float32(0.03), z=np.asarray(5, given), w=_bytes("int8", 4, 6, 1, 1), sw=np.float32(0.01)
    )
    if device == "avx512-vnni":
        _compare(model, (1, 6, 8, 8), step=0.03)
    lowered = lower(model, ShapeBinding(), "x86").model
    pass_on(lowered)
    choose_signs(lowered, ISAS[device])
    made = {value.dtype for node in lowered.graph if node.op_type == "QuantizeLinear" for value in node.outputs}
    assert made == {ir.DataType[wanted.upper()]}


def test_integers_that_a_caller_sees_keep_their_sign() -> None:
    text = "g (float[4] x) => (int8[4] y) { y = QuantizeLinear(x, s, z) }"
    lowered = lower(model_of(text, s=np.float32(0.1), z=np.int8(3)), ShapeBinding(), "x86").model
    choose_signs(lowered, AVX512)
    assert lowered.graph.outputs[0].dtype == ir.DataType.INT8
