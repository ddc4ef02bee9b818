"""How much an error of each weight counts; plain numpy.

Rows and columns of a weight may be large for no other reason than that what stands before or behind them is small: with
an input halved and its row doubled a network computes the same. An error relative to the size of its row and column is
the same then, too; the error itself is what counts where values of several channels are added up or compared. Networks
have layers of both kinds, so errors count by the geometric mean of the two, and tiny channels by no more than that of
some size (`python benchmarks/share_accuracy.py --ways tensor "tensor, exact k-means"` compares it with plain k-means).

Of what a convolution reads more is known: neighbours resemble each other, whatever the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["by_data", "by_size", "relative", "supposed_moments"]

Array = np.ndarray[Any, np.dtype[Any]]

_FLOOR = 0.1  # of the mean power, added to that of each channel
_NEIGHBOURS, _CHANNELS = 0.3, 0.2  # what values of an activation have in common


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


def supposed_moments(matrix: Array, parts: int, taps: int) -> Array:
    """Second moments of what a convolution reads as far as they can be told without data, `[parts, inputs, inputs]`.

    Neighbours in an image resemble each other, and values behind a ReLU are all positive. So errors of the weights of a
    kernel, and of those of an output, should cancel each other ("SQuant", Guo et al., 2022). How large the channels are
    is told by the rows as in `by_size`.

    Args:
        matrix: `[inputs, outputs]`.
        parts: Parts of the outputs with inputs of their own.
        taps: Neighbouring rows that see the same channel at other places.
    """
    inputs, width = len(matrix), matrix.shape[1] // parts
    powers = np.square(matrix, dtype=np.float32).reshape(inputs // taps, taps, parts, width)
    channels = np.arange(inputs) // taps
    common = np.full((inputs, inputs), _CHANNELS) + _NEIGHBOURS * (channels[:, None] == channels)
    np.fill_diagonal(common, 1.0)
    sizes = np.sqrt(relative(powers.mean(axis=(1, 3), dtype=np.float64)).astype(np.float64)).repeat(taps, axis=0)
    return np.stack([size[:, None] * common * size for size in sizes.T])


def by_data(matrix: Array, importance: Array, gains: Sequence[Array]) -> Array:
    """By what each input brings and what each output counts, float32 `[inputs, outputs]`.

    Args:
        matrix: `[inputs, outputs]`.
        importance: `[parts, inputs]` what an error counts at the output.
        gains: For each part what an error of its outputs counts.
    """
    columns = np.repeat(importance.T.astype(np.float32), matrix.shape[1] // len(importance), axis=1)
    columns *= np.concatenate(gains)
    return columns
