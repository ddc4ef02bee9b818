"""Products of two activations, many at once: attention scores and what they weigh."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from graphopt.targets import Isa
from graphopt_backends.kernels.emit import (
    Frame,
    Pointer,
    bind,
    constant,
    either,
    load,
    load_first,
    loop,
    primitive,
    reach,
    share,
    splits,
    store,
    tirx,
)
from graphopt_backends.kernels.epilogue import PLAIN, Epilogue, Result, begin, finish
from graphopt_backends.kernels.kernel import Kernel
from graphopt_backends.kernels.multiply import Multiply, Stored
from graphopt_backends.kernels.tile import Panel, Rows, accumulate, tile_of

__all__ = ["Batched", "Place", "begin_of", "transposed"]


@dataclass(frozen=True)
class Batched(Kernel):
    """C[b] = epilogue(A[b] B[b]) in float32, on views.

    Attributes:
        isa: The CPU.
        batch: Sizes of the axes before the matrices.
        rows: Rows of A and C.
        columns: Columns of B and C.
        depth: Columns of A, rows of B.
        left: Strides of A: each axis of the batch, then rows; its columns follow one another.
        right: Strides of B: each axis of the batch, then rows, then columns; one of the last two is 1.
        result: Strides of C: each axis of the batch, then rows; its columns follow one another.
        epilogue: What happens to the sums.
        operands: Strides of each operand of the epilogue along the axes of the batch.
        stored: What B is stored as; where it is no float32, its rows are whole vectors.
    """

    isa: Isa
    batch: tuple[int, ...]
    rows: int
    columns: int
    depth: int
    left: tuple[int, ...]
    right: tuple[int, ...]
    result: tuple[int, ...]
    epilogue: Epilogue = PLAIN
    operands: tuple[tuple[int, ...], ...] = ()
    stored: Stored = "float32"

    @cached_property
    def multiply(self) -> Multiply:
        """Its inner loop."""
        return Multiply(self.isa, "f32", self.stored)

    @cached_property
    def tile(self) -> tuple[int, int]:
        """Rows and vectors of a register tile."""
        return tile_of(self.multiply, self.rows, -(-self.columns // self.multiply.lanes))

    @property
    def _width(self) -> int:
        return self.tile[1] * self.multiply.lanes

    @property
    def _panels(self) -> int:
        return -(-self.columns // self._width)

    @property
    def _packs(self) -> bool:
        """Panels of B are copied to where whole vectors of columns can be read."""
        return self.stored == "float32" and (self.right[-1] != 1 or self.columns % self.multiply.lanes != 0)

    @property
    def _packed_depth(self) -> int:
        lanes = self.multiply.lanes
        return -(-self.depth // lanes) * lanes

    @property
    def scratch(self) -> int:
        """Bytes of memory that every task needs for itself."""
        return 4 * self._packed_depth * self._width if self._packs else 0

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * math.prod(self.batch) * self.rows * self.columns * self.depth

    def primitive(self, name: str) -> Any:
        """The function: (left, right, operands..., result, scratch?, task, tasks)."""
        pointers = [
            Pointer("left", "float32", reach((*self.batch, self.rows), self.left) + self.depth),
            Pointer("right", self.multiply.weight, reach((*self.batch, self.depth, self.columns), self.right) + 1),
            *self.epilogue.pointers(self.multiply, self.rows, self.columns, 0),
            Pointer("result", self.epilogue.dtype, reach((*self.batch, self.rows), self.result) + self.columns),
        ]
        if self._packs:
            pointers.append(Pointer("scratch", "float32", self.scratch // 4))
        return primitive(name, pointers, self._body)

    def _body(self, frame: Frame) -> None:
        with share(frame, math.prod(self.batch) * self._panels) as (unit, _):
            number = bind(tirx.truncdiv(unit, self._panels))
            panel = bind(tirx.truncmod(unit, self._panels))
            sides = (self.left, self.right, self.result, *self.operands)
            left, right, result, *bases = (bind(begin_of(self.batch, number, strides)) for strides in sides)
            place = Place(left, right, result, bases)
            whole, rest = divmod(self.columns, self._width)
            if not rest or not whole:
                self._panel(frame, place, panel, rest or self._width)
            else:
                either(
                    panel < whole,
                    lambda: self._panel(frame, place, panel, self._width),
                    lambda: self._panel(frame, place, panel, rest),
                )

    def _panel(self, frame: Frame, place: Place, panel: Any, columns: int) -> None:
        vectors, column = -(-columns // self.multiply.lanes), bind(panel * self._width)
        if self._packs:
            self._pack(frame, bind(place.right + column * self.right[-1]), columns)
            weight = Panel(frame["scratch"], 0, self._width)
        else:
            weight = Panel(frame["right"], place.right + column, self.right[-2])
        for start, count, high in splits(self.rows, self.tile[0]):
            with loop(count) as i:
                row = bind(start + i * high)
                totals = begin(frame, self.multiply, self.epilogue, high, vectors, column)
                offsets = [r * self.left[-1] for r in range(high)]
                source = Rows(frame["left"], place.left + row * self.left[-1], offsets)
                accumulate(self.multiply, totals, source, weight, [(self.depth, 1, 1)])
                at = [place.result + (row + r) * self.result[-1] + column for r in range(high)]
                rows = [row + r for r in range(high)]
                finish(frame, self.multiply, self.epilogue, totals, Result(at, rows, column, columns, place.bases))

    def _pack(self, frame: Frame, start: Any, columns: int) -> None:
        """Copy a panel [depth, width]; where B lies along k, blocks of it are transposed in registers."""
        lanes, source, target = self.multiply.lanes, frame["right"], frame["scratch"]
        vectors = -(-columns // lanes)
        if self.right[-1] == 1:
            with loop(self.depth) as k:
                for v in range(vectors):
                    count = min(lanes, columns - v * lanes)
                    value = load_first(source, start + k * self.right[-2] + v * lanes, lanes, count, "float32")
                    store(target, value, k * self._width + v * lanes, lanes)
            return
        whole, rest = divmod(self.depth, lanes)
        for v in range(vectors):
            count = min(lanes, columns - v * lanes)

            def block(k: Any, length: int, v: int = v, count: int = count) -> None:
                first = start + (v * lanes) * self.right[-1] + k * self.right[-2]
                rows = [
                    bind(load_first(source, first + i * self.right[-1], lanes, length, "float32"))
                    if i < count
                    else constant(0, "float32", lanes)
                    for i in range(lanes)
                ]
                for i, vector in enumerate(transposed(rows, lanes)[:length]):
                    store(target, vector, (k + i) * self._width + v * lanes, lanes)

            if self.right[-2] != 1:
                self._gather(frame, start, v, count)
                continue
            if whole:
                with loop(whole) as i:
                    block(i * lanes, lanes)
            if rest:
                block(whole * lanes, rest)

    def _gather(self, frame: Frame, start: Any, vector: int, count: int) -> None:
        """Copy a vector of columns that lie anywhere, element by element."""
        lanes = self.multiply.lanes
        with loop(self.depth) as k:
            for i in range(count):
                at = start + k * self.right[-2] + (vector * lanes + i) * self.right[-1]
                store(frame["scratch"], load(frame["right"], at, 1), k * self._width + vector * lanes + i, 1)


@dataclass(frozen=True)
class Place:
    """Where the matrices of one product begin.

    Attributes:
        left: A.
        right: B.
        result: C.
        bases: Each operand of the epilogue.
    """

    left: Any
    right: Any
    result: Any
    bases: Sequence[Any]


def begin_of(batch: Sequence[int], number: Any, strides: Sequence[int]) -> Any:
    """Where the matrices with a number begin.

    Args:
        batch: Sizes of the axes before the matrices.
        number: Counts along all of them.
        strides: Along each of them; further ones do not count.
    """
    start: Any = tirx.const(0, "int32")
    for axis in reversed(range(len(batch))):
        if batch[axis] > 1:
            index = tirx.truncmod(number, batch[axis]) if axis else number
            start = start + index * strides[axis]
            number = tirx.truncdiv(number, batch[axis])
    return start


def transposed(rows: Sequence[Any], lanes: int) -> list[Any]:
    """Exchange rows and lanes of `lanes` vectors: blocks of half the size change places, then of a quarter, and on."""
    found, half = list(rows), lanes // 2
    while half:
        low = [i if not i & half else lanes + i - half for i in range(lanes)]
        high = [i + half if not i & half else lanes + i for i in range(lanes)]
        for i in range(lanes):
            if not i & half:
                pair = [found[i], found[i + half]]
                found[i], found[i + half] = bind(tirx.Shuffle(pair, low)), bind(tirx.Shuffle(pair, high))
        half //= 2
    return found
