"""Convolutions, products, pools, reductions, normalizations, recurrences and quantized forms, for random networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from network_case import FEEDS, Drawing, Tensor

__all__ = ["LAYERS"]


def _image(g: Drawing, least: int = 3, most: int = 4) -> Tensor:
    return g.floats(least, most, lambda t: t.size > 0)


def _window(g: Drawing, spatial: Sequence[int], *, dilated: bool = True) -> dict[str, Any]:
    """Kernel, strides, dilations and pads that fit an image."""
    kernel = [g.number(1, min(4, size + 1)) for size in spatial]
    found: dict[str, Any] = {"kernel_shape": kernel}
    if g.maybe():
        found["strides"] = [g.number(1, 3) for _ in spatial]
    if dilated and g.maybe(0.25):
        found["dilations"] = [g.number(1, 2) for _ in spatial]
    if g.maybe(0.15):
        return {**found, "auto_pad": g.one(["SAME_UPPER", "SAME_LOWER", "VALID"])}
    if g.maybe(0.7):
        found["pads"] = [g.number(0, size - 1) for size in kernel * 2]
    return found


def _filters(g: Drawing, channels: int) -> tuple[int, int]:
    """Groups and filters: of all channels, of some, or of each."""
    groups = g.one([1, 1, 1, channels, *(n for n in range(2, channels) if channels % n == 0)])
    return groups, groups * g.number(1, max(1, g.one([6, 20]) // groups))


def _conv(g: Drawing) -> Tensor:
    x = _image(g)
    channels, window = x.shape[1], _window(g, x.shape[2:])
    groups, filters = _filters(g, channels)
    weight = g.weight(filters, channels // groups, *window["kernel_shape"])
    inputs = [x, weight, g.weight(filters, scale=0.5)] if g.maybe(0.6) else [x, weight]
    made = g.add("Conv", *inputs, group=groups, **window)
    return _activated(g, made)


def _activated(g: Drawing, x: Tensor) -> Tensor:
    """What mostly stands behind a layer: a residual, an activation."""
    if g.maybe(0.3):
        other = g.find(lambda t: t.dtype == "float32" and t.shape == x.shape and t.name != x.name)
        x = g.add(g.one(["Add", "Mul", "Sub"]), x, other or g.weight(*x.shape[1:]) if x.rank > 1 else x)
    if g.maybe(0.5):
        x = g.add(g.one(["Relu", "Sigmoid", "Tanh", "Gelu", "HardSwish", "LeakyRelu"]), x)
    return x


def _transposed(g: Drawing) -> Tensor:
    x = _image(g)
    channels, rank = x.shape[1], x.rank - 2
    kernel = [g.number(1, 4) for _ in range(rank)]
    strides = [g.number(1, 3) for _ in range(rank)]
    groups, filters = _filters(g, channels)
    window: dict[str, Any] = {"strides": strides, "group": groups}
    if g.maybe():
        window["pads"] = [g.number(0, size - 1) for size in kernel * 2]
    elif g.maybe(0.2):
        window["auto_pad"] = g.one(["SAME_UPPER", "SAME_LOWER", "VALID"])
    if g.maybe(0.3):
        window["output_padding"] = [g.number(0, stride - 1) for stride in strides]
    if g.maybe(0.2):
        window["dilations"] = [g.number(1, 2) for _ in range(rank)]
    weight = g.weight(channels, filters // groups, *kernel, scale=0.3)
    return g.add("ConvTranspose", x, weight, *([g.weight(filters, scale=0.5)] if g.maybe() else []), **window)


def _matmul(g: Drawing) -> Tensor:
    x = g.floats(1)
    depth, columns = x.shape[-1], g.number(1, g.one([6, 40]))
    form = g.one(["matrix", "matrix", "matrices", "vector", "left"])
    if form == "matrices":
        batch = [size if g.maybe(0.7) else 1 for size in x.shape[:-2]][g.number(0, 1) :]
        return _activated(g, g.add("MatMul", x, g.weight(*batch, depth, columns, scale=0.3)))
    if form == "vector":
        return g.add("MatMul", x, g.weight(depth))
    if form == "left" and x.rank > 1:
        return g.add("MatMul", g.weight(columns, x.shape[-2]), x)
    return _activated(g, g.add("MatMul", x, g.weight(depth, columns, scale=1 / max(1.0, depth**0.5))))


def _product(g: Drawing) -> Tensor:
    """Of two activations, the second of which may have to be turned."""
    x = g.floats(2)
    y = g.find(lambda t: t.dtype == "float32" and t.rank == x.rank and t.shape[:-2] == x.shape[:-2], 0.8)
    if y is None:
        y = g.input(g.normal((*x.shape[:-2][g.number(0, 1) :], x.shape[-1], g.number(1, 20)), 0.3))
    elif y.shape[-2] != x.shape[-1]:
        if y.shape[-1] != x.shape[-1]:
            y = g.input(g.normal((*x.shape[:-2], g.number(1, 20), x.shape[-1]), 0.3))
        y = g.add("Transpose", y, perm=[*range(y.rank - 2), y.rank - 1, y.rank - 2])
    return _activated(g, g.add("MatMul", x, y))


def _gemm(g: Drawing) -> Tensor:
    x, columns = g.floats(2, 2), g.number(1, g.one([6, 40]))
    left, right = g.maybe(0.2), g.maybe()
    rows, depth = x.shape[::-1] if left else x.shape
    shape = (columns, depth) if right else (depth, columns)
    weight = g.weight(*shape, scale=0.3) if g.maybe(0.9) else g.input(g.normal(shape, 0.3))
    inputs = [x, weight]
    if g.maybe(0.7):
        bias = g.one([(columns,), (columns,), (1, columns), (1,), (), (rows, columns), (rows, 1)])
        inputs.append(g.constant(g.normal(bias)[0]) if g.maybe(0.85) else g.input(g.normal(bias)))
    scales = {"alpha": g.one([0.5, 1.5]), "beta": g.one([0.5, 0.0, 2.0])} if g.maybe(0.2) else {}
    return _activated(g, g.add("Gemm", *inputs, transA=int(left), transB=int(right), **scales))


def _einsum(g: Drawing) -> Tensor:
    x = g.floats(3, 3)
    a, b, c = x.shape
    equation, shape = g.one(
        [("abc,cd->abd", (c, 3)), ("abc,abd->acd", (a, b, 4)), ("abc,b->ac", (b,)), ("...c,dc->...d", (5, c)),
         ("abc,dbc->ad", (2, b, c))]
    )  # fmt: skip
    return g.add("Einsum", x, g.input(g.normal(shape, 0.3)), equation=equation)


def _pool(g: Drawing) -> Tensor:
    x = _image(g)
    op = g.one(["MaxPool", "AveragePool", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool"])
    if op.startswith("Global"):
        return g.add(op, x)
    window = _window(g, x.shape[2:], dilated=op == "MaxPool")
    if "auto_pad" not in window and g.maybe(0.25) and op != "LpPool":
        window["ceil_mode"] = 1
    if op == "AveragePool" and "ceil_mode" not in window and g.maybe(0.3):  # with both, opsets count differently
        window["count_include_pad"] = 1
    return g.add(op, x, **window)


_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Mean", "Min", "Prod", "Sum", "Sum", "SumSquare")


def _reduce(g: Drawing) -> Tensor:
    op = f"Reduce{g.one(_REDUCTIONS)}"
    integers = g.find(lambda t: t.dtype in ("int32", "int64"), 0.15)
    x = integers or g.floats(1, 5, lambda t: t.size > 0)
    if op == "ReduceLogSum" and not integers:
        x = g.add("Abs", x)
    keep = {"keepdims": g.number(0, 1)} if g.maybe(0.8) else {}
    if g.maybe(0.1) or not x.rank:
        return g.add(op, x, **keep)
    axes = [int(i) for i in g.rng.choice(x.rank, g.number(1, x.rank), replace=False)]
    axes = [axis - x.rank if g.maybe(0.3) else axis for axis in axes]
    if g.opset >= 18 or op == "ReduceSum":
        return g.add(op, x, g.ints(*axes), **keep)
    return g.add(op, x, axes=axes, **keep)


def _norm(g: Drawing) -> Tensor:
    op = g.one(["Softmax", "Softmax", "LogSoftmax", "LayerNormalization", "BatchNormalization", "LpNormalization"])
    if op == "BatchNormalization":
        x = g.floats(2, 5)
        sizes = [g.weight(x.shape[1], scale=0.7) for _ in range(3)]
        spread = g.constant(np.abs(g.normal((x.shape[1],))[0]) + np.float32(0.5))
        return _activated(g, g.add(op, x, *sizes, spread))
    x = g.floats(1)
    axis = g.number(-x.rank, x.rank - 1)
    if op == "LayerNormalization":
        columns = x.shape[axis % x.rank :]
        inputs = [x, g.weight(*columns, scale=0.7)] + ([g.weight(*columns, scale=0.7)] if g.maybe(0.7) else [])
        return g.add(op, *inputs, axis=axis)
    return g.add(op, x, axis=axis, **({"p": g.number(1, 2)} if op == "LpNormalization" else {}))


def _image_norm(g: Drawing) -> Tensor:
    x = _image(g)
    scale, shift = g.weight(x.shape[1], scale=0.7), g.weight(x.shape[1], scale=0.7)
    op = g.one(["InstanceNormalization", "GroupNormalization", "LRN", "MeanVarianceNormalization"])
    if op == "LRN":
        return g.add(op, x, size=g.one([1, 3, 5]), alpha=0.3, beta=0.6, bias=1.5)
    if op == "MeanVarianceNormalization":
        return g.add(op, x, axes=[0, *range(2, x.rank)])
    if op == "GroupNormalization" and g.opset >= 21:
        groups = g.one([n for n in range(1, x.shape[1] + 1) if x.shape[1] % n == 0])
        return g.add(op, x, scale, shift, num_groups=groups)
    return g.add("InstanceNormalization", x, scale, shift)


_PLACES = ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")


def _resize(g: Drawing) -> Tensor:
    x = _image(g)
    mode = g.one(["nearest", "linear", "cubic"])
    attributes: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": g.one(_PLACES)}
    if mode == "nearest":
        attributes["nearest_mode"] = g.one(["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
    if mode == "cubic" and x.rank == 3:
        attributes["mode"] = "linear"
    if g.maybe():
        sizes = [*x.shape[:2], *(g.number(1, 2 * size) for size in x.shape[2:])]
        return g.add("Resize", x, None, None, g.ints(*sizes), **attributes)
    # scales whose products with whole numbers are exact: nearest pixels are no matter of rounding
    scales = [1.0, 1.0, *(g.one([0.5, 1.0, 2.0, 4.0, 0.25, 1.5]) for _ in x.shape[2:])]
    if any(int(size * scale) < 1 for size, scale in zip(x.shape, scales, strict=True)):
        scales = [1.0, 1.0, *([2.0] * (x.rank - 2))]
    return g.add("Resize", x, None, g.constant(np.float32(scales)), **attributes)


def _recurrent(g: Drawing) -> None:
    op, gates = g.one([("LSTM", 4), ("GRU", 3), ("RNN", 1)])
    x, hidden = g.floats(3, 3, lambda t: t.size > 0), g.number(1, 9)
    both = g.maybe(0.4)
    count, inputs = 1 + both, x.shape[2]
    weights = [g.weight(count, gates * hidden, size, scale=0.4) for size in (inputs, hidden)]
    bias = g.weight(count, 2 * gates * hidden, scale=0.4) if g.maybe(0.7) else None
    states = [None, g.input(g.normal((count, x.shape[1], hidden), 0.5))] if g.maybe(0.3) else []
    direction = "bidirectional" if both else g.one(["forward", "reverse"])
    more = {"linear_before_reset": g.number(0, 1)} if op == "GRU" else {}
    outputs = g.number(1, 3 if op == "LSTM" else 2)
    found = [x, *weights, *([bias] if bias or states else []), *states]
    g.add_all(op, *found, count=outputs, hidden_size=hidden, direction=direction, **more)


# quantized forms


def _step(g: Drawing, x: Tensor) -> Tensor:
    """A scale that covers a tensor, or nearly."""
    return g.constant(np.float32(max(0.01, x.greatest) / g.one([127.0, 100.0, 140.0])))


def _zero(g: Drawing) -> Tensor:
    kind = g.one(["uint8", "uint8", "int8"])
    return g.constant(np.array(g.one([128, 128, 121, 0] if kind == "uint8" else [0, 0, -3]), kind))


def _stepped(g: Drawing, x: Tensor) -> Tensor:
    """Through integers and back."""
    scale, zero = _step(g, x), _zero(g)
    return g.add("DequantizeLinear", g.add("QuantizeLinear", x, scale, zero), scale, zero)


def _stored(g: Drawing, shape: Sequence[int], axis: int, fan: int) -> tuple[Tensor, Tensor]:
    """A weight of integers, dequantized, and its scales."""
    many, kind = g.maybe(), g.one(["int8", "int8", "uint8"])
    values = g.rng.integers(-127, 128, shape) if kind == "int8" else g.rng.integers(0, 256, shape)
    scales = g.constant(np.float32(g.rng.uniform(0.5, 1.5, shape[axis] if many else ()) / (70 * max(1, fan) ** 0.5)))
    zeros = np.full(scales.shape, 0 if kind == "int8" else g.one([128, 120]), kind)
    inputs = [g.constant(values.astype(kind)), scales, g.constant(zeros)]
    return g.add("DequantizeLinear", *inputs, axis=axis), scales


def _bias(g: Drawing, count: int, source: Tensor, scales: Tensor) -> Tensor:
    """In steps of the sums, as quantizers store it."""
    steps = source.array * scales.array
    values = g.rng.integers(-300, 300, count).astype(np.int32)
    return g.add("DequantizeLinear", g.constant(values), g.constant(np.float32(steps)), axis=0)


def _quantized_conv(g: Drawing) -> Tensor:
    x = _image(g)
    scale, zero = _step(g, x), _zero(g)
    real = g.add("DequantizeLinear", g.add("QuantizeLinear", x, scale, zero), scale, zero)
    channels, window = x.shape[1], _window(g, x.shape[2:])
    groups, filters = _filters(g, channels)
    shape = (filters, channels // groups, *window["kernel_shape"])
    weight, scales = _stored(g, shape, 0, int(np.prod(shape[1:])))
    inputs = [real, weight, _bias(g, filters, scale, scales)] if g.maybe(0.6) else [real, weight]
    made = _activated(g, g.add("Conv", *inputs, group=groups, **window))
    return _stepped(g, made) if g.maybe(0.8) else made


def _quantized_product(g: Drawing) -> Tensor:
    x = g.floats(2, 4, lambda t: t.size > 0)
    scale, zero = _step(g, x), _zero(g)
    real = g.add("DequantizeLinear", g.add("QuantizeLinear", x, scale, zero), scale, zero)
    depth, columns = x.shape[-1], g.number(1, g.one([6, 40]))
    turned = x.rank == 2 and g.maybe()
    weight, scales = _stored(g, (columns, depth) if turned else (depth, columns), 0 if turned else 1, depth)
    if x.rank == 2:
        inputs = [real, weight, _bias(g, columns, scale, scales)] if g.maybe() else [real, weight]
        made = g.add("Gemm", *inputs, transB=int(turned))
    else:
        made = g.add("MatMul", real, weight)
    made = _activated(g, made)
    return _stepped(g, made) if g.maybe(0.8) else made


def _through_steps(g: Drawing) -> Tensor:
    return _stepped(g, g.floats())


def _joined_steps(g: Drawing) -> Tensor:
    """Two dequantized tensors put together, and quantized again on a grid of their own or of one of them."""
    x = g.floats(1)
    axis = g.number(0, x.rank - 1)
    parts = [_stepped(g, x), _stepped(g, g.one([x, g.input(g.normal(x.shape))]))]
    return _stepped(g, g.add("Concat", *parts, axis=axis))


def _grids(g: Drawing) -> Tensor:
    """Activations with a grid for each index of an axis."""
    x = g.floats(2)
    axis = g.number(0, x.rank - 1)
    scale = g.constant(np.float32(g.rng.uniform(0.01, 0.05, x.shape[axis])))
    zero = g.constant(g.rng.integers(100, 150, x.shape[axis]).astype(np.uint8))
    return g.add("DequantizeLinear", g.add("QuantizeLinear", x, scale, zero, axis=axis), scale, zero, axis=axis)


def _dynamic(g: Drawing) -> Tensor:
    """A grid that is made while it runs, and a product on it."""
    x = g.floats(2, 3, lambda t: t.size > 0)
    integers, scale, zero = g.add_all("DynamicQuantizeLinear", x, count=3)
    kind, columns = g.one(["int8", "uint8"]), g.number(1, 20)
    values = g.rng.integers(-128 if kind == "int8" else 0, 128, (x.shape[-1], columns)).astype(kind)
    sums = g.add("MatMulInteger", integers, g.constant(values), zero)
    return g.add("Mul", g.add("Cast", sums, to=1), g.add("Mul", scale, g.constant(np.float32(0.01))))


def _fused_steps(g: Drawing) -> Tensor:
    """ONNX's own quantized operators."""
    x = g.floats(2, 4, lambda t: t.size > 0)
    scale, zero = _step(g, x), _zero(g)
    integers, columns = g.add("QuantizeLinear", x, scale, zero), g.number(1, 20)
    wide = g.constant(np.float32(0.05)), g.constant(np.array(0 if zero.dtype == "int8" else 128, zero.dtype))
    if x.rank >= 3 and g.maybe():
        window = _window(g, x.shape[2:])
        shape = (columns, x.shape[1], *window["kernel_shape"])
        weight, step = g.constant(g.rng.integers(-127, 128, shape).astype(np.int8)), g.factor(0.004)
        made = g.add(
            "QLinearConv", integers, scale, zero, weight, step, g.constant(np.int8(0)), *wide, **window
        )  # fmt: skip
    else:
        weight = g.constant(g.rng.integers(-127, 128, (x.shape[-1], columns)).astype(np.int8))
        step = g.factor(0.004)
        made = g.add("QLinearMatMul", integers, scale, zero, weight, step, g.constant(np.int8(0)), *wide)
    return g.add("DequantizeLinear", made, *wide)


def _attention(g: Drawing) -> Tensor:
    """Scores of queries and keys, with a mask, times values."""
    x = g.floats(2, 4, lambda t: t.size > 0)
    turned = g.add("Transpose", x, perm=[*range(x.rank - 2), x.rank - 1, x.rank - 2])
    scores = g.add("Mul", g.add("MatMul", x, turned), g.constant(np.float32(0.3)))
    if g.maybe():
        masks = [np.where(g.rng.random((1, x.shape[-2])) < 0.3, -50, 0).astype(np.float32) for _ in range(FEEDS)]
        scores = g.add("Add", scores, g.input(masks))
    return g.add("MatMul", g.add("Softmax", scores, axis=-1), x)


LAYERS: Sequence[tuple[Callable[[Drawing], Any], int]] = (
    (_conv, 6), (_transposed, 1), (_matmul, 3), (_product, 2), (_gemm, 2), (_einsum, 1), (_pool, 3), (_reduce, 4),
    (_norm, 3), (_image_norm, 1), (_resize, 1), (_recurrent, 1), (_quantized_conv, 3), (_quantized_product, 2),
    (_through_steps, 2), (_joined_steps, 1), (_grids, 1), (_dynamic, 1), (_fused_steps, 1), (_attention, 1),
)  # fmt: skip
"""Functions that add such operators, and how likely each is."""
