"""Coding of symbols (bytes) as the smallest of what a container knows: raw, xz, one table, or contexts in waves."""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from graphopt.pack._entropy import bits, counted, planned
from graphopt.pack.decoder import Symbols, xz_filter

__all__ = ["Coded", "coded_bytes", "coded_symbols", "length_prefixed", "number", "repeats", "with_repeats", "xz"]

_WINDOWS = 4
_WINDOW = (1 << 11, 1 << 13)
"""A sample is so many pieces, each of at least and at most so many bytes."""
_THOROUGH = 1 << 17
"""Above this many bytes xz searches fast."""
_HOPE = 0.98
"""What deflate must make of a sample, of the size by other means, for xz to be tried."""
_WORTH = 0.99
"""What entropy coding must make of symbols to be tried."""


@dataclass(frozen=True)
class Coded:
    """How something is coded, in words, and its bytes."""

    words: tuple[str, ...]
    content: bytes

    def __len__(self) -> int:
        return len(self.content)


def coded_symbols(symbols: Symbols, dims: Sequence[int], width: int = 8) -> Coded:
    """Code symbols without regard to repetition: by their frequencies, or not at all.

    Args:
        symbols: In the order of the tensor.
        dims: Rows, columns, outputs and inputs, as `block_dims` sees the tensor.
        width: Bits of a symbol.
    """
    counts = counted(symbols)
    raw = Coded(("raw",), length_prefixed(symbols.tobytes()))
    if bits(counts) > _WORTH * width * len(symbols):
        return raw
    plan = planned(symbols, counts, dims)
    return min(Coded((plan.word,), length_prefixed(plan.content())), raw, key=len)


def with_repeats(coded: Coded, content: NDArray[np.uint8]) -> Coded:
    """Code by repetition instead, if that is smaller."""
    return min(coded, coded_bytes(content), key=len) if repeats(content, len(coded)) else coded


def repeats(content: NDArray[np.uint8], size: int) -> bool:
    """Whether xz may be smaller than `size`: what deflate makes of a sample tells."""
    window = int(np.clip(len(content) // 128, *_WINDOW))
    step = max(len(content) // _WINDOWS, window)
    sample = b"".join(content[at : at + window].tobytes() for at in range(0, len(content), step)[:_WINDOWS])
    return len(zlib.compress(sample, 1)) * len(content) < _HOPE * size * len(sample)


def coded_bytes(content: NDArray[np.uint8]) -> Coded:
    """Code bytes by repetition, or not at all."""
    packed = xz(content.tobytes())
    return min(Coded(("xz",), length_prefixed(packed)), Coded(("raw",), length_prefixed(content.tobytes())), key=len)


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
    mode = lzma.MODE_NORMAL if thorough else lzma.MODE_FAST
    search = {"mode": mode, "mf": lzma.MF_HC4, "nice_len": 64}
    return lzma.compress(content, lzma.FORMAT_RAW, filters=[xz_filter(len(content)) | search])
