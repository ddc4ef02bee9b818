"""Least squares under an activation: what it hides need not be right.

Behind a Relu a layer should make `relu(y)`, and below zero anything does. Minimised by majorisation: where the wanted
total is hidden, a total that is hidden as well is its own target, one that is not is drawn to the edge; each step is a
least-squares problem with the same X'X (after Zhang et al., Accelerating Very Deep Convolutional Networks, 2015).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from graphopt_passes.prune.refit.least_squares import NARROW, Correction, Moments, System, choose_ridge

__all__ = ["Change", "Rows", "fit", "step_towards"]

_LEAST_GAIN = 1e-3
_STEPS = 4
_WIDEST = 2400
_CHUNK = 1 << 22
_MOMENTS_CHUNK = 1 << 23

Change = tuple[np.ndarray, np.ndarray]
"""Of weight and bias."""


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
        return self._at(slice(places[0], places[-1] + 1) if beside else places)

    def parts(self, numbers: int) -> Iterator[Rows]:
        """All rows, as many at a time as have so many inputs and outputs."""
        size = max(1, numbers // (len(self.x) * (self.x.shape[2] + self.wanted.shape[2])))
        return (self._at(slice(start, start + size)) for start in range(0, self.x.shape[1], size))

    def _at(self, chosen: slice | np.ndarray) -> Rows:
        x, wanted, now = (array[:, chosen] for array in (self.x, self.wanted, self.now))
        return Rows(x, wanted, now, self.held_out[chosen], self.low, self.high)

    def moments(self) -> Moments:
        """Moments of the input and of what is missed."""
        found = Moments.empty(len(self.x), self.x.shape[2], self.wanted.shape[2])
        for part in self.parts(_MOMENTS_CHUNK):
            found.add(part.x, part.wanted.astype(np.float64) - part.now, part.wanted)
        return found

    def after(self, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        """Totals after a correction, `[groups, rows, outputs]`."""
        found = self.x @ weight.astype(np.float32)
        found += self.now
        found += bias[:, None].astype(np.float32)
        return found

    def products(self, weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sums over the rows of what a correction should add, where the totals that it leads to are to be right.

        Returns:
            `[groups, inputs, outputs]`: of its products with the input; `[groups, outputs]`: of itself.
        """
        found, sums = np.zeros(weight.shape), np.zeros(bias.shape)
        for part in self.parts(_CHUNK):
            missed = part.targets(part.after(weight, bias))
            missed -= part.now
            found += part.x.transpose(0, 2, 1) @ missed
            sums += missed.sum(axis=1, dtype=np.float64)
        return found, sums

    def shift(self) -> np.ndarray:
        """`[groups, outputs]`: what totals should gain on average."""
        return self.targets(self.now).mean(axis=1, dtype=np.float64) - self.now.mean(axis=1, dtype=np.float64)

    def targets(self, totals: np.ndarray) -> np.ndarray:
        """What totals should be: as wanted, or anything on the same side where that is hidden."""
        found = self.wanted.copy()
        if np.isfinite(self.low).any():
            np.copyto(found, np.minimum(totals, self.low), where=self.wanted <= self.low)
        if np.isfinite(self.high).any():
            np.copyto(found, np.maximum(totals, self.high), where=self.wanted >= self.high)
        return found

    def error(self, totals: np.ndarray) -> float:
        """Root mean square of what is seen to be missed, relative to the spread of what should be seen."""
        missed = np.clip(totals, self.low, self.high)
        missed -= np.clip(self.wanted, self.low, self.high)
        total = float(np.square(missed, out=missed).sum(dtype=np.float64))
        return float(np.sqrt(total / self._spread)) if self._spread > 0 else 0.0

    @cached_property
    def _spread(self) -> float:
        """Sum of squares of what should be seen, about its mean; as it is where it does not vary."""
        seen = np.clip(self.wanted, self.low, self.high)
        mean = seen.mean(axis=1, keepdims=True)
        power = float(np.square(seen).sum(dtype=np.float64))
        seen -= mean
        spread = float(np.square(seen, out=seen).sum(dtype=np.float64))
        return spread if spread > 1e-12 * power else power


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
    ridge, best = choose_ridge(seen, unseen, offset=offset)
    after, taken = np.inf, 0
    for change in _steps(fitted, seen, ridge, best, offset=offset):
        error = held_out.error(held_out.after(*change))
        if error >= after * (1 - _LEAST_GAIN):
            break
        best, after, taken = change, error, taken + 1
    if after >= before * (1 - _LEAST_GAIN):
        return _shifted(rows, fitted, held_out, before) if offset else None
    seen.merge(unseen)
    if taken > 1:  # all rows ask for little more than what the fitted ones did: one step from there is enough
        system = seen.system(ridge, offset=offset)
        best = step_towards(rows, system, best, partial(np.linalg.solve, system.matrix), offset=offset)
    else:
        best = seen.solve(ridge, offset=offset)
    return Correction(*best, before, after)


def _shifted(rows: Rows, fitted: Rows, held_out: Rows, before: float) -> Correction | None:
    """The correction of the bias alone."""
    groups, _, inputs = rows.x.shape
    weight = np.zeros((groups, inputs, rows.wanted.shape[2]))
    after = held_out.error(held_out.now + fitted.shift()[:, None].astype(np.float32))
    return None if after >= before * (1 - _LEAST_GAIN) else Correction(weight, rows.shift(), before, after)


def _steps(rows: Rows, moments: Moments, ridge: float, start: Change, *, offset: bool) -> Iterator[Change]:
    """The plain correction, then those that heed the activation, one better than the other."""
    yield start
    if not rows.bounded or rows.x.shape[2] > _WIDEST:
        return
    system = moments.system(ridge, offset=offset)
    dtype = np.float64 if rows.x.shape[2] <= NARROW else np.float32
    inverse = np.linalg.inv(system.matrix.astype(dtype))
    for _ in range(_STEPS):
        start = step_towards(rows, system, start, lambda wanted: inverse @ wanted.astype(dtype), offset=offset)
        yield start


def step_towards(
    rows: Rows, system: System, start: Change, solve: Callable[[np.ndarray], np.ndarray], *, offset: bool
) -> Change:
    """The plain correction towards what totals should be after the last one.

    Args:
        rows: What to fit.
        system: The equations of its moments.
        start: The last correction.
        solve: Answers of the equations to a right side, `[groups, inputs, outputs]`.
        offset: The bias may change.
    """
    products, sums = rows.products(*start)
    mean = offset * sums / rows.x.shape[1]
    weight = solve(products - rows.x.shape[1] * system.mean[:, :, None] * mean[:, None, :])
    return weight, mean - (system.mean[:, None] @ weight)[:, 0]
