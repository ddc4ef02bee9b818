"""Rounding float32 to narrower floats, with an account of what does not fit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

__all__ = [
    "FLOAT8_MAX",
    "HALF_MAX",
    "LEAST_WEIGHT_SQNR",
    "Rounding",
    "float8_scales",
    "narrowed",
    "rounding_of",
    "scaled",
]

Array = np.ndarray[Any, np.dtype[Any]]
HALF_MAX = 65504.0
FLOAT8_MAX = 448.0
LEAST_WEIGHT_SQNR = 40.0
"""dB that fp16 must keep of a constant; it keeps 73 of one that needs no denormals."""

_CHUNK = 1 << 22
_LEAST_SCALE = float(np.finfo(np.float32).tiny)
_TYPES: dict[ir.DataType, Any] = {
    ir.DataType.FLOAT16: np.float16,
    ir.DataType.BFLOAT16: ml_dtypes.bfloat16,
    ir.DataType.FLOAT8E4M3FN: ml_dtypes.float8_e4m3fn,
}


@dataclass(frozen=True)
class Rounding:
    """What rounding a tensor does to it.

    Attributes:
        count: Number of elements.
        overflows: Finite elements that become infinite.
        vanished: Elements other than zero that become zero.
        low: Least finite element, 0 if there is none.
        high: Greatest finite element.
        sqnr: Signal to noise of the finite elements in dB; infinite if the rounding is exact.
    """

    count: int
    overflows: int
    vanished: int
    low: float
    high: float
    sqnr: float

    @property
    def exact(self) -> bool:
        """Whether every element survives."""
        return not self.overflows and self.sqnr == math.inf


def narrowed(array: Array, dtype: ir.DataType, limit: float = math.inf) -> Array:
    """Round to the nearest number of a narrower type; finite elements beyond `limit` become `limit`.

    Infinities stay infinite. What is beyond the type's own range becomes infinite (NaN in E4M3FN).
    """
    if limit < math.inf:
        array = np.where(np.isfinite(array), np.clip(array, -limit, limit), array)
    with np.errstate(over="ignore"):
        return array.astype(_TYPES[dtype])


def rounding_of(tensor: ir.TensorProtocol, dtype: ir.DataType) -> Rounding:
    """Account for rounding a float32 tensor to a narrower type, piece by piece."""
    flat = tensor.numpy().reshape(-1)
    overflows = vanished = 0
    low, high, signal, noise = math.inf, -math.inf, 0.0, 0.0
    for begin in range(0, flat.size, _CHUNK):
        part = flat[begin : begin + _CHUNK]
        part = part[np.isfinite(part)]
        if not part.size:
            continue
        low, high = min(low, float(part.min())), max(high, float(part.max()))
        rounded = narrowed(part, dtype).astype(np.float32)
        fits = np.isfinite(rounded)
        overflows += int(part.size - np.count_nonzero(fits))
        vanished += int(np.count_nonzero((rounded == 0) & (part != 0)))
        signal += float(np.square(part[fits], dtype=np.float64).sum())
        noise += float(np.square((rounded - part)[fits], dtype=np.float64).sum())
    if low > high:
        low = high = 0.0
    sqnr = math.inf if not noise else 10 * math.log10(signal / noise) if signal else -math.inf
    return Rounding(flat.size, overflows, vanished, low, high, sqnr)


def float8_scales(weight: Array, axis: int | None) -> Array:
    """Scales that let E4M3 hold a weight without overflow; float32, one for each index of `axis` or a scalar.

    The greatest magnitude of a channel becomes 448, the greatest number of the format (Micikevicius et al., FP8
    Formats for Deep Learning, 2022).
    """
    others = None if axis is None else tuple(i for i in range(weight.ndim) if i != axis % weight.ndim)
    top = np.abs(weight).max(axis=others, initial=0.0)
    scales = np.maximum(np.asarray(top, np.float64) / FLOAT8_MAX, _LEAST_SCALE)
    return np.where(np.asarray(top) > 0, scales, 1.0).astype(np.float32)


def scaled(weight: Array, scales: Array, axis: int | None) -> Array:
    """Divide a weight by its scales, saturate at 448 and round to E4M3."""
    shape = [1] * weight.ndim
    if axis is not None:
        shape[axis] = -1
    return narrowed(weight / scales.reshape(shape), ir.DataType.FLOAT8E4M3FN, FLOAT8_MAX)
