"""Multiply-accumulate of one pair of element types on one CPU: how operands are loaded, and which instruction it is.

Accumulators are vectors of 32-bit elements, one for each output column. An instruction takes `group` consecutive
elements along k from each of both operands: one float, or four bytes whose products it adds. The weight is packed so
that one vector load fetches `group` elements for every column of an accumulator; the other operand is repeated over
all columns, from memory or, where instructions take one lane of a register, from `steps` groups loaded together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from graphopt.targets import Isa
from graphopt_backends.kernels.emit import bind, cast, intrinsic, lane, load, reinterpret, spread, tirx

__all__ = ["Kind", "Multiply"]

Kind = Literal["f32", "u8s8", "s8s8"]

_VNNI = ("llvm.x86.avx512.vpdpbusd.{bits}", False)
_SDOT = ("llvm.aarch64.neon.sdot.v4i32.v16i8", True)
_USDOT = ("llvm.aarch64.neon.usdot.v4i32.v16i8", False)
_INSTRUCTIONS = {
    ("u8s8", "vnni"): _VNNI,
    ("u8s8", "avx-vnni"): _VNNI,
    ("s8s8", "sdot"): _SDOT,
    ("s8s8", "usdot"): _SDOT,
    ("u8s8", "usdot"): _USDOT,
}
"""Integer dot products by element types and `Isa.dot`, and whether the weight stands first: LLVM folds the lane of a
register into sdot only where it stands last."""


@dataclass(frozen=True)
class Multiply:
    """A multiply-accumulate.

    Attributes:
        isa: The CPU.
        kind: Element types of activations and weights.
    """

    isa: Isa
    kind: Kind

    @property
    def lanes(self) -> int:
        """Columns of an accumulator."""
        return self.isa.vector_bits // 32

    @property
    def group(self) -> int:
        """Elements along k that one instruction takes."""
        return 1 if self.kind == "f32" else 4

    @property
    def steps(self) -> int:
        """Groups of the activations that are loaded together."""
        return 4 if self.isa.lane_operands else 1

    @property
    def activation(self) -> str:
        """Element type of activations."""
        return {"f32": "float32", "u8s8": "uint8", "s8s8": "int8"}[self.kind]

    @property
    def weight(self) -> str:
        """Element type of packed weights."""
        return "float32" if self.kind == "f32" else "int8"

    @property
    def sum(self) -> str:
        """Element type of accumulators."""
        return "float32" if self.kind == "f32" else "int32"

    @property
    def element_bytes(self) -> int:
        """Bytes of an activation, and of a weight."""
        return 4 if self.kind == "f32" else 1

    @property
    def is_known(self) -> bool:
        """There is an instruction for it on this CPU."""
        return self.kind == "f32" or (self.kind, self.isa.dot) in _INSTRUCTIONS

    def registers(self, rows: int, vectors: int) -> int:
        """Vector registers that a tile of accumulators and its operands take."""
        if self.isa.lane_operands:
            return rows * vectors + rows + 1 + (vectors > 1)
        return rows * vectors + vectors + 1

    def load_weight(self, buffer: Any, index: Any) -> Any:
        """One vector of packed weights."""
        return bind(load(buffer, index, self.lanes * self.group))

    def load_activation(self, buffer: Any, index: Any, groups: int) -> list[Any]:
        """`groups` groups of activations, each repeated over all columns."""
        if self.isa.lane_operands and groups == self.steps:
            words = load(buffer, index, 4) if self.group == 1 else reinterpret(load(buffer, index, 16), "int32", 4)
            words = bind(words)
            return [self._everywhere(lane(words, i)) for i in range(groups)]
        return [bind(self._everywhere(self._word(buffer, index + i * self.group))) for i in range(groups)]

    def load_rest(self, buffer: Any, index: Any, count: int) -> Any:
        """A group of which only `count` elements are there, zeros behind them."""
        word: Any = tirx.const(0, "uint32")
        for i in range(count):
            byte = cast(reinterpret(buffer[(index + i,)], "uint8", 1), "uint32", 1)
            word = tirx.bitwise_or(word, tirx.shift_left(byte, tirx.const(8 * i, "uint32")))
        return bind(self._everywhere(reinterpret(word, "int32", 1)))

    def _word(self, buffer: Any, index: Any) -> Any:
        return buffer[(index,)] if self.group == 1 else reinterpret(load(buffer, index, 4), "int32", 1)

    def _everywhere(self, word: Any) -> Any:
        vector = spread(word, self.lanes)
        return vector if self.group == 1 else reinterpret(vector, self.activation, self.lanes * 4)

    def add(self, total: Any, activation: Any, weight: Any) -> Any:
        """`total` and the product of both."""
        if self.kind == "f32":
            return total + activation * weight
        name, weight_first = _INSTRUCTIONS[self.kind, self.isa.dot]
        values = (weight, activation) if weight_first else (activation, weight)
        return intrinsic(name.format(bits=self.isa.vector_bits), "int32", self.lanes, total, *values)
