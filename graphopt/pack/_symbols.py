"""Coding of symbols (bytes) as the smallest of what a container knows: raw, xz, one table, or contexts in waves.

Entropy coding is asymmetric numeral systems with static tables (Duda, "Asymmetric numeral systems", 2009), by
constriction; contexts as in lossless image coding: the larger the neighbours, the wider the distribution.
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Sequence
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
    xz_filter,
)

__all__ = [
    "Coded",
    "coded_bytes",
    "coded_symbols",
    "entropy",
    "entropy_coded",
    "length_prefixed",
    "number",
    "repeats",
    "xz",
]

_SAMPLE = 1 << 14
_TRIED = 1 << 16
"""Symbols on which contexts are tried before they are computed for all of many."""
_THOROUGH = 1 << 17
"""Above this many bytes xz searches fast."""
_HOPE = 0.98
"""What deflate must make of a sample, of the size by other means, for xz to be tried."""
_WORTH = 0.99
"""Contexts must save a hundredth of what one table takes: they are slower to read."""
_TOTAL = 7 << 17
"""Weights of a table add up to about this much."""
_PRIOR = 10.0
_KEPT_BITS = 6.0
"""Level of the table before is kept if that costs no more: what a new level takes itself."""
_CLASSES = ((0, 0), (0, 2), (0, 3), (1, 2), (1, 3), (2, 1), (2, 3), (3, 0), (3, 1), (3, 3))
"""Numbers of classes that are tried: the others are hardly ever the best."""
_KNOWN = weighed(np.arange(LEVELS + 1, dtype=np.uint8)).astype(np.float64)
_BORDERS = np.sqrt(_KNOWN[1:-1] * _KNOWN[2:])
_SHARES = _KNOWN / _TOTAL
_LOGS = np.log(np.maximum(_SHARES, 1 / _TOTAL))


@dataclass(frozen=True)
class Coded:
    """How something is coded, in words, and its bytes."""

    words: tuple[str, ...]
    content: bytes

    def __len__(self) -> int:
        return len(self.content)


@dataclass(frozen=True)
class _Group:
    """Symbols that share a table of frequencies."""

    table: Numbers
    symbols: Symbols


def coded_symbols(symbols: Symbols, dims: Sequence[int]) -> Coded:
    """Code symbols in the smallest way.

    Args:
        symbols: In the order of the tensor.
        dims: Rows, columns, outputs and inputs, as `block_dims` sees the tensor.
    """
    ways = [Coded(("raw",), length_prefixed(symbols.tobytes()))]
    if entropy(np.bincount(symbols)) < _WORTH * 8 * len(symbols):
        ways.append(entropy_coded(symbols, dims))
    best = min(ways, key=len)
    return min(best, coded_bytes(symbols), key=len) if repeats(symbols, len(best)) else best


def entropy_coded(symbols: Symbols, dims: Sequence[int]) -> Coded:
    """Code symbols with one table, or in waves."""
    low, top = int(symbols.min()), int(symbols.max())
    shifted = symbols - np.uint8(low)
    counts = np.bincount(shifted, minlength=top - low + 1)
    best = _with_one_table(shifted, counts, low)
    waves = _in_waves(shifted, counts, low, dims) if _promising(shifted, dims) else None
    return best if waves is None or len(waves) >= _WORTH * len(best) else waves


def repeats(content: NDArray[np.uint8], size: int) -> bool:
    """Whether xz may be smaller than `size`: what deflate makes of a sample tells."""
    step = max(len(content) // 4, _SAMPLE // 4)
    sample = b"".join(content[at : at + _SAMPLE // 4].tobytes() for at in range(0, len(content), step)[:4])
    return len(zlib.compress(sample, 1)) * len(content) < _HOPE * size * len(sample)


def coded_bytes(content: NDArray[np.uint8]) -> Coded:
    """Code bytes by repetition, or not at all."""
    packed = xz(content.tobytes())
    return min(Coded(("xz",), length_prefixed(packed)), Coded(("raw",), length_prefixed(content.tobytes())), key=len)


def entropy(counts: NDArray[np.integer]) -> float:
    """Bits that symbols with these counts take at least; a row of counts is a table of its own."""
    return _times_log(counts.sum(-1)) - _times_log(counts)


def _times_log(counts: NDArray[np.integer]) -> float:
    return float((counts * np.log2(np.maximum(counts, 1))).sum())


def number(value: int) -> bytes:
    """A number as in a frame: seven bits to a byte, lowest first."""
    found = bytearray()
    while value >= 128:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def length_prefixed(part: bytes) -> bytes:
    """One part of a frame."""
    return number(len(part)) + part


def xz(content: bytes) -> bytes:
    """Compress to a raw LZMA2 stream."""
    thorough = len(content) <= _THOROUGH
    mode, finder = (lzma.MODE_NORMAL, lzma.MF_BT4) if thorough else (lzma.MODE_FAST, lzma.MF_HC4)
    search = {"mode": mode, "mf": finder, "nice_len": 64}
    return lzma.compress(content, lzma.FORMAT_RAW, filters=[xz_filter(len(content)) | search])


def _with_one_table(symbols: Symbols, counts: Numbers, low: int) -> Coded:
    levels = _levels(counts[None])
    group = _Group(frequencies(weighed(levels))[0], symbols)
    return Coded(("ans",), _part(bytes([low, len(counts) - 1, 0]), levels, [group]))


def _promising(symbols: Symbols, dims: Sequence[int]) -> bool:
    """Whether contexts tell anything in the first rows, or outputs, of much; always for little."""
    axis = 2 if dims[2] > 1 else 0
    inner = len(symbols) // dims[axis]
    first = max(_TRIED // inner, 1)
    if first >= dims[axis] // 2:
        return True
    part = symbols[: first * inner]
    counts = np.bincount(part)
    return _in_waves(part, counts, 0, (*dims[:axis], first, *dims[axis + 1 :])) is not None


def _in_waves(symbols: Symbols, counts: Numbers, low: int, dims: Sequence[int]) -> Coded | None:
    """Code in waves with contexts; None if contexts tell nothing."""
    rows, columns, outputs, inputs = dims
    middle = int(np.searchsorted(np.cumsum(counts), len(symbols) / 2))
    if rows * columns == 1 or len(counts) == 1:
        return None
    lattices = symbols.reshape(outputs, inputs, rows, columns).transpose(2, 3, 0, 1)
    around = Neighbourhood(dims, middle)
    chosen: list[tuple[int, int]] = []
    tables: list[NDArray[np.uint8]] = []
    groups: list[_Group] = []
    for wave in WAVES:
        of_wave = np.concatenate([lattices[row::2, column::2].reshape(-1) for row, column in wave])
        contexts = around.contexts(wave, FINEST, FINEST)
        counted = np.bincount(contexts * np.int64(len(counts)) + of_wave, minlength=len(counts) << 2 * FINEST)
        classes = _classes(counted.reshape(1 << FINEST, 1 << FINEST, -1))
        merged = _merged(counted.reshape(1 << FINEST, 1 << FINEST, -1), *classes).reshape(-1, len(counts))
        if wave == WAVES[1] and entropy(merged) > _WORTH * entropy(merged.sum(0)):
            return None
        levels = _levels(merged, tables[-1][-1] if tables else None)
        fewer = contexts >> np.uint8(2 * FINEST - classes[0]) << np.uint8(classes[1])
        fewer |= (contexts & np.uint8((1 << FINEST) - 1)) >> np.uint8(FINEST - classes[1])
        order = np.argsort(fewer, kind="stable") if len(merged) > 1 else slice(None)
        parts = np.split(of_wave[order], np.cumsum(merged.sum(1))[:-1])
        shares = frequencies(weighed(levels))
        groups += [_Group(table, part) for table, part in zip(shares, parts, strict=True)]
        chosen.append(classes)
        tables.append(levels)
        around.learn(wave, of_wave)
    head = bytes([low, len(counts) - 1, middle, *(places << 4 | scales for places, scales in chosen)])
    return Coded(("waves",), _part(head, np.concatenate(tables), groups))


def _classes(counted: Numbers) -> tuple[int, int]:
    """How many classes of neighbours and of distances pay, as powers of two, tables included."""
    return min(_CLASSES, key=lambda pair: _bits(_merged(counted, *pair)))


def _merged(counted: Numbers, places: int, scales: int) -> Numbers:
    shape = (1 << places, 1 << FINEST - places, 1 << scales, 1 << FINEST - scales, counted.shape[-1])
    return counted.reshape(shape).sum((1, 3))


def _bits(counts: Numbers) -> float:
    """Bits of symbols and tables; that of tables is a guess, made for the choice alone."""
    return entropy(counts) + float(np.minimum(4.0, 0.5 * np.log2(1.0 + counts)).sum()) + 0.4 * counts.size


def _levels(counts: Numbers, before: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """Levels of the tables for these counts, near those of the table before where that costs little.

    What a level costs is the divergence of its distribution from the counted one, which need not add up to 1.
    """
    totals = counts.sum(1, keepdims=True)
    shares = (counts + _PRIOR * counts.sum(0) / max(int(counts.sum()), 1)) / (totals + _PRIOR)
    places = cast("NDArray[np.intp]", np.searchsorted(_BORDERS, shares * _TOTAL))
    nearest = (places + 1).astype(np.uint8)
    nearest[shares == 0] = 0
    nearest[~nearest.any(1), 0] = 1
    fixed = totals * (shares * np.log(np.maximum(shares, 1 / _TOTAL)) - shares)
    scaled, limit = totals * shares, _KEPT_BITS * np.log(2)
    for i in range(len(counts)):
        if before is not None:
            lost = fixed[i] + totals[i] * _SHARES[before] - scaled[i] * _LOGS[before]
            nearest[i] = np.where((lost < limit) & ((before > 0) | (counts[i] == 0)), before, nearest[i])
            nearest[i, 0] |= not nearest[i].any()
        before = nearest[i]
    return nearest


def _part(head: bytes, levels: NDArray[np.uint8], groups: Sequence[_Group]) -> bytes:
    """Head, shares of the steps between levels, and words: steps, large steps, then the groups."""
    steps = np.diff(levels.astype(np.int8), axis=0, prepend=np.zeros((1, levels.shape[1]), np.int8))
    steps[0] = np.diff(steps[0], prepend=np.int8(FIRST))
    stored = (steps << 1 ^ steps >> 7).view(np.uint8).reshape(-1)
    small = np.minimum(stored, ESCAPE)
    counts = np.bincount(small, minlength=16)
    wanted = cast("NDArray[np.float64]", np.round(np.log2(np.maximum(counts, 1) / counts.max()) + 15))
    logs = np.where(counts > 0, np.clip(wanted, 1, 15), 0).astype(np.uint8)
    shares = (logs[::2] | logs[1::2] << 4).tobytes()
    of_steps = _Group(step_table(shares)[0], small)
    of_large = _Group(np.full(256, 1 << PRECISION - 8), stored[small == ESCAPE])
    return length_prefixed(head + shares + _words([of_steps, of_large, *groups]))


def _words(groups: Sequence[_Group]) -> bytes:
    """Code groups so that they are read in this order: the last symbol is written first."""
    from constriction import stream

    coder = stream.stack.AnsCoder()
    for group in reversed(groups):
        if len(group.table) > 1 and len(group.symbols):
            model = stream.model.Categorical((group.table - 1).astype(np.float32), perfect=False)
            coder.encode_reverse(group.symbols.astype(np.int32), model)
    return coder.get_compressed().astype("<u4").tobytes()
