"""Multiply-accumulate of one pair of element types on one CPU: how operands are loaded, and which instruction it is.

Accumulators are vectors of 32-bit elements, one for each output column. An instruction takes `group` consecutive
elements along k from each of both operands: one float, or some bytes whose products it adds. The weight is packed so
that one vector load fetches `group` elements for every column of an accumulator; the other operand is repeated over
all columns, from memory or, where instructions take one lane of a register, from `steps` groups loaded together.

Weights that are stored in 16 bits become floats in registers, as they are loaded.

Where an instruction takes two rows, a vector of weights has half of the columns, and the two accumulators of a pair of
rows hold the sums of both rows for the first half and for the second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from graphopt.targets import Isa
from graphopt_backends.kernels.emit import bind, cast, constant, lane, load, reinterpret, spread, tirx
from graphopt_backends.kernels.functions import from_bfloat16
from graphopt_backends.kernels.instructions import Instruction, instruction_of

__all__ = ["Kind", "Multiply", "Stored", "integer_kind", "stored_as"]

Kind = Literal["f32", "u8s8", "s8s8", "u8s8-narrow", "s8s8-narrow"]
"""Element types of activations and weights; weights are narrow where two products fit 16 bits (`instructions.py`)."""

Stored = Literal["float32", "float16", "bfloat16"]
"""Element types in which weights of floats are stored."""

_FLIPPED = 128
"""What another sign of bytes adds to them or takes away: the highest bit."""


@dataclass(frozen=True)
class Multiply:
    """A multiply-accumulate.

    Attributes:
        isa: The CPU.
        kind: Element types of activations and weights.
        stored: What weights are stored as, if they are floats.
    """

    isa: Isa
    kind: Kind
    stored: Stored = "float32"

    @cached_property
    def instruction(self) -> Instruction | None:
        """What multiplies bytes; None: floats."""
        if self.kind == "f32":
            return None
        return instruction_of(self.isa, self.kind.startswith("s8"), self.kind.endswith("narrow"))

    @property
    def lanes(self) -> int:
        """Columns of an accumulator."""
        return self.isa.vector_bits // 32

    @property
    def group(self) -> int:
        """Elements along k that one instruction takes."""
        return self.instruction.group if self.instruction else 1

    @property
    def rows(self) -> int:
        """Rows of activations that one instruction takes."""
        return self.instruction.rows if self.instruction else 1

    @property
    def steps(self) -> int:
        """Groups of the activations that are loaded together."""
        if self.rows > 1:
            return 2
        return 4 if self.isa.lane_operands else 1

    @property
    def activation(self) -> str:
        """Element type of activations."""
        return "float32" if self.kind == "f32" else "uint8" if self.kind.startswith("u8") else "int8"

    @property
    def weight(self) -> str:
        """Element type of packed weights."""
        return self.stored if self.kind == "f32" else "int8"

    @property
    def sum(self) -> str:
        """Element type of accumulators."""
        return "float32" if self.kind == "f32" else "int32"

    @property
    def element_bytes(self) -> int:
        """Bytes of an activation."""
        return 4 if self.kind == "f32" else 1

    @property
    def weight_bytes(self) -> int:
        """Bytes of a packed weight."""
        return {"float32": 4, "int8": 1}.get(self.weight, 2)

    @property
    def weight_elements(self) -> int:
        """Weights that are loaded together."""
        return self.lanes * self.group // self.rows

    @property
    def shift(self) -> int:
        """What activations have too much when they are multiplied, because the instruction wants another sign.

        Whoever starts the sums takes `shift` times the sum of a column's weights away from them.
        """
        if self.instruction is None or self.instruction.signed == (self.activation == "int8"):
            return 0
        return -_FLIPPED if self.instruction.signed else _FLIPPED

    def registers(self, rows: int, vectors: int) -> int:
        """Vector registers that a tile of accumulators and its operands take."""
        rows = -(-rows // self.rows) * self.rows
        parts, spare = (self.instruction.parts, self.instruction.spare) if self.instruction else (1, 0)
        if self.rows > 1:
            return rows * vectors + rows // self.rows + 2
        if self.isa.lane_operands:
            # two more than named: LLVM loads early
            return rows * vectors + rows + vectors + 2 + (parts - 1) + spare
        return rows * vectors + parts * (vectors + 1) + spare

    def loads(self, rows: float, vectors: float) -> float:
        """Loads that a tile takes for a group of elements along k; those of bands fetch two vectors."""
        return rows / (self.rows * self.steps) + vectors

    def arranged(self, packed: np.ndarray) -> np.ndarray:
        """Put packed weights [panels, depth / group, width, group] into the order in which registers hold them."""
        if self.instruction is None or self.instruction.parts == 1 or not self.isa.lane_operands:
            return packed
        halves = packed.reshape(*packed.shape[:2], -1, self.lanes, 2, 2).swapaxes(-2, -3)
        return np.ascontiguousarray(halves).reshape(packed.shape)

    def load_weight(self, buffer: Any, index: Any) -> Any:
        """One vector of packed weights."""
        vector = bind(load(buffer, index, self.weight_elements))
        return self.instruction.weight(vector) if self.instruction else self._widened(vector)

    def _widened(self, weights: Any) -> Any:
        """Stored weights as floats."""
        if self.stored == "float32":
            return weights
        if self.stored == "float16":
            return bind(cast(weights, "float32", self.lanes))
        return bind(from_bfloat16(weights, self.lanes))

    def load_activation(self, buffer: Any, places: Sequence[Any], groups: int) -> list[Any]:
        """`groups` groups of activations, each repeated over all columns.

        Args:
            buffer: Where they are.
            places: The first element of each row that an instruction takes.
            groups: How many.
        """
        if self.rows > 1:
            return self._in_bands([load(buffer, place, groups * self.group) for place in places], groups)
        index = places[0]
        if self.isa.lane_operands and groups == self.steps and self.element_bytes * self.group == 4:
            words = load(buffer, index, 4) if self.group == 1 else self._signed(load(buffer, index, 16), 4)
            words = bind(words if self.group == 1 else reinterpret(words, "int32", 4))
            return [self._everywhere(lane(words, i)) for i in range(groups)]
        if self.group == 1:
            return [bind(spread(buffer[(index + i,)], self.lanes)) for i in range(groups)]
        words = [reinterpret(load(buffer, index + i * self.group, 4), "int32", 1) for i in range(groups)]
        return [self._bytes(reinterpret(spread(word, self.lanes), self.activation, self.lanes * 4)) for word in words]

    def load_rest(self, buffer: Any, places: Sequence[Any], count: int) -> Any:
        """A group of which only `count` elements are there, zeros behind them; see `load_activation`."""
        if self.rows > 1:
            zero = tirx.const(0, self.activation)
            rows = [[*(buffer[(place + i,)] for i in range(count)), *[zero] * (self.group - count)] for place in places]
            return self._in_bands([tirx.Shuffle(row, list(range(self.group))) for row in rows], 1)[0]
        word: Any = tirx.const(0, "uint32")
        for i in range(count):
            byte = cast(reinterpret(buffer[(places[0] + i,)], "uint8", 1), "uint32", 1)
            word = tirx.bitwise_or(word, tirx.shift_left(byte, tirx.const(8 * i, "uint32")))
        word = reinterpret(word, "int32", 1)
        return self._bytes(reinterpret(spread(word, self.lanes), self.activation, self.lanes * 4))

    def load_band(self, buffer: Any, index: Any) -> Any:
        """A group of each of the rows that an instruction takes, brought together before."""
        return self._bytes(load(buffer, index, self.rows * self.group))

    def _in_bands(self, rows: Sequence[Any], groups: int) -> list[Any]:
        """Bring groups of two rows together, or of one that is taken twice."""
        size = groups * self.group
        bound = list(map(bind, rows))
        pair = [bound[0], bound[-1]]
        found: list[Any] = []
        for i in range(groups):
            own = range(i * self.group, (i + 1) * self.group)
            found.append(self._bytes(tirx.Shuffle(pair, [*own, *(size + place for place in own)])))
        return found

    def _everywhere(self, word: Any) -> Any:
        """A lane of activations whose sign is right."""
        vector = spread(word, self.lanes)
        return reinterpret(vector, "int8", self.lanes * 4) if self.instruction else vector

    def _bytes(self, vector: Any) -> Any:
        return bind(self._signed(vector, self.lanes))

    def ready(self, activation: Any) -> Any:
        """Activations as instructions take them, made from loaded ones right before."""
        return self.instruction.activation(activation) if self.instruction else activation

    def _signed(self, vector: Any, words: int) -> Any:
        """Activations, as many as fill 32-bit words, with the sign that the instruction wants."""
        if not self.shift:
            return vector
        flipped = tirx.bitwise_xor(reinterpret(vector, "uint32", words), constant(0x80808080, "uint32", words))
        return reinterpret(flipped, "uint8" if self.shift > 0 else "int8", 4 * words)

    def add(self, total: Any, activation: Any, weight: Any) -> Any:
        """`total` and the product of both."""
        return self.instruction.add(total, activation, weight) if self.instruction else total + activation * weight


def integer_kind(isa: Isa, activation: str, weight: np.ndarray) -> Kind:
    """The kind of a product of bytes: narrow if these weights are, and if that makes a difference to the CPU."""
    kind: Kind = "u8s8" if activation == "uint8" else "s8s8"
    narrow: Kind = "u8s8-narrow" if activation == "uint8" else "s8s8-narrow"
    instruction = Multiply(isa, narrow).instruction
    assert instruction is not None
    widest = int(np.abs(weight.astype(np.int32)).max(initial=0))
    return narrow if instruction.widest and widest <= instruction.widest else kind


def stored_as(weight: np.ndarray) -> Stored:
    """The element type in which weights are stored, by that of the array which holds them."""
    found: Mapping[str, Stored] = {"float16": "float16", "bfloat16": "bfloat16"}
    return found.get(str(weight.dtype), "float32")
