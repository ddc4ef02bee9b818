"""Codes of 2, 4 or 8 bits as bytes; plain numpy."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["pack", "pack_rows", "row_bytes", "unpack"]

Array = np.ndarray[Any, np.dtype[Any]]
_WORDS = {2: np.dtype("<u4"), 4: np.dtype("<u2")}


def pack(codes: Array, bits: int) -> Array:
    """Pack codes as ONNX stores tensors of 2 and 4 bits: in order, the first in the lowest bits of a byte.

    Args:
        codes: uint8 of any shape, below 2^bits.
        bits: 2, 4 or 8.

    Returns:
        uint8 `[ceil(size * bits / 8)]`.
    """
    flat = np.ascontiguousarray(codes).reshape(-1)
    if bits == 8:
        return flat
    per = 8 // bits
    if flat.size % per:
        flat = np.concatenate([flat, np.zeros(-flat.size % per, np.uint8)])
    words = flat.view(_WORDS[bits])  # the first code is the lowest byte; each is moved beside the one below it
    packed = words.astype(np.uint8)
    for i in range(1, per):
        packed |= (words >> ((8 - bits) * i)).astype(np.uint8) & np.uint8((2**bits - 1) << (bits * i))
    return packed


def unpack(packed: Array, bits: int, size: int) -> Array:
    """The first `size` codes of what `pack` made."""
    if bits == 8:
        return packed[:size]
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((packed[:, None] >> shifts) & np.uint8(2**bits - 1)).reshape(-1)[:size]


def pack_rows(codes: Array, bits: int) -> Array:
    """Pack each row so that whole parts of it come out of one mask or shift.

    A row is cut into 8 / bits parts of equal length; byte j holds code j of each part, the first part in the lowest
    bits. Unpacked parts, joined in order, are the row again, without moving single codes.

    Args:
        codes: uint8 `[rows, columns]`, below 2^bits; columns divide by 8 / bits.
        bits: 2, 4 or 8.

    Returns:
        uint8 `[rows, columns * bits / 8]`.
    """
    parts = np.split(codes, 8 // bits, axis=1)
    packed = parts[0].copy()
    for i, part in enumerate(parts[1:], 1):
        packed |= part << np.uint8(bits * i)
    return packed


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of a packed row of at least so many columns."""
    return -(-columns * bits // 8)
