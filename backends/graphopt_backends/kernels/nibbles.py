"""Codes of 4 bits in words of 32: how they are packed, and how a register of them is decoded.

For floats the eight codes of a word stand in order, and are places in a register of sixteen numbers, or signed numbers
that two shifts cut out. For dot products of bytes, the lower halves of the four bytes of a word are four codes of a
column, the upper halves the same four of a column in the next vector: see `Halves`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.targets import Isa
from graphopt_backends.kernels.emit import bind, cast, constant, intrinsic, load, prefetch, reinterpret, store, tirx
from graphopt_backends.kernels.instructions import Instruction
from graphopt_backends.kernels.multiply import Multiply
from graphopt_backends.kernels.prepared import BASE, MIDDLE

__all__ = ["CODES", "Decoder", "Halves", "Record"]

CODES = 8
"""Codes of a word."""

_LINE_WORDS = 16
_WIDEST_BYTE = 127


@dataclass(frozen=True)
class Halves:
    """Dot products of bytes that hold codes of two columns.

    A byte is 16 upper + lower, so that a sum of products with bytes, less that with their lower halves, is 16 times
    the sum with the upper halves: one mask makes the operands of two columns. Where an instruction wants narrow bytes,
    the upper halves are shifted down.

    Attributes:
        dot: The dot product; whichever operand has no sign is the codes.
    """

    dot: Multiply

    @property
    def _instruction(self) -> Instruction:
        assert self.dot.instruction is not None
        return self.dot.instruction

    @property
    def _whole(self) -> bool:
        """Bytes are multiplied as they are."""
        return not 0 < self._instruction.widest < _WIDEST_BYTE

    @property
    def zeros(self) -> tuple[int, int]:
        """What codes of zero are in the lower halves and in what upper sums are made with; signed ones are 0 there."""
        return MIDDLE, MIDDLE * 17 if self._whole and not self._instruction.signed else MIDDLE

    @property
    def unit(self) -> float:
        """What upper sums are multiples of."""
        return 16.0 if self._whole else 1.0

    def words(self, groups: np.ndarray) -> np.ndarray:
        """Words of codes [panels, depth / 4, width, 4]; the width is an even number of vectors."""
        panels, groups_of_rows, width, _ = groups.shape
        bytes_of = self.dot.arranged(groups.astype(np.int8)).astype(np.uint8)
        pairs = bytes_of.reshape(panels, groups_of_rows, width // (2 * self.dot.lanes), 2, self.dot.lanes * 4)
        upper = pairs[..., 1, :] ^ MIDDLE if self._instruction.signed else pairs[..., 1, :]
        return np.ascontiguousarray(pairs[..., 0, :] | (upper << 4)).view(np.int32)

    def operands(self, word: Any) -> tuple[Any, Any]:
        """What lower and upper sums are made with."""
        lanes = self.dot.lanes
        mask = constant(0x0F0F0F0F, "int32", lanes)
        upper = word if self._whole else (word >> constant(4, "int32", lanes)) & mask
        return bind(reinterpret(word & mask, "int8", 4 * lanes)), bind(reinterpret(upper, "int8", 4 * lanes))

    def add(self, totals: Sequence[Any], activations: Any, operands: Sequence[Any]) -> None:
        """Add products to a lower and an upper sum.

        Args:
            totals: Both accumulators.
            activations: Words of four of them.
            operands: Of both sums.
        """
        lanes, instruction = self.dot.lanes, self._instruction
        four = reinterpret(activations, "int8", 4 * lanes)
        right = instruction.activation(four) if instruction.signed else [four]
        for total, operand in zip(totals, operands, strict=True):
            # where one of both has no sign, codes are that one
            pair = (right, instruction.weight(operand)) if instruction.signed else ([operand], right)
            store(total, instruction.add(load(total, 0, lanes), *pair), 0, lanes)

    def sums(self, lower: Any, upper: Any) -> tuple[Any, Any]:
        """Floats of sums on top of `BASE`; that of the upper halves is as many times larger as `unit` says."""
        base = constant(BASE, "float32", self.dot.lanes)
        lower, upper = (bind(reinterpret(total, "float32", self.dot.lanes)) for total in (lower, upper))
        return lower - base, upper - (lower if self._whole else base)


@dataclass(frozen=True)
class Decoder:
    """Makes floats of codes, code - 8 of each.

    Attributes:
        isa: The CPU.
    """

    isa: Isa

    @property
    def _looks_up(self) -> bool:
        """One permutation of a register of all sixteen numbers is less than two shifts and a conversion."""
        return self.isa.vector_bits == 512

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
        table = _vector_of([float(code - MIDDLE) for code in range(16)])
        places = bind(word >> number(4 * i)) if i else word
        return intrinsic("llvm.x86.avx512.permvar.sf.512", "float32", lanes, table, places)


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

    def pair(self, group: Any, number: int, lanes: int) -> Any:
        """Words of four codes of two vectors of columns."""
        return load(self.buffer, self.start + group * (self.width // 2) + number * lanes, lanes)

    def scales(self, vector: int, lanes: int) -> Any:
        """Scales of the columns."""
        words = load(self.buffer, self.start + self.size + vector * lanes, lanes)
        return bind(reinterpret(words, "float32", lanes))

    def shifts(self, vector: int, lanes: int) -> Any:
        """What is added to the weights of the columns."""
        words = load(self.buffer, self.start + self.size + self.width + vector * lanes, lanes)
        return bind(reinterpret(words, "float32", lanes))
