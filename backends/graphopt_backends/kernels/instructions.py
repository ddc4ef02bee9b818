"""Sums of products of bytes, 32 bits wide and exact, by the instructions that CPUs have for them.

An accumulator holds a sum for each column. What multiplies takes `group` neighbouring elements along k of each of both
operands, multiplies them pairwise and adds all products to the sum:

    instruction     CPUs                                  activations   how
    vpdpbusd        x86 with AVX512-VNNI or AVX-VNNI      unsigned      four products
    vpmaddubsw      x86, narrow weights                   unsigned      pairs in 16 bits, then pairs of pairs
    vpmaddwd        x86                                   both          two pairs, widened to 16 bits before
    sdot, usdot     ARM with dot products, with I8MM      both          four products
    smmla, usmmla   ARM with I8MM                         both          eight products, of two rows and two columns
    smull, sadalp   ARM                                   signed        pairs in 16 bits, then added in 32
    multiplication  any                                   both          one product

Weights are narrow where the sum of two products fits 16 bits whatever the activations are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graphopt.targets import Isa
from graphopt_backends.kernels.emit import bind, cast, constant, intrinsic, reinterpret, tirx

__all__ = ["Instruction", "instruction_of"]

Vector = Any


@dataclass(frozen=True)
class Instruction:
    """How operands are multiplied and added; this one by itself multiplies single elements.

    Attributes:
        lanes: Columns of an accumulator.
        signed: Activations that it takes have a sign.
        group: Elements along k that it takes of a column.
        rows: Rows of activations that it takes.
        parts: Registers that an operand becomes, ready to be multiplied.
        spare: Registers for what lies between operands and sums.
        widest: Narrow weights are at most that far from zero; 0: all weights are alike.
    """

    lanes: int
    signed: bool
    group: int = 1
    rows: int = 1
    parts: int = 1
    spare: int = 0
    widest: int = 0

    def weight(self, vector: Vector) -> Sequence[Vector]:
        """Packed weights of a vector's columns, ready to be multiplied."""
        return [bind(cast(vector, "int32", self.lanes))]

    def activation(self, vector: Vector) -> Sequence[Vector]:
        """Activations as often as there are columns, ready to be multiplied."""
        return [bind(cast(vector, "int32", self.lanes))]

    def add(self, total: Vector, activation: Sequence[Vector], weight: Sequence[Vector]) -> Vector:
        """`total` and the sums of products."""
        return total + activation[0] * weight[0]


@dataclass(frozen=True)
class _Dot(Instruction):
    """One instruction does all of it.

    Attributes:
        name: LLVM's intrinsic.
        weight_first: LLVM folds the lane of a register into sdot only where it stands last.
    """

    name: str = ""
    weight_first: bool = False

    def weight(self, vector: Vector) -> Sequence[Vector]:
        return [vector]

    def activation(self, vector: Vector) -> Sequence[Vector]:
        return [vector]

    def add(self, total: Vector, activation: Sequence[Vector], weight: Sequence[Vector]) -> Vector:
        values = (*weight, *activation) if self.weight_first else (*activation, *weight)
        return intrinsic(self.name, "int32", self.lanes, total, *values)


@dataclass(frozen=True)
class _Pairs(Instruction):
    """Elements at even and at odd places, widened, are multiplied by vpmaddwd, which adds neighbouring products.

    Attributes:
        name: LLVM's intrinsic.
    """

    name: str = ""

    def weight(self, vector: Vector) -> Sequence[Vector]:
        return _halves(vector, 2 * self.lanes, signed=True)

    def activation(self, vector: Vector) -> Sequence[Vector]:
        return _halves(vector, 2 * self.lanes, signed=self.signed)

    def add(self, total: Vector, activation: Sequence[Vector], weight: Sequence[Vector]) -> Vector:
        for a, w in zip(activation, weight, strict=True):
            total = total + intrinsic(self.name, "int32", self.lanes, a, w)
        return total


def _halves(vector: Vector, lanes: int, *, signed: bool) -> Sequence[Vector]:
    """Bytes at even and at odd places as 16-bit integers."""
    dtype = "int16" if signed else "uint16"
    words, byte = reinterpret(vector, dtype, lanes), constant(8, dtype, lanes)
    even = tirx.shift_right(bind(tirx.shift_left(words, byte)), byte) if signed else words & constant(255, dtype, lanes)
    return [bind(reinterpret(half, "int16", lanes)) for half in (even, tirx.shift_right(words, byte))]


@dataclass(frozen=True)
class _NarrowPairs(_Dot):
    """Pairs of products by vpmaddubsw, which would saturate with wider weights, and pairs of those by vpmaddwd.

    Attributes:
        pairs: LLVM's intrinsic that adds neighbours.
    """

    pairs: str = ""

    def add(self, total: Vector, activation: Sequence[Vector], weight: Sequence[Vector]) -> Vector:
        sums = intrinsic(self.name, "int16", 2 * self.lanes, *activation, *weight)
        return total + intrinsic(self.pairs, "int32", self.lanes, sums, constant(1, "int16", 2 * self.lanes))


@dataclass(frozen=True)
class _Long(Instruction):
    """Products in 16 bits, which an instruction adds pairwise to sums of 32.

    A vector of weights holds the first two elements of every column, then the other two. Both halves are added in
    16 bits if the weights are narrow.
    """

    def weight(self, vector: Vector) -> Sequence[Vector]:
        return [vector]

    def activation(self, vector: Vector) -> Sequence[Vector]:
        pairs = reinterpret(vector, "int16", 8)
        return [bind(reinterpret(tirx.Shuffle([pairs], [i] * 4), "int8", 8)) for i in range(2)]

    def add(self, total: Vector, activation: Sequence[Vector], weight: Sequence[Vector]) -> Vector:
        products = [
            intrinsic("llvm.aarch64.neon.smull.v8i16", "int16", 8, part, _part(weight[0], 8 * i, 8))
            for i, part in enumerate(activation)
        ]
        for product in [products[0] + products[1]] if self.widest else products:
            total = total + intrinsic("llvm.aarch64.neon.saddlp.v4i32.v8i16", "int32", 4, product)
        return total


def _part(vector: Vector, first: int, count: int) -> Vector:
    return tirx.Shuffle([vector], list(range(first, first + count)))


def instruction_of(isa: Isa, signed: bool, narrow: bool) -> Instruction:
    """What multiplies bytes on a CPU.

    Args:
        isa: The CPU.
        signed: Activations have a sign.
        narrow: Weights are narrow.
    """
    lanes = isa.vector_bits // 32
    if isa.dot in ("vnni", "avx-vnni"):
        return _Dot(lanes, signed=False, group=4, name=f"llvm.x86.avx512.vpdpbusd.{isa.vector_bits}")
    if isa.dot == "i8mm":
        name = "llvm.aarch64.neon.smmla" if signed else "llvm.aarch64.neon.usmmla"
        return _Dot(lanes, signed=signed, group=8, rows=2, name=f"{name}.v4i32.v16i8")
    if isa.dot == "sdot":
        return _Dot(lanes, signed=True, group=4, name="llvm.aarch64.neon.sdot.v4i32.v16i8", weight_first=True)
    if isa.machine == "aarch64":
        return _Long(lanes, signed=True, group=4, parts=2, spare=7, widest=127 if narrow else 0)
    if isa.vector_bits in _PAIRS:
        pairs, narrow_pairs = _PAIRS[isa.vector_bits]
        if narrow:
            return _NarrowPairs(lanes, signed=False, group=4, spare=2, widest=64, name=narrow_pairs, pairs=pairs)
        return _Pairs(lanes, signed=signed, group=4, parts=2, spare=1, name=pairs)
    return Instruction(lanes, signed=signed)


_PAIRS = {
    256: ("llvm.x86.avx2.pmadd.wd", "llvm.x86.avx2.pmadd.ub.sw"),
    512: ("llvm.x86.avx512.pmaddw.d.512", "llvm.x86.avx512.pmaddubs.w.512"),
}
"""Intrinsics of x86 by the width of a vector."""
