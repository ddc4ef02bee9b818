"""Scales and zero points of blocks of a matrix; plain numpy.

A matrix `[inputs, outputs]` is cut along its inputs into groups; each group of each output has a scale and a zero
point of its own: real = scale * (code - zero), with codes from 0 to 2^bits - 1, and the real number zero always on the
grid. A symmetric grid has its zero in the middle, at 2^(bits - 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

__all__ = ["Blocks", "Fit", "GridRule", "fit_group", "group_bounds", "round_matrix"]

Array = np.ndarray[Any, np.dtype[Any]]
Fit = Literal["minmax", "mse", "hqq"]

_LEAST_SCALE = 2.0**-100
_SHRINKS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, 0.66, 0.6)
_REFITS = 2
_HQQ_ROUNDS = 20
_HQQ_NORM = 0.7
_HQQ_BETA = 1.0
_HQQ_GROWTH = 1.1


@dataclass(frozen=True)
class GridRule:
    """What a grid looks like and how it is fitted.

    Attributes:
        bits: Bits of a code, 2, 4 or 8.
        group: Inputs in a group; the last group may be shorter.
        symmetric: The zero point is fixed in the middle.
        fit: minmax: the range of the group. mse: the least squares error among ranges shrunk step by step, then
            least-squares scales. hqq: the sparsest error by half-quadratic splitting (Badri and Shaji,
            "Half-Quadratic Quantization of Large Machine Learning Models", 2023), with integer zero points.
    """

    bits: int
    group: int
    symmetric: bool
    fit: Fit

    @property
    def top(self) -> int:
        """The greatest code."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""
        return 2 ** (self.bits - 1)


@dataclass(frozen=True, eq=False)
class Blocks:
    """A matrix as codes.

    Attributes:
        codes: `[inputs, outputs]` uint8.
        scales: `[groups, outputs]` float32.
        zeros: `[groups, outputs]` uint8.
        rule: What the grids look like.
    """

    codes: Array
    scales: Array
    zeros: Array
    rule: GridRule

    @property
    def group(self) -> int:
        """Inputs in a group."""
        return self.rule.group

    def outputs(self, part: slice) -> Blocks:
        """The same of some outputs."""
        return Blocks(self.codes[:, part], self.scales[:, part], self.zeros[:, part], self.rule)

    def rows(self, start: int, stop: int) -> Array:
        """Real numbers of the inputs from `start`, the first of a group, to `stop`; float32."""
        first = start // self.group
        count = -(-stop // self.group) - first
        inside = [min(self.group, stop - start - i * self.group) for i in range(count)]
        scales = np.repeat(self.scales[first : first + count], inside, axis=0)
        zeros = np.repeat(self.zeros[first : first + count], inside, axis=0)
        return (self.codes[start:stop].astype(np.float32) - zeros) * scales

    def real(self) -> Array:
        """Real numbers `[inputs, outputs]`, float32."""
        return self.rows(0, len(self.codes))


def group_bounds(inputs: int, group: int) -> list[tuple[int, int]]:
    """First input and the one after the last of each group."""
    return [(start, min(start + group, inputs)) for start in range(0, inputs, group)]


def round_matrix(weight: Array, rule: GridRule, importance: Array | None = None) -> Blocks:
    """Round a matrix `[inputs, outputs]` to the nearest codes, group by group: no other copy of it is made.

    Args:
        weight: The matrix; may be memory-mapped and of any memory order.
        rule: The grid.
        importance: `[inputs]` weights of squared errors; None: all alike.
    """
    inputs, outputs = weight.shape
    bounds = group_bounds(inputs, rule.group)
    codes = np.empty((inputs, outputs), np.uint8)
    scales, zeros = np.empty((len(bounds), outputs), np.float32), np.empty((len(bounds), outputs), np.uint8)
    for i, (start, stop) in enumerate(bounds):
        rows = np.ascontiguousarray(weight[start:stop], np.float32)
        scales[i], zeros[i] = fit_group(rows, rule, None if importance is None else importance[start:stop])
        codes[start:stop] = _encode(rows, scales[i], zeros[i], rule.top)
    return Blocks(codes, scales, zeros, rule)


def fit_group(rows: Array, rule: GridRule, importance: Array | None = None) -> tuple[Array, Array]:
    """Fit the grid of one group.

    Args:
        rows: `[inputs of the group, outputs]` float32.
        rule: The grid.
        importance: `[inputs of the group]` weights of squared errors; None: all alike.

    Returns:
        Scales float32 and zero points uint8, `[outputs]` each.
    """
    low = np.minimum(rows.min(axis=0), 0)
    high = np.maximum(rows.max(axis=0), 0)
    if rule.fit == "mse":
        return _least_squares(rows, low, high, rule, importance)
    scales, zeros = _range_grid(low, high, rule)
    if rule.fit == "hqq":
        scales, zeros = _half_quadratic(rows, scales, zeros, rule)
    return scales, zeros.astype(np.uint8)


def _range_grid(low: Array, high: Array, rule: GridRule) -> tuple[Array, Array]:
    """The grid whose ends are the ends of the range; zero points float32."""
    if rule.symmetric:
        reach = np.maximum(-low, high) / np.float32(rule.middle - 1 if rule.bits > 2 else 1)
        return _sound(reach), np.full(low.shape, rule.middle, np.float32)
    scales = _sound((high - low) / np.float32(rule.top))
    return scales, np.clip(np.rint(-low / scales), 0, rule.top).astype(np.float32)


def _sound(scales: Array) -> Array:
    return np.where(scales > _LEAST_SCALE, scales, np.float32(1.0)).astype(np.float32)


def _steps(rows: Array, scales: Array, zeros: Array, top: int) -> Array:
    """Codes less the zero point, float32."""
    steps = rows / scales
    np.rint(steps, out=steps)
    return np.clip(steps, -zeros, top - zeros, out=steps)


def _encode(rows: Array, scales: Array, zeros: Array, top: int) -> Array:
    zeros = zeros.astype(np.float32)
    steps = _steps(rows, scales, zeros, top)
    steps += zeros
    return steps.astype(np.uint8)


def _least_squares(
    rows: Array, low: Array, high: Array, rule: GridRule, importance: Array | None
) -> tuple[Array, Array]:
    """The best of shrunk ranges, each improved by least-squares scales for its codes."""
    weights = None if importance is None else importance.astype(np.float32)[:, None]
    least, best_scales, best_zeros = np.full(low.shape, np.inf, np.float32), low, low
    for shrink in _SHRINKS:
        scales, zeros = _range_grid(low * np.float32(shrink), high * np.float32(shrink), rule)
        for refit in range(_REFITS + 1):
            steps = _steps(rows, scales, zeros, rule.top)
            weighted = steps if weights is None else steps * weights
            error = np.einsum("ij,ij->j", weighted, steps)  # of steps with themselves, and with the weight
            cross = np.einsum("ij,ij->j", weighted, rows)
            loss = scales * (scales * error - 2 * cross)
            better = loss < least
            least, best_scales = np.where(better, loss, least), np.where(better, scales, best_scales)
            best_zeros = np.where(better, zeros, best_zeros)
            if refit < _REFITS:
                scales = np.where((error > 0) & (cross > 0), cross / np.maximum(error, 1e-30), scales)
                scales = _sound(scales)
    return best_scales.astype(np.float32), best_zeros.astype(np.uint8)


def _half_quadratic(rows: Array, scales: Array, zeros: Array, rule: GridRule) -> tuple[Array, Array]:
    """Grids that make the errors sparse: alternately shrink the errors and fit the grid to what is left.

    Badri and Shaji fit real zero points to given scales; integer zero points hardly move by themselves, so the scales
    are fitted as well, by least squares.
    """
    beta, top = _HQQ_BETA / np.maximum(scales, 1e-30) ** (2 - _HQQ_NORM), rule.top
    current = zeros
    best, least = (scales, zeros), _sparse_loss(rows, scales, zeros, top)
    for _ in range(_HQQ_ROUNDS):
        steps = _steps(rows, scales, current, top)
        error = rows - steps * scales
        size = np.abs(error)
        kept = np.maximum(size - _HQQ_NORM * np.maximum(size, 1e-30) ** (_HQQ_NORM - 1) / beta, 0)
        goal = rows - np.sign(error) * kept
        if not rule.symmetric:
            current = np.clip(np.rint(np.mean(steps + current - goal / scales, axis=0)), 0, top).astype(np.float32)
            steps = _steps(goal, scales, current, top)
        square, cross = np.einsum("ij,ij->j", steps, steps), np.einsum("ij,ij->j", steps, goal)
        scales = _sound(np.where((square > 0) & (cross > 0), cross / np.maximum(square, 1e-30), scales))
        loss = _sparse_loss(rows, scales, current, top)
        better = loss < least
        best = np.where(better, scales, best[0]), np.where(better, current, best[1])
        least = np.minimum(loss, least)
        beta = beta * np.float32(_HQQ_GROWTH)
    return best[0].astype(np.float32), best[1]


def _sparse_loss(rows: Array, scales: Array, zeros: Array, top: int) -> Array:
    return (np.abs(rows - _steps(rows, scales, zeros, top) * scales) ** _HQQ_NORM).sum(axis=0)
