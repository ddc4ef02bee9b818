"""Products of a matrix with a packed weight: rows of activations times a constant, with an epilogue."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    constant,
    each_vector,
    either,
    load,
    load_first,
    loop,
    primitive,
    share_pairs,
    store,
    store_first,
    tirx,
    when,
)  # fmt: skip
from graphopt_backends.kernels.epilogue import PLAIN, Epilogue, Result, Tile, begin, finish
from graphopt_backends.kernels.kernel import Kernel
from graphopt_backends.kernels.multiply import Kind, Multiply, Stored
from graphopt_backends.kernels.tile import SET_BYTES, Panel, Rows, Tiles, accumulate, tile_of

__all__ = ["Gemm", "pack_columns", "pack_matrix"]

_LINE_BYTES = 64
_MOST_BLOCK_BYTES = 2048
_LEAST_BLOCK_BYTES = 1024
"""Lengths of the blocks along k: rows of a tile stay in the first cache, and sums are rarely put aside."""


@dataclass(frozen=True)
class Gemm(Kernel):
    """C = epilogue(A W).

    Attributes:
        isa: The CPU.
        kind: Element types.
        rows: Rows of A and C.
        columns: Columns of W and C.
        depth: Columns of A, rows of W.
        epilogue: What happens to the sums.
        source_pitch: Elements from row to row of A; 0: `depth`.
        result_pitch: Elements from row to row of C; 0: `columns`.
        stored: What weights are stored as, if they are floats.
    """

    isa: Isa
    kind: Kind
    rows: int
    columns: int
    depth: int
    epilogue: Epilogue = PLAIN
    source_pitch: int = 0
    result_pitch: int = 0
    stored: Stored = "float32"

    @cached_property
    def multiply(self) -> Multiply:
        """Its inner loop."""
        return Multiply(self.isa, self.kind, self.stored)

    @cached_property
    def tile(self) -> tuple[int, int]:
        """Rows and vectors of a register tile."""
        return tile_of(self.multiply, self.rows, -(-self.columns // self.multiply.lanes))

    @property
    def width(self) -> int:
        """Columns of a panel of the packed weight."""
        return self.tile[1] * self.multiply.lanes

    @property
    def panels(self) -> int:
        """Panels of the packed weight."""
        return -(-self.columns // self.width)

    @property
    def packed_depth(self) -> int:
        """Rows of the packed weight: whole groups."""
        group = self.multiply.group
        return -(-self.depth // group) * group

    @property
    def _pitch(self) -> int:
        return self.source_pitch or self.depth

    @property
    def _copies(self) -> bool:
        """Rows are copied to where they do not fight for places in the cache, or lie as an instruction takes them."""
        return self.rows > 1 and (self._in_bands or self._pitch * self.multiply.element_bytes % SET_BYTES == 0)

    @property
    def _in_bands(self) -> bool:
        return self.multiply.rows > 1

    @property
    def _copied_pitch(self) -> int:
        """Elements from copied row to row, off the places in the cache that they would fight for."""
        return self._block + _LINE_BYTES // self.multiply.element_bytes

    def _together(self, rows: int) -> int:
        """Rows of a tile as instructions take them."""
        return -(-rows // self.multiply.rows) * self.multiply.rows

    @property
    def _copied_tile(self) -> int:
        """Elements from copied tile to tile."""
        high = self.tile[0]
        return self._together(high) * self.packed_depth if self._in_bands else high * self._copied_pitch

    @property
    def scratch(self) -> int:
        """Bytes of memory that every task needs for itself."""
        return self._part * self._copied_tile * self.multiply.element_bytes if self._copies else 0

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.columns * self.depth

    def pack(self, weight: np.ndarray) -> np.ndarray:
        """Lay out a weight [depth, columns] as this kernel reads it."""
        return self.multiply.arranged(pack_matrix(weight, self.width, self.multiply.group))

    def pack_column(self, values: np.ndarray) -> np.ndarray:
        """Lay out numbers for each column."""
        return pack_columns(values, self.panels * self.width)

    def primitive(self, name: str) -> Any:
        """The function: (source, weight, bias?, operands..., result, scratch?, task, tasks)."""
        multiply, padded = self.multiply, self.panels * self.width
        pitch = self.result_pitch or self.columns
        pointers = [
            Pointer("source", multiply.activation, (self.rows - 1) * self._pitch + self.depth),
            Pointer("weight", multiply.weight, padded * self.packed_depth),
            *self.epilogue.pointers(multiply, self.rows, self.columns, padded),
            Pointer("result", self.epilogue.dtype, (self.rows - 1) * pitch + self.columns),
        ]
        if self._copies:
            pointers.append(Pointer("scratch", multiply.activation, self.scratch // self.multiply.element_bytes))
        return primitive(name, pointers, self._body)

    @cached_property
    def _tiles(self) -> Tiles:
        return Tiles(self.rows, self.tile[0])

    @cached_property
    def _weight_stays(self) -> bool:
        """The packed weight stays in the cache while rows pass by, or is read only once."""
        weight = self.panels * self.width * self.packed_depth * self.multiply.weight_bytes
        return weight <= self.isa.level2_bytes // 2 or self._tiles.count == 1

    @cached_property
    def _block(self) -> int:
        """Length of a block along k: a divisor of the depth, if there is a good one and sums fit into the result."""
        most, least = (size // self.multiply.element_bytes for size in (_MOST_BLOCK_BYTES, _LEAST_BLOCK_BYTES))
        if self._weight_stays or self._in_bands or self.depth <= most or self.epilogue.dtype != self.multiply.sum:
            return self.depth
        step = self.multiply.group * self.multiply.steps
        good = (size for size in range(most // step * step, least, -step) if self.depth % size == 0)
        return next(good, self.depth)

    @cached_property
    def _part(self) -> int:
        """Tiles of a part of the rows, which stays in the cache while panels pass by."""
        if self._weight_stays:
            return 1
        fit = self.isa.level2_bytes // 2 // (self.tile[0] * self._block * self.multiply.element_bytes)
        for_all = -(-self._tiles.count * self.panels // (2 * self.isa.cores))
        return max(1, min(fit, for_all, self._tiles.count))

    def _body(self, frame: Frame) -> None:
        """Parts of the rows, blocks along k, panels, tiles: what is read again and again stays in the cache."""
        blocks = self.depth // self._block
        with share_pairs(frame, -(-self._tiles.count // self._part), self.panels) as (part, first, last):
            tile = bind(part * self._part)
            start = bind(self._tiles.start(tile))
            with loop(blocks) as block:
                if self._copies:
                    self._copy(frame, tile, block)
                with T.serial(first, last) as panel:
                    below, beside = self._weights(first, block + 1), self._weights(panel + 1, block)
                    ahead = bind(tirx.Select(panel + 1 < last, beside, below)) if self._pace else 0

                    def multiplied(row: Any, rows: int, i: Any, panel: Any = panel, ahead: Any = ahead) -> None:
                        self._columns(frame, _Place(row, row - start, rows, i, panel, block, ahead))

                    self._each_tile(tile, multiplied)

    @property
    def _pace(self) -> int:
        """Weights of the next panel that are fetched for each k; ARM CPUs see by themselves what comes next."""
        return 0 if self._weight_stays or self.isa.lane_operands else -(-self.width // self._part)

    def _weights(self, panel: Any, block: Any) -> Any:
        """The first weight of a panel's block."""
        return (panel * self.packed_depth + block * self._block) * self.width

    def _each_tile(self, first: Any, body: Callable[[Any, int, Any], None]) -> None:
        """Emit code for the tiles of a part: `body(first row, rows, number in the part)`."""
        last = bind(tirx.min(first + self._part, self._tiles.count))
        with T.serial(first, last) if self._part > 1 else loop(1, first) as tile:
            number = tile - first if self._part > 1 else 0
            self._tiles.visit(tile, lambda row, rows: body(row, rows, number))

    def _copy(self, frame: Frame, tile: Any, block: Any) -> None:
        """Copy the rows of a part, which begins with a tile, into this task's scratch memory."""
        if self._in_bands:
            self._each_tile(tile, lambda row, rows, i: self._bring_together(frame, row, rows, i))
            return
        lanes = self.isa.vector_bits // (8 * self.multiply.element_bytes)
        first = bind(self._tiles.start(tile))
        last = self._tiles.start(tirx.min(tile + self._part, self._tiles.count))
        with T.serial(0, last - first) as row:
            source = bind((first + row) * self._pitch + block * self._block)
            target = bind(row * self._copied_pitch)
            each_vector(
                self._block,
                lanes,
                lambda i, n: store(frame["scratch"], load(frame["source"], source + i, n), target + i, n),
            )

    def _bring_together(self, frame: Frame, row: Any, rows: int, number: Any) -> None:
        """Copy a tile so that a group of each row follows that of the row before; zeros stand for what is not there."""
        group, together, dtype = self.multiply.group, self._together(rows), self.multiply.activation
        whole, rest = divmod(self.depth, group)
        for r in range(together):
            source = (row + r) * self._pitch
            target = number * self._copied_tile + r * group

            def move(i: Any, count: int, source: Any = source, target: Any = target, there: bool = r < rows) -> None:
                value = constant(0, dtype, group)
                if there:
                    value = load_first(frame["source"], source + i * group, group, count, dtype)
                store(frame["scratch"], value, target + i * (together * group), group)

            if whole:
                with loop(whole) as i:
                    move(i, group)
            if rest:
                move(whole, rest)

    def _columns(self, frame: Frame, place: _Place) -> None:
        """The last panel may have fewer columns."""
        whole, rest = divmod(self.columns, self.width)
        if not rest or not whole:
            self._tile(frame, place, rest or self.width)
        else:
            either(
                place.panel < whole,
                lambda: self._tile(frame, place, self.width),
                lambda: self._tile(frame, place, rest),
            )

    def _tile(self, frame: Frame, place: _Place, columns: int) -> None:
        multiply, pitch = self.multiply, self.result_pitch or self.columns
        rows, row, column = place.rows, place.row, bind(place.panel * self.width)
        totals = begin(frame, multiply, self.epilogue, rows, -(-columns // multiply.lanes), column)
        result = Result(
            [(row + r) * pitch + column for r in range(rows)], [row + r for r in range(rows)], column, columns
        )
        blocks = self.depth // self._block
        if blocks > 1:
            when(place.block > 0, lambda: _resume(frame, multiply, totals, result))
        if self._copies and self._in_bands:
            together, size = self._together(rows), multiply.rows * multiply.group
            offsets = list(range(0, together * multiply.group, size))
            source = Rows(frame["scratch"], bind(place.number * self._copied_tile), offsets, together)
        elif self._copies:
            offsets = [r * self._copied_pitch for r in range(rows)]
            source = Rows(frame["scratch"], bind(place.before * self._copied_pitch), offsets)
        else:
            start = bind(row * self._pitch + place.block * self._block)
            source = Rows(frame["source"], start, [r * self._pitch for r in range(rows)])
        ahead = bind(place.ahead + place.number * (self._block * self._pace)) if self._pace else 0
        weights = bind(self._weights(place.panel, place.block))
        panel = Panel(frame["weight"], weights, self.width, ahead, self._pace)
        length = self.packed_depth if source.together else self._block
        accumulate(multiply, totals, source, panel, [(length, 1, 1)])
        if blocks == 1:
            finish(frame, multiply, self.epilogue, totals, result)
        else:
            either(
                place.block < blocks - 1,
                lambda: _put_aside(frame, multiply, totals, result),
                lambda: finish(frame, multiply, self.epilogue, totals, result),
            )


@dataclass(frozen=True)
class _Place:
    """Where a tile lies.

    Attributes:
        row: Its first row.
        before: Rows of its part before it.
        rows: How many rows it has.
        number: Which tile of its part it is.
        panel: Its panel of columns.
        block: Its block along k.
        ahead: Weights that are needed when all tiles of the part are done.
    """

    row: Any
    before: Any
    rows: int
    number: Any
    panel: Any
    block: Any
    ahead: Any


def _resume(frame: Frame, multiply: Multiply, totals: Tile, result: Result) -> None:
    """Go on with sums that were put aside."""
    for at, row in zip(result.at, totals, strict=True):
        for first, count, total in _vectors(multiply, row, result.columns):
            store(
                total, load_first(frame["result"], at + first, multiply.lanes, count, multiply.sum), 0, multiply.lanes
            )


def _put_aside(frame: Frame, multiply: Multiply, totals: Tile, result: Result) -> None:
    """Leave sums where the result will be until the next block along k."""
    for at, row in zip(result.at, totals, strict=True):
        for first, count, total in _vectors(multiply, row, result.columns):
            store_first(frame["result"], load(total, 0, multiply.lanes), at + first, multiply.lanes, count)


def _vectors(multiply: Multiply, row: Sequence[Any], columns: int) -> Iterator[tuple[int, int, Any]]:
    """First column, number of columns and accumulator of each vector of a row."""
    for i, total in enumerate(row):
        yield i * multiply.lanes, min(multiply.lanes, columns - i * multiply.lanes), total


def pack_matrix(weight: np.ndarray, width: int, group: int) -> np.ndarray:
    """Lay out a matrix in panels of `width` columns: [panels, depth / group, width, group], zeros where it ends."""
    depth, columns = weight.shape
    panels, groups = -(-columns // width), -(-depth // group)
    padded = np.zeros((groups * group, panels * width), weight.dtype)
    padded[:depth, :columns] = weight
    return np.ascontiguousarray(padded.reshape(groups, group, panels, width).transpose(2, 0, 3, 1))


def pack_columns(values: np.ndarray, padded: int) -> np.ndarray:
    """Numbers for each column, zeros behind them."""
    found = np.zeros(padded, values.dtype)
    found[: values.size] = values.reshape(-1)
    return found
