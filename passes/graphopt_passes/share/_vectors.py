"""Weighted k-means of short vectors; plain numpy, the same result for the same input.

Lloyd's iterations over a part of the vectors that is spread evenly, from a start where each new entry is the vector
that the entries so far serve worst among a few drawn in proportion to that (k-means++ with candidates, Arthur and
Vassilvitskii, 2007), then some over all. Distances are found for some thousand vectors at a time, so memory is bounded.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from graphopt.analyses.moments import spread_out

__all__ = ["fit_vectors", "nearest_vectors"]

Array = np.ndarray[Any, np.dtype[Any]]

_PART = 16_384
_ROUNDS, _LAST_ROUNDS = 30, 6
_CHUNK = 1 << 20
_CANDIDATES = 8
_LEAST_WEIGHT = 1e-3


def fit_vectors(vectors: Array, weights: Array | None, entries: int, *, zero: bool = False) -> Array:
    """A codebook `[entries, width]`.

    Args:
        vectors: `[n, width]`.
        weights: The same shape, what an error of each number counts; None: all 1.
        entries: Size of the codebook.
        zero: The first entry is exactly 0.
    """
    x = np.asarray(vectors, np.float32)
    w = np.ones_like(x) if weights is None else np.asarray(weights, np.float32)
    mean = float(w.mean())
    w = np.maximum(w, _LEAST_WEIGHT * mean) if mean > 0 else np.ones_like(x)
    chosen = spread_out(len(x), _PART)
    table = _improved(x[chosen], w[chosen], _start(x[chosen], w[chosen], entries, zero), _ROUNDS, zero)
    return _improved(x, w, table, _LAST_ROUNDS, zero) if len(chosen) < len(x) else table


def nearest_vectors(vectors: Array, weights: Array | None, table: Array) -> Array:
    """The entry nearest to each vector, uint8 `[n]`; among equal ones the first."""
    x, table = np.asarray(vectors, np.float32), table.astype(np.float32)
    codes, step = np.empty(len(x), np.uint8), max(1, _CHUNK // len(table))
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        w = None if weights is None else np.asarray(weights[part], np.float32)
        codes[part] = _distances(x[part], w, table).argmin(axis=1)
    return codes


def _distances(x: Array, w: Array | None, table: Array) -> Array:
    """Square distances without what is the same for all entries, `[n, entries]`."""
    if w is None:
        return np.square(table).sum(axis=1) - 2 * (x @ table.T)
    return w @ np.square(table).T - 2 * ((w * x) @ table.T)


def _start(x: Array, w: Array, entries: int, zero: bool) -> Array:
    """Entries among the vectors, each where the error is still large."""
    rng = np.random.default_rng(0)
    table = np.zeros((entries, x.shape[1]), np.float32)
    if not zero:
        centre = (w * x).sum(axis=0) / w.sum(axis=0)
        table[0] = x[(w * np.square(x - centre)).sum(axis=1).argmin()]
    error = (w * np.square(x - table[0])).sum(axis=1, dtype=np.float64)
    for i in range(1, entries):
        total = float(error.sum())
        if total <= 0:
            table[i:] = table[0]
            break
        ends = np.cumsum(error)
        picks = np.minimum(np.searchsorted(ends, rng.random(_CANDIDATES) * ends[-1]), len(x) - 1)
        after = np.minimum(error, (w * np.square(x - x[picks][:, None])).sum(axis=2, dtype=np.float64))
        best = int(after.sum(axis=1).argmin())
        table[i], error = x[picks[best]], after[best]
    return table


def _improved(x: Array, w: Array, table: Array, rounds: int, zero: bool) -> Array:
    """Lloyd's iterations, until no vector moves."""
    before: Array | None = None
    for _ in range(rounds):
        codes = nearest_vectors(x, w, table)
        if before is not None and np.array_equal(codes, before):
            break
        before = codes
        sums, mass = np.empty(table.shape), np.empty(table.shape)
        for d in range(table.shape[1]):
            mass[:, d] = np.bincount(codes, w[:, d], len(table))
            sums[:, d] = np.bincount(codes, w[:, d].astype(np.float64) * x[:, d], len(table))
        table = np.divide(sums, mass, out=table.astype(np.float64), where=mass > 0).astype(np.float32)
        if zero:
            table[0] = 0
    return table
