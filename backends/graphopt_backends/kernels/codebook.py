"""Products with weights that are codes: places in tables of few numbers, which all columns or some of them share.

Vectors lie along k, so that a register of codes belongs to one column, and is looked up in one table, whichever that
is. Sums of a column are added up at the end. The packed codes are one stream of registers: for each panel of columns
as many as a vector has lanes, for each strip of some of them, for each turn along k, a register of every column.

    rows    inner loop
    few     codes are decoded right before they are multiplied
    more    the same for every tile of rows where one instruction decodes; else strips are decoded into scratch memory
            first, which also pays for many rows, as long as the first cache holds a strip
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from graphopt.targets import Isa
from graphopt_backends.kernels.emit import (
    Frame,
    Pointer,
    T,
    add_to,
    bind,
    constant,
    either,
    load,
    load_first,
    local,
    loop,
    place_of,
    prefetch,
    primitive,
    share_pairs,
    store,
    tirx,
)  # fmt: skip
from graphopt_backends.kernels.epilogue import PLAIN, Epilogue, Result, begin, finish
from graphopt_backends.kernels.gemm import pack_columns
from graphopt_backends.kernels.kernel import Kernel
from graphopt_backends.kernels.multiply import Multiply
from graphopt_backends.kernels.tables import Tables, tables_of
from graphopt_backends.kernels.tile import Tiles

__all__ = ["Codebook"]

_AHEAD_WORDS = 4096  # how far in front of what is read the stream of codes is fetched
_LINE_WORDS = 16
_STRIP = 4  # columns
_MANY_ROWS = 32
_UNROLLED = 4  # vectors along k of decoded strips


@dataclass(frozen=True)
class Codebook(Kernel):
    """C = epilogue(A W) with W[k, n] = tables[n / span][codes[k, n]].

    Attributes:
        isa: The CPU.
        rows: Rows of A and C.
        columns: Columns of W and C.
        depth: Columns of A, rows of W.
        entries: Numbers of a table, 64 at most.
        span: Neighbouring columns that share a table; the last ones may be fewer.
        epilogue: What happens to the sums.
        source_pitch: Elements from row to row of A; 0: `depth`.
        result_pitch: Elements from row to row of C; 0: `columns`.
    """

    isa: Isa
    rows: int
    columns: int
    depth: int
    entries: int
    span: int
    epilogue: Epilogue = PLAIN
    source_pitch: int = 0
    result_pitch: int = 0

    @property
    def is_known(self) -> bool:
        """This CPU has instructions for it."""
        return tables_of(self.isa, self.entries) is not None

    @cached_property
    def _tables(self) -> Tables:
        found = tables_of(self.isa, self.entries)
        assert found is not None
        return found

    @cached_property
    def _multiply(self) -> Multiply:
        return Multiply(self.isa, "f32")

    @property
    def _lanes(self) -> int:
        return self._multiply.lanes

    @property
    def _fused_rows(self) -> int:
        """Rows whose sums fit the registers next to tables and codes."""
        return 4 if self._lanes > 2 * _STRIP else 2

    @cached_property
    def _decodes_strips(self) -> bool:
        """Strips are decoded before they are multiplied with rows."""
        if self.rows <= self._fused_rows:
            return False
        return self._tables.steps > 1 or (
            self.rows >= _MANY_ROWS and 4 * _STRIP * self.depth <= self.isa.level1_bytes // 2
        )

    @cached_property
    def tile(self) -> tuple[int, int]:
        """Rows of a tile, and columns of a strip: one row wants many sums at once, which wait for each other."""
        if self.rows == 1 and self._lanes > 2 * _STRIP:
            return 1, 2 * _STRIP
        most = self._fused_rows
        if self._decodes_strips:
            most = 3 if self.isa.registers == 16 else 4 if self.isa.lane_operands else 6
        return -(-self.rows // -(-self.rows // most)), _STRIP

    @property
    def _panels(self) -> int:
        return -(-self.columns // self._lanes)

    @property
    def _strips(self) -> int:
        """Strips of a panel."""
        return self._lanes // self.tile[1]

    @property
    def _turns(self) -> int:
        """Registers of codes of a column."""
        return -(-self.depth // self._tables.codes)

    @property
    def _strip_words(self) -> int:
        return self._turns * self.tile[1] * self._lanes

    @property
    def _vectors(self) -> int:
        """Vectors of activations of a row; the last one may be filled in part."""
        return -(-self.depth // self._lanes)

    @property
    def _pitch(self) -> int:
        return self.source_pitch or self.depth

    @cached_property
    def _tiles(self) -> Tiles:
        return Tiles(self.rows, self.tile[0])

    @cached_property
    def _part(self) -> int:
        """Tiles of a part of the rows, whose activations stay in the cache."""
        fit = self.isa.level2_bytes // 2 // (4 * self.tile[0] * self.depth)
        return max(1, min(fit, self._tiles.count))

    @property
    def _decoded_at(self) -> int:
        """Words of scratch memory in front of the decoded strip: sums of a panel."""
        return self._part * self.tile[0] * self._lanes

    @property
    def _decoded_pitch(self) -> int:
        """Words from decoded column to column, which do not fight for places in the cache."""
        return (self._vectors | 1) * self._lanes

    @property
    def scratch(self) -> int:
        """Bytes of memory that every task needs for itself."""
        return 4 * (self._decoded_at + (self.tile[1] * self._decoded_pitch if self._decodes_strips else 0))

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.columns * self.depth

    def pack(self, codes: np.ndarray) -> np.ndarray:
        """Lay out codes [depth, columns] as this kernel reads them: int32 [panels, strips, turns, strip, lanes]."""
        strip, register = self.tile[1], self._tables.codes
        padded = np.zeros((self._panels * self._lanes, self._turns * register), np.uint8)
        padded[: self.columns, : self.depth] = codes.T
        words = self._tables.words(padded.reshape(self._panels, self._strips, strip, self._turns, register))
        return np.ascontiguousarray(words.swapaxes(2, 3))

    def pack_tables(self, tables: np.ndarray) -> np.ndarray:
        """Lay out tables [number, entries]; all numbers are finite."""
        filled = np.zeros((len(tables), self._tables.entries), np.float32)
        filled[:, : tables.shape[1]] = tables
        return self._tables.pack(filled)

    def pack_column(self, values: np.ndarray) -> np.ndarray:
        """Lay out numbers for each column."""
        return pack_columns(values, self._panels * self._lanes)

    def primitive(self, name: str) -> Any:
        """The function: (source, codes, tables, bias?, operands..., result, scratch, task, tasks)."""
        pitch, padded = self.result_pitch or self.columns, self._panels * self._lanes
        pointers = [
            Pointer("source", "float32", (self.rows - 1) * self._pitch + self.depth),
            Pointer("codes", "int32", self._panels * self._strips * self._strip_words),
            Pointer("tables", "int32", -(-self.columns // self.span) * self._tables.size),
            *self.epilogue.pointers(self._multiply, self.rows, self.columns, padded),
            Pointer("result", self.epilogue.dtype, (self.rows - 1) * pitch + self.columns),
            Pointer("scratch", "float32", self.scratch // 4),
        ]
        return primitive(name, pointers, self._body)

    def _body(self, frame: Frame) -> None:
        """Parts of the rows, panels, strips, tiles; sums of a panel are put aside until all of its strips are done."""
        with share_pairs(frame, -(-self._tiles.count // self._part), self._panels) as (part, first, last):
            tile = bind(part * self._part)
            end = bind(tirx.min(tile + self._part, self._tiles.count))
            row = bind(self._tiles.start(tile))
            with T.serial(first, last) as panel:
                with loop(self._strips) as strip:
                    self._add_strip(frame, panel, strip, (tile, end), row)
                with T.serial(tile, end) as index:
                    self._tiles.visit(index, lambda at, rows: self._finish(frame, at, at - row, rows, panel))

    def _add_strip(self, frame: Frame, panel: Any, strip: Any, tiles: tuple[Any, Any], row: Any) -> None:
        words = place_of((panel * self._strips + strip) * self._strip_words)
        column = bind(panel * self._lanes + strip * self.tile[1])
        tables = self._held(frame, column)
        if self._decodes_strips:
            self._decode(frame, words, tables)
        with T.serial(*tiles) as index:

            def add(at: Any, rows: int) -> None:
                starts = [place_of((at + r) * self._pitch) for r in range(rows)]
                totals = [[local(self._lanes, "float32") for _ in range(self.tile[1])] for _ in range(rows)]
                for total in (total for sums in totals for total in sums):
                    store(total, constant(0, "float32", self._lanes), 0, self._lanes)
                if self._decodes_strips:
                    self._add_decoded(frame, totals, starts)
                else:
                    self._add_codes(frame, totals, starts, words, tables)
                for r, sums in enumerate(totals):
                    vectors = [bind(load(total, 0, self._lanes)) for total in sums]
                    found = tirx.Shuffle([_added(vectors, self._lanes)], list(range(self.tile[1])))
                    to = (at - row + r) * self._lanes + strip * self.tile[1]
                    store(frame["scratch"], found, to, self.tile[1])

            self._tiles.visit(index, add)

    def _held(self, frame: Frame, column: Any) -> Sequence[Sequence[Any]]:
        """The tables of a strip's columns."""
        last, strip = -(-self.columns // self.span) - 1, self.tile[1]

        def table(place: Any) -> Sequence[Any]:
            number = tirx.min(tirx.truncdiv(place, self.span), last) if last else 0
            return self._tables.held(frame["tables"], place_of(number * self._tables.size))

        if not last or self.span % strip == 0:
            return [table(column)] * strip
        return [table(column + c) for c in range(strip)]

    def _each_turn(self, body: Callable[[Any, int, bool], None]) -> None:
        """Emit code for registers of codes: `body(turn, vectors, all activations are there)`."""
        whole = self.depth // self._tables.codes
        if whole:
            with loop(whole) as turn:
                body(turn, self._tables.codes // self._lanes, True)
        if whole < self._turns:
            body(whole, self._vectors - whole * self._tables.codes // self._lanes, self.depth % self._lanes == 0)

    def _codes(self, frame: Frame, words: Any, turn: Any) -> list[Any]:
        """A register of codes of each column of a strip."""
        strip, lanes = self.tile[1], self._lanes
        start = words + turn * (strip * lanes)
        if self._ahead:
            for word in range(0, strip * lanes, _LINE_WORDS):
                prefetch(frame["codes"], start + _AHEAD_WORDS + word)
        return [bind(load(frame["codes"], start + c * lanes, lanes)) for c in range(strip)]

    @property
    def _ahead(self) -> bool:
        """Codes are fetched early: they do not stay in the cache, and the CPU is not ARM's."""
        bytes_of = 4 * self._panels * self._strips * self._strip_words
        return not self.isa.lane_operands and bytes_of > self.isa.level2_bytes // 2

    def _activations(self, frame: Frame, start: Any, first: Any, vector: int, whole: bool) -> Any:
        """A vector of a row's activations, zeros behind the last one."""
        count = self._lanes if whole else (self.depth - 1) % self._lanes + 1
        return bind(load_first(frame["source"], start + first + vector * self._lanes, self._lanes, count, "float32"))

    def _add_codes(
        self, frame: Frame, totals: Sequence[Sequence[Any]], starts: Sequence[Any], words: Any, tables: Sequence[Any]
    ) -> None:
        """Add products with codes, decoded here."""
        together, lanes = self._tables.together, self._lanes

        def turn_of(turn: Any, vectors: int, whole: bool) -> None:
            codes, first = self._codes(frame, words, turn), place_of(turn * self._tables.codes)
            for group in range(-(-vectors // together)):
                these = range(group * together, min(vectors, (group + 1) * together))
                activations = [
                    [self._activations(frame, start, first, v, whole or v < vectors - 1) for v in these]
                    for start in starts
                ]
                for c, (word, table) in enumerate(zip(codes, tables, strict=True)):
                    weights = self._tables.decoded(word, table, group)[: len(these)]
                    for row, sums in zip(activations, totals, strict=True):
                        for activation, weight in zip(row, weights, strict=True):
                            add_to(sums[c], activation * weight, lanes)

        self._each_turn(turn_of)

    def _decode(self, frame: Frame, words: Any, tables: Sequence[Any]) -> None:
        """Put the columns of a strip into scratch memory."""
        together, lanes = self._tables.together, self._lanes

        def turn_of(turn: Any, vectors: int, _: bool) -> None:
            codes = self._codes(frame, words, turn)
            for c, (word, table) in enumerate(zip(codes, tables, strict=True)):
                at = place_of(self._decoded_at + c * self._decoded_pitch + turn * self._tables.codes)
                for group in range(-(-vectors // together)):
                    found = self._tables.decoded(word, table, group)
                    for v, weight in enumerate(found[: vectors - group * together], group * together):
                        store(frame["scratch"], weight, at + v * lanes, lanes)

        self._each_turn(turn_of)

    def _add_decoded(self, frame: Frame, totals: Sequence[Sequence[Any]], starts: Sequence[Any]) -> None:
        """Add products with a decoded strip."""
        lanes, rest = self._lanes, self.depth % self._lanes

        def step(first: Any, v: int, whole: bool) -> None:
            weights = [
                bind(load(frame["scratch"], self._decoded_at + c * self._decoded_pitch + first + v * lanes, lanes))
                for c in range(self.tile[1])
            ]
            for start, sums in zip(starts, totals, strict=True):
                activation = self._activations(frame, start, first, v, whole)
                for total, weight in zip(sums, weights, strict=True):
                    add_to(total, activation * weight, lanes)

        turns, more = divmod(self.depth // lanes, _UNROLLED)
        if turns:
            with loop(turns) as turn:
                first = place_of(turn * (_UNROLLED * lanes))
                for v in range(_UNROLLED):
                    step(first, v, whole=True)
        for v in range(more + bool(rest)):
            step(turns * _UNROLLED * lanes, v, whole=v < more)

    def _finish(self, frame: Frame, row: Any, number: Any, rows: int, panel: Any) -> None:
        """The last panel may have fewer columns; it is computed whole and stored in part."""
        whole, rest = divmod(self.columns, self._lanes)
        column, pitch = bind(panel * self._lanes), self.result_pitch or self.columns
        totals = begin(frame, self._multiply, self.epilogue, rows, 1, column)
        for r, (total,) in enumerate(totals):
            add_to(total, load(frame["scratch"], (number + r) * self._lanes, self._lanes), self._lanes)
        places = [(row + r) * pitch + column for r in range(rows)]

        def put(columns: int) -> None:
            finish(frame, self._multiply, self.epilogue, totals,
                   Result(places, [row + r for r in range(rows)], column, columns))  # fmt: skip

        if not rest or not whole:
            put(rest or self._lanes)
        else:
            either(panel < whole, lambda: put(self._lanes), lambda: put(rest))


def _added(vectors: Sequence[Any], lanes: int) -> Any:
    """A vector that begins with the sum of all lanes of each vector; they are a power of two, at most the lanes.

    Neighbours are added, of two vectors at once: what comes out keeps their order.
    """
    found = list(vectors)
    neighbours = [list(range(first, 2 * lanes, 2)) for first in range(2)]
    for _ in range(lanes.bit_length() - 1):
        pairs = [found[i : i + 2] if len(found) > 1 else [found[0]] * 2 for i in range(0, len(found), 2)]
        found = [bind(tirx.Shuffle(pair, neighbours[0]) + tirx.Shuffle(pair, neighbours[1])) for pair in pairs]
    return found[0]
