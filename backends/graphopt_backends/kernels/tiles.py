"""Products of bytes by AMX: instructions that multiply whole tiles, 16 rows of 64 bytes by 64 bytes of 16 columns.

A task tells the CPU once how large its tiles are: all of the same height, and of the same length along k. Where rows or
k do not divide evenly, the last tile begins so much earlier that it ends with them: rows are computed twice, and
weights of elements that were multiplied before are zero. So nothing is read behind the matrices, and nothing is copied.

Two tiles of rows meet two of columns, whose four tiles of sums stay in registers along k. The sums begin as the bias,
which is one row repeated (a tile loaded without a stride), and go through a few kilobytes of the first cache into
vectors, where the epilogue takes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from graphopt.targets import Isa
from graphopt_backends.kernels.emit import (
    Frame,
    Pointer,
    T,
    bind,
    either,
    load,
    local,
    loop,
    primitive,
    share_pairs,
    store,
    tirx,
)  # fmt: skip
from graphopt_backends.kernels.epilogue import PLAIN, Epilogue, Result, finish
from graphopt_backends.kernels.gemm import pack_columns, pack_matrix
from graphopt_backends.kernels.multiply import Kind, Multiply

__all__ = ["TileGemm", "configuration", "tiles_pay"]

_MOST_ROWS = 16
_MOST_LENGTH = 64
_COLUMNS = 16
_GROUP = 4
_ROW_BYTES = 64
"""A packed tile of weights: a row has a group of elements along k of every column."""

_ACROSS = 2
"""Tiles of columns, and at most of rows, that are multiplied with each other."""

_SUMS, _LEFT, _RIGHT = 0, _ACROSS * _ACROSS, _ACROSS * _ACROSS + _ACROSS
"""The first tile registers of sums, activations and weights."""

_CONFIGURATION = 16
"""32-bit words that describe tiles to the CPU."""

_WIDTH = _ACROSS * _COLUMNS

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
    fits = depth >= _MOST_LENGTH or depth % _GROUP == 0
    filled = rows >= _LEAST_ROWS and columns >= _COLUMNS and depth >= _LEAST_DEPTH
    return isa.tiles and kind in _PRODUCTS and fits and filled


@dataclass(frozen=True)
class TileGemm:
    """C = epilogue(A W) on bytes; see `Gemm`, whose parameters its function has.

    Attributes:
        isa: The CPU, which has tiles.
        kind: Element types.
        rows: Rows of A and C.
        columns: Columns of W and C.
        depth: Columns of A, rows of W; whole groups, or more than a tile has.
        epilogue: What happens to the sums.
        source_pitch: Elements from row to row of A; 0: `depth`.
        result_pitch: Elements from row to row of C; 0: `columns`.
    """

    isa: Isa
    kind: Kind
    rows: int
    columns: int
    depth: int
    epilogue: Epilogue = PLAIN
    source_pitch: int = 0
    result_pitch: int = 0

    @cached_property
    def multiply(self) -> Multiply:
        """Types, and vectors of sums."""
        return Multiply(self.isa, self.kind)

    @cached_property
    def high(self) -> int:
        """Tiles of rows that are multiplied together."""
        return 1 if self.rows <= _MOST_ROWS else _ACROSS

    @cached_property
    def blocks(self) -> int:
        """How often that many cover the rows."""
        return -(-self.rows // (self.high * _MOST_ROWS))

    @cached_property
    def height(self) -> int:
        """Rows of a tile."""
        return -(-self.rows // (self.blocks * self.high))

    @cached_property
    def chunks(self) -> int:
        """Tiles along k."""
        return -(-self.depth // _MOST_LENGTH)

    @cached_property
    def length(self) -> int:
        """Elements of a tile along k."""
        return -(-self.depth // (self.chunks * _GROUP)) * _GROUP

    @property
    def panels(self) -> int:
        """Panels of columns, the last of which may have one tile."""
        return -(-self.columns // _WIDTH)

    @property
    def _padded(self) -> int:
        return -(-self.columns // _COLUMNS) * _COLUMNS

    @property
    def _pitch(self) -> int:
        return self.source_pitch or self.depth

    @property
    def _panel_bytes(self) -> int:
        """Bytes of the weights of a tile's columns."""
        return self.chunks * self.length * _COLUMNS

    @property
    def scratch(self) -> int:
        """Bytes of memory that every task needs for itself."""
        return 4 * (_CONFIGURATION + self.high * self.height * _WIDTH)

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.columns * self.depth

    @cached_property
    def _part(self) -> int:
        """Blocks of a part of the rows, which stays in the second cache while panels pass by."""
        fit = self.isa.level2_bytes // 2 // (self.high * self.height * self._pitch)
        for_all = -(-self.blocks * self.panels // (2 * self.isa.cores))
        return max(1, min(fit, for_all, self.blocks))

    def pack(self, weight: np.ndarray) -> np.ndarray:
        """Lay out a weight [depth, columns] as this kernel reads it."""
        parts = np.zeros((self.chunks, self.length, self.columns), np.int8)
        for chunk, part in enumerate(parts):
            fresh = weight[chunk * self.length : (chunk + 1) * self.length]
            part[self.length - len(fresh) :] = fresh
        return pack_matrix(parts.reshape(-1, self.columns), _COLUMNS, _GROUP)

    def pack_column(self, values: np.ndarray) -> np.ndarray:
        """Lay out numbers for each column."""
        return pack_columns(values, self._padded)

    def primitive(self, name: str) -> Any:
        """The function: (source, weight, bias?, operands..., result, scratch, task, tasks)."""
        pitch = self.result_pitch or self.columns
        pointers = [
            Pointer("source", self.multiply.activation, (self.rows - 1) * self._pitch + self.depth),
            Pointer("weight", "int8", self._padded // _COLUMNS * self._panel_bytes),
            *self.epilogue.pointers(self.multiply, self.rows, self.columns, self._padded),
            Pointer("result", self.epilogue.dtype, (self.rows - 1) * pitch + self.columns),
            Pointer("scratch", "int32", self.scratch // 4),
        ]
        return primitive(name, pointers, self._body)

    def _body(self, frame: Frame) -> None:
        """Parts of the rows, panels, blocks of rows: the weights of a panel stay in the first cache."""
        words = configuration(self.height, self.length)
        store(frame["scratch"], tirx.Shuffle([tirx.const(int(w), "int32") for w in words], list(range(16))), 0, 16)
        _tile("ldtilecfg", _at(frame["scratch"], 0))
        with share_pairs(frame, -(-self.blocks // self._part), self.panels) as (part, first, last):
            begin = bind(part * self._part)
            end = bind(tirx.min(begin + self._part, self.blocks))
            with T.serial(first, last) as panel, T.serial(begin, end) as block:
                self._columns(frame, block, panel)
        _tile("tilerelease")

    def _columns(self, frame: Frame, block: Any, panel: Any) -> None:
        """The last panel may have fewer columns."""
        whole, rest = divmod(self.columns, _WIDTH)
        if not rest or not whole:
            self._block(frame, block, panel, rest or _WIDTH)
        else:
            either(
                panel < whole,
                lambda: self._block(frame, block, panel, _WIDTH),
                lambda: self._block(frame, block, panel, rest),
            )

    def _row(self, tile: Any) -> Any:
        """The first row of a tile."""
        first = tile * self.height
        even = self.rows == self.blocks * self.high * self.height
        return first if even else tirx.min(first, self.rows - self.height)

    def _block(self, frame: Frame, block: Any, panel: Any, columns: int) -> None:
        wide, column = -(-columns // _COLUMNS), bind(panel * _WIDTH)
        sums = [[_SUMS + i * _ACROSS + j for j in range(wide)] for i in range(self.high)]
        for row in sums:
            for j, register in enumerate(row):
                if self.epilogue.bias:
                    _load(register, frame["bias"], column + j * _COLUMNS, 0)
                else:
                    _tile("tilezero", _register(register))
        rows = [bind(self._row(block * self.high + i) * self._pitch) for i in range(self.high)]
        weights = [bind((panel * _ACROSS + j) * self._panel_bytes) for j in range(wide)]
        with loop(self.chunks) as chunk:
            k = bind(tirx.min(chunk * self.length, self.depth - self.length)) if self.depth % self.length else chunk * self.length
            for i, row in enumerate(rows):
                _load(_LEFT + i, frame["source"], row + k, self._pitch)
            for j, weight in enumerate(weights):
                _load(_RIGHT + j, frame["weight"], weight + chunk * (self.length * _COLUMNS), _ROW_BYTES)
                for i in range(self.high):
                    _tile(_PRODUCTS[self.kind], *map(_register, (sums[i][j], _LEFT + i, _RIGHT + j)))
        for i, row in enumerate(sums):
            for j, register in enumerate(row):
                at = _CONFIGURATION + i * self.height * _WIDTH + j * _COLUMNS
                _tile("tilestored64", _register(register), _at(frame["scratch"], at), _stride(4 * _WIDTH))
        self._finish(frame, block, column, columns)

    def _finish(self, frame: Frame, block: Any, column: Any, columns: int) -> None:
        """Let the epilogue take the sums, row by row."""
        multiply, pitch = self.multiply, self.result_pitch or self.columns
        lanes = multiply.lanes
        with loop(self.high) as i:
            first = bind(self._row(block * self.high + i))
            with loop(self.height) as r:
                row, at = bind(first + r), bind(_CONFIGURATION + (i * self.height + r) * _WIDTH)
                totals = [local(lanes, "int32") for _ in range(-(-columns // lanes))]
                for v, total in enumerate(totals):
                    store(total, load(frame["scratch"], at + v * lanes, lanes), 0, lanes)
                result = Result([row * pitch + column], [row], column, columns)
                finish(frame, multiply, self.epilogue, [totals], result)


_PRODUCTS = {"u8s8": "tdpbusd", "s8s8": "tdpbssd"}


def configuration(height: int, length: int) -> np.ndarray:
    """What tells the CPU the sizes of its tiles, as 32-bit words.

    Args:
        height: Rows of activations, and of sums.
        length: Elements along k.
    """
    rows, row_bytes = np.zeros(16, np.uint8), np.zeros(16, np.uint16)
    rows[_SUMS:_LEFT], row_bytes[_SUMS:_LEFT] = height, 4 * _COLUMNS
    rows[_LEFT:_RIGHT], row_bytes[_LEFT:_RIGHT] = height, length
    rows[_RIGHT : _RIGHT + _ACROSS], row_bytes[_RIGHT : _RIGHT + _ACROSS] = length // _GROUP, _ROW_BYTES
    palette = np.zeros(16, np.uint8)
    palette[0] = 1
    return np.concatenate([part.view(np.int32) for part in (palette, row_bytes, rows)])


def _tile(name: str, *values: Any) -> None:
    """Emit one of the instructions."""
    T.evaluate(tirx.call_llvm_intrin("void", f"llvm.x86.{name}", *values))


def _register(number: int) -> Any:
    return tirx.const(number, "int8")


def _stride(size: int) -> Any:
    return tirx.const(size, "int64")


def _at(buffer: Any, index: Any) -> Any:
    return tirx.address_of(buffer[(index,)])


def _load(register: int, buffer: Any, index: Any, row_bytes: int) -> None:
    """Fill a tile from memory.

    Args:
        register: Which.
        buffer: What is there.
        index: Its first element.
        row_bytes: Bytes from row to row; 0 repeats one.
    """
    _tile("tileloadd64", _register(register), _at(buffer, index), _stride(row_bytes))
