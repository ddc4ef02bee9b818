"""How far rounding moves the mean of what a layer computes; plain numpy.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019): with a weight off by dW
and an input off by dx, the mean of the result is off by dW E[x] + (W + dW) E[dx].
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["mean_shift"]

Array = np.ndarray[Any, np.dtype[Any]]


def mean_shift(weight: Array, rounded: Array, mean: Array, moved: Array) -> Array:
    """What to add to the bias of each output channel so that rounding leaves its mean alone.

    Args:
        weight: `[groups, rows, channels, taps]`.
        rounded: The same after rounding.
        mean: `[groups, channels, taps]` mean of the inputs.
        moved: `[groups, channels]` mean of what rounding adds to an input.

    Returns:
        `[groups * rows]`.
    """
    error = rounded.astype(np.float64) - weight
    by_weight = np.einsum("grct,gct->gr", error, mean)
    by_input = np.einsum("grct,gc->gr", rounded, moved)
    return -(by_weight + by_input).reshape(-1)
