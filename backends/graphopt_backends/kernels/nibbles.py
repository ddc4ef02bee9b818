"""Codes of 4 bits in words of 32: how they are packed, and how a register of them is decoded.

For floats the eight codes of a word stand in order, and are places in a table that a register holds, or signed numbers
that two shifts cut out. For dot products of bytes, the lower halves of the four bytes of a word are the first four
codes of a column and the upper halves the next four, so that a mask makes a group that the instruction takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.targets import Isa
from graphopt_backends.kernels.emit import bind, cast, constant, intrinsic, load, prefetch, reinterpret, tirx
from graphopt_backends.kernels.multiply import Multiply
from graphopt_backends.kernels.prepared import MIDDLE

__all__ = ["CODES", "Decoder", "Record", "byte_words"]

CODES = 8
"""Codes of a word."""

_LINE_WORDS = 16


def byte_words(dot: Multiply, groups: np.ndarray) -> np.ndarray:
    """Words of codes for dot products of bytes.

    Args:
        dot: The dot product.
        groups: Codes [panels, depth / 4, width, 4].
    """
    panels, _, width, _ = groups.shape
    pairs = dot.arranged(groups.astype(np.int8)).astype(np.uint8).reshape(panels, -1, 2, width * 4)
    return np.ascontiguousarray(pairs[:, :, 0] | (pairs[:, :, 1] << 4)).view(np.int32)


@dataclass(frozen=True)
class Decoder:
    """Makes floats of codes.

    Attributes:
        isa: The CPU.
        table: What the sixteen codes stand for; empty: code - 8.
    """

    isa: Isa
    table: tuple[float, ...]

    @property
    def is_known(self) -> bool:
        """This CPU can do it."""
        return not self.table or self.isa.vector_bits >= 256

    @property
    def _looks_up(self) -> bool:
        return bool(self.table) or self.isa.vector_bits == 512

    def words(self, groups: np.ndarray) -> np.ndarray:
        """Words of codes [panels, depth / 8, width, 8]."""
        if not self._looks_up:
            groups = groups ^ MIDDLE  # which makes them signed numbers of 4 bits
        places = np.arange(0, 32, 4, dtype=np.uint32)
        return np.bitwise_or.reduce(groups.astype(np.uint32) << places, axis=-1).view(np.int32)

    def decoded(self, word: Any, i: int) -> Any:
        """What the codes at one place of a vector of words stand for."""
        lanes = self.isa.vector_bits // 32

        def number(value: int) -> Any:
            return constant(value, "int32", lanes)

        if not self._looks_up:
            upmost = word << number(28 - 4 * i) if i < CODES - 1 else word
            return cast(upmost >> number(28), "float32", lanes)
        table = self.table or tuple(float(code - MIDDLE) for code in range(16))
        places = bind(word >> number(4 * i)) if i else word
        if lanes == 16:
            return intrinsic("llvm.x86.avx512.permvar.sf.512", "float32", lanes, _vector_of(table), places)
        lower, upper = (
            intrinsic("llvm.x86.avx2.permps", "float32", lanes, _vector_of(half), places)
            for half in (table[:8], table[8:])
        )
        return tirx.Select((places & number(8)) != number(0), bind(upper), bind(lower))


def _vector_of(values: Sequence[float]) -> Any:
    return tirx.Shuffle([tirx.const(value, "float32") for value in values], list(range(len(values))))


@dataclass(frozen=True)
class Record:
    """A block of a panel of packed weights.

    Attributes:
        buffer: All of them.
        start: Its first word.
        width: Columns.
        size: Words of codes.
        ahead: How far in front of what is read words are fetched; 0: they are not.
    """

    buffer: Any
    start: Any
    width: int
    size: int
    ahead: int

    def fetch(self, turn: Any, turns: int) -> None:
        """Let words come that are as many as those of some turns."""
        if self.ahead:
            start = self.start + turn * self.width + self.ahead
            for word in range(0, turns * self.width, _LINE_WORDS):
                prefetch(self.buffer, start + word)

    def codes(self, turn: Any, vector: int, lanes: int) -> Any:
        """Words of eight codes."""
        return load(self.buffer, self.start + turn * self.width + vector * lanes, lanes)

    def scales(self, vector: int, lanes: int) -> Any:
        """Scales of the columns."""
        words = load(self.buffer, self.start + self.size + vector * lanes, lanes)
        return bind(reinterpret(words, "float32", lanes))

    def shifts(self, vector: int, lanes: int) -> Any:
        """What is added to the weights of the columns."""
        words = load(self.buffer, self.start + self.size + self.width + vector * lanes, lanes)
        return bind(reinterpret(words, "float32", lanes))
