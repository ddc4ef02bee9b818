"""Activations of products with weights in blocks: copied, or rounded to int8, with what is known of each block.

A row becomes words of 32 bits: its activations, zeros behind them, then facts about every block. Of floats that is
their sum. Of int8 it is the number that a step stands for, what sums of products with lower and with upper halves of
bytes begin with, and the real sum of the block's activations.

Sums of integers begin with the bits of `BASE`, a float whose last bit is worth one: they are floats when they are done,
and a subtraction leaves the sum. They begin lower by what codes of zero add to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from graphopt.targets import Isa
from graphopt_backends.kernels.emit import (
    Frame,
    bind,
    cast,
    constant,
    intrinsic,
    lane,
    load,
    local,
    loop,
    reinterpret,
    spread,
    store,
    tirx,
)
from graphopt_backends.kernels.tile import SET_BYTES

__all__ = ["BASE", "LOWER", "MIDDLE", "MOST_ROUNDED", "STEP", "TOTAL", "UPPER", "Activations", "Prepared", "Source"]

Activations = Literal["float32", "int8"]
"""What activations are multiplied as."""

MIDDLE = 8
"""The code of zero."""

STEP, LOWER, UPPER, TOTAL = range(4)
"""Facts about a block of int8, in their order."""

BASE = 1.5 * 2**23
"""What sums of integers are on top of; they may be up to 2^22 away from it."""

MOST_ROUNDED = 128
"""The longest block of int8: sums of products of whole bytes with them are less than 2^22 away from zero."""

_BASE_BITS = 0x4B400000

_LEAST_SCALE = 1e-30


@dataclass(frozen=True)
class Prepared:
    """How rows of activations lie in scratch memory.

    Attributes:
        isa: The CPU.
        activations: What they become.
        depth: Activations of a row.
        block: How many of them belong to a block, a multiple of the lanes of a vector.
        sums: Sums of blocks are needed.
        zeros: What codes of zero are in lower and in upper halves of bytes.
    """

    isa: Isa
    activations: Activations
    depth: int
    block: int
    sums: bool
    zeros: tuple[int, int] = (MIDDLE, MIDDLE)

    @property
    def dtype(self) -> str:
        """What words are read as."""
        return "int32" if self.activations == "int8" else "float32"

    @property
    def blocks(self) -> int:
        """Blocks of a row."""
        return -(-self.depth // self.block)

    @property
    def _facts(self) -> int:
        """The first word behind the activations."""
        size = self.blocks * self.block
        return size // 4 if self.activations == "int8" else size

    @property
    def _fact_words(self) -> int:
        return 4 if self.activations == "int8" else 1

    def facts(self, block: Any) -> Any:
        """The first word of what is known of a block."""
        return self._facts + block * self._fact_words

    @property
    def words(self) -> int:
        """Words of a row."""
        size = self._facts + self.blocks * self._fact_words
        return size if 4 * size % SET_BYTES else size + self._lanes

    @property
    def _lanes(self) -> int:
        return self.isa.vector_bits // 32

    def put(self, frame: Frame, source: Any, target: Any) -> None:
        """Prepare a row.

        Args:
            frame: Its parameters `source` and `scratch`.
            source: First activation.
            target: First word.
        """
        whole, rest = divmod(self.depth, self.block)
        put = self._round if self.activations == "int8" else self._copy
        if whole:
            with loop(whole) as block:
                put(frame, bind(source + block * self.block), target, block, self.block)
        if rest:
            put(frame, bind(source + whole * self.block), target, whole, rest)

    def _each_vector(self, frame: Frame, start: Any, count: int, body: Callable[[Any, Any], None]) -> None:
        """Emit code for vectors of a block: `body(first, values)`; zeros stand behind the first `count` values."""
        lanes = self._lanes
        whole, rest = divmod(count, lanes)
        if whole:
            with loop(whole) as i:
                body(i * lanes, bind(load(frame["source"], start + i * lanes, lanes)))
        if rest:
            zero = tirx.const(0.0, "float32")
            values = [frame["source"][(start + whole * lanes + i,)] if i < rest else zero for i in range(lanes)]
            body(whole * lanes, bind(tirx.Shuffle(values, list(range(lanes)))))
            whole += 1
        if whole * lanes < self.block:
            with loop(self.block // lanes - whole) as i:
                body((whole + i) * lanes, constant(0, "float32", lanes))

    def _copy(self, frame: Frame, source: Any, target: Any, block: Any, count: int) -> None:
        """Copy a block, and add its activations up."""
        lanes, scratch, to = self._lanes, frame["scratch"], bind(target + block * self.block)
        total = local(lanes, "float32")
        store(total, constant(0, "float32", lanes), 0, lanes)

        def put(first: Any, value: Any) -> None:
            store(scratch, value, to + first, lanes)
            if self.sums:
                store(total, load(total, 0, lanes) + value, 0, lanes)

        self._each_vector(frame, source, count, put)
        if self.sums:
            store(scratch, _added(load(total, 0, lanes), lanes), target + self.facts(block), 1)

    def _round(self, frame: Frame, source: Any, target: Any, block: Any, count: int) -> None:
        """Round a block to int8, so that the largest activation is 127 steps."""
        lanes, scratch = self._lanes, frame["scratch"]
        most, total = local(lanes, "float32"), local(lanes, "int32")
        store(most, constant(0, "float32", lanes), 0, lanes)
        store(total, constant(0, "int32", lanes), 0, lanes)

        def compare(_: Any, value: Any) -> None:
            store(most, tirx.max(load(most, 0, lanes), tirx.abs(value)), 0, lanes)

        self._each_vector(frame, source, count, compare)
        largest = bind(intrinsic(f"llvm.vector.reduce.fmax.v{lanes}f32", "float32", 1, load(most, 0, lanes)))
        steps = bind(tirx.const(127.0, "float32") / tirx.max(largest, tirx.const(_LEAST_SCALE, "float32")))

        def put(first: Any, value: Any) -> None:
            steps_of = value * spread(steps, lanes)
            whole = bind(intrinsic(f"llvm.lrint.v{lanes}i32.v{lanes}f32", "int32", lanes, steps_of))
            words = reinterpret(cast(whole, "int8", lanes), "int32", lanes // 4)
            store(scratch, words, target + tirx.truncdiv(block * self.block + first, 4), lanes // 4)
            store(total, load(total, 0, lanes) + whole, 0, lanes)

        self._each_vector(frame, source, count, put)
        scale = bind(largest / tirx.const(127.0, "float32"))
        added = bind(intrinsic(f"llvm.vector.reduce.add.v{lanes}i32", "int32", 1, load(total, 0, lanes)))
        facts = bind(target + self.facts(block))
        store(scratch, reinterpret(scale, "int32", 1), facts + STEP, 1)
        for fact, zero in zip((LOWER, UPPER), self.zeros, strict=True):
            first = tirx.const(_BASE_BITS, "int32") - added * tirx.const(zero, "int32")
            store(scratch, first, facts + fact, 1)
        if self.sums:
            store(scratch, reinterpret(scale * cast(added, "float32", 1), "int32", 1), facts + TOTAL, 1)


@dataclass(frozen=True)
class Source:
    """Activations of a tile: where each row begins."""

    buffer: Any
    starts: Sequence[Any]


def _added(vector: Any, lanes: int) -> Any:
    """The sum of all lanes."""
    total: Any = tirx.const(0.0, "float32")
    vector = bind(vector)
    for i in range(lanes):
        total = total + lane(vector, i)
    return total
