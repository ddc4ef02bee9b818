"""What happens to a tile of sums before it is stored: bias, residual, activation, requantization, in registers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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

__all__ = ["PLAIN", "SUM", "Epilogue", "Result", "Tile", "begin", "finish"]

Tile = Sequence[Sequence[Any]]
"""Accumulators, vectors in registers, by row and column."""

SUM = operand(0)
"""The sum itself."""


@dataclass(frozen=True)
class Epilogue:
    """A function of the sums.

    Attributes:
        expression: Operand 0 is the sum; further ones lie as `strides` says.
        strides: Of operands 1 and on: elements from row to row, and from column to column, which are 0 or 1.
        bias: Sums begin with a number for each column instead of zero.
    """

    expression: Expression = SUM
    strides: tuple[tuple[int, int], ...] = ()
    bias: bool = False

    @property
    def dtype(self) -> str:
        """Element type of the result."""
        return self.expression.dtype

    def pointers(self, multiply: Multiply, rows: int, columns: int, padded: int) -> tuple[Pointer, ...]:
        """Parameters that a kernel takes for it, bias first.

        Args:
            multiply: What the sums are made by.
            rows: Rows of the result.
            columns: Its columns.
            padded: Columns of the packed weight, and of the bias.
        """
        found = [Pointer("bias", multiply.sum, padded)] if self.bias else []
        dtypes = operands(self.expression)
        for i, (row, column) in enumerate(self.strides, 1):
            size = (rows - 1) * row + (columns - 1) * column + 1
            found.append(Pointer(f"operand{i}", dtypes.get(i, "float32"), size))
        return tuple(found)


PLAIN = Epilogue()
"""Sums are stored as they are."""


@dataclass(frozen=True)
class Result:
    """Where a tile goes.

    Attributes:
        at: Element of the result that each row begins with.
        rows: Number of each row, by which operands are found.
        column: First column.
        columns: How many of the tile's columns there are.
        bases: Where each operand begins, if not with its pointer.
    """

    at: Sequence[Any]
    rows: Sequence[Any]
    column: Any
    columns: int
    bases: Sequence[Any] = ()


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
    """Evaluate the epilogue on a tile and store it in the parameter `result`."""
    lanes, dtypes = multiply.lanes, operands(epilogue.expression)

    def fetch(i: int, row: Any, first: int, count: int) -> Any:
        """A vector of operand `i`."""
        source, (row_stride, column_stride) = frame[f"operand{i}"], epilogue.strides[i - 1]
        at = result.bases[i - 1] if result.bases else 0
        if row_stride:
            at = at + row * row_stride
        if not column_stride:
            return bind(spread(source[(at,)], lanes))
        return bind(load_first(source, at + result.column + first, lanes, count, dtypes.get(i, "float32")))

    for v in range(len(totals[0])):
        first = v * lanes
        count = min(lanes, result.columns - first)
        if count <= 0:
            break
        numbered = list(enumerate(epilogue.strides, 1))
        shared = {i: fetch(i, 0, first, count) for i, (row_stride, _) in numbered if not row_stride}
        for r, (at, row) in enumerate(zip(result.at, result.rows, strict=True)):
            own = {i: fetch(i, row, first, count) for i, (row_stride, _) in numbered if row_stride}
            value = evaluate(epilogue.expression, {0: load(totals[r][v], 0, lanes), **shared, **own}, lanes)
            store_first(frame["result"], value, at + first, lanes, count)
