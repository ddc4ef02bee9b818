"""Quantized graphs: what is computed on integers, and what merely passes them on.

A DequantizeLinear in front of arithmetic is part of that arithmetic, and one in front of a convolution or product
makes it one of integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt_backends._fold import is_constant
from graphopt_backends.kernels.expression import Expression, as_type, call, parameter

__all__ = [
    "Bytes", "Grid", "Integers", "as_bytes", "bytes_of", "dequantized", "grid_of", "integers_of", "is_weight", "real",
    "weight_of",
]  # fmt: skip

_BYTES = (ir.DataType.UINT8, ir.DataType.INT8)


@dataclass(frozen=True)
class Grid:
    """Real numbers that integers stand for: scale * (integer - zero_point)."""

    scale: float
    zero_point: int
    dtype: str


def grid_of(node: ir.Node) -> Grid | None:
    """The one grid of a QuantizeLinear or DequantizeLinear on 8-bit activations; None if it is anything else."""
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or node.domain not in ("", "ai.onnx"):
        return None
    scale, zero = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    if scale is None or not is_constant(scale) or (zero is not None and not is_constant(zero)):
        return None
    side = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
    if side is None or side.dtype is None or side.dtype not in _BYTES or scale.dtype != ir.DataType.FLOAT:
        return None
    scales, zeros = _numbers(scale), _numbers(zero) if zero is not None else np.zeros(1)
    if scales.size != 1 or zeros.size != 1:
        return None
    return Grid(float(scales[0]), int(zeros[0]), str(side.dtype.numpy()))


def _numbers(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy().reshape(-1)


def dequantized(value: ir.Value) -> tuple[ir.Value, Grid] | None:
    """What a value was before a DequantizeLinear with one grid."""
    node = value.producer()
    if node is None or node.op_type != "DequantizeLinear":
        return None
    grid, source = grid_of(node), node.inputs[0]
    return None if grid is None or source is None or is_constant(source) else (source, grid)


def real(integers: Expression, grid: Grid) -> Expression:
    """The real numbers that integers of a grid stand for."""
    value = as_type(as_type(integers, "int32"), "float32")
    if grid.zero_point:
        value = call("sub", value, parameter(grid.zero_point))
    return call("mul", value, parameter(grid.scale))


@dataclass(frozen=True)
class Integers:
    """A convolution or product on integers.

    Attributes:
        source: Integers that it reads.
        zero_point: Theirs; a value where only a run tells it.
        weight: Integers, their zero points taken away: from -255 to 255.
        scale: Of the sums: one for each output channel, or one for all; None: the sums themselves are the result.
        bias: Added to the sums, int32, if there is one.
    """

    source: ir.Value
    zero_point: int | ir.Value
    weight: np.ndarray
    scale: np.ndarray | None
    bias: np.ndarray | None


def integers_of(node: ir.Node, channel_axis: int) -> Integers | None:
    """The integer form of a convolution or product; None where its operands are no 8-bit integers.

    Args:
        node: A Conv, Gemm, MatMul, ConvInteger or MatMulInteger.
        channel_axis: Axis of the weight with the output channels.
    """
    source, weight = node.inputs[0], node.inputs[1]
    if source is None or weight is None:
        return None
    if node.op_type.endswith("Integer"):
        return _explicit(node, source, weight)
    if node.attributes.get_float("alpha", 1.0) != 1.0 or node.attributes.get_float("beta", 1.0) != 1.0:
        return None
    read, stored = dequantized(source), _stored(weight, channel_axis)
    if read is None or stored is None:
        return None
    values, scales = stored
    scale = np.float32(read[1].scale) * scales
    bias: np.ndarray | None = None
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = _bias(node.inputs[2], scale)
        if bias is None:
            return None
    return Integers(read[0], read[1].zero_point, values, scale, bias)


@dataclass(frozen=True)
class Bytes:
    """A product of two activations that are bytes.

    Attributes:
        sides: Both of them.
        zeros: Their zero points.
        scale: Of the sums; None: the sums themselves are the result.
    """

    sides: tuple[ir.Value, ir.Value]
    zeros: tuple[int, int]
    scale: float | None


def bytes_of(node: ir.Node) -> Bytes | None:
    """The form of a MatMul or MatMulInteger whose operands are both computed, of bytes on one grid each."""
    left, right = node.inputs[0], node.inputs[1]
    if left is None or right is None:
        return None
    if node.op_type == "MatMulInteger":
        zeros = [node.inputs[i] if len(node.inputs) > i else None for i in (2, 3)]
        given = [value for value in zeros if value is not None]
        if is_constant(right) or not all(is_constant(value) and _numbers(value).size == 1 for value in given):
            return None
        a, b = (0 if value is None else int(_numbers(value)[0]) for value in zeros)
        return Bytes((left, right), (a, b), None)
    first, second = dequantized(left), dequantized(right)
    if node.op_type != "MatMul" or first is None or second is None:
        return None
    grid, other = first[1], second[1]
    scale = float(np.float32(grid.scale) * np.float32(other.scale))
    return Bytes((first[0], second[0]), (grid.zero_point, other.zero_point), scale)


def _explicit(node: ir.Node, source: ir.Value, weight: ir.Value) -> Integers:
    """Operands of an operator on integers."""
    zero, weight_zero = (node.inputs[i] if len(node.inputs) > i else None for i in (2, 3))
    values = _array(weight).astype(np.int16)
    if weight_zero is not None:
        columns = _array(weight_zero).astype(np.int16)
        shape = (-1,) + (1,) * (values.ndim - 1) if node.op_type == "ConvInteger" else (-1,)
        values = values - columns.reshape(shape if columns.size > 1 else ())
    if zero is None:
        return Integers(source, 0, values, None, None)
    return Integers(source, int(_array(zero).reshape(-1)[0]) if is_constant(zero) else zero, values, None, None)


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()


def _stored(weight: ir.Value, channel_axis: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Integers of a weight without their zero points, and scales."""
    node = weight.producer()
    if node is None or node.op_type != "DequantizeLinear" or node.attributes.get_int("block_size", 0):
        return None
    values, scale = node.inputs[0], node.inputs[1]
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    constants = [value for value in (values, scale, zero) if value is not None]
    if values is None or scale is None or not all(is_constant(value) for value in constants):
        return None
    if values.dtype not in _BYTES or scale.dtype != ir.DataType.FLOAT:
        return None
    array, scales = _array(values).astype(np.int16), _numbers(scale)
    if max(scales.size, _numbers(zero).size if zero is not None else 1) > 1:
        axis = node.attributes.get_int("axis", 1) % array.ndim
        if axis != channel_axis % array.ndim:
            return None
    if zero is not None and _numbers(zero).any():
        zeros = _numbers(zero).astype(np.int16)
        array = array - zeros.reshape([-1 if i == channel_axis % array.ndim and zeros.size > 1 else 1
                                       for i in range(array.ndim)])  # fmt: skip
    return array, scales


def as_bytes(weight: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Weights as int8, and what those of each index of an axis have too little then; None: nothing."""
    others = tuple(i for i in range(weight.ndim) if i != axis % weight.ndim)
    above = np.maximum(weight.max(others, keepdims=True, initial=0) - 127, 0)
    excess = above + np.minimum(weight.min(others, keepdims=True, initial=0) + 128, 0)
    found = (weight - excess).astype(np.int8)
    return found, excess.reshape(-1) if excess.any() else None


def is_weight(value: ir.Value) -> bool:
    """A constant, or what a DequantizeLinear makes of constants."""
    node = value.producer()
    if is_constant(value):
        return True
    return (
        node is not None and node.op_type == "DequantizeLinear" and not node.attributes.get_int("block_size", 0)
        and all(source is None or is_constant(source) for source in node.inputs)
    )  # fmt: skip


def weight_of(value: ir.Value) -> np.ndarray:
    """Values of a weight."""
    if is_constant(value):
        assert value.const_value is not None
        return value.const_value.numpy()
    node = value.producer()
    assert node is not None
    arrays = [source.const_value.numpy() for source in node.inputs if source is not None and source.const_value]
    integers, scale = arrays[0], arrays[1]
    zero = arrays[2] if len(arrays) > 2 else np.zeros_like(scale)
    if scale.size > 1:
        shape = [-1 if i == node.attributes.get_int("axis", 1) % integers.ndim else 1 for i in range(integers.ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    return ((integers.astype(np.float32) - zero.astype(np.float32)) * scale).astype(np.float32)


def _bias(value: ir.Value, scale: np.ndarray) -> np.ndarray | None:
    """The bias in steps of the sums: as it is stored, or a float one rounded to them."""
    node = value.producer()
    if node is not None and node.op_type == "DequantizeLinear" and is_weight(value):
        stored, steps = node.inputs[0], node.inputs[1]
        assert stored is not None
        assert steps is not None
        shifted = any(_numbers(zero).any() for zero in node.inputs[2:] if zero is not None)
        if stored.dtype == ir.DataType.INT32 and not shifted and np.allclose(_numbers(steps), scale, rtol=1e-5, atol=0):
            return _numbers(stored)
    if not is_weight(value):
        return None
    steps = np.round(weight_of(value).reshape(-1).astype(np.float64) / scale)
    return steps.astype(np.int32) if np.abs(steps).max(initial=0) < 2**30 else None
