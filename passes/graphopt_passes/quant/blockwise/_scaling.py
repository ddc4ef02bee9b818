"""Scales of inputs that make a matrix easier to round; plain numpy.

Activation-aware weight quantization (Lin et al., "AWQ", 2023): multiply the weights of inputs that carry large
activations, and divide these activations, so that rounding hurts them less. The scales are a power of the root mean
squares, found by trying.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from graphopt_passes.quant.blockwise._grids import GridRule, round_matrix
from graphopt_passes.quant.blockwise._rounding import output_error

__all__ = ["search_scales"]

Array = np.ndarray[Any, np.dtype[Any]]

_POWERS = tuple(i / 20 for i in range(1, 21))
_COLUMNS = 256
_REACH = 2.0**10
_GAIN = 0.02


def search_scales(weights: Sequence[Array], h: Array, rule: GridRule) -> tuple[Array, float] | None:
    """Find scales for layers that read the same.

    Args:
        weights: Matrices `[inputs, outputs]`.
        h: Moments of the input, `[inputs, inputs]`.
        rule: The grid.

    Returns:
        float32 `[inputs]` to multiply the weights by and divide the inputs by, and the share of the error that is
        left; None where nothing is gained.
    """
    samples = [_some_columns(weight) for weight in weights]
    root = np.sqrt(np.maximum(np.einsum("ii->i", h), 0))
    seen = root > 0
    if not seen.any():
        return None
    before, best = _error(samples, np.ones(len(root), np.float32), h, rule), None
    least = before * (1 - _GAIN)
    level = np.where(seen, np.log(np.where(seen, root, 1.0)), 0.0)
    level = np.where(seen, level - level[seen].mean(), 0.0)
    for power in _POWERS:
        scales = np.clip(np.exp(power * level), 1 / _REACH, _REACH).astype(np.float32)
        error = _error(samples, scales, h, rule)
        if error < least:
            best, least = scales, error
    return None if best is None else (best, least / before)


def _some_columns(weight: Array) -> Array:
    columns = weight.shape[1]
    chosen = np.linspace(0, columns - 1, min(columns, _COLUMNS)).astype(np.int64)
    return np.asarray(weight[:, chosen], np.float32)


def _error(weights: Sequence[Array], scales: Array, h: Array, rule: GridRule) -> float:
    total = 0.0
    importance = np.einsum("ii->i", h) / np.square(scales)
    for weight in weights:
        real = round_matrix(weight * scales[:, None], rule, importance).real() / scales[:, None]
        total += output_error(weight - real, h)
    return total
