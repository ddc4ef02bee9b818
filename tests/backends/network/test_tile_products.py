"""Quantized graphs on a CPU that multiplies tiles give what ONNX Runtime gives."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from network_runner import run_network
from text_models import build as model_of

from graphopt.reference import Reference
from graphopt_backends.x86 import TARGETS, X86Backend

_TARGET = next(target for target in TARGETS if target.device == "amx")
pytestmark = pytest.mark.skipif(X86Backend().how(_TARGET) != "executed", reason="no CPU with AMX here")
_RANDOM = np.random.default_rng(9)


def _bytes(dtype: str, *shape: int) -> np.ndarray:
    return _RANDOM.integers(*((-127, 128) if dtype == "int8" else (0, 256)), shape).astype(dtype)


def _scales(count: int) -> np.ndarray:
    return _RANDOM.uniform(0.001, 0.002, count).astype(np.float32)


def _ran(model: ir.Model, shape: tuple[int, ...], step: float) -> list[str]:
    """The kernels that ran; four inputs give ONNX Runtime's results, which seldom are a step away."""
    assert _TARGET.isa
    reference, ran = Reference(model.clone(), threads=1, optimize=False), list[str]()
    for seed in range(4):
        feed = {"x": np.random.default_rng(seed).standard_normal(shape).astype(np.float32)}
        got, ran = run_network(model, _TARGET.isa, feed)
        for name, expected in reference.run(feed).items():
            assert np.abs(got[name] - expected).max() <= 1.01 * step
            assert (np.abs(got[name] - expected) > 0.01 * step).mean() <= 0.02
    return ran


@pytest.mark.parametrize(("dtype", "zero"), [("int8", 0), ("uint8", 90)])
def test_products_whose_grid_a_run_tells(dtype: str, zero: int) -> None:
    text = """
    g (float[1,29,70] x) => (float[1,29,40] y) {
        xq, s, z = DynamicQuantizeLinear(x)
        p = MatMulInteger(xq, w, z, wz)
        r = Cast<to=1>(p)
        scale = Mul(s, ws)
        m = Mul(r, scale)
        y = Relu(m)
    }"""
    model = model_of(text, w=_bytes(dtype, 70, 40), wz=np.asarray(zero, dtype), ws=_scales(40))
    ran = _ran(model, (1, 29, 70), 0.02)
    # vectors make the sums of activations, where weights are no bytes
    assert ran == ["Range", "Round", "Loops", *(["Gemm", "TileGemm"] if zero else ["TileGemm"])]


@pytest.mark.parametrize(("dtype", "zero"), [("int8", 0), ("uint8", 130)])
def test_convolutions_whose_border_a_run_tells(dtype: str, zero: int) -> None:
    text = """
    g (float[1,20,7,18] x) => (float[1,24,7,18] y) {
        xq, s, z = DynamicQuantizeLinear(x)
        p = ConvInteger<pads=[1,1,1,1]>(xq, w, z, wz)
        r = Cast<to=1>(p)
        scale = Mul(s, ws)
        y = Mul(r, scale)
    }"""
    model = model_of(text, w=_bytes(dtype, 24, 20, 3, 3), wz=np.asarray(zero, dtype), ws=_scales(1))
    ran = _ran(model, (1, 20, 7, 18), 0.02)
    assert [name for name in ran if name.endswith("Conv")] == (["Conv", "TileConv"] if zero else ["TileConv"])


@pytest.mark.parametrize("activation", ["int8", "uint8"])
def test_convolutions_between_other_layers(activation: str) -> None:
    text = """
    g (float[2,64,9,9] x) => (float[2,48,9,9] y) {
        xq = QuantizeLinear(x, s, z)
        xr = DequantizeLinear(xq, s, z)
        ar = DequantizeLinear<axis=0>(a, sa, za)
        br = DequantizeLinear<axis=0>(b, sb, zb)
        m = Conv<pads=[1,1,1,1]>(xr, ar)
        mq = QuantizeLinear(m, s, z)
        mr = DequantizeLinear(mq, s, z)
        p = Conv(mr, br)
        c = Add(p, xs)
        yq = QuantizeLinear(c, sy, z)
        y = DequantizeLinear(yq, sy, z)
    }"""
    model = model_of(
        text, s=np.array(0.03, np.float32), z=np.asarray(5, activation), sy=np.array(0.04, np.float32), xs=_scales(1),
        a=_bytes("int8", 56, 64, 3, 3), sa=_scales(56), za=np.zeros(56, np.int8),
        b=_bytes("int8", 48, 56, 1, 1), sb=4 * _scales(48), zb=np.zeros(48, np.int8),
    )  # fmt: skip
    ran = _ran(model, (2, 64, 9, 9), 0.04)
    assert {"TileConv", "TileGemm"} <= set(ran)
