"""Parts of models as they fall to the host of an NPU, with the largest error that each may have beside ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from text_models import build

__all__ = ["CASES", "draw"]

Array = np.ndarray[Any, np.dtype[Any]]

_F, _I64 = np.float32, np.int64


def _number(value: float, dtype: Any = np.float32) -> Array:
    return np.array(value, dtype)


_SCALE, _ZERO = _number(0.0039215227589), _number(-7, np.int8)
_LAST = 1e-6  # the last bits, where functions of libm and sums in another order differ


def _i(*values: int) -> Array:
    return np.array(values, _I64)


def _simple(body: str, shape: str = "1,3,4,5", result: str = "float[1,3,4,5]", kind: str = "float", **weights: Any):
    return lambda: build(f"g ({kind}[{shape}] x) => ({result} y) {{ {body} }}", opset=17, **weights)


_QUANTIZED = """g (int8[2,6] x) => (int8[2,6] y) {
  real = DequantizeLinear(x, s, z)  scaled = Mul(real, factors)  moved = Add(scaled, offsets)
  y = QuantizeLinear(moved, t, z)
}"""
_HEADS = """g (int8[1,9,4] x, float[1,9,4] other) => (float[1,4] best, float[1,9,4] shares, float[1,8,9] both) {
  real = DequantizeLinear(x, s, z)  where = ArgMax<axis = 1, keepdims = 0>(real)  best = Cast<to = 1>(where)
  shares = Softmax<axis = 1>(real)  joined = Concat<axis = 2>(shares, other)  both = Transpose<perm = [0, 2, 1]>(joined)
}"""
_TOP = "g (float[2,3,9] x) => (float[2,3,4] y, int64[2,3,4] i) { y, i = TopK<largest = 1>(x, k) }"
_LOW = "g (float[2,9,3] x) => (float[2,5,3] y, int64[2,5,3] i) { y, i = TopK<largest = 0, axis = 1>(x, k) }"
_LOGIC = """g (float[3,4] x) => (bool[3,4] y) {
  a = Less(x, c)  b = Greater(x, d)  n = Not(a)  e = And(n, b)  f = Or(e, a)  y = Xor(f, b) }"""
_WIDE = "g (int64[1,7] x) => (int64[1,7] y) { d = Div(x, c)  m = Mod(d, e)  y = Mul(m, c) }"
_SHARED = """g (float[2,3] x, float[2] idle) => (float[2,3] y, float[2,3] same, float[3] known) {
  y = Relu(x)  same = Identity(y)  known = Identity(c) }"""
_SIXTEEN = "g (float[1,60] x) => (int16[1,60] y) { y = QuantizeLinear(x, s, z) }"
_SPLIT = "g (float[1,4,4] x) => (float[1,2,4] y, float[1,2,4] z) { y, z = Split<axis = 1>(x) }"

CASES: dict[str, tuple[Callable[[], ir.Model], float]] = {
    "quantize": (_simple("y = QuantizeLinear(x, s, z)", result="int8[1,3,4,5]", s=_number(0.0173), z=_ZERO), 0),
    "quantize to 16 bits": (lambda: build(_SIXTEEN, 21, s=_number(0.00011), z=_number(0, np.int16)), 0),
    "dequantize": (_simple("y = DequantizeLinear(x, s, z)", kind="int8", s=_SCALE, z=_ZERO), 0),
    "dequantize channels": (
        _simple("y = DequantizeLinear<axis = 1>(x, s)", kind="int8", s=np.array([0.017, 0.1, 0.3], _F)), 0,
    ),
    "multiply, add": (
        lambda: build(_QUANTIZED, s=_SCALE, z=_ZERO, factors=(6,), offsets=(2, 6), t=_number(0.0117)), 0,
    ),
    "heads": (lambda: build(_HEADS, s=_number(0.0471), z=_ZERO), _LAST),
    "softmax": (_simple("y = Softmax(x)"), _LAST),
    "gather": (_simple("y = Gather<axis = 2>(x, i)", result="float[1,3,3,5]", i=_i(2, 0, -1)), 0),
    "look up": (
        lambda: build("g (int64[1,7] x) => (float[1,7,6] y) { y = Gather(table, x) }", table=(30, 6)), 0,
    ),
    "gather elements": (_simple("y = GatherElements<axis = 3>(x, i)", i=np.full((1, 3, 4, 5), 2, _I64)), 0),
    "transpose": (_simple("y = Transpose<perm = [0, 2, 3, 1]>(x)", result="float[1,4,5,3]"), 0),
    "split": (lambda: build(_SPLIT, 13), 0),
    "slice backwards": (
        _simple("y = Slice(x, a, b, c, d)", result="float[1,3,4,3]", a=_i(-1), b=_i(-100), c=_i(3), d=_i(-2)), 0,
    ),
    "reflect": (_simple("y = Pad<mode = \"reflect\">(x, p)", result="float[1,3,6,8]", p=_i(0, 0, 1, 1, 0, 0, 1, 2)), 0),
    "largest": (lambda: build(_TOP, k=_i(4)), 0),
    "smallest": (lambda: build(_LOW, k=_i(5)), 0),
    "sums so far": (_simple("y = CumSum(x, a)", a=np.array(2, _I64)), _LAST),
    "sums before": (_simple("y = CumSum<exclusive = 1, reverse = 1>(x, a)", a=np.array(1, _I64)), _LAST),
    "logic": (lambda: build(_LOGIC, c=_number(0.1), d=_number(-0.4)), 0),
    "whole numbers": (lambda: build(_WIDE, c=_i(3), e=_i(5)), 0),
    "normalize": (_simple("y = LayerNormalization(x, s, b)", s=(5,), b=(5,)), _LAST),
    "instances": (_simple("y = InstanceNormalization(x, s, b)", s=(3,), b=(3,)), _LAST),
    "convolution": (_simple("y = Conv(x, w, b)", result="float[1,6,2,3]", w=(6, 3, 3, 3), b=(6,)), _LAST),
    "matrix": (_simple("y = MatMul(x, w)", result="float[1,3,4,7]", w=(5, 7)), _LAST),
    "functions": (_simple("a = Erf(x)  b = Exp(a)  c = Tanh(b)  d = Sigmoid(c)  e = Floor(x)  y = Add(d, e)"), _LAST),
    "means": (_simple("y = ReduceMean<axes = [2, 3]>(x)", result="float[1,3,1,1]"), _LAST),
    "scatter": (
        lambda: build(
            "g (float[5,3] x, float[2,3] u) => (float[5,3] y) { y = ScatterND(x, i, u) }", i=np.array([[1], [3]], _I64)
        ),
        0,
    ),
    "one value twice, a constant, and an input that nothing reads": (lambda: build(_SHARED, c=(3,)), 0),
}  # fmt: skip


def draw(value: ir.Value, rng: np.random.Generator) -> Array:
    """Random numbers for an input, small enough to be indices where they are whole."""
    assert value.dtype is not None
    shape, dtype = tuple(int(size) for size in value.shape or () if isinstance(size, int)), str(value.dtype.numpy())
    if dtype == "float32":
        return (rng.standard_normal(shape) * 2).astype(dtype)
    return rng.integers(*((-128, 128) if dtype == "int8" else (0, 30)), shape).astype(dtype)
