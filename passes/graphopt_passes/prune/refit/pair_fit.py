"""Two layers with an activation between them, fitted together to what the second should make.

    total = clip(x A + a, low, high) * gain, windowed, times B, plus b and what a shortcut adds

One layer after the other, B is left with what A's channels were in the whole model. Here A may make other channels, if
B can do more with them. The two take turns in least squares: A with the activation's present kinks held still and its
normal equations approximated by a Kronecker product (Martens and Grosse, K-FAC, 2015), its step scaled by an exact line
search; then B. The damping follows Levenberg and Marquardt: a step that does not help on held-out samples is taken
back and tried shorter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from graphopt_passes.prune.refit.clipped_fit import Rows
from graphopt_passes.prune.refit.windows import Windows

__all__ = ["Pair", "Weights", "fit_pair"]

_STEPS = 8
_DAMPING = (1e-2, 0.3, 100.0)
_LEAST_GAIN = 1e-4


@dataclass(frozen=True, eq=False)
class Weights:
    """Of both layers: `[inputs, middle]`, `[middle]`, `[middle * kernel, outputs]`, `[outputs]`; float32."""

    first: np.ndarray
    first_bias: np.ndarray
    second: np.ndarray
    second_bias: np.ndarray


@dataclass(frozen=True, eq=False)
class Pair:
    """Two layers on some samples.

    Attributes:
        rows: `[rows, inputs]`: what the first layer multiplies, float32.
        shape: Of what the second layer reads.
        windows: How it reads it.
        low: `[middle]`: bounds of the activation between, in units of the first layer with its offset.
        high: `[middle]`.
        offset: `[middle]`: what is added between the first layer and the activation.
        gain: `[middle]`: what the second layer reads is this times the clipped total of the first.
        out: What should come out, without `x` and `now`: wanted totals `[1, rows, outputs]` and their bounds.
        bypass: `[rows, outputs]`: what is added to the second layer's output.
    """

    rows: np.ndarray
    shape: tuple[int, ...]
    windows: Windows
    low: np.ndarray
    high: np.ndarray
    offset: np.ndarray
    gain: np.ndarray
    out: Rows
    bypass: np.ndarray

    def middle(self, weights: Weights) -> np.ndarray:
        """`[rows, middle]`: totals before the activation."""
        return self.rows @ weights.first + (weights.first_bias + self.offset)

    def read(self, middle: np.ndarray) -> np.ndarray:
        """`[rows, middle * kernel]`: what the second layer multiplies."""
        return self.windows.rows(self.windows.image(middle * self.gain, self.shape))

    def totals(self, read: np.ndarray, weights: Weights) -> np.ndarray:
        """`[rows, outputs]`."""
        return read @ weights.second + weights.second_bias + self.bypass

    def error(self, weights: Weights) -> float:
        """Relative error of what is seen of the totals."""
        read = self.read(np.clip(self.middle(weights), self.low, self.high))
        return self.out.error(self.totals(read, weights)[None])

    def missed(self, totals: np.ndarray) -> np.ndarray:
        """What totals should gain."""
        return self.out.targets(totals[None])[0] - totals


@dataclass(frozen=True, eq=False)
class _Products:
    """Products of rows about their mean."""

    mean: np.ndarray
    matrix: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray) -> _Products:
        mean = rows.mean(axis=0, dtype=np.float64)
        matrix = (rows.T @ rows).astype(np.float64) - len(rows) * np.outer(mean, mean)
        return cls(mean, matrix)

    def solve(self, rows: np.ndarray, missed: np.ndarray, damping: float) -> tuple[np.ndarray, np.ndarray]:
        """Weight and bias that explain what is missed."""
        level = missed.mean(axis=0, dtype=np.float64)
        products = (rows.T @ missed).astype(np.float64) - len(rows) * np.outer(self.mean, level)
        weight = np.linalg.solve(_damped(self.matrix, damping), products)
        return weight, level - self.mean @ weight


def fit_pair(
    fitted: Pair, held_out: Pair, every: Callable[[], Pair], weights: Weights
) -> tuple[Weights, float, float] | None:
    """Fit two layers together.

    Args:
        fitted: Samples to fit.
        held_out: Samples to choose by.
        every: Makes both in one, for the final fit.
        weights: Where to start from.

    Returns:
        The weights, and the error on held-out samples before and after; None where nothing helps there.
    """
    least, damping, most = _DAMPING
    before = error = held_out.error(weights)
    products, best, taken = _Products.of(fitted.rows), weights, 0.0
    for _ in range(_STEPS):
        found = _step(fitted, products, best, damping)
        after = held_out.error(found)
        if after < error * (1 - _LEAST_GAIN):
            best, error, taken, damping = found, after, damping, max(damping / 3, least)
        elif (damping := 10 * damping) > most:
            break
    if not taken:
        return None
    # all samples ask for little more than the fitted ones did: one step from there is enough
    whole = every()
    return _step(whole, _Products.of(whole.rows), best, taken), before, error


def _step(pair: Pair, products: _Products, weights: Weights, damping: float) -> Weights:
    """Move the first layer, then the second."""
    weights = _first(pair, products, weights, damping)
    read = pair.read(np.clip(pair.middle(weights), pair.low, pair.high))
    missed = pair.missed(pair.totals(read, weights))
    weight, bias = _Products.of(read).solve(read, missed, damping)
    second, second_bias = weights.second + weight, weights.second_bias + bias
    return replace(weights, second=second.astype(np.float32), second_bias=second_bias.astype(np.float32))


def _first(pair: Pair, products: _Products, weights: Weights, damping: float) -> Weights:
    middle = pair.middle(weights)
    missed = pair.missed(pair.totals(pair.read(np.clip(middle, pair.low, pair.high)), weights))
    moving = (middle > pair.low) & (middle < pair.high)
    pulled = pair.windows.flat(pair.windows.back(missed @ weights.second.T, pair.shape)) * (pair.gain * moving)
    taps = weights.second.reshape(len(pair.gain), -1) * pair.gain[:, None]
    coupling = _damped((taps @ taps.T).astype(np.float64), damping)
    weight, bias = (np.linalg.solve(coupling, part.T).T for part in products.solve(pair.rows, pulled, damping))
    weight, bias = weight.astype(np.float32), bias.astype(np.float32)
    change = pair.read((pair.rows @ weight + bias) * moving) @ weights.second
    power = float(np.square(change, dtype=np.float64).sum())
    if power <= 0:
        return weights
    length = np.float32(float((missed * change).sum(dtype=np.float64)) / power)
    return replace(weights, first=weights.first + length * weight, first_bias=weights.first_bias + length * bias)


def _damped(matrix: np.ndarray, damping: float) -> np.ndarray:
    level = damping * float(np.diag(matrix).mean())
    return matrix + (level if level > 0 else 1.0) * np.eye(len(matrix))
