"""Constants of a network, written one after the other as kernels are chosen, so that never more than one is held."""

from __future__ import annotations

import hashlib
from typing import BinaryIO

import numpy as np

__all__ = ["Weights"]

_ALIGNMENT = 64
_SLACK = 1024  # bytes behind the last tensor, where a vector may reach


class Weights:
    """A growing file of tensors; equal ones are written once.

    Args:
        stream: Where they go; its position is where the first one lies.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._size = 0
        self._known: dict[bytes, int] = {}
        self._digest = hashlib.sha256()

    def put(self, array: np.ndarray) -> int:
        """Write a tensor; returns its offset in bytes."""
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        digest = hashlib.sha256(data).digest()
        if digest not in self._known:
            self._write(b"\0" * (-self._size % _ALIGNMENT))
            self._known[digest] = self._size
            self._write(data)
        return self._known[digest]

    def finish(self) -> None:
        """Write what vectors may reach behind the last tensor."""
        self._write(b"\0" * (_SLACK + -self._size % _ALIGNMENT))

    @property
    def nbytes(self) -> int:
        """Bytes so far."""
        return self._size

    @property
    def digest(self) -> str:
        """SHA-256 of all bytes so far."""
        return self._digest.hexdigest()

    def _write(self, data: bytes | memoryview) -> None:
        self._stream.write(data)
        self._digest.update(data)
        self._size += len(data)
