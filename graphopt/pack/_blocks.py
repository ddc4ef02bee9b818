"""Coding of a block of elements: as symbols, through a codebook, by byte planes, as gaps and the rest, or as bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from graphopt.pack._symbols import (
    Coded,
    coded_bytes,
    coded_symbols,
    length_prefixed,
    number,
    repeats,
    with_repeats,
)
from graphopt.pack.decoder import Symbols, unpacked

__all__ = ["coded_block"]

_CODEBOOK = 256
_SAMPLE = 1 << 12
_SPARSE = 0.3
"""Fraction of zeros from which elements are stored with gaps."""
_EMPTY = 0.95
"""The same if there are few values: then gaps are hardly smaller, but read faster."""
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
        return with_repeats(_small(content, dtype, bits, dims), content)
    if bits > 64:
        return coded_bytes(content)
    elements = content.view(f"<u{bits // 8}")
    codebook, filled = _codebook(elements, dtype), np.count_nonzero(elements)
    sparse = 0 < filled <= (1 - (_SPARSE if codebook is None else _EMPTY)) * len(elements)
    ways = [Coded(("raw",), length_prefixed(content.tobytes()))]
    if sparse:
        ways.append(with_repeats(_with_gaps(elements, np.flatnonzero(elements), dtype), content))
    if codebook is not None:
        ways.append(_with_codebook(*codebook, dims))
    elif not sparse:
        ways.append(_planes(elements, dtype, dims))
    return min(ways, key=len)


def _small(content: NDArray[np.uint8], dtype: int, bits: int, dims: Sequence[int]) -> Coded:
    """Elements that are symbols; signed ones in the order of their values."""
    symbols = content if bits == 8 else unpacked(content, bits)
    if dtype in _SIGNED:
        coded = coded_symbols(symbols ^ np.uint8(1 << bits - 1), dims, bits)
        coded = Coded(("signed", *coded.words), coded.content)
    else:
        coded = coded_symbols(symbols, dims, bits)
    raw = Coded(("raw",), length_prefixed(content.tobytes()))
    return raw if len(raw) <= len(coded) else coded


def _with_codebook(table: Elements, symbols: Symbols, dims: Sequence[int]) -> Coded:
    coded = with_repeats(coded_symbols(symbols, dims), symbols)
    return Coded(("codebook", *coded.words), length_prefixed(table.tobytes()) + coded.content)


def _with_gaps(elements: Elements, places: NDArray[np.intp], dtype: int) -> Coded:
    """Zeros before each element that is none, 255 and on if there are so many, then these elements."""
    gaps = np.diff(places, prepend=-1) - 1
    steps = np.full(int((gaps // 255 + 1).sum()), 255, np.uint8)
    steps[np.cumsum(gaps // 255 + 1) - 1] = gaps % 255
    of_gaps = with_repeats(coded_symbols(steps, (1, 1, len(steps), 1)), steps)
    others, dims = elements[places], (1, 1, len(places), 1)
    codebook = _codebook(others, dtype)
    of_others = _planes(others, dtype, dims) if codebook is None else _with_codebook(*codebook, dims)
    content = number(len(steps)) + of_gaps.content + of_others.content
    return Coded(("gaps", *of_gaps.words, *of_others.words), content)


def _codebook(elements: Elements, dtype: int) -> tuple[Elements, Symbols] | None:
    """The different values in order, and which of them each element is; None if there are too many to be worth it."""
    table = _distinct(elements[:: len(elements) // _SAMPLE + 1])
    while len(table) <= min(_CODEBOOK, len(elements) // 3):
        places = _places(table, elements)
        others = elements[table[places] != elements]
        if not len(others):
            order = np.argsort(table.view(_NUMBERS.get(dtype, table.dtype)), kind="stable")
            ranks = np.empty(len(table), np.uint8)
            ranks[order] = np.arange(len(table))
            return table[order], ranks[places]
        table = _distinct(np.concatenate([table, others[:_SAMPLE]]))
    return None


def _distinct(elements: Elements) -> Elements:
    """The different values in order of their bits; as np.unique, which hashes first and takes longer."""
    ordered = np.sort(elements)
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])]


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
    """The highest byte of all elements, then the next; floats with their sign as the lowest bit.

    Bytes of floats repeat only where floats do, so that one look at these is enough.
    """
    size, content, floats = elements.itemsize, elements.view(np.uint8), dtype in _SIGN_FIRST
    if floats:
        kind = elements.dtype.type
        elements = elements << kind(1) | elements >> kind(8 * size - 1)
    bytes_of = elements.view(np.uint8).reshape(-1, size)
    planes = [np.ascontiguousarray(bytes_of[:, i]) for i in reversed(range(size))]
    coded = [coded_symbols(plane, dims) for plane in planes]
    if floats and not repeats(content, sum(map(len, coded))):
        return _joined(coded, floats=floats)
    coded = [with_repeats(of_plane, plane) for of_plane, plane in zip(coded, planes, strict=True)]
    return with_repeats(_joined(coded, floats=floats), content)


def _joined(planes: Sequence[Coded], *, floats: bool) -> Coded:
    words = ("rotated" if floats else "planes", *(word for plane in planes for word in plane.words))
    return Coded(words, b"".join(plane.content for plane in planes))
