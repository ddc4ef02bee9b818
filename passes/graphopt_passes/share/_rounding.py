"""Choose codebook entries so that the output of a layer changes least, given second moments of its input; plain numpy.

With `X` the rows that a layer reads and `H = X'X / rows`, a difference `D` `[inputs, outputs]` of the weights changes
the output by `tr(D' H D)` on average, or with a gain for each output by `tr(D' H D G)`. `compensate` takes entries
input by input and lets the inputs still to come make up for the error (Frantar et al., "GPTQ", 2022, with a codebook in
place of a grid). `refine` then alternates entries fitted to the codes by least squares, and codes to the entries by
coordinate descent (Behdin et al., "QuantEase", 2023), and never makes the error larger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Part", "compensate", "output_loss", "refine"]

Array = np.ndarray[Any, np.dtype[Any]]

_LAZY = 128  # inputs whose errors reach the later ones together, in one product
_SWEEP = 64
_ROUNDS = 6
_GAIN = 0.003
_DIRECTIONS = 12


@dataclass(frozen=True, eq=False)
class Part:
    """Columns of a weight that read the same inputs: all of them, or those of one group of a convolution.

    Attributes:
        weight: `[inputs, outputs]` float32.
        h: Damped moments `[inputs, inputs]` float64.
        order: `[inputs]` the inputs, those with the largest moments first.
        factor: The upper triangle `U` with `U'U` the inverse of `h` in that order, float64.
        owner: `[outputs]` codebook of each column.
        gain: `[outputs]` what a square error of each output counts, float32.
        fixed: `[inputs, outputs]` weights that are 0 and stay 0; None: none.
    """

    weight: Array
    h: Array
    order: Array
    factor: Array
    owner: Array
    gain: Array
    fixed: Array | None = None

    @classmethod
    def of(cls, weight: Array, h: Array, owner: Array, fixed: Array | None = None) -> Part:
        """A part with its factor, all outputs alike."""
        order, gain = np.argsort(-np.einsum("ii->i", h), kind="stable"), np.ones(len(owner), np.float32)
        return cls(weight, h, order, _inverse_factor(h[np.ix_(order, order)]), owner, gain, fixed)

    @property
    def powers(self) -> Array:
        """`[outputs]` mean squares of the outputs."""
        return np.einsum("io,io->o", self.weight, self.h.astype(np.float32) @ self.weight)

    @property
    def importance(self) -> Array:
        """`[inputs]` what an error of each input costs when the others make up for it as well as they can.

        That is the inverse of the diagonal of the inverse of `h` (Optimal Brain Surgeon, Hassibi and Stork, 1993).
        """
        found = np.empty(len(self.order))
        found[self.order] = 1 / np.square(self.factor).sum(axis=0)
        return found


def compensate(part: Part, tables: Array) -> Array:
    """Codes of one part, uint8 `[inputs, outputs]`, input by input in its order.

    Args:
        part: The weights.
        tables: `[groups, entries]`, ascending.
    """
    order, factor = part.order, part.factor.astype(np.float32)
    look, left = _Lookup(tables, part.owner), part.weight[order]
    codes, inputs = np.empty(part.weight.shape, np.uint8), len(left)
    for start in range(0, inputs, _LAZY):
        stop = min(start + _LAZY, inputs)
        errors = np.zeros((stop - start, left.shape[1]), np.float32)
        for j in range(start, stop):
            chosen = look.nearest(left[j], None if part.fixed is None else part.fixed[order[j]])
            codes[order[j]] = chosen
            errors[j - start] = error = (left[j] - look.real(chosen)) / factor[j, j]
            left[j + 1 : stop] -= factor[j, j + 1 : stop, None] * error
        left[stop:] -= factor[start:stop, stop:].T @ errors
    return codes


def refine(
    parts: Sequence[Part], codes: Sequence[Array], tables: Array, *, fit: bool = True
) -> tuple[list[Array], Array]:
    """Fit entries to codes and codes to entries in turn, as long as the error falls.

    Args:
        parts: All parts that share the codebooks.
        codes: Codes of each.
        tables: `[groups, entries]`, ascending; entries that are 0 stay 0.
        fit: False: the entries stay.
    """
    narrow = [part.h.astype(np.float32) for part in parts]
    best, best_tables, least = [*codes], tables, output_loss(parts, codes, tables)
    for _ in range(_ROUNDS):
        tried_tables = _fitted(parts, best, best_tables, narrow) if fit else best_tables
        tried_tables, tried = _ascending(tried_tables, best, parts)
        for part, one, h in zip(parts, tried, narrow, strict=True):
            _descend(part, one, tried_tables, h)
        loss = output_loss(parts, tried, tried_tables)
        if not loss < least:
            break
        gain, best, best_tables, least = 1 - loss / least, tried, tried_tables, loss
        if gain < _GAIN:
            break
    return best, best_tables


def output_loss(parts: Sequence[Part], codes: Sequence[Array], tables: Array) -> float:
    """`tr(D' H D G)` of all parts."""
    total = 0.0
    for part, one in zip(parts, codes, strict=True):
        difference = part.weight - _Lookup(tables, part.owner).real(one)
        total += float(np.vdot(difference * part.gain, part.h.astype(np.float32) @ difference))
    return total


class _Lookup:
    """Finds entries for a row of weights, each column in its own codebook.

    Args:
        tables: `[groups, entries]`, ascending.
        owner: `[outputs]` codebook of each column.
    """

    def __init__(self, tables: Array, owner: Array) -> None:
        self._table, self._entries = tables.astype(np.float32).reshape(-1), tables.shape[1]
        self._first = owner.astype(np.int64) * self._entries
        self._middles = ((tables[:, 1:] + tables[:, :-1]) / 2).astype(np.float32)
        self._owner = owner.astype(np.int64) * (self._entries - 1)
        self._zeros = np.abs(tables).argmin(axis=1)[owner].astype(np.uint8)

    def real(self, codes: Array) -> Array:
        """What codes `[..., outputs]` stand for, float32."""
        return self._table[codes + self._first]

    def nearest(self, wish: Array, fixed: Array | None = None) -> Array:
        """The codes nearest to wishes `[outputs]`; where `fixed` the one of 0."""
        if len(self._middles) == 1:
            codes = np.searchsorted(self._middles[0], wish).astype(np.uint8)
        else:
            codes = self._search(wish)
        return codes if fixed is None else np.where(fixed, self._zeros, codes)

    def _search(self, wish: Array) -> Array:
        """Binary searches side by side."""
        middles, most = self._middles.reshape(-1), self._entries - 1
        found, step = np.zeros(len(wish), np.int64), 1 << most.bit_length()
        while step := step // 2:
            tried = found + step
            inside = tried <= most
            below = middles[self._owner + np.minimum(tried, most) - 1] < wish
            found = np.where(inside & below, tried, found)
        return found.astype(np.uint8)


def _inverse_factor(h: Array) -> Array:
    """The upper triangle `U` with `U'U` the inverse of `h`: from one Cholesky factor of `h` read backwards."""
    backwards = np.linalg.cholesky(h[::-1, ::-1])
    return np.triu(np.linalg.inv(backwards[::-1, ::-1]))


def _descend(part: Part, codes: Array, tables: Array, h: Array) -> None:
    """Move each code to its best place given all others, once, in order; in place."""
    look, inputs = _Lookup(tables, part.owner), len(codes)
    real = look.real(codes)
    pull = h @ (part.weight - real)
    for start in range(0, inputs, _SWEEP):
        stop = min(start + _SWEEP, inputs)
        moved = np.zeros((stop - start, real.shape[1]), np.float32)
        for j in range(start, stop):
            fixed = None if part.fixed is None else part.fixed[j]
            codes[j] = look.nearest(real[j] + pull[j] / h[j, j], fixed)
            moved[j - start] = step = look.real(codes[j]) - real[j]
            pull[start:stop] -= h[start:stop, j, None] * step
        pull[stop:] -= h[stop:, start:stop] @ moved


def _fitted(parts: Sequence[Part], codes: Sequence[Array], tables: Array, narrow: Sequence[Array]) -> Array:
    """Entries with less error of the output for given codes, by conjugate gradients on the normal equations.

    With `Z` the matrix that spreads entries over weights and `H` that of all outputs, each with its gain, these are
    `Z'HZ c = Z'H w`; neither is ever made. A few steps from the present entries do nearly all there is to do, and cost
    a product with the moments each.
    """
    entries, size = tables.shape[1], tables.size
    places = [
        one.astype(np.int64) + part.owner.astype(np.int64) * entries for part, one in zip(parts, codes, strict=True)
    ]

    def gathered(rows: Sequence[Array]) -> Array:
        sums = [
            np.bincount(p.reshape(-1), (part.gain * r).reshape(-1), size)
            for part, p, r in zip(parts, places, rows, strict=True)
        ]
        return np.sum(sums, axis=0)

    def product(vector: Array) -> Array:
        return gathered([h @ vector.astype(np.float32)[p] for h, p in zip(narrow, places, strict=True)])

    free = (tables != 0).reshape(-1)
    diagonal = gathered(
        [np.broadcast_to(np.einsum("ii->i", h)[:, None], p.shape) for h, p in zip(narrow, places, strict=True)]
    )
    scale = np.where(free & (diagonal > 0), 1 / np.maximum(diagonal, 1e-30), 0.0)
    found = tables.astype(np.float64).reshape(-1)
    rest = gathered(
        [h @ (part.weight - found.astype(np.float32)[p]) for h, part, p in zip(narrow, parts, places, strict=True)]
    )
    direction = scaled = scale * rest
    level = float(rest @ scaled)
    for _ in range(_DIRECTIONS):
        image = product(direction)
        bend = float(direction @ image)
        if not (level > 0 and bend > 0):
            break
        found = found + level / bend * direction
        rest = rest - level / bend * image
        scaled = scale * rest
        before, level = level, float(rest @ scaled)
        direction = scaled + level / before * direction
    return found.reshape(tables.shape)


def _ascending(tables: Array, codes: Sequence[Array], parts: Sequence[Part]) -> tuple[Array, list[Array]]:
    """Sort codebooks, and let copies of the codes mean the same as before."""
    order = np.argsort(tables, axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.broadcast_to(np.arange(tables.shape[1]), tables.shape), 1)
    sorted_ = np.take_along_axis(tables, order, 1)
    return sorted_, [ranks[part.owner, one].astype(np.uint8) for part, one in zip(parts, codes, strict=True)]
