"""How much an error of each weight counts; plain numpy.

Rows and columns of a weight may be large for no other reason than that what stands before or behind them is small: with
an input halved and its row doubled a network computes the same. An error relative to the size of its row and column is
the same then, too; the error itself is what counts where values of several channels are added up or compared. Networks
have layers of both kinds, so errors count by the geometric mean of the two, and tiny channels by no more than that of
some size (`python benchmarks/share_accuracy.py --ways tensor "tensor, exact k-means"` compares it with plain k-means).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["by_data", "by_size", "relative"]

Array = np.ndarray[Any, np.dtype[Any]]

_FLOOR = 0.1  # of the mean power, added to that of each channel


def relative(powers: Array) -> Array:
    """What an error of each channel counts, given mean squares of its values, float32 of the same shape."""
    powers = np.asarray(powers, np.float64)
    mean = float(powers.mean())
    if mean <= 0:
        return np.ones(powers.shape, np.float32)
    return ((powers / mean + _FLOOR) ** -0.5).astype(np.float32)


def by_size(matrix: Array, parts: int, taps: int) -> Array:
    """By the size of row and column, float32 `[inputs, outputs]`: what is known without data.

    Args:
        matrix: `[inputs, outputs]`.
        parts: Parts of the outputs with inputs of their own.
        taps: Neighbouring rows that see the same channel at other places, as those of a convolution's kernel do.
    """
    powers = np.square(matrix, dtype=np.float32)
    inputs, width = len(matrix), matrix.shape[1] // parts
    rows = powers.reshape(inputs // taps, taps, parts, width).mean(axis=(1, 3), dtype=np.float64)
    spread = relative(rows).repeat(taps, axis=0).repeat(width, axis=1)
    spread *= relative(powers.mean(axis=0, dtype=np.float64))
    return spread


def by_data(matrix: Array, importance: Array, powers: Sequence[Array]) -> Array:
    """By what each input brings and by the size of each output, float32 `[inputs, outputs]`.

    Args:
        matrix: `[inputs, outputs]`.
        importance: `[parts, inputs]` what an error counts at the output.
        powers: For each part mean squares of its outputs.
    """
    columns = np.repeat(importance.T.astype(np.float32), matrix.shape[1] // len(importance), axis=1)
    columns *= relative(np.concatenate(powers))
    return columns
