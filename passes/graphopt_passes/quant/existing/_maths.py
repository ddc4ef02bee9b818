"""Real numbers of stored integers: real = scale * (integer - zero_point); plain numpy."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["blocks_to_matrix", "real_numbers", "unpack"]

Array = np.ndarray[Any, np.dtype[Any]]


def real_numbers(integers: Array, scale: Array, zero_point: Array | None, axis: int = 0, block: int = 0) -> Array:
    """Dequantize as ONNX DequantizeLinear does, float32.

    Args:
        integers: Any integer or narrow float type, any rank.
        scale: A scalar, one value for each index of `axis`, one for each block of `axis`, or whatever broadcasts.
        zero_point: Like `scale`; None: zero.
        axis: Axis of scales that are a vector or blocks.
        block: Length of a block along `axis`; 0: no blocks.
    """
    real = integers.astype(np.float32)
    if zero_point is not None:
        real = real - _spread(zero_point.astype(np.float32), integers.shape, axis, block)
    return (real * _spread(scale.astype(np.float32), integers.shape, axis, block)).astype(np.float32)


def unpack(packed: Array, bits: int, count: int) -> Array:
    """Numbers of `bits` bits from bytes, the lowest bits first: `[..., bytes]` becomes `[..., count]`, uint8."""
    if bits == 8:
        return packed[..., :count]
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    numbers = (packed[..., None] >> shifts) & np.uint8(2**bits - 1)
    return numbers.reshape(*packed.shape[:-1], -1)[..., :count]


def blocks_to_matrix(
    packed: Array, scales: Array, zero_points: Array | None, *, rows: int, columns: int, bits: int, block: int
) -> Array:
    """The weight `[rows, columns]` that a MatMulNBits multiplies with, float32.

    Args:
        packed: uint8 `[columns, blocks, bytes]`.
        scales: `columns * blocks` values, one for each block of a column.
        zero_points: uint8, packed like the weights, or as many numbers as scales; None: the middle, 2**(bits - 1).
        rows: Inputs of the layer.
        columns: Outputs of the layer.
        bits: 2, 4 or 8.
        block: Weights of a column that share a scale.
    """
    blocks = -(-rows // block)
    numbers = unpack(packed.reshape(columns, blocks, -1), bits, block).astype(np.float32)
    if zero_points is None:
        middle: Array = np.full((columns, blocks), 2 ** (bits - 1), np.float32)
    elif zero_points.dtype == np.uint8:
        middle = unpack(zero_points.reshape(columns, -1), bits, blocks).astype(np.float32)
    else:
        middle = zero_points.reshape(columns, blocks).astype(np.float32)
    real = (numbers - middle[..., None]) * scales.reshape(columns, blocks, 1).astype(np.float32)
    return np.ascontiguousarray(real.reshape(columns, -1)[:, :rows].T)


def _spread(parameter: Array, shape: tuple[int, ...], axis: int, block: int) -> Array:
    """Give a scale or zero point a shape that broadcasts."""
    if parameter.size == 1:
        return parameter.reshape(())
    axis %= len(shape)
    if block:
        return np.take(np.repeat(parameter, block, axis=axis), np.arange(shape[axis]), axis=axis)
    if parameter.ndim == 1 and parameter.size == shape[axis]:
        return parameter.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return parameter
