"""Integer grids for activations, weights and biases; plain numpy.

Scheme of Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference"
(2018): real = scale * (integer - zero_point), with the real number zero always on the grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

__all__ = [
    "Grid",
    "activation_grid",
    "bias_floor",
    "decibel",
    "dequantize",
    "pair_reach",
    "quantize",
    "quantize_bias",
    "quantize_weight",
    "raise_scales",
    "top_integer",
    "weight_scales",
]

Array = np.ndarray[Any, np.dtype[Any]]
_LEAST_SCALE = 2.0**-100  # products of two scales stay normal in float32
_BIAS_LIMIT = 2**31 - 2**8


@dataclass(frozen=True)
class Grid:
    """An integer grid for one tensor: real = scale * (integer - zero_point).

    Attributes:
        scale: Step, exactly representable in float32.
        zero_point: Integer that stands for zero.
        dtype: uint8 or int8.
    """

    scale: float
    zero_point: int
    dtype: Literal["uint8", "int8"]

    @property
    def bounds(self) -> tuple[float, float]:
        """Least and greatest real number on the grid."""
        info = np.iinfo(self.dtype)
        return self.scale * (int(info.min) - self.zero_point), self.scale * (int(info.max) - self.zero_point)


def activation_grid(
    low: float,
    high: float,
    dtype: Literal["uint8", "int8"],
    *,
    symmetric: bool = False,
    power_of_two: bool = False,
) -> Grid:
    """Fit a grid to the range [low, high], widened to hold zero.

    A symmetric grid has its zero point in the middle: 128 for uint8, 0 for int8. A power of two as scale is the next
    greater one.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    info = np.iinfo(dtype)
    if symmetric:
        scale = _float32(max(-low, high) / 127, power_of_two)
        return Grid(scale, 128 if dtype == "uint8" else 0, dtype)
    scale = _float32((high - low) / 255, power_of_two)
    zero_point = round(int(info.min) - low / scale)
    return Grid(scale, min(max(zero_point, int(info.min)), int(info.max)), dtype)


def quantize(values: Array, grid: Grid) -> Array:
    """Round values to the grid, half to even, as ONNX QuantizeLinear does."""
    info = np.iinfo(grid.dtype)
    steps = np.rint(values.astype(np.float32) / np.float32(grid.scale)) + grid.zero_point
    return np.clip(steps, info.min, info.max).astype(grid.dtype)


def dequantize(integers: Array, grid: Grid) -> Array:
    """Real numbers of grid points, float32."""
    return (integers.astype(np.float32) - np.float32(grid.zero_point)) * np.float32(grid.scale)


def weight_scales(weight: Array, axis: int | None, bits: int = 8, *, power_of_two: bool = False) -> Array:
    """Scales that let the greatest magnitude reach the end of a symmetric grid, [channels] or a scalar, float32.

    Args:
        weight: The weight, any rank.
        axis: Axis with a scale for each index; None: one scale for all.
        bits: 8 for -127..127; 7 where a kernel adds the products of two neighbouring weights with uint8 in 16 bits,
            which two weights of -63..63 cannot saturate. With an axis known, only the sum of each two neighbours has
            to stay within 128 then, so that a weight beside a small one keeps its bits.
        power_of_two: Take the next greater powers of two.
    """
    others = None if axis is None else tuple(i for i in range(weight.ndim) if i != axis % weight.ndim)
    reach = np.max(np.abs(weight), axis=others, initial=0.0).astype(np.float64)
    if axis is not None and bits < 8:
        reach = np.maximum(reach, pair_reach(np.moveaxis(weight, axis, 0)))
    scales = np.where(reach > 0, np.maximum(reach / top_integer(axis, bits), _LEAST_SCALE), 1.0)
    if power_of_two:
        scales = np.exp2(np.ceil(np.log2(scales)))
    return scales.astype(np.float32)


def pair_reach(rows: Array) -> Array:
    """Greatest magnitude of the sum of two neighbours in each row, float64[channels].

    Kernels read a row [channel, ...] as it stands or with the first of the other axes innermost; the opposite signs
    of two neighbours cancel and need no care.
    """
    found = np.zeros(len(rows))
    for order in (rows, np.moveaxis(rows, 1, -1)) if rows.ndim > 2 else (rows,):
        flat = order.reshape(len(rows), -1)
        if flat.shape[1] > 1:
            found = np.maximum(found, np.abs(flat[:, 1:] + flat[:, :-1]).max(axis=1))
    return found


def quantize_weight(weight: Array, scales: Array, axis: int | None, bits: int = 8) -> Array:
    """Round a weight to int8 with the given scales."""
    shape = [1] * weight.ndim
    if axis is not None:
        shape[axis % weight.ndim] = -1
    top = top_integer(axis, bits)
    return np.clip(np.rint(weight / scales.reshape(shape)), -top, top).astype(np.int8)


def quantize_bias(bias: Array, scale: Array) -> Array | None:
    """Round a bias [C] to int32 with scale [C] or a scalar; None where it does not fit 32 bits."""
    steps = np.rint(bias.astype(np.float64) / scale.astype(np.float64))
    return steps.astype(np.int32) if np.abs(steps).max(initial=0.0) <= _BIAS_LIMIT else None


def bias_floor(bias: Array, input_scale: float, channels: int) -> Array:
    """Least scales of a weight with which a bias fits 32 bits in steps of input times weight scale, float32[channels].

    Where they are above what the weight wants, its products are so small beside the bias that the coarser steps are
    below the resolution of float32.

    Args:
        bias: [groups * channels]; zeros are returned if not all of it is finite, for then no scale helps.
        input_scale: Scale of the activations.
        channels: Number of scales; groups share them, and all of the bias shares a single one.
    """
    reach = np.abs(bias.astype(np.float64)).reshape(-1, channels).max(axis=0, initial=0.0)
    least = reach / (_BIAS_LIMIT * (1 - 2.0**-20) * input_scale)
    fits = np.isfinite(least).all() and least.max(initial=0.0) < np.finfo(np.float32).max
    return (least if fits else np.zeros(channels)).astype(np.float32)


def raise_scales(scales: Array, least: Array, *, power_of_two: bool = False) -> Array:
    """Scales of at least `least`, [channels] or a scalar, float32; powers of two stay such."""
    least = least.reshape(scales.shape)
    if power_of_two:
        least = np.exp2(np.ceil(np.log2(np.maximum(least, _LEAST_SCALE))))
    return np.maximum(scales, least).astype(np.float32)


def decibel(signal: float, noise: float) -> float:
    """Signal to noise as 10 log10 of the ratio of powers; infinite without noise."""
    if noise <= 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 and noise < math.inf else -math.inf


def top_integer(axis: int | None, bits: int) -> int:
    """Greatest integer of a weight; with a scale for each channel `weight_scales` looks after pairs instead."""
    return 2 ** ((8 if axis is not None else bits) - 1) - 1


def _float32(scale: float, power_of_two: bool) -> float:
    if scale <= 0:
        return 1.0
    scale = max(scale, _LEAST_SCALE)
    return 2.0 ** math.ceil(math.log2(scale)) if power_of_two else float(np.float32(scale))
