"""What happens to a tile of sums before it is stored: bias, residual, activation, requantization, in registers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from graphopt_backends.kernels.emit import (
    Frame,
    Pointer,
    bind,
    constant,
    load,
    load_first,
    local,
    spread,
    store,
    store_first,
)
from graphopt_backends.kernels.expression import Expression, evaluate, operand, operands
from graphopt_backends.kernels.multiply import Multiply

__all__ = ["PLAIN", "SUM", "Epilogue", "Layout", "Result", "Tile", "begin", "finish"]

Tile = Sequence[Sequence[Any]]
"""Accumulators, vectors in registers, by row and column."""

Layout = Literal["scalar", "row", "column", "tensor"]
"""An operand is one number, one for each row or column, or as large as the result."""


SUM = operand(0)
"""The sum itself."""


@dataclass(frozen=True)
class Epilogue:
    """A function of the sums.

    Attributes:
        expression: Operand 0 is the sum; further ones are as `layouts` says.
        layouts: Of operands 1 and on.
        bias: Sums begin with a number for each column instead of zero.
    """

    expression: Expression = SUM
    layouts: tuple[Layout, ...] = ()
    bias: bool = False

    @property
    def dtype(self) -> str:
        """Element type of the result."""
        return self.expression.dtype

    def pointers(self, multiply: Multiply, rows: int, columns: int, padded: int, pitch: int) -> tuple[Pointer, ...]:
        """Parameters that a kernel takes for it, bias first.

        Args:
            multiply: What the sums are made by.
            rows: Rows of the result.
            columns: Its columns.
            padded: Columns of the packed weight; what stands for each column is stored for all of them.
            pitch: Elements from row to row of the result.
        """
        found = [Pointer("bias", multiply.sum, padded)] if self.bias else []
        sizes = {"scalar": 1, "row": rows, "column": padded, "tensor": (rows - 1) * pitch + columns}
        dtypes = operands(self.expression)
        for i, layout in enumerate(self.layouts, 1):
            found.append(Pointer(f"operand{i}", dtypes.get(i, "float32"), sizes[layout]))
        return tuple(found)


PLAIN = Epilogue()
"""Sums are stored as they are."""


@dataclass(frozen=True)
class Result:
    """Where a tile goes.

    Attributes:
        name: Parameter that it is written to.
        at: Element of each row's first column.
        rows: Number of each row, for operands that have one for each.
        column: First column.
        columns: How many of the tile's columns there are.
    """

    name: str
    at: Sequence[Any]
    rows: Sequence[Any]
    column: Any
    columns: int


def begin(frame: Frame, multiply: Multiply, epilogue: Epilogue, rows: int, vectors: int, column: Any) -> Tile:
    """Accumulators of a tile with their first value."""
    lanes = multiply.lanes
    totals = [[local(lanes, multiply.sum) for _ in range(vectors)] for _ in range(rows)]
    for v in range(vectors):
        first = constant(0, multiply.sum, lanes)
        if epilogue.bias:
            first = bind(load(frame["bias"], column + v * lanes, lanes))
        for row in totals:
            store(row[v], first, 0, lanes)
    return totals


def finish(frame: Frame, multiply: Multiply, epilogue: Epilogue, totals: Tile, result: Result) -> None:
    """Evaluate the epilogue on a tile and store it."""
    lanes, dtypes = multiply.lanes, operands(epilogue.expression)
    for v in range(len(totals[0])):
        count = min(lanes, result.columns - v * lanes)
        if count <= 0:
            break
        shared = {
            i: bind(load(frame[f"operand{i}"], result.column + v * lanes, lanes))
            for i, layout in enumerate(epilogue.layouts, 1)
            if layout == "column"
        }
        for r, at in enumerate(result.at):
            values = {0: load(totals[r][v], 0, lanes), **shared}
            for i, layout in enumerate(epilogue.layouts, 1):
                source = frame[f"operand{i}"]
                if layout == "tensor":
                    values[i] = load_first(source, at + v * lanes, lanes, count, dtypes.get(i, "float32"))
                elif layout != "column":
                    values[i] = spread(source[(result.rows[r] if layout == "row" else 0,)], lanes)
            value = evaluate(epilogue.expression, values, lanes)
            store_first(frame[result.name], value, at + v * lanes, lanes, count)
