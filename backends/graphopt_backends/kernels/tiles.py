"""Products of bytes by AMX: instructions that multiply whole tiles, 16 rows of 64 bytes by 64 bytes of 16 columns.

A task tells the CPU once how large its tiles are: all of the same height, and of the same length along k. Where rows or
k do not divide evenly, the last tile begins so much earlier that it ends with them: rows are computed twice, and
weights of elements that were multiplied before are zero. So nothing is read behind the matrices, and nothing is copied.

Two tiles of rows meet two of columns, whose four tiles of sums stay in registers along k. The sums begin as the bias,
which is one row repeated (a tile loaded without a stride), and go through a few kilobytes of the first cache into
vectors, where the epilogue takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from graphopt.targets import Isa
from graphopt_backends.kernels.emit import (
    Frame,
    T,
    bind,
    load,
    local,
    loop,
    prefetch,
    reinterpret,
    store,
    tirx,
)  # fmt: skip
from graphopt_backends.kernels.epilogue import Epilogue, Result, finish
from graphopt_backends.kernels.multiply import Kind, Multiply

__all__ = [
    "ACROSS", "COLUMNS", "CONFIGURATION_BYTES", "GROUP", "LINE_BYTES", "MOST_LENGTH", "MOST_ROWS", "WIDTH", "Block",
    "Chunks", "configured", "sixteenths", "tiles_pay",
]  # fmt: skip

MOST_ROWS = 16
"""Rows of a tile at most."""

MOST_LENGTH = 64
"""Elements of a tile along k at most."""

COLUMNS = 16
"""Columns of a tile of weights, and of sums."""

GROUP = 4
"""Elements along k that lie together: a row of a packed tile of weights has a group of every column."""

ACROSS = 2
"""Tiles of columns, and at most of rows, that are multiplied with each other."""

WIDTH = ACROSS * COLUMNS
"""Columns of a block."""

CONFIGURATION_BYTES = 64
"""What describes tiles, in scratch memory in front of their sums."""

LINE_BYTES = 64
"""What comes into a cache at once."""

_ROW_BYTES = 64
_SUMS, _LEFT, _RIGHT = 0, ACROSS * ACROSS, ACROSS * ACROSS + ACROSS
"""The first tile registers of sums, activations and weights."""

_PRODUCTS = {"u8s8": "tdpbusd", "s8s8": "tdpbssd"}

_LEAST_ROWS, _LEAST_DEPTH = 4, 48


def tiles_pay(isa: Isa, kind: Kind, rows: int, columns: int, depth: int) -> bool:
    """True if tiles multiply faster than vectors: enough of them is filled, and sums are worth their way to vectors.

    Args:
        isa: The CPU.
        kind: Element types.
        rows: Rows of the result, or pixels.
        columns: Columns of the result, or filters.
        depth: Elements that follow each other along k.
    """
    fits = depth >= MOST_LENGTH or depth % GROUP == 0
    filled = rows >= _LEAST_ROWS and columns >= COLUMNS and depth >= _LEAST_DEPTH
    return isa.tiles and kind in _PRODUCTS and fits and filled


@dataclass(frozen=True)
class Block:
    """Two tiles of rows, or one, by as many of columns; the code that multiplies them.

    Attributes:
        kind: Element types.
        high: Tiles of rows.
        height: Rows of a tile.
        length: Elements of a tile along k.
        columns: Columns, at most `WIDTH`.
    """

    kind: Kind
    high: int
    height: int
    length: int
    columns: int = WIDTH

    @property
    def wide(self) -> int:
        """Tiles of columns."""
        return -(-self.columns // COLUMNS)

    @property
    def weight_bytes(self) -> int:
        """Bytes of a packed tile of weights."""
        return self.length * COLUMNS

    @property
    def sum_bytes(self) -> int:
        """Bytes of scratch memory, through which sums go."""
        return 4 * self.high * self.height * WIDTH

    def _each_sum(self) -> Iterator[tuple[int, int, Any]]:
        """Row, column and register of every tile of sums."""
        for i in range(self.high):
            for j in range(self.wide):
                yield i, j, _register(_SUMS + i * ACROSS + j)

    def begin(self, bias: Any | None, column: Any) -> None:
        """Let sums begin as the bias from a column on, or as zero."""
        for _, j, register in self._each_sum():
            if bias is None:
                _tile("tilezero", register)
            else:
                _tile("tileloadd64", register, _at(bias, column + j * COLUMNS), _stride(0))

    def add(self, left: Any, rows: Sequence[Any], pitch: int, right: Any, weights: Sequence[Any]) -> None:
        """Add the products of one tile along k.

        Args:
            left: Activations.
            rows: The first element of each tile of them.
            pitch: Bytes from row to row.
            right: Packed weights.
            weights: The first element of each tile of them.
        """
        for i, row in enumerate(rows):
            _tile("tileloadd64", _register(_LEFT + i), _at(left, row), _stride(pitch))
        for j, weight in enumerate(weights):
            _tile("tileloadd64", _register(_RIGHT + j), _at(right, weight), _stride(_ROW_BYTES))
            self.multiply(j)

    def multiply(self, column: int) -> None:
        """Add the products of tiles in registers for one tile of columns."""
        for i in range(self.high):
            registers = _SUMS + i * ACROSS + column, _LEFT + i, _RIGHT + column
            _tile(_PRODUCTS[self.kind], *map(_register, registers))

    def fetch(self, right: Any, at: Any, lines: int) -> None:
        """Let some cache lines of weights come, which another block needs next."""
        for i in range(lines):
            prefetch(right, at + i * LINE_BYTES)

    def lines(self, turns: int) -> int:
        """Cache lines that come with every tile along k, so that a panel has come after some turns."""
        return -(-ACROSS * self.weight_bytes // (LINE_BYTES * turns))

    def put(self, scratch: Any, at: int) -> None:
        """Write the sums into scratch memory from a byte on, row by row of all tiles of columns."""
        for i, j, register in self._each_sum():
            place = at + 4 * (i * self.height * WIDTH + j * COLUMNS)
            _tile("tilestored64", register, _at(scratch, place), _stride(4 * WIDTH))

    def finish(
        self,
        frame: Frame,
        multiply: Multiply,
        epilogue: Epilogue,
        at: int,
        first: Callable[[Any], Any],
        pitch: int,
        column: Any,
    ) -> None:
        """Let the epilogue take the sums, row by row.

        Args:
            frame: Where everything is.
            multiply: Vectors of sums.
            epilogue: What is computed of them.
            at: Byte of the scratch memory where they are.
            first: Gives the number of a tile's first row in the result.
            pitch: Elements from row to row of the result.
            column: First column.
        """
        lanes = multiply.lanes
        with loop(self.high) as tile:
            start = bind(first(tile))
            with loop(self.height) as i:
                row, place = bind(start + i), bind(at + (tile * self.height + i) * (4 * WIDTH))
                totals = [local(lanes, "int32") for _ in range(-(-self.columns // lanes))]
                for v, total in enumerate(totals):
                    values = load(frame["scratch"], place + 4 * v * lanes, 4 * lanes)
                    store(total, reinterpret(values, "int32", lanes), 0, lanes)
                finish(frame, multiply, epilogue, [totals], Result([row * pitch + column], [row], column, self.columns))


@dataclass(frozen=True)
class Chunks:
    """Consecutive elements along k, cut into tiles of one length; the last begins so early that it ends with them.

    Attributes:
        run: How many elements; whole groups, or more than a tile has.
    """

    run: int

    @cached_property
    def count(self) -> int:
        """How many tiles there are."""
        return -(-self.run // MOST_LENGTH)

    @cached_property
    def length(self) -> int:
        """Elements of a tile."""
        return -(-self.run // (self.count * GROUP)) * GROUP

    def start(self, chunk: Any) -> Any:
        """The first element of a tile."""
        first = chunk * self.length
        return first if self.run % self.length == 0 else tirx.min(first, self.run - self.length)

    def cut(self, weight: np.ndarray) -> np.ndarray:
        """Weights [run, columns] of all tiles, below each other; zeros stand where two tiles meet the same elements."""
        parts = np.zeros((self.count, self.length, weight.shape[1]), weight.dtype)
        for chunk, part in enumerate(parts):
            fresh = weight[chunk * self.length : (chunk + 1) * self.length]
            part[self.length - len(fresh) :] = fresh
        return parts.reshape(-1, weight.shape[1])


def sixteenths(size: int) -> tuple[int, int]:
    """How many tiles of at most 16 rows cover some rows, and how high the lowest that do are."""
    count = -(-size // MOST_ROWS)
    return count, -(-size // count)


@contextmanager
def configured(block: Block, scratch: Any, at: int) -> Iterator[None]:
    """Tell the CPU the sizes of tiles, and give their registers back behind the code that uses them.

    Args:
        block: What has these sizes.
        scratch: Bytes of memory of this task.
        at: Where 64 of them are free.
    """
    rows, row_bytes, palette = np.zeros(16, np.uint8), np.zeros(16, np.uint16), np.zeros(16, np.uint8)
    palette[0] = 1
    rows[_SUMS:_RIGHT], row_bytes[_SUMS:_LEFT] = block.height, 4 * COLUMNS
    row_bytes[_LEFT:_RIGHT] = block.length
    rows[_RIGHT : _RIGHT + ACROSS], row_bytes[_RIGHT : _RIGHT + ACROSS] = block.length // GROUP, _ROW_BYTES
    values = np.concatenate([part.view(scratch.dtype) for part in (palette, row_bytes, rows)])
    words = [tirx.const(int(value), scratch.dtype) for value in values]
    store(scratch, tirx.Shuffle(words, list(range(len(words)))), at, len(words))
    _tile("ldtilecfg", _at(scratch, at))
    yield
    _tile("tilerelease")


def _tile(name: str, *values: Any) -> None:
    """Emit one of the instructions."""
    T.evaluate(tirx.call_llvm_intrin("void", f"llvm.x86.{name}", *values))


def _register(number: int) -> Any:
    return tirx.const(number, "int8")


def _stride(size: int) -> Any:
    return tirx.const(size, "int64")


def _at(buffer: Any, index: Any) -> Any:
    return tirx.address_of(buffer[(index,)])
