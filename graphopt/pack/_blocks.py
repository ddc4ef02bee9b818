"""Coding of a block of elements: as symbols, through a codebook, by byte planes, as gaps and the rest, or as bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from graphopt.pack._symbols import (
    Coded,
    coded_bytes,
    coded_symbols,
    entropy_coded,
    length_prefixed,
    number,
    repeats,
)
from graphopt.pack.decoder import Symbols, unpacked

__all__ = ["coded_block"]

_CODEBOOK = 256
_SAMPLE = 1 << 12
_SPARSE = 0.3
"""Fraction of zeros from which gaps are tried."""
_SIGN_FIRST = frozenset({1, 10, 11, 16})
"""Types whose highest bit is a sign and stands before an exponent."""
_SIGNED = frozenset({3, 22, 26})
"""Types of a byte and less whose highest bit is a sign."""
_NUMBERS = {1: "<f4", 5: "<i2", 6: "<i4", 7: "<i8", 10: "<f2", 11: "<f8"}
"""Types whose values are not in the order of their bits."""

Elements = NDArray[np.unsignedinteger]


def coded_block(content: NDArray[np.uint8], dtype: int, bits: int, dims: Sequence[int]) -> Coded:
    """Code a block in the smallest way found.

    Args:
        content: Its bytes.
        dtype: Type of its elements, by ONNX's numbers.
        bits: Bits of an element.
        dims: Its shape, as `block_dims` sees it.
    """
    if bits <= 8:
        return _small(content, dtype, bits, dims)
    if bits > 64:
        return coded_bytes(content)
    best = min(_ways(content.view(f"<u{bits // 8}"), dtype, dims), key=len)
    return min(best, coded_bytes(content), key=len) if repeats(content, len(best)) else best


def _small(content: NDArray[np.uint8], dtype: int, bits: int, dims: Sequence[int]) -> Coded:
    """Elements that are symbols; signed ones in the order of their values."""
    symbols = content if bits == 8 else unpacked(content, bits)
    if dtype in _SIGNED:
        coded = entropy_coded(symbols ^ np.uint8(1 << bits - 1), dims)
        best = Coded(("signed", *coded.words), coded.content)
    else:
        best = entropy_coded(symbols, dims)
    raw = Coded(("raw",), length_prefixed(content.tobytes()))
    ways = [best, raw, *([coded_bytes(content)] if repeats(content, len(best)) else [])]
    return min(ways, key=len)


def _ways(elements: Elements, dtype: int, dims: Sequence[int]) -> Iterator[Coded]:
    yield _dense(elements, dtype, dims)
    if 0 < np.count_nonzero(elements) < (1 - _SPARSE) * len(elements):
        yield _with_gaps(elements, np.flatnonzero(elements), dtype)


def _dense(elements: Elements, dtype: int, dims: Sequence[int]) -> Coded:
    """Through a codebook, if there are few values; else by planes."""
    found = _codebook(elements, dtype)
    if found is None:
        return _planes(elements, dtype, dims)
    table, symbols = found
    coded = coded_symbols(symbols, dims)
    return Coded(("codebook", *coded.words), length_prefixed(table.tobytes()) + coded.content)


def _with_gaps(elements: Elements, places: NDArray[np.intp], dtype: int) -> Coded:
    """Zeros before each element that is none, 255 and on if there are so many, then these elements."""
    gaps = np.diff(places, prepend=-1) - 1
    steps = np.full(int((gaps // 255 + 1).sum()), 255, np.uint8)
    steps[np.cumsum(gaps // 255 + 1) - 1] = gaps % 255
    of_gaps = coded_symbols(steps, (1, len(steps), 1, 1))
    of_others = _dense(elements[places], dtype, (1, len(places), 1, 1))
    content = number(len(steps)) + of_gaps.content + of_others.content
    return Coded(("gaps", *of_gaps.words, *of_others.words), content)


def _codebook(elements: Elements, dtype: int) -> tuple[Elements, Symbols] | None:
    """The different values in order, and which of them each element is; None if there are more than 256."""
    table = np.unique(elements[:: len(elements) // _SAMPLE + 1])
    while len(table) <= _CODEBOOK:
        places = _places(table, elements)
        others = elements[table[places] != elements]
        if not len(others):
            order = np.argsort(table.view(_NUMBERS.get(dtype, table.dtype)), kind="stable")
            ranks = np.empty(len(table), np.uint8)
            ranks[order] = np.arange(len(table))
            return table[order], ranks[places]
        table = np.union1d(table, others[:_SAMPLE])
    return None


def _places(table: Elements, elements: Elements) -> NDArray[np.integer]:
    """Where in the table elements that are in it stand; by their highest 16 bits, if these tell all values apart."""
    shift = elements.dtype.type(8 * elements.itemsize - 16)
    keys = table >> shift
    if len(np.unique(keys)) < len(table):
        return np.minimum(np.searchsorted(table, elements), len(table) - 1)
    ranks = np.zeros(1 << 16, np.uint8)
    ranks[keys] = np.arange(len(table))
    return ranks[elements >> shift]


def _planes(elements: Elements, dtype: int, dims: Sequence[int]) -> Coded:
    """The highest byte of all elements, then the next; floats with their sign as the lowest bit."""
    size = elements.itemsize
    if dtype in _SIGN_FIRST:
        kind = elements.dtype.type
        elements = elements << kind(1) | elements >> kind(8 * size - 1)
    planes = elements.view(np.uint8).reshape(-1, size)
    coded = [coded_symbols(np.ascontiguousarray(planes[:, i]), dims) for i in reversed(range(size))]
    words = ("rotated" if dtype in _SIGN_FIRST else "planes", *(word for plane in coded for word in plane.words))
    return Coded(words, b"".join(plane.content for plane in coded))
