"""Products of a matrix of bytes with a packed weight by AMX; see `tiles.py`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from graphopt.targets import Isa
from graphopt_backends.kernels.emit import Frame, Pointer, T, bind, either, loop, primitive, share_pairs, tirx
from graphopt_backends.kernels.epilogue import PLAIN, Epilogue
from graphopt_backends.kernels.gemm import pack_columns, pack_matrix
from graphopt_backends.kernels.kernel import Kernel
from graphopt_backends.kernels.multiply import Kind, Multiply
from graphopt_backends.kernels.tiles import (
    ACROSS,
    COLUMNS,
    CONFIGURATION_BYTES,
    GROUP,
    LINE_BYTES,
    WIDTH,
    Block,
    Chunks,
    configured,
    sixteenths,
    tiles_pay,
)

__all__ = ["TileGemm"]


@dataclass(frozen=True)
class TileGemm(Kernel):
    """C = epilogue(A W) on bytes; see `Gemm`, whose parameters its function has.

    Attributes:
        isa: The CPU, which has tiles.
        kind: Element types.
        rows: Rows of A and C.
        columns: Columns of W and C.
        depth: Columns of A, rows of W; see `Chunks`.
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

    @property
    def pays(self) -> bool:
        """True if tiles are faster than vectors."""
        return tiles_pay(self.isa, self.kind, self.rows, self.columns, self.depth)

    @cached_property
    def block(self) -> Block:
        """Tiles that are multiplied together."""
        tiles, _ = sixteenths(self.rows)
        high = min(tiles, ACROSS)
        return Block(self.kind, high, -(-self.rows // (-(-tiles // high) * high)), self.chunks.length)

    @cached_property
    def chunks(self) -> Chunks:
        """Tiles along k."""
        return Chunks(self.depth)

    @cached_property
    def _blocks(self) -> int:
        """Blocks of rows."""
        return -(-self.rows // (self.block.high * self.block.height))

    @property
    def panels(self) -> int:
        """Panels of columns, the last of which may have one tile."""
        return -(-self.columns // WIDTH)

    @property
    def _tiles(self) -> int:
        """Tiles of columns."""
        return -(-self.columns // COLUMNS)

    @property
    def _weights(self) -> int:
        """Weights of the columns of a tile."""
        return self.chunks.count * self.block.weight_bytes

    @property
    def _pitch(self) -> int:
        return self.source_pitch or self.depth

    @property
    def scratch(self) -> int:
        """Bytes of memory that every task needs for itself."""
        return CONFIGURATION_BYTES + self.block.sum_bytes

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.columns * self.depth

    @cached_property
    def _part(self) -> int:
        """Blocks of a part of the rows, which stays in the second cache while panels pass by."""
        fit = self.isa.level2_bytes // 2 // (self.block.high * self.block.height * self._pitch)
        for_all = -(-self._blocks * self.panels // (2 * self.isa.cores))
        return max(1, min(fit, for_all, self._blocks))

    @cached_property
    def _lines(self) -> int:
        """Cache lines of the next panel that come with every tile along k; none where all weights stay in the cache."""
        stays = self._tiles * self._weights <= self.isa.level2_bytes // 2
        return 0 if stays else self.block.lines(self._part)

    def pack(self, weight: np.ndarray) -> np.ndarray:
        """Lay out a weight [depth, columns] as this kernel reads it."""
        return pack_matrix(self.chunks.cut(weight), COLUMNS, GROUP)

    def pack_column(self, values: np.ndarray) -> np.ndarray:
        """Lay out numbers for each column."""
        return pack_columns(values, self._tiles * COLUMNS)

    def primitive(self, name: str) -> Any:
        """The function: (source, weight, bias?, operands..., result, scratch, task, tasks)."""
        multiply, pitch = self.multiply, self.result_pitch or self.columns
        pointers = [
            Pointer("source", multiply.activation, (self.rows - 1) * self._pitch + self.depth),
            Pointer("weight", multiply.weight, self._tiles * self._weights),
            *self.epilogue.pointers(multiply, self.rows, self.columns, self._tiles * COLUMNS),
            Pointer("result", self.epilogue.dtype, (self.rows - 1) * pitch + self.columns),
            Pointer("scratch", multiply.activation, self.scratch),
        ]
        return primitive(name, pointers, self._body)

    def _body(self, frame: Frame) -> None:
        """Parts of the rows, panels, blocks of rows: the weights of a panel stay in the first cache."""
        parts = -(-self._blocks // self._part)
        with (
            configured(self.block, frame["scratch"], 0),
            share_pairs(frame, parts, self.panels) as (part, first, last),
        ):
            begin = bind(part * self._part)
            end = bind(tirx.min(begin + self._part, self._blocks))
            with T.serial(first, last) as panel, T.serial(begin, end) as number:
                bytes_of_turn = self.chunks.count * self._lines * LINE_BYTES
                ahead = (panel + 1) * (ACROSS * self._weights) + (number - begin) * bytes_of_turn
                self._columns(frame, number, panel, bind(ahead) if self._lines else 0)

    def _columns(self, frame: Frame, number: Any, panel: Any, ahead: Any) -> None:
        """The last panel may have fewer columns."""
        whole, rest = divmod(self.columns, WIDTH)
        full, narrow = self.block, replace(self.block, columns=rest or WIDTH)
        if not rest or not whole:
            self._block(frame, narrow, number, panel, ahead)
        else:
            either(
                panel < whole,
                lambda: self._block(frame, full, number, panel, ahead),
                lambda: self._block(frame, narrow, number, panel, ahead),
            )

    def _row(self, tile: Any) -> Any:
        """The first row of a tile: the last one ends with the rows."""
        even = self.rows == self._blocks * self.block.high * self.block.height
        first = tile * self.block.height
        return first if even else tirx.min(first, self.rows - self.block.height)

    def _block(self, frame: Frame, block: Block, number: Any, panel: Any, ahead: Any) -> None:
        column, tile = bind(panel * WIDTH), bind(number * block.high)
        rows = [bind(self._row(tile + i) * self._pitch) for i in range(block.high)]
        weights = [bind((panel * ACROSS + j) * self._weights) for j in range(block.wide)]
        block.begin(frame["bias"] if self.epilogue.bias else None, column)
        with loop(self.chunks.count) as chunk:
            k = bind(self.chunks.start(chunk))
            below = chunk * block.weight_bytes
            left, right = [row + k for row in rows], [weight + below for weight in weights]
            block.fetch(frame["weight"], ahead + chunk * (self._lines * LINE_BYTES), self._lines)
            block.add(frame["source"], left, self._pitch, frame["weight"], right)
        block.put(frame["scratch"], CONFIGURATION_BYTES)
        pitch = self.result_pitch or self.columns
        block.finish(
            frame, self.multiply, self.epilogue, CONFIGURATION_BYTES, lambda i: self._row(tile + i), pitch, column
        )
