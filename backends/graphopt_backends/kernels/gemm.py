"""Products of a matrix with a packed weight: rows of activations times a constant, with an epilogue."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from graphopt.targets import Isa
from graphopt_backends.kernels.emit import (
    Frame,
    Pointer,
    bind,
    each_vector,
    either,
    load,
    primitive,
    share,
    splits,
    store,
    tirx,
    when,
)  # fmt: skip
from graphopt_backends.kernels.epilogue import PLAIN, Epilogue, Result, begin, finish
from graphopt_backends.kernels.multiply import Kind, Multiply
from graphopt_backends.kernels.tile import SET_BYTES, Panel, Rows, accumulate, tile_of

__all__ = ["Gemm", "pack_columns", "pack_matrix"]


@dataclass(frozen=True)
class Gemm:
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
        """Its inner loop."""
        return Multiply(self.isa, self.kind)

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
        """Rows are copied to where they do not fight for places in the cache."""
        return self.rows > 1 and self._pitch * self.multiply.element_bytes % SET_BYTES == 0

    @property
    def _copied_pitch(self) -> int:
        return self.depth + 64 // self.multiply.element_bytes

    @property
    def scratch(self) -> int:
        """Bytes of memory that every task needs for itself."""
        return self.tile[0] * self._copied_pitch * self.multiply.element_bytes if self._copies else 0

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.columns * self.depth

    def pack(self, weight: np.ndarray) -> np.ndarray:
        """Lay out a weight [depth, columns] as this kernel reads it."""
        return pack_matrix(weight, self.width, self.multiply.group)

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

    def _body(self, frame: Frame) -> None:
        """Tiles in the order that reads the larger operand once."""
        blocks = splits(self.rows, self.tile[0])
        count = sum(block[1] for block in blocks)
        rows_first = self._copies or self._weight_stays()
        with share(frame, count * self.panels) as (unit, first_unit):
            fresh = None
            if rows_first:
                block, panel = bind(tirx.truncdiv(unit, self.panels)), bind(tirx.truncmod(unit, self.panels))
                fresh = tirx.any(panel == 0, unit == first_unit)
            else:
                panel, block = bind(tirx.truncdiv(unit, count)), bind(tirx.truncmod(unit, count))
            if len(blocks) == 1:
                self._rows(frame, block * blocks[0][2], blocks[0][2], panel, fresh)
            else:
                (_, first, high), (start, _, low) = blocks
                either(
                    block < first,
                    lambda: self._rows(frame, block * high, high, panel, fresh),
                    lambda: self._rows(frame, start + (block - first) * low, low, panel, fresh),
                )

    def _weight_stays(self) -> bool:
        """The packed weight stays in the cache while rows pass by."""
        weight = self.panels * self.width * self.packed_depth * self.multiply.element_bytes
        return weight <= self.isa.level2_bytes // 2 or self.rows > 4 * self.columns

    def _copy(self, frame: Frame, row: Any, rows: int) -> None:
        """Copy the rows of a block into this task's scratch memory."""
        lanes = self.isa.vector_bits // (8 * self.multiply.element_bytes)
        for r in range(rows):
            source, target = (row + r) * self._pitch, r * self._copied_pitch

            def move(i: Any, n: int, source: Any = source, target: int = target) -> None:
                store(frame["scratch"], load(frame["source"], source + i, n), target + i, n)

            each_vector(self.depth, lanes, move)

    def _rows(self, frame: Frame, row: Any, rows: int, panel: Any, fresh: Any) -> None:
        if self._copies:
            when(fresh, lambda: self._copy(frame, row, rows))
        whole, rest = divmod(self.columns, self.width)
        if not rest:
            self._tile(frame, row, rows, panel, self.width)
        elif not whole:
            self._tile(frame, row, rows, panel, rest)
        else:
            either(
                panel < whole,
                lambda: self._tile(frame, row, rows, panel, self.width),
                lambda: self._tile(frame, row, rows, panel, rest),
            )

    def _tile(self, frame: Frame, row: Any, rows: int, panel: Any, columns: int) -> None:
        multiply, pitch = self.multiply, self.result_pitch or self.columns
        vectors, column = -(-columns // multiply.lanes), panel * self.width
        totals = begin(frame, multiply, self.epilogue, rows, vectors, column)
        if self._copies:
            source = Rows(frame["scratch"], 0, [r * self._copied_pitch for r in range(rows)])
        else:
            source = Rows(frame["source"], row * self._pitch, [r * self._pitch for r in range(rows)])
        weight = Panel(frame["weight"], panel * (self.packed_depth * self.width), self.width)
        accumulate(multiply, totals, source, weight, [(self.depth, 1, 1)])
        at = [(row + r) * pitch + column for r in range(rows)]
        result = Result(at, [row + r for r in range(rows)], column, columns)
        finish(frame, multiply, self.epilogue, totals, result)


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
