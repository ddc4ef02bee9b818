"""Weighted k-means of numbers, exactly; plain numpy.

In one dimension clusters are intervals of the sorted numbers. The best `k` of them follow from the best `k - 1` of all
beginnings by dynamic programming (Wang and Song, "Ckmeans.1d.dp", 2011). The last cluster's best beginning never moves
left as its end moves right, so a layer of the table takes O(n log n) instead of O(n^2) by divide and conquer (Groenlund
et al., "Fast exact k-means, k-medians and Bregman divergence clustering in 1D", 2017). Many tables are filled side by
side, one for each group of numbers, level by level.

Memory is bounded, and so is time: the solution is exact where `entries * groups * n log n` stays below 10^8, which
holds for 300,000 different numbers and 16 clusters. Beyond that clusters may begin at some thousand places only, spread
evenly over the numbers and over their range, and the result is improved by Lloyd's iterations over all numbers ("Least
squares quantization in PCM", 1982), which take k binary searches each. Of more than four million numbers a histogram of
a million bins is clustered, each bin by its mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Tables", "fit_tables", "nearest"]

Array = np.ndarray[Any, np.dtype[Any]]

_STEPS = 1e8
_MOST_PLACES = 8192
_DEPTH = 16  # levels of the tree of so many places, and some more
_SIDE_BY_SIDE = 1 << 18
_ROUNDS = 60
_LEAST_WEIGHT = 1e-3
_MANY, _BINS, _BLOCK = 1 << 22, 1 << 20, 1 << 20


@dataclass(frozen=True, eq=False)
class Tables:
    """Codebooks.

    Attributes:
        values: `[groups, entries]` float64, ascending; an entry that nothing needs repeats another.
        exact: No other codebooks of this size have a smaller error.
    """

    values: Array
    exact: bool


def fit_tables(
    numbers: Array, weights: Array | None, entries: int, *, zero: bool = False, steps: float = _STEPS
) -> Tables:
    """The codebooks with the least weighted square error, one for each group.

    Args:
        numbers: `[groups, n]`, finite.
        weights: The same shape, not negative; those below a thousandth of a group's mean count as that, since data yet
            to come may use what calibration data did not. None: all 1.
        entries: Size of a codebook, at least 2.
        zero: One of the entries is exactly 0.
        steps: What dynamic programming may take in all; where it would take more the result is not exact.
    """
    groups, n = numbers.shape
    chunk = max(1, _SIDE_BY_SIDE // n)
    allowed = steps / (entries * groups * (1 + zero))
    parts = [
        _fit(numbers[i : i + chunk], None if weights is None else weights[i : i + chunk], entries, zero, allowed)
        for i in range(0, groups, chunk)
    ]
    return Tables(np.concatenate([part.values for part in parts]), all(part.exact for part in parts))


def nearest(numbers: Array, tables: Array) -> Array:
    """The entry nearest to each number, uint8 `[groups, n]`; tables `[groups, entries]` ascend."""
    codes = np.empty(numbers.shape, np.uint8)
    for group, table in enumerate(tables):
        middles = (table[1:] + table[:-1]) / 2
        for start in range(0, numbers.shape[1], _BLOCK):
            part = slice(start, start + _BLOCK)
            codes[group, part] = np.searchsorted(middles, numbers[group, part])
    return codes


@dataclass(frozen=True, eq=False)
class _Sums:
    """Sorted numbers and prefix sums of their weights and of weight times number, float64 `[groups, n + 1]`.

    Attributes:
        numbers: `[groups, n]`.
        w: Sums of weights.
        s: Sums of weight times number.
        binned: Each number stands for those of a bin.
    """

    numbers: Array
    w: Array
    s: Array
    binned: bool = False

    def at(self, places: Array) -> tuple[Array, Array]:
        """Both sums at places `[groups, m]`."""
        return np.take_along_axis(self.w, places, 1), np.take_along_axis(self.s, places, 1)


def _fit(numbers: Array, weights: Array | None, entries: int, zero: bool, allowed: float) -> Tables:
    sums = _sorted_sums(numbers, weights)
    places, everywhere = _places(sums, entries, allowed)
    edges, skipped = _best_edges(*sums.at(places), entries - zero, zero)
    edges = np.take_along_axis(places, edges, 1)
    tables = _means(sums, edges, skipped)
    if not everywhere:
        tables = _lloyd(sums, tables, zero)
    return Tables(tables, everywhere and not sums.binned)


def _sorted_sums(numbers: Array, weights: Array | None) -> _Sums:
    """Sort each group; equal numbers of a single group are merged, and a great many put into bins."""
    if len(numbers) == 1 and numbers.shape[1] > _MANY:
        return _binned_sums(numbers[0], None if weights is None else weights[0])
    if weights is None:
        ordered = np.sort(numbers, axis=1).astype(np.float64)
        w = np.ones_like(ordered)
    else:
        order = np.argsort(numbers, axis=1, kind="stable")
        ordered = np.take_along_axis(numbers, order, 1).astype(np.float64)
        w = np.take_along_axis(np.broadcast_to(weights, numbers.shape), order, 1).astype(np.float64)
        mean = w.mean(axis=1, keepdims=True)
        w = np.maximum(w, np.where(mean > 0, _LEAST_WEIGHT * mean, 1.0))
    if len(ordered) == 1:
        starts = np.flatnonzero(np.concatenate([[True], np.diff(ordered[0]) > 0]))
        if len(starts) < ordered.shape[1]:
            w, ordered = np.add.reduceat(w[0], starts)[None], ordered[:, starts]
    return _Sums(ordered, _prefixes(w), _prefixes(w * ordered))


def _prefixes(values: Array) -> Array:
    return np.concatenate([np.zeros((len(values), 1)), np.cumsum(values, axis=1)], axis=1)


def _binned_sums(numbers: Array, weights: Array | None) -> _Sums:
    """Bins of equal width, read block by block."""
    low, high = float(numbers.min()), float(numbers.max())
    least = 1.0 if weights is None else _LEAST_WEIGHT * float(weights.mean(dtype=np.float64)) or 1.0
    w, s = np.zeros(_BINS), np.zeros(_BINS)
    scale = (_BINS - 1) / (high - low) if high > low else 0.0
    for start in range(0, len(numbers), _BLOCK):
        x = numbers[start : start + _BLOCK].astype(np.float64)
        bins = ((x - low) * scale).astype(np.int64)
        own = np.full(len(x), least) if weights is None else np.maximum(weights[start : start + _BLOCK], least)
        w += np.bincount(bins, own, _BINS)
        s += np.bincount(bins, own * x, _BINS)
    filled = w > 0
    return _Sums((s[filled] / w[filled])[None], _prefixes(w[filled][None]), _prefixes(s[filled][None]), binned=True)


def _places(sums: _Sums, entries: int, allowed: float) -> tuple[Array, bool]:
    """Where clusters may begin and end, `[groups, places]` ascending, and whether that is everywhere."""
    count, n = sums.numbers.shape
    if n * math.log2(max(2, n)) <= allowed:
        return np.broadcast_to(np.arange(n + 1), (count, n + 1)), True
    half = max(entries, min(int(allowed / _DEPTH), _MOST_PLACES, n) // 2)
    evenly = np.broadcast_to(np.linspace(0, n, half + 1).astype(np.int64), (count, half + 1))
    reach = sums.numbers[:, -1:] - sums.numbers[:, :1]
    by_range = _below(sums.numbers, sums.numbers[:, :1] + reach * np.linspace(0, 1, half + 1)[1:])
    return np.sort(np.concatenate([evenly, by_range], axis=1), axis=1), False


def _below(ordered: Array, limits: Array) -> Array:
    """How many of the sorted numbers `[groups, n]` are below each limit `[groups, m]`: binary searches side by side."""
    n = ordered.shape[1]
    if len(ordered) == 1:
        return np.searchsorted(ordered[0], limits[0])[None]
    found, step = np.zeros(limits.shape, np.int64), 1 << n.bit_length()
    while step := step // 2:
        tried = found + step
        known = np.take_along_axis(ordered, np.minimum(tried, n) - 1, 1)
        found = np.where((tried <= n) & (known < limits), tried, found)
    return found


def _best_edges(w: Array, s: Array, clusters: int, zero: bool) -> tuple[Array, Array | None]:
    """Edges of the clusters with the least error, given sums at the places where edges may be.

    The error of a cluster is `sum(w x^2) - (sum w x)^2 / sum w`, so the sum of the second terms, the gain, is made as
    large as possible. With `zero` one interval between clusters may stand for 0, without a gain.

    Returns:
        Edges `[groups, clusters + 1]`, or with `zero` `[groups, clusters + 2]`, and which interval is then 0's.
    """
    groups, count = w.shape
    plain = np.full((groups, count), -np.inf)
    plain[:, 0] = 0
    with_zero, froms = np.zeros((groups, count)), list[Array]()
    zero_froms, skips = list[Array](), [np.zeros((groups, count), np.int32)]
    for _ in range(clusters):
        plain, begins = _layer(plain, w, s)
        froms.append(begins)
        if zero:
            by_cluster, begins = _layer(with_zero, w, s)
            zero_froms.append(begins)
            with_zero, skip = _skip(plain, by_cluster)
            skips.append(skip)
    return _trace_zero(froms, zero_froms, skips) if zero else (_trace(froms), None)


def _skip(plain: Array, by_cluster: Array) -> tuple[Array, Array]:
    """Let an interval without gain end at each place, or not (-1), whichever is better; and where it begins."""
    best = np.maximum.accumulate(plain, axis=1)
    begins = np.maximum.accumulate(np.where(plain == best, np.arange(plain.shape[1], dtype=np.int32), 0), axis=1)
    return np.maximum(best, by_cluster), np.where(best >= by_cluster, begins, -1).astype(np.int32)


def _layer(before: Array, w: Array, s: Array) -> tuple[Array, Array]:
    """The most gain up to each place with one more cluster, and where that begins, both `[groups, places]`.

    Places are visited in the order of a binary tree: between two whose clusters begin at `a` and `b`, a cluster begins
    between `a` and `b`.
    """
    groups, count = before.shape
    last, gain, begins = count - 1, before.copy(), np.zeros((groups, count), np.int32)
    rows = (np.arange(groups) * count)[:, None]
    before, w, s = before.reshape(-1), w.reshape(-1), s.reshape(-1)
    step = 1 << last.bit_length()
    while step := step // 2:
        ends = np.arange(step, count, 2 * step)
        low = begins[:, ends - step]
        after = ends + step
        high = np.where(after <= last, begins[:, np.minimum(after, last)], ends)
        high = np.minimum(high, ends)
        lengths = (high - low + 1).reshape(-1)
        starts = np.cumsum(lengths) - lengths
        first = (rows + low).reshape(-1)
        here = np.arange(lengths.sum()) + np.repeat(first - starts, lengths)
        there = (rows + ends).reshape(-1)
        value = _gains(before, w, s, here, np.repeat(w[there], lengths), np.repeat(s[there], lengths))
        most = np.maximum.reduceat(value, starts)
        hits = np.flatnonzero(value == np.repeat(most, lengths))
        chosen = hits[np.searchsorted(hits, starts)]
        gain[:, ends] = most.reshape(groups, -1)
        begins[:, ends] = (here[chosen].reshape(groups, -1) - rows).astype(np.int32)
    return gain, begins


def _gains(before: Array, w: Array, s: Array, here: Array, w_end: Array, s_end: Array) -> Array:
    """Gain up to `here` and of a cluster from there to an end; an empty cluster gains nothing."""
    width = w_end - w[here]
    square = np.square(s_end - s[here])
    return before[here] + np.divide(square, width, out=np.zeros_like(square), where=width > 0)


def _trace(froms: list[Array]) -> Array:
    """Edges of the last layer's clusters, read backwards."""
    groups, count = froms[0].shape
    edges = [np.full(groups, count - 1)]
    for begins in reversed(froms):
        edges.append(begins[np.arange(groups), edges[-1]].astype(np.int64))
    return np.stack(edges[::-1], axis=1)


def _trace_zero(froms: list[Array], zero_froms: list[Array], skips: list[Array]) -> tuple[Array, Array]:
    """The same with one interval that stands for 0."""
    groups, count = skips[0].shape
    rows, end, layer = np.arange(groups), np.full(groups, count - 1), np.full(groups, len(froms))
    passed, interval = np.zeros(groups, bool), np.zeros(groups, np.int64)
    edges = [end]
    skip_table, plain_table = np.stack(skips), np.stack([skips[0], *froms])
    zero_table = np.stack([skips[0], *zero_froms])
    for i in range(len(froms), -1, -1):
        skip = skip_table[layer, rows, end]
        now = ~passed & (skip >= 0)
        by_cluster = np.where(passed, plain_table[layer, rows, end], zero_table[layer, rows, end])
        end = np.where(now, skip, by_cluster).astype(np.int64)
        interval, layer, passed = np.where(now, i, interval), layer - ~now, passed | now
        edges.append(end)
    return np.stack(edges[::-1], axis=1), interval


def _means(sums: _Sums, edges: Array, skipped: Array | None) -> Array:
    """Entries: the mean of each cluster, 0 for the interval that stands for it; empty ones repeat a neighbour."""
    w, s = (np.diff(x, axis=1) for x in sums.at(edges))
    tables = np.divide(s, w, out=np.full_like(s, np.nan), where=w > 0)
    if skipped is not None:
        tables[np.arange(len(tables)), skipped] = 0.0
    return _filled(tables)


def _filled(tables: Array) -> Array:
    """Ascending, with empty entries (NaN) as repetitions of the greatest."""
    tables = np.sort(tables, axis=1)  # NaN last
    most = np.nanmax(tables, axis=1, keepdims=True)
    return np.where(np.isnan(tables), most, tables)


def _lloyd(sums: _Sums, tables: Array, zero: bool) -> Array:
    """Move numbers to their nearest entry and entries to their numbers' mean until neither changes."""
    groups, n = sums.numbers.shape
    first, last, before = np.zeros((groups, 1), np.int64), np.full((groups, 1), n), np.empty(0)
    for _ in range(_ROUNDS):
        inner = _below(sums.numbers, (tables[:, 1:] + tables[:, :-1]) / 2)
        if np.array_equal(inner, before):
            break
        before = inner
        w, s = (np.diff(x, axis=1) for x in sums.at(np.concatenate([first, inner, last], axis=1)))
        means = np.divide(s, w, out=tables.copy(), where=w > 0)
        tables = np.sort(np.where(tables == 0, 0.0, means) if zero else means, axis=1)
    return tables
