"""Least squares under an activation: what it hides need not be right.

Behind a Relu a layer should make `relu(y)`, and below zero anything does. Minimised by majorisation: where the wanted
total is hidden, a total that is hidden as well is its own target, one that is not is drawn to the edge; each step is a
least-squares problem with the same X'X (after Zhang et al., Accelerating Very Deep Convolutional Networks, 2015).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

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
        """Some of the rows; those that lie side by side are not copied."""
        places = np.flatnonzero(mask)
        beside = len(places) > 0 and places[-1] - places[0] == len(places) - 1
        chosen = slice(places[0], places[-1] + 1) if beside else places
        x, wanted, now = (array[:, chosen] for array in (self.x, self.wanted, self.now))
        return Rows(x, wanted, now, self.held_out[chosen], self.low, self.high)

    def moments(self) -> Moments:
        """Moments of the input and of what is missed."""
        groups, count, inputs = self.x.shape
        found = Moments.empty(groups, inputs, self.wanted.shape[2])
        size = max(1, _CHUNK // (groups * inputs))
        for start in range(0, count, size):
            x, wanted, now = (array[:, start : start + size] for array in (self.x, self.wanted, self.now))
            found.add(x, wanted.astype(np.float64) - now, wanted)
        return found

    def after(self, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        """Totals after a correction, `[groups, rows, outputs]`."""
        return self.now + self.x @ weight.astype(np.float32) + bias[:, None].astype(np.float32)

    def missed(self, totals: np.ndarray) -> np.ndarray:
        """What a correction should add, where its totals are to be what they should be."""
        targets = self.targets(totals)
        targets -= self.now
        return targets

    def shift(self) -> np.ndarray:
        """`[groups, outputs]`: what totals should gain on average."""
        return self.targets(self.now).mean(axis=1, dtype=np.float64) - self.now.mean(axis=1, dtype=np.float64)

    def targets(self, totals: np.ndarray) -> np.ndarray:
        """What totals should be: as wanted, or anything on the same side where that is hidden."""
        found = self.wanted.copy()
        if np.isfinite(self.low).any():
            np.minimum(totals, self.low, out=found, where=self.wanted <= self.low)
        if np.isfinite(self.high).any():
            np.maximum(totals, self.high, out=found, where=self.wanted >= self.high)
        return found

    def error(self, totals: np.ndarray) -> float:
        """Root mean square of what is seen to be missed, relative to the spread of what should be seen."""
        seen, wanted = np.clip(totals, self.low, self.high), np.clip(self.wanted, self.low, self.high)
        seen -= wanted
        missed = float(np.square(seen, out=seen).sum(dtype=np.float64))
        mean = wanted.mean(axis=1, keepdims=True)
        power = float(np.square(wanted).sum(dtype=np.float64))
        wanted -= mean
        spread = float(np.square(wanted, out=wanted).sum(dtype=np.float64))
        scale = spread if spread > 1e-12 * power else power
        return float(np.sqrt(missed / scale)) if scale > 0 else 0.0


def fit(rows: Rows, *, offset: bool) -> Correction | None:
    """Fit the correction of a layer.

    Args:
        rows: What to fit and what to choose by.
        offset: The bias may change.

    Returns:
        The correction, None where nothing helps on the held-out rows. Where no change of the weight does, the bias
        alone may.
    """
    fitted, held_out = rows.of(~rows.held_out), rows.of(rows.held_out)
    seen, unseen = fitted.moments(), held_out.moments()
    before = held_out.error(held_out.now)
    ridge = choose_ridge(seen, unseen, offset=offset)
    best, after, taken = seen.solve(ridge, offset=offset), np.inf, 0
    for change in _steps(fitted, seen, ridge, best, offset=offset):
        error = held_out.error(held_out.after(*change))
        if error >= after * (1 - _LEAST_GAIN):
            break
        best, after, taken = change, error, taken + 1
    if after >= before * (1 - _LEAST_GAIN):
        return _shifted(rows, fitted, held_out, before) if offset else None
    seen.merge(unseen)
    start = best if taken > 1 else seen.solve(ridge, offset=offset)
    # all rows ask for little more than what the fitted ones did: one step from there is enough
    *_, best = islice(_steps(rows, seen, ridge, start, offset=offset), min(taken, 2))
    return Correction(*best, before, after)


def _shifted(rows: Rows, fitted: Rows, held_out: Rows, before: float) -> Correction | None:
    """The correction of the bias alone."""
    groups, _, inputs = rows.x.shape
    weight = np.zeros((groups, inputs, rows.wanted.shape[2]))
    after = held_out.error(held_out.now + fitted.shift()[:, None].astype(np.float32))
    return None if after >= before * (1 - _LEAST_GAIN) else Correction(weight, rows.shift(), before, after)


def _steps(
    rows: Rows, moments: Moments, ridge: float, start: tuple[np.ndarray, np.ndarray], *, offset: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The plain correction, then those that heed the activation, one better than the other."""
    weight, bias = start
    yield weight, bias
    if not rows.bounded or rows.x.shape[2] > _WIDEST:
        return
    system = moments.system(ridge, offset=offset)
    inverse = np.linalg.inv(system.matrix)
    flipped = rows.x.transpose(0, 2, 1)
    for _ in range(_STEPS):
        missed = rows.missed(rows.after(weight, bias))
        mean = offset * missed.mean(axis=1, dtype=np.float64)
        products = (flipped @ missed).astype(np.float64)
        weight = inverse @ (products - moments.rows * system.mean[:, :, None] * mean[:, None, :])
        bias = mean - (system.mean[:, None] @ weight)[:, 0]
        yield weight, bias
