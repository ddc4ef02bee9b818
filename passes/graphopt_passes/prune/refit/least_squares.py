"""Least squares from streamed second moments.

A linear layer should come closer to a wanted output: `R = Y - (X W + b)` is what it misses. The correction solves

    min over D, d of  |R - (X D + d)|^2 + ridge |D|^2

so that few samples change little (ridge regression towards the present weights, Hoerl and Kennard, 1970). X and R enter
only through `X'X`, `X'R` and sums, one batch after the other. The ridge is chosen on rows that were held out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

__all__ = ["NARROW", "RIDGES", "Correction", "Moments", "System", "choose_ridge"]

RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Candidates, relative to the mean square of an input."""

NARROW = 640
"""Layers with more inputs are refitted with less effort: in float32, and with fewer ridges to choose from."""

_JUDGED = 64


@dataclass
class Moments:
    """First and second moments of rows `x`, of what is missed `r`, and the spread of the wanted output `y`.

    All arrays are float64 with the groups of a grouped layer first.

    Attributes:
        rows: Rows seen.
        x: `[groups, inputs]` sums.
        r: `[groups, outputs]` sums.
        xx: `[groups, inputs, inputs]`.
        xr: `[groups, inputs, outputs]`.
        rr: `[groups, outputs]` sums of squares.
        y: `[groups, outputs]` sums.
        yy: `[groups, outputs]` sums of squares.
    """

    rows: int
    x: np.ndarray
    r: np.ndarray
    xx: np.ndarray
    xr: np.ndarray
    rr: np.ndarray
    y: np.ndarray
    yy: np.ndarray

    @classmethod
    def empty(cls, groups: int, inputs: int, outputs: int) -> Moments:
        """Moments of nothing."""
        narrow = [np.zeros((groups, outputs)) for _ in range(4)]
        xx, xr = np.zeros((groups, inputs, inputs)), np.zeros((groups, inputs, outputs))
        return cls(0, np.zeros((groups, inputs)), narrow[0], xx, xr, narrow[1], narrow[2], narrow[3])

    def add(self, x: np.ndarray, r: np.ndarray, y: np.ndarray) -> None:
        """Count rows: `x [groups, rows, inputs]`, `r` and `y [groups, rows, outputs]`.

        Sums are float64; of a wide layer the products of `x` about its mean are float32.
        """
        count, total, missed = x.shape[1], x.sum(axis=1, dtype=np.float64), r.sum(axis=1, dtype=np.float64)
        self.rows += count
        self.x += total
        self.r += missed
        self._products(x, r, total / max(1, count), missed)
        self.rr += np.square(r, dtype=np.float64).sum(axis=1)
        self.y += y.sum(axis=1, dtype=np.float64)
        self.yy += np.square(y, dtype=np.float64).sum(axis=1)

    def _products(self, x: np.ndarray, r: np.ndarray, mean: np.ndarray, missed: np.ndarray) -> None:
        if x.shape[2] <= NARROW:
            wide = x.astype(np.float64, copy=False)
            flipped = wide.transpose(0, 2, 1)
            self.xx += flipped @ wide
            self.xr += flipped @ r.astype(np.float64, copy=False)
            return
        centred = x.astype(np.float32, copy=False) - mean[:, None].astype(np.float32)
        flipped, mean = centred.transpose(0, 2, 1), mean.astype(np.float32).astype(np.float64)
        left = centred.sum(axis=1, dtype=np.float64)  # what rounding left of the mean
        crossed = left[:, :, None] * mean[:, None, :]
        self.xx += flipped @ centred
        self.xx += crossed + crossed.transpose(0, 2, 1) + x.shape[1] * mean[:, :, None] * mean[:, None, :]
        self.xr += flipped @ r.astype(np.float32, copy=False)
        self.xr += mean[:, :, None] * missed[:, None, :]

    def merge(self, other: Moments) -> None:
        """Count the rows of `other` as well."""
        self.rows += other.rows
        for name in ("x", "r", "xx", "xr", "rr", "y", "yy"):
            mine: np.ndarray = getattr(self, name)
            mine += getattr(other, name)

    def few(self, outputs: int) -> Moments:
        """The same of so many outputs, spread evenly; all if there are not more."""
        every = slice(None, None, -(-self.r.shape[1] // outputs))
        narrow = {name: getattr(self, name)[:, every] for name in ("r", "rr", "y", "yy")}
        return replace(self, xr=self.xr[:, :, every], **narrow)

    @property
    def finite(self) -> bool:
        """No row held an infinity or NaN."""
        return bool(np.isfinite(self.xx).all() and np.isfinite(self.rr).all() and np.isfinite(self.yy).all())

    def error(self, weight: np.ndarray | None = None, bias: np.ndarray | None = None) -> float:
        """Root mean square of what is missed after a correction, relative to the spread of the wanted output.

        Args:
            weight: `[groups, inputs, outputs]`; None: no correction.
            bias: `[groups, outputs]`.
        """
        missed = float(self.rr.sum())
        if weight is not None and bias is not None:
            missed -= 2 * float((weight * self.xr).sum() + (bias * self.r).sum())
            missed += float((weight * (self.xx @ weight)).sum()) + self.rows * float(np.square(bias).sum())
            missed += 2 * float((bias * (self.x[:, None] @ weight)[:, 0]).sum())
        spread = float((self.yy - np.square(self.y) / max(1, self.rows)).sum())
        scale = spread if spread > 1e-12 * float(self.yy.sum()) else float(self.yy.sum())
        return float(np.sqrt(max(0.0, missed) / scale)) if scale > 0 else 0.0

    def system(self, ridge: float, *, offset: bool) -> System:
        """The equations of a correction.

        Args:
            ridge: Relative to the mean square of the inputs.
            offset: The bias may change; it is not penalised.
        """
        mean = offset * self.x / max(1, self.rows)
        matrix = self.xx - self.rows * mean[:, :, None] * mean[:, None, :]
        diagonal = np.arange(matrix.shape[1])
        power = self.xx[:, diagonal, diagonal].mean(axis=1)
        # where the inputs hardly vary, what is left of them after centring is rounding
        level = ridge * matrix[:, diagonal, diagonal].mean(axis=1) + 1e-12 * power
        matrix[:, diagonal, diagonal] += np.where(power > 0, level, 1.0)[:, None]
        return System(matrix, mean)

    def solve(self, ridge: float, *, offset: bool, roughly: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """The correction of weight `[groups, inputs, outputs]` and bias `[groups, outputs]`.

        Args:
            ridge: Relative to the mean square of the inputs.
            offset: The bias may change; it is not penalised.
            roughly: In float32.
        """
        system = self.system(ridge, offset=offset)
        mean = offset * self.r / max(1, self.rows)
        wanted = self.xr - self.rows * system.mean[:, :, None] * mean[:, None, :]
        dtype = np.float32 if roughly else np.float64
        weight = np.linalg.solve(system.matrix.astype(dtype, copy=False), wanted.astype(dtype, copy=False))
        return weight, mean - (system.mean[:, None] @ weight)[:, 0]


@dataclass(frozen=True, eq=False)
class System:
    """The left side of the equations of a correction.

    Attributes:
        matrix: `[groups, inputs, inputs]`: products of the inputs about their mean, with the ridge.
        mean: `[groups, inputs]` of the inputs; zero where the bias may not change.
    """

    matrix: np.ndarray
    mean: np.ndarray


@dataclass(frozen=True, eq=False)
class Correction:
    """What to add to a layer.

    Attributes:
        weight: `[groups, inputs, outputs]`.
        bias: `[groups, outputs]`; zero where the bias may not change.
        before: Relative error of the output on held-out rows as things are.
        after: The same with the correction that the other rows ask for.
    """

    weight: np.ndarray
    bias: np.ndarray
    before: float
    after: float


def choose_ridge(
    seen: Moments, held_out: Moments, *, offset: bool, ridges: Sequence[float] = RIDGES
) -> tuple[float, tuple[np.ndarray, np.ndarray]]:
    """The ridge that does best on held-out rows, and the correction that it leads to.

    Of a wide layer, only candidates next to the best one yet are tried, and judged by some of its outputs.

    Args:
        seen: Moments of the rows to fit.
        held_out: Moments of the rows to choose by.
        offset: The bias may change.
        ridges: Candidates, ascending.
    """
    if seen.x.shape[1] <= NARROW:
        corrections = [seen.solve(ridge, offset=offset) for ridge in ridges]
        best = min(range(len(ridges)), key=lambda i: held_out.error(*corrections[i]))
        return ridges[best], corrections[best]
    best, errors = len(ridges) // 2, {-1: np.inf, len(ridges): np.inf}
    some, judges = seen.few(_JUDGED), held_out.few(_JUDGED)
    while True:
        near = (best, best - 1, best + 1)
        errors |= {
            i: judges.error(*some.solve(ridges[i], offset=offset, roughly=True)) for i in near if i not in errors
        }
        better = min(near, key=errors.__getitem__)
        if better == best:
            return ridges[best], seen.solve(ridges[best], offset=offset)
        best = better
