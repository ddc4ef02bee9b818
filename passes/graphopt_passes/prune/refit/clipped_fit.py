"""Least squares under an activation: what it hides need not be right.

Behind a Relu a layer should make `relu(y)`, and below zero anything does. Minimised by majorisation: where the wanted
total is hidden, a total that is hidden as well is its own target, one that is not is drawn to the edge; each step is a
least-squares problem with the same X'X (after Zhang et al., Accelerating Very Deep Convolutional Networks, 2015).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from graphopt_passes.prune.refit.least_squares import Correction, Moments, choose_ridge

__all__ = ["Rows", "fit"]

_LEAST_GAIN = 1e-3
_STEPS = 4
_WIDEST = 2400
_CHUNK = 1 << 23


@dataclass(frozen=True, eq=False)
class Rows:
    """What goes into a layer and what should come out, row by row, groups first.

    Attributes:
        x: `[groups, rows, inputs]`, float32.
        wanted: `[groups, rows, outputs]`: totals in the whole model, float32.
        now: `[groups, rows, outputs]`: totals with the present weights, float32.
        held_out: `[rows]`: not to be fitted, but to choose by.
        low: `[groups, 1, outputs]`: totals below look the same; -inf where there is no such bound.
        high: `[groups, 1, outputs]`: totals above look the same.
    """

    x: np.ndarray
    wanted: np.ndarray
    now: np.ndarray
    held_out: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def bounded(self) -> bool:
        """Whether an activation hides anything."""
        return bool(np.isfinite(self.low).any() or np.isfinite(self.high).any())

    def of(self, mask: np.ndarray) -> Rows:
        """Some of the rows; all of them are not copied."""
        if mask.all():
            return self
        x, wanted, now = (array[:, mask] for array in (self.x, self.wanted, self.now))
        return Rows(x, wanted, now, self.held_out[mask], self.low, self.high)

    def moments(self) -> Moments:
        """Moments of the input and of what is missed."""
        groups, count, inputs = self.x.shape
        found = Moments.empty(groups, inputs, self.wanted.shape[2])
        for chosen in np.array_split(np.arange(count), groups * count * inputs // _CHUNK + 1):
            x, wanted, now = (array[:, chosen].astype(np.float64) for array in (self.x, self.wanted, self.now))
            found.add(x, wanted - now, wanted)
        return found

    def after(self, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        """Totals after a correction, `[groups, rows, outputs]`."""
        return self.now + self.x @ weight.astype(np.float32) + bias[:, None].astype(np.float32)

    def targets(self, totals: np.ndarray) -> np.ndarray:
        """What totals should be: as wanted, or anything on the same side where that is hidden."""
        edge = np.clip(self.wanted, self.low, self.high)
        below = (self.wanted <= self.low) & (totals <= self.low)
        above = (self.wanted >= self.high) & (totals >= self.high)
        return np.where(below | above, totals, edge)

    def error(self, totals: np.ndarray) -> float:
        """Root mean square of what is seen to be missed, relative to the spread of what should be seen."""
        seen, wanted = np.clip(totals, self.low, self.high), np.clip(self.wanted, self.low, self.high)
        missed = float(np.square(seen - wanted, dtype=np.float64).sum())
        power = float(np.square(wanted, dtype=np.float64).sum())
        spread = float(np.square(wanted - wanted.mean(axis=1, keepdims=True), dtype=np.float64).sum())
        scale = spread if spread > 1e-12 * power else power
        return float(np.sqrt(missed / scale)) if scale > 0 else 0.0


def fit(rows: Rows, *, offset: bool) -> Correction | None:
    """Fit the correction of a layer.

    Args:
        rows: What to fit and what to choose by.
        offset: The bias may change.

    Returns:
        The correction, None where nothing helps on the held-out rows.
    """
    fitted, held_out = rows.of(~rows.held_out), rows.of(rows.held_out)
    seen, unseen = fitted.moments(), held_out.moments()
    before = held_out.error(held_out.now)
    ridge = choose_ridge(seen, unseen, offset=offset)
    errors = [held_out.error(held_out.after(*step)) for step in _steps(fitted, seen, ridge, offset=offset)]
    best = int(np.argmin(errors))
    if errors[best] >= before * (1 - _LEAST_GAIN):
        return None
    seen.merge(unseen)
    steps = list(_steps(rows, seen, ridge, offset=offset, most=best))
    return Correction(*steps[-1], before, errors[best])


def _steps(
    rows: Rows, moments: Moments, ridge: float, *, offset: bool, most: int = _STEPS
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Corrections one better than the other: the plain one, then those that heed the activation."""
    weight, bias = moments.solve(ridge, offset=offset)
    yield weight, bias
    if not most or not rows.bounded or rows.x.shape[2] > _WIDEST:
        return
    system = moments.system(ridge, offset=offset)
    inverse = np.linalg.inv(system.matrix)
    flipped = rows.x.transpose(0, 2, 1)
    for _ in range(most):
        missed = rows.targets(rows.after(weight, bias)) - rows.now
        mean = offset * missed.mean(axis=1, dtype=np.float64)
        products = (flipped @ missed).astype(np.float64)
        weight = inverse @ (products - moments.rows * system.mean[:, :, None] * mean[:, None, :])
        bias = mean - (system.mean[:, None] @ weight)[:, 0]
        yield weight, bias
