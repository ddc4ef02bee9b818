"""Regression of reduced rank: factors that make a wanted output of what a layer reads.

    min over W of rank r, b of  |seen(Y) - seen(X W + b)|^2         seen: what an activation lets through

Without an activation: least squares, and of its answer the leading terms as X weights them (Izenman, 1975), which is no
worse than solving for the second factor alone. Under a Relu, what it hides need not be right: by majorisation, totals
that should be hidden and are become their own targets, and each step is a problem without an activation again (Zhang
et al., Accelerating Very Deep Convolutional Networks, 2015). The rank binds in each of the steps, not behind them.

Held-out rows choose the ridge, how many steps to go, and whether to answer to the output at all or to keep to the
weight; the factors are then found again from all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from graphopt_passes.lowrank._factors import Problem
from graphopt_passes.lowrank.schemes import Chain
from graphopt_passes.prune.refit.clipped_fit import Change, Rows, step_towards
from graphopt_passes.prune.refit.least_squares import Moments, choose_ridge

__all__ = ["Answer", "answer"]

Array = np.ndarray[Any, np.dtype[Any]]
Shorten = Callable[[Problem], Chain]

_STEPS = 8
_LEAST_GAIN = 1e-3
_WIDEST = 2400


@dataclass(frozen=True, eq=False)
class Answer:
    """Factors, and what they lead to.

    Attributes:
        chain: The factors.
        bias: `[outputs]`: what the bias gains.
        error: Root mean square of what factors from the other rows miss on held-out ones, relative to the spread of
            what is wanted there.
    """

    chain: Chain
    bias: Array
    error: float


def answer(rows: Rows, weight: Array, shorten: Shorten, *, offset: bool) -> Answer:
    """Factor a layer so that it makes what is wanted.

    Args:
        rows: What the layer reads and what it should make; one group.
        weight: `[inputs, outputs]`: as it is.
        shorten: Factors a weight, as moments of its input weight errors.
        offset: The bias may change.
    """
    fitted, held_out = rows.of(~rows.held_out), rows.of(rows.held_out)
    moments, unseen = fitted.moments(), held_out.moments()
    ridge, free = choose_ridge(moments, unseen, offset=offset)
    some = _Reduced(fitted, moments, ridge, weight, shorten, offset=offset)
    none = np.zeros_like(free[0]), np.zeros_like(free[1])
    starts = [some.shortened(start) for start in (free, none)]
    errors = [start.error_on(held_out) for start in starts]
    keeps = errors[1] < errors[0]
    best, error, steps = _descended(some, starts[keeps], errors[keeps], held_out)
    moments.merge(unseen)
    every = _Reduced(rows, moments, ridge, weight, shorten, offset=offset)
    if steps:  # all rows ask for little more than the fitted ones did: one step from there is enough
        final = every.shortened(every.step(best))
    else:
        final = every.shortened(none if keeps else moments.solve(ridge, offset=offset))
    return Answer(final.chain, final.bias, error)


@dataclass(frozen=True, eq=False)
class _Found:
    """A chain in the place of a weight."""

    chain: Chain
    bias: Array
    weight: Array

    @property
    def change(self) -> Change:
        """What weight and bias have gained."""
        return (self.chain.dense - self.weight)[None], self.bias[None]

    def error_on(self, rows: Rows) -> float:
        return rows.error(rows.after(*self.change))


class _Reduced:
    """Rows with their moments, and answers of reduced rank to them."""

    def __init__(
        self, rows: Rows, moments: Moments, ridge: float, weight: Array, shorten: Shorten, *, offset: bool
    ) -> None:
        self.rows, self._weight, self._shorten, self._offset = rows, weight, shorten, offset
        self._system, plain = moments.system(ridge, offset=offset), moments.system(0.0, offset=offset)
        self._second, self._mean = plain.matrix[0] / max(1, moments.rows), plain.mean[0]

    def shortened(self, change: Change) -> _Found:
        """Factors of a changed weight, and the bias that makes up for their mean error."""
        wanted = self._weight + change[0][0]
        chain = self._shorten(Problem(wanted, self._second))
        return _Found(chain, change[1][0] + self._mean @ (wanted - chain.dense), self._weight)

    def step(self, found: _Found) -> Change:
        """The answer of any rank to what totals should be, now that they are what was found."""
        solve = partial(np.linalg.solve, self._system.matrix)
        return step_towards(self.rows, self._system, found.change, solve, offset=self._offset)


def _descended(reduced: _Reduced, start: _Found, error: float, held_out: Rows) -> tuple[_Found, float, int]:
    """Where steps lead that better the held-out rows, their error there, and how many steps that was."""
    if not held_out.bounded or len(start.weight) > _WIDEST:
        return start, error, 0
    for taken in range(_STEPS):
        found = reduced.shortened(reduced.step(start))
        after = found.error_on(held_out)
        if after >= error * (1 - _LEAST_GAIN):
            return start, error, taken
        start, error = found, after
    return start, error, _STEPS
