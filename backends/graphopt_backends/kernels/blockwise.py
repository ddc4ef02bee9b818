"""Products with weights of 4 bits: blocks of a column share a scale, and are decoded in registers.

A weight is (code - 8) * scale + shift, or table[code] * scale, where scale and shift belong to a block of consecutive
k of a column. The packed weight is one stream of 32-bit words: for each panel of columns and block along k, the words
of codes, the scales, and the shifts if there are any. What is done with it depends on the activations:

    activations   rows    inner loop
    float         few     sums of a block are made of bare codes, then scaled: memory decides
    float         many    a decoded and scaled vector of weights serves all rows
    int8          any     blocks of activations are rounded to int8 first; dot products of bytes, then scaled

A word holds eight codes of a column. For floats they stand in order; the decoders are a table in a register where one
instruction looks sixteen numbers up, else two shifts and a conversion. For bytes, the lower halves of the four bytes
are the first four codes and the upper halves the next four, so that a mask gives a group that dot products take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from graphopt.targets import Isa
from graphopt_backends.kernels.emit import (
    Frame,
    Pointer,
    T,
    bind,
    cast,
    constant,
    either,
    intrinsic,
    lane,
    load,
    local,
    loop,
    prefetch,
    primitive,
    reinterpret,
    share_pairs,
    splits,
    spread,
    start_of,
    store,
    tirx,
)  # fmt: skip
from graphopt_backends.kernels.epilogue import PLAIN, Epilogue, Result, Tile, begin, finish
from graphopt_backends.kernels.gemm import pack_columns, pack_matrix
from graphopt_backends.kernels.multiply import Multiply
from graphopt_backends.kernels.tile import SET_BYTES

__all__ = ["CODES", "MIDDLE", "Activations", "Blockwise"]

Activations = Literal["float32", "int8"]
"""What activations are multiplied as."""

CODES = 8
"""Codes of a word; the depth of a block is a multiple of it, and of what is read of activations at once."""

MIDDLE = 8
"""The code of zero."""

_STEP = 16  # elements along k that one turn of a loop takes
_FEW_ROWS = 4
_STRIPS = 8
_LEAST_SCALE = 1e-30
_LINE_WORDS = 16
_AHEAD_WORDS = 4096  # how far in front of what is read the stream of weights is fetched


@dataclass(frozen=True)
class Blockwise:
    """C = epilogue(A W) with W in blocks of 4-bit codes.

    Attributes:
        isa: The CPU.
        activations: What A is multiplied as; float32 numbers are what it holds.
        rows: Rows of A and C.
        columns: Columns of W and C.
        depth: Columns of A, rows of W.
        block: Consecutive k that share a scale, a multiple of 16; the last block of a column may have fewer.
        shifted: Blocks have a shift as well.
        table: What the sixteen codes stand for; empty: code - 8.
        epilogue: What happens to the sums.
        source_pitch: Elements from row to row of A; 0: `depth`.
        result_pitch: Elements from row to row of C; 0: `columns`.
    """

    isa: Isa
    activations: Activations
    rows: int
    columns: int
    depth: int
    block: int
    shifted: bool = False
    table: tuple[float, ...] = ()
    epilogue: Epilogue = PLAIN
    source_pitch: int = 0
    result_pitch: int = 0

    @cached_property
    def multiply(self) -> Multiply:
        """Vectors of the sums."""
        return Multiply(self.isa, "f32")

    @cached_property
    def dot(self) -> Multiply:
        """Products of codes and rounded activations; whichever has no sign stands where the CPU wants it."""
        isa = replace(self.isa, dot="sdot") if self.isa.dot == "i8mm" else self.isa
        return Multiply(isa, "s8s8-narrow" if isa.lane_operands else "u8s8-narrow")

    @property
    def is_known(self) -> bool:
        """This CPU has instructions for it."""
        if self.activations == "float32":
            return not self.table or self.isa.vector_bits >= 256
        return not self.table and self.dot.group == 4

    @cached_property
    def tile(self) -> tuple[int, int]:
        """Rows and vectors of a register tile: wide strips for few rows, else many rows, which decoded weights serve.

        Two vectors halve the loads of activations, where these are loads and registers are many.
        """
        vectors = -(-self.columns // self.multiply.lanes)
        if self.rows < _FEW_ROWS:
            strips = _STRIPS // 2 if self.isa.lane_operands else _STRIPS  # more make LLVM spill decoded weights
            most = min(strips, vectors, self._most_sums // self.rows)
            return self.rows, -(-vectors // -(-vectors // max(1, most)))
        wide = min(vectors, 2) if self.isa.registers > 16 and not self.isa.lane_operands else 1
        return -(-self.rows // -(-self.rows // (self._most_sums // wide))), wide

    @property
    def _most_sums(self) -> int:
        """Sums that fit the registers next to what is multiplied."""
        free = self.isa.registers - (8 if self.isa.registers > 16 else 5) - (2 if self.table else 0)
        # sums of a block beside those of all blocks; activations where lanes of registers are multiplied
        return max(1, free // (1 + self._scales_sums + self.isa.lane_operands))

    @property
    def _scales_sums(self) -> bool:
        """Sums of a block are scaled, not weights."""
        return self.activations == "int8" or self.rows < _FEW_ROWS

    @property
    def width(self) -> int:
        """Columns of a panel of the packed weight."""
        return self.tile[1] * self.multiply.lanes

    @property
    def panels(self) -> int:
        """Panels of the packed weight."""
        return -(-self.columns // self.width)

    @property
    def blocks(self) -> int:
        """Blocks of a column."""
        return -(-self.depth // self.block)

    @property
    def _words(self) -> int:
        """Words of a block of a panel."""
        return (self.block // CODES + 1 + self.shifted) * self.width

    @property
    def _pitch(self) -> int:
        return self.source_pitch or self.depth

    @property
    def _sums_needed(self) -> bool:
        """Shifts are multiplied with the sums of a block of activations."""
        return self.shifted and self._scales_sums

    @property
    def _copies(self) -> bool:
        fight = self.rows > 1 and 4 * self._pitch % SET_BYTES == 0  # for places in the cache
        return self.activations == "int8" or self._sums_needed or self.depth % self.block != 0 or fight

    @property
    def _row_words(self) -> int:
        """Words of scratch memory for a row: its activations, and for every block scale, correction and sum."""
        size = self._facts + 3 * self.blocks
        return size if 4 * size % SET_BYTES else size + self.multiply.lanes

    @cached_property
    def _tiles(self) -> tuple[tuple[int, int, int], ...]:
        return splits(self.rows, self.tile[0])

    @cached_property
    def _tile_count(self) -> int:
        return sum(tiles[1] for tiles in self._tiles)

    @cached_property
    def _part(self) -> int:
        """Tiles of a part of the rows, whose prepared activations stay in the cache."""
        fit = self.isa.level2_bytes // 2 // (4 * self.tile[0] * (self._row_words if self._copies else self.depth))
        return max(1, min(fit, self._tile_count))

    @cached_property
    def _ahead(self) -> int:
        """Words in front of what is read that are fetched: none where the weight stays in the cache."""
        return _AHEAD_WORDS if 4 * self.panels * self.blocks * self._words > self.isa.level2_bytes // 2 else 0

    @property
    def scratch(self) -> int:
        """Bytes of memory that every task needs for itself."""
        return 4 * self._part * self.tile[0] * self._row_words if self._copies else 0

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.columns * self.depth

    def pack(self, codes: np.ndarray, scales: np.ndarray, shifts: np.ndarray | None = None) -> np.ndarray:
        """Lay out a weight as this kernel reads it: int32 [panels, blocks, words, width].

        Args:
            codes: 0 to 15, [depth, columns].
            scales: [blocks, columns].
            shifts: What is added to the weights of a block, [blocks, columns]; of `shifted` kernels.
        """
        padded = np.full((self.blocks * self.block, self.columns), MIDDLE, np.uint8)
        padded[: self.depth] = codes
        words = self._code_words(padded).reshape(self.panels, self.blocks, self.block // CODES, self.width)
        numbers = [scales] if shifts is None else [scales, shifts]
        parts = [pack_matrix(part.astype(np.float32), self.width, 1).reshape(self.panels, self.blocks, 1, self.width)
                 for part in numbers]  # fmt: skip
        return np.concatenate([words, *(part.view(np.int32) for part in parts)], axis=2)

    def _code_words(self, codes: np.ndarray) -> np.ndarray:
        if self.activations == "int8":
            groups = self.dot.arranged(pack_matrix(codes.astype(np.int8), self.width, 4)).astype(np.uint8)
            pairs = groups.reshape(self.panels, -1, 2, self.width * 4)
            return np.ascontiguousarray(pairs[:, :, 0] | (pairs[:, :, 1] << 4)).view(np.int32)
        if not self._looks_up:
            codes = codes ^ MIDDLE  # which makes them signed numbers of 4 bits
        groups = pack_matrix(codes, self.width, CODES).astype(np.uint32)
        places = np.arange(0, 32, 4, dtype=np.uint32)
        return np.bitwise_or.reduce(groups << places, axis=-1).view(np.int32)

    def pack_column(self, values: np.ndarray) -> np.ndarray:
        """Lay out numbers for each column."""
        return pack_columns(values, self.panels * self.width)

    def primitive(self, name: str) -> Any:
        """The function: (source, weight, bias?, operands..., result, scratch?, task, tasks)."""
        pitch = self.result_pitch or self.columns
        pointers = [
            Pointer("source", "float32", (self.rows - 1) * self._pitch + self.depth),
            Pointer("weight", "int32", self.panels * self.blocks * self._words),
            *self.epilogue.pointers(self.multiply, self.rows, self.columns, self.panels * self.width),
            Pointer("result", self.epilogue.dtype, (self.rows - 1) * pitch + self.columns),
        ]
        if self._copies:
            pointers.append(Pointer("scratch", self._prepared, self.scratch // 4))
        return primitive(name, pointers, self._body)

    @property
    def _prepared(self) -> str:
        return "int32" if self.activations == "int8" else "float32"

    def _body(self, frame: Frame) -> None:
        """Parts of the rows, panels, tiles; activations of a part are prepared once."""
        with share_pairs(frame, -(-self._tile_count // self._part), self.panels) as (part, first, last):
            tile = bind(part * self._part)
            end = bind(tirx.min(tile + self._part, self._tile_count))
            row = bind(start_of(self._tiles, tile))
            if self._copies:
                with T.serial(0, start_of(self._tiles, end) - row) as r:
                    self._prepare(frame, bind((row + r) * self._pitch), bind(r * self._row_words))
            with T.serial(first, last) as panel, T.serial(tile, end) as index:
                self._each_height(frame, index, row, panel)

    def _each_height(self, frame: Frame, index: Any, first_row: Any, panel: Any) -> None:
        row = bind(start_of(self._tiles, index))
        if len(self._tiles) == 1:
            self._columns(frame, row, row - first_row, self._tiles[0][2], panel)
        else:
            (_, count, high), (_, _, low) = self._tiles
            either(
                index < count,
                lambda: self._columns(frame, row, row - first_row, high, panel),
                lambda: self._columns(frame, row, row - first_row, low, panel),
            )

    def _columns(self, frame: Frame, row: Any, number: Any, rows: int, panel: Any) -> None:
        """The last panel may have fewer columns; it is computed whole and stored in part."""
        whole, rest = divmod(self.columns, self.width)
        column = bind(panel * self.width)
        lanes, vectors = self.multiply.lanes, self.tile[1]
        totals = begin(frame, self.multiply, self.epilogue, rows, vectors, column)
        source = self._source(frame, row, number, rows)
        with loop(self.blocks) as block:
            at = _place((panel * self.blocks + block) * self._words)
            record = _Record(frame["weight"], at, self.width, self.block // CODES * self.width, self._ahead)
            if self.activations == "int8":
                self._add_dots(totals, source, record, block)
            elif self._scales_sums:
                self._add_sums(totals, source, record, block)
            else:
                self._add_products(totals, source, record, block)
        pitch = self.result_pitch or self.columns
        places = [(row + r) * pitch + column for r in range(rows)]

        def put(columns: int) -> None:
            shown = [total[: -(-columns // lanes)] for total in totals]
            finish(frame, self.multiply, self.epilogue, shown,
                   Result(places, [row + r for r in range(rows)], column, columns))  # fmt: skip

        if not rest or not whole:
            put(rest or self.width)
        else:
            either(panel < whole, lambda: put(self.width), lambda: put(rest))

    def _source(self, frame: Frame, row: Any, number: Any, rows: int) -> _Source:
        if self._copies:
            start = _place(number * self._row_words)
            return _Source(frame["scratch"], [start + r * self._row_words for r in range(rows)])
        start = _place(row * self._pitch)
        return _Source(frame["source"], [start + r * self._pitch for r in range(rows)])

    @property
    def _facts(self) -> int:
        """Where, behind a row's prepared activations, the scales of its blocks are; corrections and sums follow."""
        size = self.blocks * self.block
        return size // 4 if self.activations == "int8" else size

    def _prepare(self, frame: Frame, source: Any, target: Any) -> None:
        """Copy a row into scratch memory, zeros behind it, with what is known of each block."""
        whole, rest = divmod(self.depth, self.block)
        if whole:
            with loop(whole) as block:
                self._prepare_block(frame, source, target, block, self.block)
        if rest:
            self._prepare_block(frame, source, target, whole, rest)

    def _prepare_block(self, frame: Frame, source: Any, target: Any, block: Any, count: int) -> None:
        if self.activations == "int8":
            self._round(frame, bind(source + block * self.block), target, block, count)
            return
        lanes = self.multiply.lanes
        to, scratch = bind(target + block * self.block), frame["scratch"]
        total = local(lanes, "float32")
        store(total, constant(0, "float32", lanes), 0, lanes)
        for first in range(0, self.block, lanes):
            value = self._activation(frame, source + block * self.block, first, count)
            store(scratch, value, to + first, lanes)
            store(total, load(total, 0, lanes) + value, 0, lanes)
        if self._sums_needed:
            place = target + self._facts + 2 * self.blocks + block
            store(scratch, _added(load(total, 0, lanes), lanes), place, 1)

    def _activation(self, frame: Frame, start: Any, first: int, count: int) -> Any:
        """A vector of a row's block, of which `count` elements are there; zeros stand for the rest."""
        lanes = self.multiply.lanes
        there = max(0, min(lanes, count - first))
        if there == lanes:
            return bind(load(frame["source"], start + first, lanes))
        zero = tirx.const(0.0, "float32")
        values = [frame["source"][(start + first + i,)] if i < there else zero for i in range(lanes)]
        return bind(tirx.Shuffle(values, list(range(lanes))))

    def _round(self, frame: Frame, source: Any, target: Any, block: Any, count: int) -> None:
        """Round a block of a row to int8, so that the largest is 127 steps; codes of zero are taken into account."""
        lanes, scratch, facts = self.multiply.lanes, frame["scratch"], bind(target + self._facts + block)
        most, total = local(lanes, "float32"), local(lanes, "int32")
        store(most, constant(0, "float32", lanes), 0, lanes)
        store(total, constant(0, "int32", lanes), 0, lanes)
        vectors = range(0, self.block, lanes)
        for first in vectors:
            size = tirx.abs(self._activation(frame, source, first, count))
            store(most, tirx.max(load(most, 0, lanes), size), 0, lanes)
        largest = bind(intrinsic(f"llvm.vector.reduce.fmax.v{lanes}f32", "float32", 1, load(most, 0, lanes)))
        steps = bind(tirx.const(127.0, "float32") / tirx.max(largest, tirx.const(_LEAST_SCALE, "float32")))
        for first in vectors:
            value = self._activation(frame, source, first, count) * spread(steps, lanes)
            whole = bind(intrinsic(f"llvm.lrint.v{lanes}i32.v{lanes}f32", "int32", lanes, value))
            words = reinterpret(cast(whole, "int8", lanes), "int32", lanes // 4)
            store(scratch, words, target + (block * self.block + first) // 4, lanes // 4)
            store(total, load(total, 0, lanes) + whole, 0, lanes)
        scale = bind(largest / tirx.const(127.0, "float32"))
        sums = bind(intrinsic(f"llvm.vector.reduce.add.v{lanes}i32", "int32", 1, load(total, 0, lanes)))
        store(scratch, reinterpret(scale, "int32", 1), facts, 1)
        store(scratch, sums * tirx.const(-MIDDLE, "int32"), facts + self.blocks, 1)
        if self.shifted:
            store(scratch, reinterpret(scale * cast(sums, "float32", 1), "int32", 1), facts + 2 * self.blocks, 1)

    def _add_dots(self, totals: Tile, source: _Source, record: _Record, block: Any) -> None:
        """Add a block's sums of products of bytes, scaled."""
        lanes, rows, vectors = self.multiply.lanes, len(totals), len(totals[0])
        at, fact = _place(block), self._facts
        facts = [start + at + fact for start in source.starts]
        sums = [[local(lanes, "int32") for _ in range(vectors)] for _ in range(rows)]
        for row, fact in zip(sums, facts, strict=True):
            first = bind(spread(source.buffer[(fact + self.blocks,)], lanes))
            for total in row:
                store(total, first, 0, lanes)
        mask, nibble = constant(0x0F0F0F0F, "int32", lanes), constant(4, "int32", lanes)
        with loop(self.block // _STEP) as turn:
            record.fetch(turn * 2, 2)
            word = _place(block * (self.block // 4) + turn * (_STEP // 4))
            words = [start + word for start in source.starts]
            loaded = [self._quad(source.buffer, word) for word in words]
            for half in range(2):
                packed = [bind(record.codes(turn * 2 + half, v, lanes)) for v in range(vectors)]
                for upper in range(2):
                    parts = [word >> nibble if upper else word for word in packed]
                    codes = [reinterpret(part & mask, "int8", 4 * lanes) for part in parts]
                    self._add_group(sums, loaded, 2 * half + upper, [bind(code) for code in codes])
        scales = [record.scales(v, lanes) for v in range(vectors)]
        shifts = [record.shifts(v, lanes) for v in range(vectors)] if self.shifted else []
        for r, (row, fact) in enumerate(zip(sums, facts, strict=True)):
            own = bind(spread(reinterpret(source.buffer[(fact,)], "float32", 1), lanes))
            for v, total in enumerate(row):
                value = cast(load(total, 0, lanes), "float32", lanes)
                _add(totals[r][v], value * bind(scales[v] * own), lanes)
            if self.shifted:
                self._add_shifts(totals[r], source, fact, shifts)

    def _add_shifts(self, totals: Sequence[Any], source: _Source, fact: Any, shifts: Sequence[Any]) -> None:
        lanes, value = self.multiply.lanes, source.buffer[(fact + 2 * self.blocks,)]
        sums = bind(spread(reinterpret(value, "float32", 1) if self.activations == "int8" else value, lanes))
        for total, shift in zip(totals, shifts, strict=True):
            _add(total, sums * shift, lanes)

    def _quad(self, buffer: Any, word: Any) -> Callable[[int], Any]:
        """Four groups of a row's bytes, each in all lanes."""
        lanes = self.multiply.lanes
        if self.isa.lane_operands:
            words = bind(load(buffer, word, 4))
            return lambda i: reinterpret(spread(lane(words, i), lanes), "int8", 4 * lanes)
        return lambda i: bind(reinterpret(spread(buffer[(word + i,)], lanes), "int8", 4 * lanes))

    def _add_group(self, sums: Tile, loaded: Sequence[Callable[[int], Any]], group: int, codes: Sequence[Any]) -> None:
        lanes, instruction = self.multiply.lanes, self.dot.instruction
        assert instruction is not None
        weights = [instruction.weight(code) if instruction.signed else code for code in codes]
        for row, fetch in zip(sums, loaded, strict=True):
            activation = instruction.activation(fetch(group)) if instruction.signed else [fetch(group)]
            for total, weight in zip(row, weights, strict=True):
                # where one operand has no sign, codes are that one
                pair = (activation, weight) if instruction.signed else ([weight], activation)
                store(total, instruction.add(load(total, 0, lanes), *pair), 0, lanes)

    def _add_sums(self, totals: Tile, source: _Source, record: _Record, block: Any) -> None:
        """Add a block's sums of products with bare codes, scaled."""
        lanes, vectors = self.multiply.lanes, len(totals[0])
        sums = [[local(lanes, "float32") for _ in range(vectors)] for _ in totals]
        for total in (total for row in sums for total in row):
            store(total, constant(0, "float32", lanes), 0, lanes)
        with loop(self.block // CODES) as turn:
            record.fetch(turn, 1)
            k = _place(block * self.block + turn * CODES)
            for v in range(vectors):
                word = bind(record.codes(turn, v, lanes))
                for i in range(CODES):
                    weight = bind(self._decoded(word, i))
                    for row, start in zip(sums, source.starts, strict=True):
                        _add(row[v], spread(source.buffer[(start + k + i,)], lanes) * weight, lanes)
        scales = [record.scales(v, lanes) for v in range(vectors)]
        for row, into, start in zip(sums, totals, source.starts, strict=True):
            for total, inner, scale in zip(into, row, scales, strict=True):
                _add(total, load(inner, 0, lanes) * scale, lanes)
            if self.shifted:
                shifts = [record.shifts(v, lanes) for v in range(vectors)]
                self._add_shifts(into, source, start + _place(block) + self._facts, shifts)

    def _add_products(self, totals: Tile, source: _Source, record: _Record, block: Any) -> None:
        """Add a block's products with scaled weights, each of which serves all rows."""
        lanes, vectors = self.multiply.lanes, len(totals[0])
        scales = [record.scales(v, lanes) for v in range(vectors)]
        shifts = [record.shifts(v, lanes) for v in range(vectors)] if self.shifted else []
        with loop(self.block // CODES) as turn:
            record.fetch(turn, 1)
            k = _place(block * self.block + turn * CODES)
            words = [bind(record.codes(turn, v, lanes)) for v in range(vectors)]
            for half in range(2):
                loaded = [self._four(source.buffer, start + k + 4 * half) for start in source.starts]
                for i in range(4):
                    weights = [self._decoded(word, 4 * half + i) * scale
                               for word, scale in zip(words, scales, strict=True)]  # fmt: skip
                    if shifts:
                        weights = [weight + shift for weight, shift in zip(weights, shifts, strict=True)]
                    weights = [bind(weight) for weight in weights]
                    for row, fetch in zip(totals, loaded, strict=True):
                        activation = fetch(i)
                        for total, weight in zip(row, weights, strict=True):
                            _add(total, activation * weight, lanes)

    def _four(self, buffer: Any, index: Any) -> Callable[[int], Any]:
        """Four of a row's activations, each in all lanes."""
        lanes = self.multiply.lanes
        if self.isa.lane_operands:
            vector = bind(load(buffer, index, 4))
            return lambda i: spread(lane(vector, i), lanes)
        return lambda i: bind(spread(buffer[(index + i,)], lanes))

    @property
    def _looks_up(self) -> bool:
        """Codes are places in a table."""
        return bool(self.table) or self.isa.vector_bits == 512

    def _decoded(self, word: Any, i: int) -> Any:
        """What the codes at one place of a vector of words stand for."""
        lanes = self.multiply.lanes

        def number(value: int) -> Any:
            return constant(value, "int32", lanes)

        if not self._looks_up:
            upmost = word << number(28 - 4 * i) if i < CODES - 1 else word
            return cast(upmost >> number(28), "float32", lanes)
        table = self.table or tuple(float(code - MIDDLE) for code in range(16))
        places = bind(word >> number(4 * i)) if i else word
        if lanes == 16:
            return intrinsic("llvm.x86.avx512.permvar.sf.512", "float32", lanes, _vector_of(table), places)
        lower, upper = (
            intrinsic("llvm.x86.avx2.permps", "float32", lanes, _vector_of(half), places)
            for half in (table[:8], table[8:])
        )
        return tirx.Select((places & number(8)) != number(0), bind(upper), bind(lower))


@dataclass(frozen=True)
class _Source:
    """Activations of a tile: where each row begins."""

    buffer: Any
    starts: Sequence[Any]


@dataclass(frozen=True)
class _Record:
    """A block of a panel of packed weights.

    Attributes:
        buffer: All of them.
        start: Its first word.
        width: Columns.
        size: Words of codes.
        ahead: How far in front of what is read words are fetched; 0: they are not.
    """

    buffer: Any
    start: Any
    width: int
    size: int
    ahead: int

    def fetch(self, turn: Any, turns: int) -> None:
        """Let words come that are as many as those of some turns."""
        if self.ahead:
            start = self.start + turn * self.width + self.ahead
            for word in range(0, turns * self.width, _LINE_WORDS):
                prefetch(self.buffer, start + word)

    def codes(self, turn: Any, vector: int, lanes: int) -> Any:
        """Words of eight codes."""
        return load(self.buffer, self.start + turn * self.width + vector * lanes, lanes)

    def scales(self, vector: int, lanes: int) -> Any:
        """Scales of the columns."""
        words = load(self.buffer, self.start + self.size + vector * lanes, lanes)
        return bind(reinterpret(words, "float32", lanes))

    def shifts(self, vector: int, lanes: int) -> Any:
        """What is added to the weights of the columns."""
        words = load(self.buffer, self.start + self.size + self.width + vector * lanes, lanes)
        return bind(reinterpret(words, "float32", lanes))


def _place(index: Any) -> Any:
    """A place that constants are added to: where it has all bits of an address, they become parts of instructions."""
    return bind(cast(index, "int64", 1))


def _add(total: Any, value: Any, lanes: int) -> None:
    store(total, load(total, 0, lanes) + value, 0, lanes)


def _added(vector: Any, lanes: int) -> Any:
    """The sum of all lanes."""
    total: Any = tirx.const(0.0, "float32")
    vector = bind(vector)
    for i in range(lanes):
        total = total + lane(vector, i)
    return total


def _vector_of(values: Sequence[float]) -> Any:
    return tirx.Shuffle([tirx.const(value, "float32") for value in values], list(range(len(values))))
