"""Products of two activations that are bytes, many at once: quantized attention. Sums are exact, 32 bits wide.

With A' = A + s, as the instruction wants the sign of A, and B' as it wants that of B, the sum of (A - a)(B - b) along k
is that of A'B' without a' times the sum of a column of B', b' times the sum of a row of A', and depth * a' * b' more.
Columns are summed while they are packed; the sums of rows are one more column, of ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from graphopt_backends.kernels.batched import Batched, Place, transposed
from graphopt_backends.kernels.emit import (
    Frame,
    Pointer,
    bind,
    constant,
    load,
    load_first,
    local,
    loop,
    primitive,
    reach,
    reinterpret,
    splits,
    store,
    tirx,
)
from graphopt_backends.kernels.epilogue import Result, finish
from graphopt_backends.kernels.multiply import Multiply
from graphopt_backends.kernels.tile import Panel, Rows, accumulate, tile_of

__all__ = ["ByteProducts"]

_WORD = 4  # bytes that most instructions take of a column; others take one
_FLIP = 128


@dataclass(frozen=True)
class ByteProducts(Batched):
    """C[b] = epilogue((A[b] - a)(B[b] - b)), on views; see `Batched`.

    The strides of B may be those that `reads` accepts.

    Attributes:
        dtypes: Element types of A and B: int8 or uint8.
        zeros: Zero points of A and B.
    """

    dtypes: tuple[str, str] = field(kw_only=True)
    zeros: tuple[int, int] = field(kw_only=True)

    @cached_property
    def multiply(self) -> Multiply:
        """Its inner loop: an instruction that takes one row, which CPUs with one for two have as well."""
        isa = replace(self.isa, dot="sdot") if self.isa.dot == "i8mm" else self.isa
        return Multiply(isa, "u8s8" if self.dtypes[0] == "uint8" else "s8s8")

    def reads(self, right: Sequence[int]) -> bool:
        """Columns of B follow one another; or its rows do, and the CPU multiplies words."""
        return right[-1] == 1 or (right[-2] == 1 and self.multiply.group == _WORD)

    @property
    def _zeros(self) -> tuple[int, int]:
        """Zero points as instructions see them."""
        return self.zeros[0] + self.multiply.shift, self.zeros[1] - (_FLIP if self.dtypes[1] == "uint8" else 0)

    @property
    def _extra(self) -> int:
        """Vectors of ones."""
        return int(self._zeros[1] != 0)

    @cached_property
    def tile(self) -> tuple[int, int]:
        """Rows and vectors of a register tile, ones left out."""
        vectors = -(-self.columns // self.multiply.lanes)
        high, wide = tile_of(self.multiply, self.rows, vectors + self._extra)
        wide = max(1, wide - self._extra)
        while high > 1 and self.multiply.registers(high, wide + self._extra) > self.isa.registers:
            high -= 1
        return high, wide

    @property
    def _groups(self) -> int:
        return -(-self.depth // self.multiply.group)

    @property
    def scratch(self) -> int:
        """Bytes of memory that every task needs for itself: a packed panel."""
        return self._groups * self.multiply.group * (self.tile[1] + self._extra) * self.multiply.lanes

    def primitive(self, name: str) -> Any:
        """The function: (left, right, operands..., result, scratch, task, tasks)."""
        pointers = [
            Pointer("left", self.dtypes[0], reach((*self.batch, self.rows), self.left) + self.depth),
            Pointer("right", self.dtypes[1], reach((*self.batch, self.depth, self.columns), self.right) + 1),
            *self.epilogue.pointers(self.multiply, self.rows, self.columns, 0),
            Pointer("result", self.epilogue.dtype, reach((*self.batch, self.rows), self.result) + self.columns),
            Pointer("scratch", "int8", self.scratch),
        ]
        return primitive(name, pointers, self._body)

    def _panel(self, frame: Frame, place: Place, panel: Any, columns: int) -> None:
        lanes = self.multiply.lanes
        vectors, column = -(-columns // lanes), bind(panel * self._width)
        starts = [local(lanes, "int32") for _ in range(vectors)]
        self._pack_summed(frame, bind(place.right + column * self.right[-1]), columns, starts)
        self._begin(starts)
        weight = Panel(frame["scratch"], 0, (vectors + self._extra) * lanes)
        for start, count, high in splits(self.rows, self.tile[0]):
            with loop(count) as i:
                row = bind(start + i * high)
                totals = [[local(lanes, "int32") for _ in range(vectors + self._extra)] for _ in range(high)]
                for total in totals:
                    for v, part in enumerate(total):
                        first = load(starts[v], 0, lanes) if v < vectors else constant(0, "int32", lanes)
                        store(part, first, 0, lanes)
                offsets = [r * self.left[-1] for r in range(high)]
                rows = Rows(frame["left"], place.left + row * self.left[-1], offsets)
                accumulate(self.multiply, totals, rows, weight, [(self.depth, 1, 1)])
                at = [place.result + (row + r) * self.result[-1] + column for r in range(high)]
                target = Result(at, [row + r for r in range(high)], column, columns, place.bases)
                finish(frame, self.multiply, self.epilogue, [self._without_rows(t, vectors) for t in totals], target)

    def _begin(self, starts: Sequence[Any]) -> None:
        """From the sums of columns to what the sums of products begin with."""
        lanes, (a, b) = self.multiply.lanes, self._zeros
        for start in starts:
            value = constant(self.depth * a * b, "int32", lanes) - load(start, 0, lanes) * constant(a, "int32", lanes)
            store(start, value if a else constant(0, "int32", lanes), 0, lanes)

    def _without_rows(self, total: Sequence[Any], vectors: int) -> Sequence[Any]:
        """Sums of products without the zero point of B times the sum of a row, which stands in the last vector."""
        lanes = self.multiply.lanes
        if self._extra:
            taken = bind(load(total[-1], 0, lanes) * constant(self._zeros[1], "int32", lanes))
            for part in total[:vectors]:
                store(part, load(part, 0, lanes) - taken, 0, lanes)
        return total[:vectors]

    def _pack_summed(self, frame: Frame, start: Any, columns: int, sums: Sequence[Any]) -> None:
        """Copy a panel [groups, width, word], and add up its columns."""
        for part in sums:
            store(part, constant(0, "int32", self.multiply.lanes), 0, self.multiply.lanes)
        if self.multiply.group == 1:
            self._pack_bytes(frame, start, columns, sums)
            return
        step = 1 if self.right[-1] == 1 else self.multiply.lanes  # groups that are packed together
        whole, rest = divmod(self.depth, step * _WORD)

        def some(group: Any, length: int) -> None:
            for v in range(len(sums)):
                count = min(self.multiply.lanes, columns - v * self.multiply.lanes)
                read = self._across if self.right[-1] == 1 else self._along
                for i, words in enumerate(read(frame, start, group * _WORD, length, v, count)):
                    self._put(frame, group + i, v, words, length - i * _WORD, sums)
            for i in range(-(-length // _WORD) if self._extra else 0):
                self._put_ones(frame, group + i, len(sums), length - i * _WORD)

        if whole:
            with loop(whole) as i:
                some(bind(i * step), step * _WORD)
        if rest:
            some(whole * step, rest)

    def _pack_bytes(self, frame: Frame, start: Any, columns: int, sums: Sequence[Any]) -> None:
        """See `_pack_summed`, where an instruction takes one byte of a column."""
        lanes, dtype = self.multiply.lanes, self.dtypes[1]
        with loop(self.depth) as k:
            at = bind(k * ((len(sums) + self._extra) * lanes))
            for v in range(len(sums)):
                count = min(lanes, columns - v * lanes)
                value = load_first(frame["right"], start + k * self.right[-2] + v * lanes, lanes, count, dtype)
                if dtype == "uint8":
                    value = tirx.bitwise_xor(value, constant(_FLIP, "uint8", lanes))
                weight = bind(reinterpret(value, "int8", lanes))
                store(frame["scratch"], weight, at + v * lanes, lanes)
                self._add_up(sums[v], weight)
            if self._extra:
                store(frame["scratch"], constant(1, "int8", lanes), at + len(sums) * lanes, lanes)

    def _across(self, frame: Frame, start: Any, k: Any, length: int, vector: int, count: int) -> list[Any]:
        """A group of rows of B, whose columns follow one another: words of columns."""
        lanes, dtype = self.multiply.lanes, self.dtypes[1]
        first = bind(start + k * self.right[-2] + vector * lanes)
        rows = [
            bind(load_first(frame["right"], first + i * self.right[-2], lanes, count, dtype))
            if i < length
            else constant(0, dtype, lanes)
            for i in range(_WORD)
        ]
        places = [row * lanes + column for column in range(lanes) for row in range(_WORD)]
        return [bind(reinterpret(tirx.Shuffle(rows, places), "int32", lanes))]

    def _along(self, frame: Frame, start: Any, k: Any, length: int, vector: int, count: int) -> list[Any]:
        """Groups of rows of B, whose rows follow one another in each column: words are transposed in registers."""
        lanes, dtype = self.multiply.lanes, self.dtypes[1]
        first = bind(start + vector * lanes * self.right[-1] + k)
        size = lanes * _WORD
        columns = [
            bind(
                reinterpret(load_first(frame["right"], first + i * self.right[-1], size, length, dtype), "int32", lanes)
            )
            if i < count
            else constant(0, "int32", lanes)
            for i in range(lanes)
        ]
        return transposed(columns, lanes)[: -(-length // _WORD)]

    def _put(self, frame: Frame, group: Any, vector: int, words: Any, length: int, sums: Sequence[Any]) -> None:
        lanes = self.multiply.lanes
        if self.dtypes[1] == "uint8":
            words = tirx.bitwise_xor(words, constant(_of_bytes(0x80, length), "int32", lanes))
        weight = bind(self._arranged(reinterpret(words, "int8", lanes * _WORD)))
        width = (len(sums) + self._extra) * lanes
        store(frame["scratch"], weight, (group * width + vector * lanes) * _WORD, lanes * _WORD)
        self._add_up(sums[vector], weight)

    def _add_up(self, total: Any, weight: Any) -> None:
        """Add a packed vector to the sums of its columns, if they are needed."""
        instruction, lanes = self.multiply.instruction, self.multiply.lanes
        if self._zeros[0] and instruction:
            kind = "int8" if instruction.signed else "uint8"
            ones = self.multiply.ready(constant(1, kind, lanes * self.multiply.group))
            store(total, self.multiply.add(load(total, 0, lanes), ones, instruction.weight(weight)), 0, lanes)

    def _put_ones(self, frame: Frame, group: Any, vectors: int, length: int) -> None:
        lanes = self.multiply.lanes
        ones = reinterpret(constant(_of_bytes(1, length), "int32", lanes), "int8", lanes * _WORD)
        at = (group * (vectors + self._extra) + vectors) * lanes * _WORD
        store(frame["scratch"], self._arranged(ones), at, lanes * _WORD)

    def _arranged(self, weight: Any) -> Any:
        """Bytes of a vector in the order in which registers hold them."""
        size = self.multiply.lanes * _WORD
        order = self.multiply.arranged(np.arange(size).reshape(1, 1, self.multiply.lanes, _WORD)).reshape(-1)
        return weight if (order == np.arange(size)).all() else tirx.Shuffle([weight], [int(i) for i in order])


def _of_bytes(value: int, count: int) -> int:
    """The first bytes of a word, as a signed number."""
    word = sum(value << (8 * i) for i in range(min(count, _WORD)))
    return word - (1 << 32) if word >= 1 << 31 else word
