"""What the operators of a QDQ graph make, in integers, written from ONNX's and TOSA's definitions alone.

Integers are evaluated by what ONNX Runtime makes of the float operator on integers, which is exact below 2**24, so that
pads, strides, groups and axes are those of ONNX. Roundings are TOSA's:

    RESCALE   (n * m + 2**(s - 1)) >> s, with m / 2**s nearest to the ratio of the scales, 2**30 <= m < 2**31;
              for sums in 48 bits, which 16-bit activations have, 2**14 <= m < 2**15

Three kinds of numbers come out of an operator, before they are rounded:

    Exact     integers, and the exact step of each: sums, products, what was moved; rounded by RESCALE, bit for bit
    Floats    float32, as ONNX Runtime computes them: functions of one element, which are tables; rounded bit for bit
    Near      float64, and how far what is computed may lie from them: where lowering rounds more than once
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper
from quantized_graphs import run_node

__all__ = ["Rounded", "cut", "evaluate", "rescale"]

Array = np.ndarray[Any, np.dtype[Any]]
_LIMIT = 1 << 24
_MOVES = frozenset(
    {
        "Concat", "DepthToSpace", "Flatten", "GlobalMaxPool", "Identity", "MaxPool", "Pad", "ReduceMax", "ReduceMin",
        "Reshape", "Slice", "SpaceToDepth", "Split", "Squeeze", "Transpose", "Unsqueeze",
    }
)  # fmt: skip
_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_MEANS = frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean", "ReduceSum"})
_PAIRS = frozenset({"Add", "Sub", "Mul", "Div", "Max", "Min"})


@dataclass(frozen=True)
class Exact:
    """Integers `n`, each with one of several steps.

    Constants are `fixed`, 16-bit activations `wide`; `bits` are those of the multiplier that rounds them.
    """

    n: Array
    steps: tuple[Fraction, ...]
    which: Array
    bounds: tuple[float, float] = (-math.inf, math.inf)
    fixed: bool = False
    wide: bool = False
    bits: int = 31

    @property
    def real(self) -> Array:
        return self.n * np.array([float(step) for step in self.steps])[self.which]


@dataclass(frozen=True)
class Floats:
    """Numbers as ONNX Runtime computes them."""

    real: Array
    bounds: tuple[float, float] = (-math.inf, math.inf)


@dataclass(frozen=True)
class Near:
    """Numbers, and how far what is computed may lie from them."""

    real: Array
    error: float
    bounds: tuple[float, float] = (-math.inf, math.inf)


Real = Exact | Floats | Near


@dataclass(frozen=True)
class Rounded:
    """What a QuantizeLinear, or an operator on integers, must make.

    Attributes:
        place: The real result in steps of its grid, not yet rounded or saturated, zero point included.
        integers: The result bit for bit; None where only a bound is known.
        error: How far from `place`, in steps, what is rounded may lie.
        low: The least integer that it may be.
        high: The greatest.
    """

    place: Array
    integers: Array | None
    error: float
    low: int
    high: int


def cut(model: ir.Model) -> onnx.ModelProto:
    """A QDQ graph cut at its integers: what QuantizeLinear makes is an output, what reads it reads an input instead."""
    proto = ir.to_proto(model)
    graph = proto.graph
    known = {value.name: value for value in (*graph.value_info, *graph.output, *graph.input)}
    made = [name for node in graph.node for name in node.output if known[name].type.tensor_type.elem_type != 1]
    del graph.output[:]
    for node in graph.node:
        for index, name in enumerate(node.output):
            if name in made:
                node.output[index] = f"{name}.made"
    graph.input.extend(known[name] for name in made)
    for name in made:
        value = onnx.ValueInfoProto.FromString(known[name].SerializeToString())
        value.name = f"{name}.made"
        graph.output.append(value)
    return proto


def evaluate(parts: onnx.ModelProto, integers: Mapping[str, Array]) -> dict[str, Rounded]:
    """What each operator makes of given integers.

    Args:
        parts: What `cut` made of a graph.
        integers: All that its inputs hold.
    """
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in parts.graph.initializer}
    held: dict[str, Any] = {**constants, **integers}
    found = dict[str, Rounded]()
    for node in parts.graph.node:
        inputs = [held[name] if name else None for name in node.input]
        if node.op_type == "QuantizeLinear":
            found[node.output[0].removesuffix(".made")] = _quantized(*inputs)
        elif node.op_type == "DequantizeLinear":
            fixed = node.input[0] in constants
            held[node.output[0]] = replace(_dequantized(node, *inputs), fixed=fixed)
        elif node.op_type == "ArgMax":
            assert isinstance(inputs[0], Exact)
            picked = run_node(node, [inputs[0].n.astype(np.float32)])[0]
            found[node.output[0].removesuffix(".made")] = Rounded(picked, picked, 0.0, -(2**31), 2**31)
        else:
            results = _operator(node, inputs)
            held.update(zip(node.output, results if isinstance(results, list) else [results], strict=True))
    return found


def rescale(n: Array, ratios: list[Fraction], which: Array, bits: int = 31) -> Array:
    """TOSA's RESCALE to 32 bits, with one of several ratios for each integer."""
    factors = [_multiplier(ratio, bits) for ratio in ratios]
    m, s = (np.array([pair[part] for pair in factors])[which] for part in (0, 1))
    return (n.astype(np.int64) * m + (np.int64(1) << (s - 1))) >> s


def _multiplier(ratio: Fraction, bits: int) -> tuple[int, int]:
    if not ratio:
        return 0, bits
    shift = 0
    while ratio * 2**shift < 2 ** (bits - 1):
        shift += 1
    while ratio * 2**shift >= 2**bits:
        shift -= 1
    whole = round(ratio * 2**shift)
    return (whole, shift) if whole < 2**bits else (2 ** (bits - 1), shift - 1)


def _dequantized(node: onnx.NodeProto, integers: Array, scale: Array, zero: Array | None = None) -> Exact:
    n = integers.astype(np.int64) - (0 if zero is None else int(zero.reshape(-1)[0]))
    which = np.zeros(n.shape, np.int64)
    if scale.size > 1:
        axis = next(a.i for a in node.attribute if a.name == "axis")
        which = which + np.arange(scale.size).reshape([-1 if a == axis % n.ndim else 1 for a in range(n.ndim)])
    steps = tuple(Fraction(float(s)) for s in scale.reshape(-1))
    return Exact(n, steps, which, wide=integers.dtype == np.int16)


def _quantized(real: Real, scale: Array, zero: Array) -> Rounded:
    info, point, step = np.iinfo(zero.dtype), int(zero), Fraction(float(scale))
    ends = [int(np.clip(np.rint(np.float32(b) / scale) + point, info.min, info.max)) for b in real.bounds]
    place, error = real.real.astype(np.float64) / float(step) + point, 0.0
    if isinstance(real, Near):
        return Rounded(place, None, real.error / float(step), *ends)
    if isinstance(real, Floats):
        found = np.rint(real.real / scale).astype(np.float64) + point
    else:
        found = rescale(real.n, [s / step for s in real.steps], real.which, real.bits) + point
    return Rounded(place, np.clip(found, *ends).astype(zero.dtype), error, *ends)


def _operator(node: onnx.NodeProto, inputs: list[Any]) -> Real | list[Exact]:
    """The numbers that a float operator makes."""
    kind, first = node.op_type, inputs[0]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if kind in ("Relu", "Clip"):
        ends = (0.0, math.inf) if kind == "Relu" else _ends(inputs)
        return replace(first, bounds=ends)
    if kind in _PRODUCTS and isinstance(inputs[1], Exact):
        return _product(node, inputs, attributes)
    if kind in _MOVES:
        return _moved(node, inputs)
    if kind in _MEANS:
        return _mean(node, inputs, attributes)
    if kind == "Resize":
        return _moved(node, inputs) if attributes.get("mode", b"nearest") == b"nearest" else _resized(node, inputs)
    if kind == "Softmax":
        e = np.exp(first.real - first.real.max(attributes.get("axis", -1), keepdims=True))
        return Near(e / e.sum(attributes.get("axis", -1), keepdims=True), 2.0**-19)
    if kind == "PRelu":
        return _prelu(first, inputs[1])
    if kind == "BatchNormalization":
        scale, bias, mean, variance = (
            _floats(v).astype(np.float64).reshape(-1, *(1,) * (first.n.ndim - 2)) for v in inputs[1:5]
        )
        factor = scale / np.sqrt(variance + attributes.get("epsilon", 1e-5))
        return Near((first.real - mean) * factor + bias, float(np.abs(factor * first.real).max()) * 2.0**-20 + 1e-9)
    if kind in _PAIRS and len(inputs) == 2 and not (_one_element(inputs) and _narrow(inputs)):
        return _pair(kind, *inputs)
    return Floats(run_node(node, [_floats(value) for value in inputs])[0])


def _floats(value: Any) -> Any:
    """Numbers as float32, as DequantizeLinear makes them."""
    if isinstance(value, Floats):
        return np.clip(value.real, *value.bounds)
    if not isinstance(value, Exact):
        return value
    steps = np.array([np.float32(float(step)) for step in value.steps])[value.which]
    return np.clip(value.n.astype(np.float32) * steps, *value.bounds).astype(np.float32)


def _one_element(inputs: list[Any]) -> bool:
    """Whether an operator on pairs is a function of one element, or follows one."""
    sizes = [value.n.size if isinstance(value, Exact) else np.asarray(value).size for value in inputs
             if not isinstance(value, Floats)]  # fmt: skip
    return len(sizes) < 2 or min(sizes) == 1 or inputs[0] is inputs[1]


def _narrow(inputs: list[Any]) -> bool:
    """Whether a table has an entry for each integer."""
    return not any(isinstance(value, Exact) and value.wide for value in inputs)


def _ends(inputs: list[Any]) -> tuple[float, float]:
    low, high = (*inputs[1:], None, None)[:2]
    return (-math.inf if low is None else float(low)), (math.inf if high is None else float(high))


def _whole(node: onnx.NodeProto, n: Array, weight: Array) -> Array:
    """What ONNX Runtime makes of a linear operator on integers: digit by digit, so that sums stay below 2**24."""
    total, place = np.int64(0), 1
    while n.any() or place == 1:
        digit = np.fmod(n, 64)
        found = run_node(node, [digit.astype(np.float32), weight.astype(np.float32)])[0]
        assert np.abs(found).max(initial=0) < _LIMIT
        total, place, n = total + found.astype(np.int64) * place, place * 64, (n - digit) // 64
    return np.asarray(total)


def _moved(node: onnx.NodeProto, inputs: list[Any]) -> Exact | list[Exact]:
    """Integers and what they stand for, moved alike."""
    sources = [value for value in inputs if isinstance(value, Exact)]
    steps = tuple(step for source in sources for step in source.steps)
    offsets = np.cumsum([0, *(len(source.steps) for source in sources)])
    if node.op_type == "Pad":
        return _padded(node, inputs)
    moved = [
        run_node(node, [part(value) if isinstance(value, Exact) else value for value in inputs])
        for part in (lambda value: value.n.astype(np.float32), lambda value: _indices(value, sources, offsets))
    ]
    if len(sources) == 1:
        moved[1] = [np.zeros_like(array) for array in moved[0]]
    found = [Exact(n.astype(np.int64), steps, w.astype(np.int64)) for n, w in zip(*moved, strict=True)]
    return found if len(found) > 1 else found[0]


def _indices(value: Exact, sources: list[Exact], offsets: Array) -> Array:
    position = next(index for index, source in enumerate(sources) if source is value)
    return (value.which + offsets[position]).astype(np.float32)


def _padded(node: onnx.NodeProto, inputs: list[Any]) -> Exact:
    """Numbers and the constant around them, which has a step of its own."""
    data, operands = inputs[0], (*inputs[1:], None, None)[:3]
    value = 0.0 if operands[1] is None else float(np.asarray(_floats(operands[1])).reshape(-1)[0])
    fillings = np.float32(np.sign(value)), np.float32(1)
    n, which = (
        run_node(node, [array.astype(np.float32), operands[0], filling, operands[2]][: max(3, len(inputs))])[0]
        for array, filling in zip((data.n, data.which), fillings, strict=True)
    )
    steps = (*data.steps, Fraction(abs(value)) or Fraction(1))
    return Exact(n.astype(np.int64), steps, which.astype(np.int64))


def _product(node: onnx.NodeProto, inputs: list[Any], attributes: dict[str, Any]) -> Exact:
    """Sums of products, with the bias on their grid."""
    data, weight, bias = (*inputs, None)[:3]
    bare = onnx.NodeProto(op_type=node.op_type, output=node.output)
    bare.attribute.extend(a for a in node.attribute if a.name not in ("alpha", "beta"))
    sums = _whole(bare, data.n, weight.n)
    axis = 1 if node.op_type.startswith("Conv") else sums.ndim - 1
    size = sums.shape[axis]
    factor = Fraction(float(np.float32(attributes.get("alpha", 1.0))))
    steps = [data.steps[0] * step * factor for step in weight.steps]
    steps = tuple(steps * (size // len(steps)) if len(steps) > 1 else steps)
    along = [-1 if a == axis else 1 for a in range(sums.ndim)]
    which = np.zeros(sums.shape, np.int64) + (np.arange(len(steps)).reshape(along) if len(steps) > 1 else 0)
    if bias is not None:
        real = (bias.real if isinstance(bias, Exact) else bias.astype(np.float64)) * attributes.get("beta", 1.0)
        whole = np.broadcast_to(real.reshape(-1), (size,))
        added = [round(Fraction(float(b)) / steps[i % len(steps)]) for i, b in enumerate(whole)]
        sums = sums + np.array(added).reshape(along)
    return Exact(sums, steps, which, bits=15 if data.wide else 31)


def _mean(node: onnx.NodeProto, inputs: list[Any], attributes: dict[str, Any]) -> Real:
    """Sums, and what they are divided by as a part of the step."""
    data, rest = inputs[0], inputs[1:]
    mean = run_node(node, [data.n.astype(np.float32), *rest])[0].astype(np.float64)
    pool = node.op_type == "AveragePool"
    if pool and (any(attributes.get("pads", (0,))) or {"auto_pad", "ceil_mode"} & {*attributes}):
        return Near(mean * float(data.steps[0]), float(data.steps[0]) * (1.0 if data.wide else 2.0**-14))
    count = 1 if node.op_type == "ReduceSum" else data.n.size // mean.size
    count = math.prod(attributes["kernel_shape"]) if pool else count
    n = np.rint(mean * count)
    assert np.abs(n - mean * count).max() < 0.1
    return Exact(
        n.astype(np.int64),
        (data.steps[0] / count,),
        np.zeros(n.shape, np.int64),
        bits=15 if pool and n[0, 0].size > 1 and data.wide else 31,
    )


def _resized(node: onnx.NodeProto, inputs: list[Any]) -> Near:
    """Interpolated numbers; the weights of ONNX Runtime are float32, those of the lowering exact."""
    data = inputs[0]
    real = run_node(node, [data.n.astype(np.float32), *inputs[1:]])[0].astype(np.float64)
    return Near(real * float(data.steps[0]), float(data.steps[0]) * (1.0 if data.wide else 2.0**-12))


def _prelu(data: Exact, slopes: Any) -> Real:
    """Numbers below 0 with a step of their own, that of their channel."""
    reals = np.broadcast_to(slopes.real if isinstance(slopes, Exact) else slopes.astype(np.float64), data.n.shape)
    if data.wide:  # the two sides are multiplied by different numbers of bits
        return Near(np.where(data.n < 0, data.real * reals, data.real), float(data.steps[0]))
    values, index = np.unique(reals, return_inverse=True)
    steps = (data.steps[0], *(data.steps[0] * abs(Fraction(float(v))) for v in values))
    below = data.n < 0
    return Exact(np.where(below, data.n * np.sign(reals).astype(np.int64), data.n), steps,
                 np.where(below, index.reshape(data.n.shape) + 1, 0))  # fmt: skip


def _pair(kind: str, left: Any, right: Any) -> Real:
    """An operator on pairs of elements, of which one may be a constant."""
    if kind in ("Max", "Min"):
        a, b = np.broadcast_arrays(left.real, right.real)
        first = a >= b if kind == "Max" else a <= b
        n = np.where(first, left.n, right.n)
        return Exact(n, left.steps + right.steps, np.where(first, left.which, right.which + len(left.steps)))
    if kind == "Div":
        return _scaled(left, 1 / (right.real if isinstance(right, Exact) else right.astype(np.float64)))
    if kind == "Mul":
        return _scaled(left, right) if isinstance(left, Exact) and not left.fixed else _scaled(right, left)
    a, b = (value.real if isinstance(value, Exact) else value.astype(np.float64) for value in (left, right))
    widest = max(float(v.steps[0]) for v in (left, right) if isinstance(v, Exact) and not v.fixed)
    widest = max(widest, float(np.abs(b).max()) * 2.0**-6)
    wide = any(isinstance(value, Exact) and value.wide for value in (left, right))
    return Near(a + b if kind == "Add" else a - b, widest * 2.0 ** (-6 if wide else -14))


def _scaled(data: Exact, other: Any) -> Real:
    """Products; constants of one number for each channel are a part of the step."""
    if isinstance(other, Exact) and not other.fixed:
        n = data.n * other.n
        return Exact(n, (data.steps[0] * other.steps[0],), np.zeros(n.shape, np.int64))
    reals = other.real if isinstance(other, Exact) else other.astype(np.float64)
    if max(reals.shape, default=1) != reals.size:
        return Near(data.real * reals, float(np.abs(data.real).max()) * float(np.abs(reals).max()) * 2.0**-20)
    wide = np.broadcast_to(reals, np.broadcast_shapes(data.n.shape, reals.shape))
    values, index = np.unique(wide, return_inverse=True)
    steps = tuple(data.steps[0] * abs(Fraction(float(v))) for v in values)
    n = data.n * np.sign(wide).astype(np.int64)
    return Exact(n, steps, index.reshape(wide.shape), bits=15 if data.wide else 31)
