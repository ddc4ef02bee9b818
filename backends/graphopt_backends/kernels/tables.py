"""Tables of few numbers, and codes that are places in them: how both are packed, and how registers are decoded.

A register holds codes of consecutive k of one column, and becomes vectors of that many floats in their order. How a
table is looked up depends on the CPU:

    CPU        entries     codes     by
    AVX-512    4, 16       2, 4      vpermps; fewer entries are repeated, so that bits of the next code do no harm
    AVX-512    32, 64      8         vpermt2ps, once or twice and a blend
    AVX2       4, 16       2, 4      vpermps, once or twice and a blend
    ARM        4, 16       2, 4      tbl for each of the four bytes of a number, and zips
    ARM        32, 64      8         the same with two and four registers for each byte
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.targets import Isa
from graphopt_backends.kernels.emit import bind, constant, intrinsic, load, reinterpret, tirx

__all__ = ["SIZES", "Tables", "tables_of"]

_BYTE = 8
_LOOKED_UP_AT_ONCE = 16  # bytes of tbl, lanes of vpermps
_MOST_PERMUTED = {256: 16, 512: 64}  # entries by bits of a vector
_BITS = {4: 2, 16: 4, 32: 8, 64: 8}
SIZES = tuple(_BITS)
"""Entries of tables; those with fewer are filled up."""


@dataclass(frozen=True)
class Tables(abc.ABC):
    """Tables of one size on one CPU.

    Attributes:
        isa: The CPU.
        entries: Numbers of a table, one of `SIZES`.
    """

    isa: Isa
    entries: int

    @property
    def lanes(self) -> int:
        """Floats of a vector."""
        return self.isa.vector_bits // 32

    @property
    def bits(self) -> int:
        """Of a code."""
        return _BITS[self.entries]

    @property
    def codes(self) -> int:
        """Codes of a register."""
        return self.isa.vector_bits // self.bits

    @property
    def together(self) -> int:
        """Vectors that are decoded at once."""
        return 1

    @property
    @abc.abstractmethod
    def steps(self) -> int:
        """Instructions, about, that look up a vector."""

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """Words of a packed table."""

    @abc.abstractmethod
    def pack(self, tables: np.ndarray) -> np.ndarray:
        """Lay out tables [number, entries] of float32 as int32 [number, size]."""

    @abc.abstractmethod
    def words(self, codes: np.ndarray) -> np.ndarray:
        """Lay out codes [..., codes] as int32 [..., lanes]."""

    @abc.abstractmethod
    def held(self, buffer: Any, start: Any) -> Sequence[Any]:
        """A table, ready to be looked up; it begins at a word of a buffer."""

    @abc.abstractmethod
    def decoded(self, word: Any, held: Sequence[Any], group: int) -> Sequence[Any]:
        """Vectors of floats, `together` of them, that a group of the codes of a register stands for."""


@dataclass(frozen=True)
class _InLanes(Tables):
    """Words of codes: a vector of floats is made of those at one place of all words."""

    def words(self, codes: np.ndarray) -> np.ndarray:
        split = codes.reshape(*codes.shape[:-1], -1, self.lanes).astype(np.uint32)
        places = np.arange(0, 32, self.bits, dtype=np.uint32)[:, None]
        return np.bitwise_or.reduce(split << places, axis=-2).view(np.int32)

    def _number(self, value: int) -> Any:
        return constant(value, "int32", self.lanes)

    def _places(self, word: Any, group: int) -> Any:
        """Codes in the lowest bits of lanes, others above them."""
        return bind(word >> self._number(self.bits * group)) if group else word


@dataclass(frozen=True)
class _Permuted(_InLanes):
    """Registers hold the table: permutations look at the lowest bits of places."""

    @property
    def steps(self) -> int:
        return 1 if self.entries <= self.lanes else 4

    @property
    def size(self) -> int:
        return max(self.entries, self.lanes)

    def pack(self, tables: np.ndarray) -> np.ndarray:
        return np.tile(tables.astype(np.float32), self.size // self.entries).view(np.int32)

    def held(self, buffer: Any, start: Any) -> Sequence[Any]:
        words = [load(buffer, start + first, self.lanes) for first in range(0, self.size, self.lanes)]
        return [bind(reinterpret(word, "float32", self.lanes)) for word in words]

    def decoded(self, word: Any, held: Sequence[Any], group: int) -> Sequence[Any]:
        places = self._places(word, group)
        if self.lanes == _LOOKED_UP_AT_ONCE and len(held) > 1:
            found = [self._from_two(held[i : i + 2], places) for i in range(0, len(held), 2)]
        else:
            found = [self._from_one(part, places) for part in held]
        if len(found) == 1:
            return [bind(found[0])]
        # the highest bit of the code decides, as a sign
        highest = word << self._number(32 - self.bits * group - self.entries.bit_length() + 1)
        return [bind(tirx.Select(highest < self._number(0), bind(found[1]), bind(found[0])))]

    def _from_one(self, table: Any, places: Any) -> Any:
        if self.lanes == _LOOKED_UP_AT_ONCE:
            return intrinsic("llvm.x86.avx512.permvar.sf.512", "float32", self.lanes, table, places)
        return intrinsic("llvm.x86.avx2.permps", "float32", self.lanes, table, places)

    def _from_two(self, table: Sequence[Any], places: Any) -> Any:
        return intrinsic("llvm.x86.avx512.vpermi2var.ps.512", "float32", self.lanes, table[0], places, table[1])


@dataclass(frozen=True)
class _Planes(Tables):
    """Registers hold the first bytes of all numbers of the table, the second ones, and so on.

    A field of the sixteen bytes of a register of codes becomes four vectors of four floats.
    """

    @property
    def together(self) -> int:
        return 4

    @property
    def steps(self) -> int:
        return 3

    @property
    def _registers(self) -> int:
        """That hold a plane."""
        return -(-self.entries // _LOOKED_UP_AT_ONCE)

    @property
    def size(self) -> int:
        return 4 * 4 * self._registers

    def pack(self, tables: np.ndarray) -> np.ndarray:
        filled = np.zeros((len(tables), self.size // 4 * 4), np.float32)
        filled[:, : self.entries] = tables
        planes = filled.view(np.uint8).reshape(len(tables), -1, 4).swapaxes(1, 2)
        return np.ascontiguousarray(planes[:, :, : 16 * self._registers]).reshape(len(tables), -1).view(np.int32)

    def words(self, codes: np.ndarray) -> np.ndarray:
        split = codes.reshape(*codes.shape[:-1], -1, _LOOKED_UP_AT_ONCE).astype(np.uint8)
        places = np.arange(0, _BYTE, self.bits, dtype=np.uint8)[:, None]
        return np.ascontiguousarray(np.bitwise_or.reduce(split << places, axis=-2)).view(np.int32)

    def held(self, buffer: Any, start: Any) -> Sequence[Any]:
        words = [load(buffer, start + first, 4) for first in range(0, self.size, 4)]
        return [bind(reinterpret(word, "int8", 16)) for word in words]

    def decoded(self, word: Any, held: Sequence[Any], group: int) -> Sequence[Any]:
        places, count = self._field(word, group), self._registers
        name = f"llvm.aarch64.neon.tbl{count}.v16i8"
        planes = [intrinsic(name, "int8", 16, *held[i : i + count], places) for i in range(0, 4 * count, count)]
        first, second, third, fourth = map(bind, planes)
        lower, upper = _zipped(first, second, 1), _zipped(third, fourth, 1)
        pairs = zip(lower, upper, strict=True)
        return [bind(reinterpret(half, "float32", 4)) for low, high in pairs for half in _zipped(low, high, 2)]

    def _field(self, word: Any, group: int) -> Any:
        """Codes at one place of all bytes."""
        whole = reinterpret(word, "uint8", 16)
        shifted = whole >> constant(self.bits * group, "uint8", 16) if group else whole
        last = self.bits * (group + 1) == _BYTE
        masked = shifted if last else shifted & constant((1 << self.bits) - 1, "uint8", 16)
        return bind(reinterpret(masked, "int8", 16))


def _zipped(left: Any, right: Any, size: int) -> Sequence[Any]:
    """Elements of two vectors in turns, of so many bytes: both halves."""
    each = 16 // size
    pair = [bind(reinterpret(side, f"int{8 * size}", each)) for side in (left, right)]
    turns = [place for i in range(each) for place in (i, each + i)]
    return [bind(tirx.Shuffle(pair, turns[first : first + each])) for first in (0, each)]


def tables_of(isa: Isa, entries: int) -> Tables | None:
    """How a CPU looks up tables of so many entries; None: it has no instructions for it, or floats are as fast."""
    size = next((size for size in SIZES if size >= entries), 0)
    if not size:
        return None
    if isa.machine == "aarch64":
        return _Planes(isa, size)
    return _Permuted(isa, size) if size <= _MOST_PERMUTED.get(isa.vector_bits, 0) else None
