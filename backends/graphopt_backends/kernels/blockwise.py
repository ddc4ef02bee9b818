"""Products with weights of 4 bits: blocks of a column share a scale, and are decoded in registers.

A weight is (code - 8) * scale + shift, where scale and shift belong to a block of consecutive k of a column. The packed
weight is one stream of 32-bit words: for each panel of columns and block along k, the words of codes, the scales, and
the shifts if there are any. What is done with it depends on the activations:

    activations   rows    inner loop
    float         few     sums of a block are made of bare codes, then scaled: memory decides
    float         more    a decoded and scaled vector of weights serves all rows of a tile
    float         many    panels are decoded into scratch memory, and then multiplied as any others
    int8          any     blocks of activations are rounded to int8 first; dot products of bytes, then scaled
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
    lane,
    load,
    local,
    loop,
    place_of,
    primitive,
    reinterpret,
    share_pairs,
    spread,
    store,
    tirx,
)  # fmt: skip
from graphopt_backends.kernels.epilogue import PLAIN, Epilogue, Result, Tile, begin, finish
from graphopt_backends.kernels.gemm import pack_columns, pack_matrix
from graphopt_backends.kernels.kernel import Kernel
from graphopt_backends.kernels.multiply import Multiply
from graphopt_backends.kernels.nibbles import CODES, Decoder, Halves, Record
from graphopt_backends.kernels.prepared import (
    LOWER,
    MIDDLE,
    MOST_ROUNDED,
    STEP,
    TOTAL,
    UPPER,
    Activations,
    Prepared,
    Source,
)
from graphopt_backends.kernels.tile import SET_BYTES, Panel, Rows, Tiles, accumulate, tile_of

__all__ = ["MIDDLE", "Activations", "Blockwise"]

_STEP = 16  # elements along k that one turn of a loop takes
_FEW_ROWS = 4
_MANY_ROWS = 32
_STRIPS = 8
_AHEAD_WORDS = 4096  # how far in front of what is read the stream of weights is fetched


@dataclass(frozen=True)
class Blockwise(Kernel):
    """C = epilogue(A W) with W in blocks of 4-bit codes.

    Attributes:
        isa: The CPU.
        activations: What A is multiplied as; float32 numbers are what it holds.
        rows: Rows of A and C.
        columns: Columns of W and C.
        depth: Columns of A, rows of W.
        block: Consecutive k that share a scale, a multiple of 16, 128 at most where activations are int8; the last
            block of a column may have fewer.
        shifted: Blocks have a shift as well.
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

    @cached_property
    def _halves(self) -> Halves:
        return Halves(self.dot)

    @property
    def is_known(self) -> bool:
        """This CPU has instructions for it."""
        return self.activations == "float32" or (self.dot.group == 4 and self.block <= MOST_ROUNDED)

    @cached_property
    def tile(self) -> tuple[int, int]:
        """Rows and vectors of a register tile: wide strips for few rows, else many rows, which decoded weights serve.

        Two vectors halve the loads of activations, where these are loads and registers are many. Bytes hold codes of
        two vectors.
        """
        vectors = -(-self.columns // self.multiply.lanes)
        pairs = self.activations == "int8"
        if self._decodes_panels:
            return tile_of(self.multiply, self.rows, vectors)
        if self.rows < _FEW_ROWS:
            # more make LLVM spill decoded weights
            strips = _STRIPS // 2 if self.isa.lane_operands and not pairs else _STRIPS
            most = max(1, min(strips, vectors, self._held(1) // self.rows))
            wide = -(-vectors // -(-vectors // most))
            return self.rows, wide + wide % 2 if pairs else wide
        wide = 2 if pairs or (self.isa.registers > 16 and not self.isa.lane_operands and vectors > 1) else 1
        return -(-self.rows // -(-self.rows // self._held(wide))), wide

    def _held(self, vectors: int) -> int:
        """Rows of so many vectors whose sums fit the registers next to what is multiplied."""
        free = self.isa.registers - (8 if self.isa.registers > 16 else 5)
        # sums of a block beside those of all blocks; activations where lanes of registers are multiplied
        return max(1, free // (vectors * (1 + self._scales_sums) + self.isa.lane_operands))

    @property
    def _scales_sums(self) -> bool:
        """Sums of a block are scaled, not weights."""
        return self.activations == "int8" or self.rows < _FEW_ROWS

    @property
    def _decodes_panels(self) -> bool:
        """Panels are decoded before they are multiplied with rows."""
        return self.activations == "float32" and self.rows >= _MANY_ROWS

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

    @cached_property
    def _prepared(self) -> Prepared:
        """How activations lie in scratch memory; sums of blocks are what shifts are multiplied with."""
        sums = self.shifted and self._scales_sums
        zeros = self._halves.zeros if self.activations == "int8" else (MIDDLE, MIDDLE)
        return Prepared(self.isa, self.activations, self.depth, self.block, sums, zeros)

    @cached_property
    def _decoder(self) -> Decoder:
        return Decoder(self.isa)

    @property
    def _copies(self) -> bool:
        fight = self.rows > 1 and 4 * self._pitch % SET_BYTES == 0  # for places in the cache
        return self.activations == "int8" or self._prepared.sums or self.depth % self.block != 0 or fight

    @cached_property
    def _tiles(self) -> Tiles:
        return Tiles(self.rows, self.tile[0])

    @cached_property
    def _part(self) -> int:
        """Tiles of a part of the rows, whose prepared activations stay in the cache."""
        fit = self.isa.level2_bytes // 2 // (4 * self.tile[0] * (self._prepared.words if self._copies else self.depth))
        return max(1, min(fit, self._tiles.count))

    @cached_property
    def _ahead(self) -> int:
        """Words in front of what is read that are fetched; none where the weight stays in the cache, nor on ARM."""
        stays = self.isa.lane_operands or 4 * self.panels * self.blocks * self._words <= self.isa.level2_bytes // 2
        return 0 if stays else _AHEAD_WORDS

    @property
    def _decoded_at(self) -> int:
        """Words of scratch memory in front of the decoded panel: prepared activations."""
        return self._part * self.tile[0] * self._prepared.words if self._copies else 0

    @property
    def scratch(self) -> int:
        """Bytes of memory that every task needs for itself."""
        return 4 * (self._decoded_at + (self.blocks * self.block * self.width if self._decodes_panels else 0))

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
        if self.activations == "int8":
            words = self._halves.words(pack_matrix(padded, self.width, 4))
        else:
            words = self._decoder.words(pack_matrix(padded, self.width, CODES))
        words = words.reshape(self.panels, self.blocks, self.block // CODES, self.width)
        numbers = [scales] if shifts is None else [scales, shifts]
        parts = [pack_matrix(part.astype(np.float32), self.width, 1).reshape(self.panels, self.blocks, 1, self.width)
                 for part in numbers]  # fmt: skip
        if self.activations == "int8":
            parts[0].reshape(-1, 2, self.multiply.lanes)[:, 1] /= self._halves.unit
        return np.concatenate([words, *(part.view(np.int32) for part in parts)], axis=2)

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
        if self.scratch:
            pointers.append(Pointer("scratch", self._prepared.dtype, self.scratch // 4))
        return primitive(name, pointers, self._body)

    def _body(self, frame: Frame) -> None:
        """Parts of the rows, panels, tiles; activations of a part are prepared once."""
        with share_pairs(frame, -(-self._tiles.count // self._part), self.panels) as (part, first, last):
            tile = bind(part * self._part)
            end = bind(tirx.min(tile + self._part, self._tiles.count))
            row = bind(self._tiles.start(tile))
            if self._copies:
                with T.serial(0, self._tiles.start(end) - row) as r:
                    self._prepared.put(frame, bind((row + r) * self._pitch), bind(r * self._prepared.words))
            with T.serial(first, last) as panel:
                if self._decodes_panels:
                    self._decode(frame, panel)
                with T.serial(tile, end) as index:
                    self._tiles.visit(index, lambda at, rows: self._tile(frame, at, at - row, rows, panel))

    def _record(self, frame: Frame, panel: Any, block: Any) -> Record:
        at = place_of((panel * self.blocks + block) * self._words)
        return Record(frame["weight"], at, self.width, self.block // CODES * self.width, self._ahead)

    def _decode(self, frame: Frame, panel: Any) -> None:
        """Put a panel of floats [k, width] into scratch memory."""
        lanes, vectors = self.multiply.lanes, self.tile[1]
        with loop(self.blocks) as block:
            record = self._record(frame, panel, block)
            scales = [record.scales(v, lanes) for v in range(vectors)]
            shifts = [record.shifts(v, lanes) for v in range(vectors)] if self.shifted else []
            with loop(self.block // CODES) as turn:
                record.fetch(turn, 1)
                at = place_of(self._decoded_at + (block * self.block + turn * CODES) * self.width)
                words = [bind(record.codes(turn, v, lanes)) for v in range(vectors)]
                for i in range(CODES):
                    for v, weight in enumerate(self._weights(words, i, scales, shifts)):
                        store(frame["scratch"], weight, at + i * self.width + v * lanes, lanes)

    def _weights(self, words: Sequence[Any], i: int, scales: Sequence[Any], shifts: Sequence[Any]) -> list[Any]:
        """What the codes at one place of words stand for, in their block."""
        found = [self._decoder.decoded(word, i) * scale for word, scale in zip(words, scales, strict=True)]
        if shifts:
            found = [weight + shift for weight, shift in zip(found, shifts, strict=True)]
        return [bind(weight) for weight in found]

    def _tile(self, frame: Frame, row: Any, number: Any, rows: int, panel: Any) -> None:
        """The last panel may have fewer columns; it is computed whole and stored in part."""
        whole, rest = divmod(self.columns, self.width)
        column = bind(panel * self.width)
        lanes, vectors = self.multiply.lanes, self.tile[1]
        totals = begin(frame, self.multiply, self.epilogue, rows, vectors, column)
        source = self._source(frame, row, number, rows)
        if self._decodes_panels:
            decoded = Panel(frame["scratch"], self._decoded_at, self.width)
            accumulate(self.multiply, totals, Rows(source.buffer, 0, source.starts), decoded, [(self.depth, 1, 1)])
        else:
            with loop(self.blocks) as block:
                self._add_block(totals, source, self._record(frame, panel, block), block)
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

    def _add_block(self, totals: Tile, source: Source, record: Record, block: Any) -> None:
        if self.activations == "int8":
            self._add_dots(totals, source, record, block)
        elif self._scales_sums:
            self._add_sums(totals, source, record, block)
        else:
            self._add_products(totals, source, record, block)

    def _source(self, frame: Frame, row: Any, number: Any, rows: int) -> Source:
        if self._copies:
            start = place_of(number * self._prepared.words)
            return Source(frame["scratch"], [start + r * self._prepared.words for r in range(rows)])
        start = place_of(row * self._pitch)
        return Source(frame["source"], [start + r * self._pitch for r in range(rows)])

    def _add_dots(self, totals: Tile, source: Source, record: Record, block: Any) -> None:
        """Add a block's sums of products of bytes, scaled."""
        lanes, vectors = self.multiply.lanes, len(totals[0])
        first = place_of(self._prepared.facts(block))
        facts = [self._four(source.buffer, start + first) for start in source.starts]
        sums = [[local(lanes, "int32") for _ in range(vectors)] for _ in totals]
        for row, fact in zip(sums, facts, strict=True):
            for v, total in enumerate(row):
                store(total, fact(UPPER if v % 2 else LOWER), 0, lanes)
        with loop(self.block // _STEP) as turn:
            record.fetch(turn * 2, 2)
            word = place_of(block * (self.block // 4) + turn * (_STEP // 4))
            loaded = [self._four(source.buffer, start + word) for start in source.starts]
            for group in range(_STEP // 4):
                for v in range(0, vectors, 2):
                    codes = self._halves.operands(bind(record.pair(turn * (_STEP // 4) + group, v // 2, lanes)))
                    for row, fetch in zip(sums, loaded, strict=True):
                        self._halves.add(row[v : v + 2], fetch(group), codes)
        scales = [record.scales(v, lanes) for v in range(vectors)]
        shifts = [record.shifts(v, lanes) for v in range(vectors)] if self.shifted else []
        for into, row, fact in zip(totals, sums, facts, strict=True):
            step = reinterpret(fact(STEP), "float32", lanes)
            for v in range(0, vectors, 2):
                pair = self._halves.sums(*(load(total, 0, lanes) for total in row[v : v + 2]))
                for i, value in enumerate(pair, v):
                    add_to(into[i], value * bind(scales[i] * step), lanes)
            if self.shifted:
                _add_shifts(into, reinterpret(fact(TOTAL), "float32", lanes), shifts, lanes)

    def _add_sums(self, totals: Tile, source: Source, record: Record, block: Any) -> None:
        """Add a block's sums of products with bare codes, scaled."""
        lanes, vectors = self.multiply.lanes, len(totals[0])
        sums = [[local(lanes, "float32") for _ in range(vectors)] for _ in totals]
        for total in (total for row in sums for total in row):
            store(total, constant(0, "float32", lanes), 0, lanes)
        with loop(self.block // CODES) as turn:
            record.fetch(turn, 1)
            k = place_of(block * self.block + turn * CODES)
            for v in range(vectors):
                word = bind(record.codes(turn, v, lanes))
                for i in range(CODES):
                    weight = bind(self._decoder.decoded(word, i))
                    for row, start in zip(sums, source.starts, strict=True):
                        add_to(row[v], spread(source.buffer[(start + k + i,)], lanes) * weight, lanes)
        scales = [record.scales(v, lanes) for v in range(vectors)]
        for row, into, start in zip(sums, totals, source.starts, strict=True):
            for total, inner, scale in zip(into, row, scales, strict=True):
                add_to(total, load(inner, 0, lanes) * scale, lanes)
            if self.shifted:
                total = source.buffer[(start + place_of(self._prepared.facts(block)),)]
                _add_shifts(into, bind(spread(total, lanes)), [record.shifts(v, lanes) for v in range(vectors)], lanes)

    def _add_products(self, totals: Tile, source: Source, record: Record, block: Any) -> None:
        """Add a block's products with scaled weights, each of which serves all rows."""
        lanes, vectors = self.multiply.lanes, len(totals[0])
        scales = [record.scales(v, lanes) for v in range(vectors)]
        shifts = [record.shifts(v, lanes) for v in range(vectors)] if self.shifted else []
        with loop(self.block // CODES) as turn:
            record.fetch(turn, 1)
            k = place_of(block * self.block + turn * CODES)
            words = [bind(record.codes(turn, v, lanes)) for v in range(vectors)]
            for half in range(2):
                loaded = [self._four(source.buffer, start + k + 4 * half) for start in source.starts]
                for i in range(4):
                    weights = self._weights(words, 4 * half + i, scales, shifts)
                    for row, fetch in zip(totals, loaded, strict=True):
                        activation = fetch(i)
                        for total, weight in zip(row, weights, strict=True):
                            add_to(total, activation * weight, lanes)

    def _four(self, buffer: Any, index: Any) -> Callable[[int], Any]:
        """Four of a row's words, each in all lanes."""
        lanes = self.multiply.lanes
        if self.isa.lane_operands:
            vector = bind(load(buffer, index, 4))
            return lambda i: spread(lane(vector, i), lanes)
        return lambda i: bind(spread(buffer[(index + i,)], lanes))


def _add_shifts(totals: Sequence[Any], sums: Any, shifts: Sequence[Any], lanes: int) -> None:
    """Add a block's sum of activations times what is added to its weights."""
    for total, shift in zip(totals, shifts, strict=True):
        add_to(total, sums * shift, lanes)
