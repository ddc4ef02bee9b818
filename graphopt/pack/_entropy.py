"""Entropy coding of symbols: with one table of frequencies, or in waves, with a table for each context.

Coding is asymmetric numeral systems with static tables (Duda, "Asymmetric numeral systems", 2009), by constriction;
contexts as in lossless image coding: the larger the neighbours, the wider the distribution. What a way takes follows
from counts alone, so that only the chosen one is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from graphopt.pack.decoder import (
    ESCAPE,
    FINEST,
    FIRST,
    LEVELS,
    PRECISION,
    WAVES,
    Neighbourhood,
    Numbers,
    Symbols,
    frequencies,
    step_table,
    weighed,
)

__all__ = ["Plan", "bits", "counted", "planned"]

_TRIED = 1 << 16
"""Symbols on which contexts are tried before they are computed for all of many."""
_LITTLE = 1 << 13
"""Symbols up to which contexts are tried to the end."""
_WORTH = 0.99
"""Contexts must save a hundredth of what one table takes: they are slower to read."""
_TIME = 32.0
"""Bits that a context must save beyond those of its table: each takes time to read."""
_TOTAL = 7 << 17
"""Weights of a table add up to about this much."""
_PRIOR = 10.0
_KEPT_BITS = 6.0
"""Level of the table before is kept if that costs no more: what a new level takes itself."""
_CLASSES = ((0, 0), (0, 2), (0, 3), (1, 2), (1, 3), (2, 1), (2, 3), (3, 0), (3, 1), (3, 3))
"""How many classes, as powers of two, of neighbours and of distances are tried: others are hardly ever the best."""

Levels = NDArray[np.uint8]
Reals = NDArray[np.float64]

_SHARES = weighed(np.arange(LEVELS + 1, dtype=np.uint8)) / _TOTAL
_BORDERS = np.sqrt(_SHARES[1:-1] * _SHARES[2:])
_STRETCH = np.geomspace(1e-4, 40.0, 400)
"""How far a level may lie from a share, as the logarithm of their ratio, and what it costs above it, and below."""
_ABOVE, _BELOW = np.log(np.expm1(_STRETCH) - _STRETCH), np.log(np.expm1(-_STRETCH) + _STRETCH)


@dataclass(frozen=True)
class _Wave:
    """Symbols, the context of each, and how often each number is a symbol of each context."""

    symbols: Symbols
    contexts: Symbols
    counts: Numbers

    def groups(self) -> Iterator[NDArray[np.int32]]:
        """Symbols of one context after the other."""
        order = np.argsort(self.contexts, kind="stable") if len(self.counts) > 1 else slice(None)
        ordered, end = self.symbols[order].astype(np.int32), 0
        for size in self.counts.sum(1).tolist():
            yield ordered[end : end + size]
            end += size


@dataclass(frozen=True)
class Plan:
    """A way to code symbols that is not written yet: its word, the first bytes of its part, waves, bits it takes."""

    word: str
    head: bytes
    waves: Sequence[_Wave]
    bits: float

    def content(self) -> bytes:
        """Write it: head, shares of steps between levels, and words: steps, large steps, then each context."""
        levels = _levels(np.concatenate([wave.counts for wave in self.waves]))
        steps = _steps(levels)
        small = np.minimum(steps, ESCAPE)
        counts = np.bincount(small, minlength=ESCAPE + 1)
        wanted = np.round(np.log2(np.maximum(counts, 1) / np.max(counts)) + 15)
        logs = np.where(counts > 0, np.clip(wanted, 1, 15), 0).astype(np.uint8)
        shares = (logs[::2] | logs[1::2] << 4).tobytes()
        tables = (*step_table(shares), np.full(256, 1 << PRECISION - 8), *frequencies(weighed(levels)))
        groups = (small, steps[small == ESCAPE], *(group for wave in self.waves for group in wave.groups()))
        return self.head + shares + _words(tables, groups)


def planned(symbols: Symbols, counts: Numbers, dims: Sequence[int]) -> Plan:
    """Plan to code symbols, with one table or in waves.

    Args:
        symbols: In the order of the tensor.
        counts: How often each number is among them.
        dims: Rows, columns, outputs and inputs, as `block_dims` sees the tensor.
    """
    low, end = int(np.flatnonzero(counts)[0]), int(np.flatnonzero(counts)[-1]) + 1
    counts, symbols = counts[low:end], symbols - np.uint8(low) if low else symbols
    head, whole = bytes([low, len(counts) - 1]), _Wave(symbols, np.zeros(0, np.uint8), counts[None])
    plain = Plan("ans", head + bytes(1), (whole,), bits(counts))
    if dims[0] * dims[1] == 1 or len(counts) == 1 or not _promising(symbols, dims):
        return plain
    waves = _in_waves(symbols, counts, head, dims)
    return waves if waves is not None and waves.bits < _WORTH * plain.bits else plain


def counted(symbols: Symbols) -> Numbers:
    """How often each number is among symbols."""
    if len(symbols) % 2 or len(symbols) < 1 << 16:
        return np.bincount(symbols)
    pairs = np.bincount(symbols.view(np.uint16), minlength=1 << 16).reshape(256, 256)
    return pairs.sum(0) + pairs.sum(1)


def bits(counts: Numbers) -> float:
    """About how many bits symbols with these counts take, with their table."""
    logs = np.log2(np.maximum(counts, 1))
    total = float(counts.sum())
    return total * np.log2(max(total, 1)) + float((_table_bits(logs) - counts * logs).sum())


def _table_bits(logs: Reals) -> Reals:
    """What levels of a table take, by the logarithm of the counts: a guess, made for choices alone."""
    return np.minimum(4.0, 0.5 * logs) + 0.6


def _promising(symbols: Symbols, dims: Sequence[int]) -> bool:
    """Whether contexts tell anything in the first rows, or outputs, of much; always for little."""
    axis = 2 if dims[2] > 1 else 0
    inner = len(symbols) // dims[axis]
    first = max(_TRIED // inner, 1)
    if first >= dims[axis] // 2:
        return True
    part = symbols[: first * inner]
    return _in_waves(part, np.bincount(part), bytes(2), (*dims[:axis], first, *dims[axis + 1 :])) is not None


def _in_waves(symbols: Symbols, counts: Numbers, head: bytes, dims: Sequence[int]) -> Plan | None:
    """Plan to code in waves with contexts; None if contexts tell nothing."""
    rows, columns, outputs, inputs = dims
    middle = int(np.searchsorted(np.cumsum(counts), len(symbols) / 2))
    lattices = symbols.reshape(outputs, inputs, rows, columns).transpose(2, 3, 0, 1)
    around = Neighbourhood(dims, middle)
    waves: list[_Wave] = []
    needed, chosen = 0.0, bytearray([middle])
    for wave in WAVES:
        of_wave = np.concatenate([lattices[row::2, column::2].reshape(-1) for row, column in wave])
        contexts = around.contexts(wave, FINEST, FINEST)
        places = contexts.astype(np.intp) * len(counts) + of_wave
        finest = np.bincount(places, minlength=len(counts) << 2 * FINEST)
        (neighbours, distances), merged, least, without = _classes(finest.reshape(1 << FINEST, 1 << FINEST, -1))
        if wave == WAVES[1] and least > _WORTH * without and len(symbols) > _LITTLE:
            return None
        waves.append(_Wave(of_wave, _merged(neighbours, distances)[contexts], merged))
        chosen.append(neighbours << 4 | distances)
        needed += least
        around.learn(wave, of_wave)
    return Plan("waves", head + chosen, waves, needed)


def _merged(neighbours: int, distances: int) -> Symbols:
    """The context that each of the finest falls into, of 2 ** `neighbours` times 2 ** `distances`."""
    first, second = np.divmod(np.arange(1 << 2 * FINEST), 1 << FINEST)
    return (first >> FINEST - neighbours << distances | second >> FINEST - distances).astype(np.uint8)


def _edges() -> NDArray[np.intp]:
    """First and last class of neighbours, and of distances, of each context of each way in `_CLASSES`."""
    found: list[tuple[int, int, int, int]] = []
    for neighbours, distances in _CLASSES:
        high, wide = 1 << FINEST - neighbours, 1 << FINEST - distances
        for row, column in np.ndindex(1 << neighbours, 1 << distances):
            found.append((row * high, (row + 1) * high, column * wide, (column + 1) * wide))
    return np.array(found).T


_TOP, _BOTTOM, _LEFT, _RIGHT = _edges()
_SIZES = np.array([1 << sum(pair) for pair in _CLASSES])
_STARTS = np.cumsum(_SIZES) - _SIZES


def _classes(finest: Numbers) -> tuple[tuple[int, int], Numbers, float, float]:
    """How many classes of neighbours and of distances pay.

    Returns:
        Their numbers, counts of each context, and bits of symbols and tables, with these contexts and without any.
    """
    sums = np.zeros((finest.shape[0] + 1, finest.shape[1] + 1, finest.shape[2]), np.int64)
    np.cumsum(np.cumsum(finest, axis=0), axis=1, out=sums[1:, 1:])
    counts = sums[_BOTTOM, _RIGHT] - sums[_TOP, _RIGHT] - sums[_BOTTOM, _LEFT] + sums[_TOP, _LEFT]
    totals, logs = counts.sum(1), np.log2(np.maximum(counts, 1))
    each = totals * np.log2(np.maximum(totals, 1)) + (_table_bits(logs) - counts * logs).sum(1) + _TIME
    whole = np.add.reduceat(each, _STARTS)
    best = int(np.argmin(whole))
    of_best = counts[_STARTS[best] : _STARTS[best] + _SIZES[best]]
    return _CLASSES[best], of_best, float(whole[best]), float(whole[0])


def _levels(counts: Numbers) -> Levels:
    """Levels of the tables for these counts, those of the table before where that costs little.

    A level r times as large as the wanted share s of n symbols costs n s (r - 1 - log r), the divergence of two
    distributions that need not add up to 1.
    """
    totals = counts.sum(1, keepdims=True)
    shares = (counts + _PRIOR * counts.sum(0) / max(int(totals.sum()), 1)) / (totals + _PRIOR)
    levels = cast("NDArray[np.intp]", np.searchsorted(_BORDERS, shares)).astype(np.uint8) + np.uint8(1)
    levels[shares == 0] = 0
    levels[~levels.any(1), 0] = 1
    shares = np.maximum(shares, 1e-12)
    costs = cast("Reals", np.log(_KEPT_BITS * np.log(2) / (np.maximum(totals, 1) * shares)))
    lowest = shares * np.exp(-np.interp(costs, _BELOW, _STRETCH)) * (counts > 0)
    highest = shares * np.exp(np.interp(costs, _ABOVE, _STRETCH))
    for i in range(1, len(levels)):
        before = _SHARES[levels[i - 1]]
        kept = (lowest[i] <= before) & (before <= highest[i])
        levels[i] = np.where(kept, levels[i - 1], levels[i])
        levels[i, 0] |= not levels[i].any()
    return levels


def _steps(levels: Levels) -> Symbols:
    """Steps from the table before, in the first from the symbol before; the sign is the lowest bit."""
    steps = np.diff(levels.view(np.int8), axis=0, prepend=np.zeros((1, levels.shape[1]), np.int8))
    steps[0] = np.diff(steps[0], prepend=np.int8(FIRST))
    return (steps << 1 ^ steps >> 7).view(np.uint8).reshape(-1)


def _words(tables: Sequence[Numbers], groups: Sequence[NDArray[np.integer]]) -> bytes:
    """Code groups, each with its table, so that they are read in this order: the last symbol is written first."""
    from constriction import stream

    coder = stream.stack.AnsCoder()
    for table, symbols in zip(reversed(tables), reversed(groups), strict=True):
        if len(table) > 1 and len(symbols):
            model = stream.model.Categorical((table - 1).astype(np.float32), perfect=False)
            coder.encode_reverse(symbols.astype(np.int32, copy=False), model)
    return coder.get_compressed().astype("<u4").tobytes()
