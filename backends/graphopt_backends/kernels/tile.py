"""Register tiles: how many rows and vectors of a result are computed at once, and the loop over k that does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import Any

from graphopt_backends.kernels.emit import load, loop, store
from graphopt_backends.kernels.multiply import Multiply

__all__ = ["SET_BYTES", "Panel", "Rows", "Walk", "accumulate", "rectangle_of", "tile_of"]

SET_BYTES = 2048
"""Rows that lie a multiple of this apart share the few places that a cache has for them."""

_MOST_ROWS = 16
_MOST_HIGH = 4
_MOST_VECTORS = 4
_MOST_STRIPS = 8
_ENOUGH = 28  # accumulators that hide the latency of every CPU there is
_FEW_ROWS = 4

Walk = tuple[int, int, int]
"""A loop along k: turns, elements of activations and rows of packed weights that a turn goes on."""


def tile_of(multiply: Multiply, rows: int, vectors: int) -> tuple[int, int]:
    """Rows and vectors of the tile.

    The most accumulators that fit the registers, counted after the rest of rows and vectors is evened out over all
    tiles; few loads for each of them. With a handful of rows memory decides, and wide strips of the weight are read.

    Args:
        multiply: What is done in it.
        rows: Rows of the result.
        vectors: Vectors that a row has.
    """
    few = rows < _FEW_ROWS
    best, found = -1.0, (1, 1)
    for wide in range(1, min(vectors, _MOST_STRIPS if few else _MOST_VECTORS) + 1):
        for high in range(1, min(rows, _MOST_ROWS) + 1):
            if multiply.registers(high, wide) > multiply.isa.registers:
                break
            mean_rows = rows / -(-rows // high)
            mean_vectors = vectors / -(-vectors // wide)
            held = mean_rows * mean_vectors
            loads = mean_rows / multiply.steps + mean_vectors
            enough = 3.0 if multiply.isa.lane_operands else 1.5
            worth = held if few else min(held, _ENOUGH) * min(1.0, held / loads / enough)
            if worth > best + 1e-9:
                best, found = worth, (high, wide)
    return found


def rectangle_of(multiply: Multiply, height: int, width: int, vectors: int) -> tuple[int, int, int]:
    """Rows and columns of pixels, and vectors, of the tile of an image; see `tile_of`.

    Args:
        multiply: What is done in it.
        height: Rows of the result.
        width: Columns of the result.
        vectors: Vectors of its channels.
    """
    best, found = -1.0, (1, 1, 1)
    for wide in range(1, min(vectors, _MOST_VECTORS) + 1):
        for high in range(1, min(height, _MOST_HIGH) + 1):
            for columns in range(1, min(width, _MOST_ROWS // high) + 1):
                if multiply.registers(high * columns, wide) > multiply.isa.registers:
                    break
                if high > 1 and columns < width:
                    continue  # a second row pays where one is short
                mean_rows = width / -(-width // columns) * (height / -(-height // high))
                mean_vectors = vectors / -(-vectors // wide)
                held = mean_rows * mean_vectors
                loads = mean_rows / multiply.steps + mean_vectors
                enough = 3.0 if multiply.isa.lane_operands else 1.5
                worth = min(held, _ENOUGH) * min(1.0, held / loads / enough) - 0.1 * (high - 1)
                if worth > best + 1e-9:
                    best, found = worth, (high, columns, wide)
    return found


@dataclass(frozen=True)
class Rows:
    """Activations of a tile: `offsets` elements behind `start`, each row begins."""

    buffer: Any
    start: Any
    offsets: Sequence[Any]


@dataclass(frozen=True)
class Panel:
    """Packed weights [k / group, width, group] of a tile, beginning at an element."""

    buffer: Any
    start: Any
    width: int


def accumulate(
    multiply: Multiply, totals: Sequence[Sequence[Any]], rows: Rows, panel: Panel, walks: Sequence[Walk]
) -> None:
    """Add products along k to a tile.

    Args:
        multiply: How.
        totals: Accumulators by row and vector.
        rows: One operand.
        panel: The other.
        walks: Nested loops, the last of which goes along consecutive elements.
    """
    if len(walks) > 1:
        turns, stride, weight_rows = walks[0]
        with loop(turns) as i:
            further = replace(rows, start=rows.start + i * stride)
            below = replace(panel, start=panel.start + i * (weight_rows * panel.width))
            accumulate(multiply, totals, further, below, walks[1:])
        return
    group, lanes = multiply.group, multiply.lanes
    length, step = walks[0][0], group * multiply.steps
    whole = length // step

    def add(activations: Sequence[Callable[[], Any]], k: Any) -> None:
        """One group: a row's activations are fetched right before they are used, which needs one register."""
        first = panel.start + k * panel.width
        weights = [multiply.load_weight(panel.buffer, first + v * lanes * group) for v in range(len(totals[0]))]
        for row, fetch in zip(totals, activations, strict=True):
            activation = fetch()
            for total, column in zip(row, weights, strict=True):
                store(total, multiply.add(load(total, 0, lanes), activation, column), 0, lanes)

    def fetched(k: Any, groups: int) -> list[Callable[[], list[Any]]]:
        at = [rows.start + offset + k for offset in rows.offsets]
        return [partial(multiply.load_activation, rows.buffer, place, groups) for place in at]

    if whole:
        with loop(whole) as turn:
            k = turn * step if whole > 1 else 0
            if multiply.steps == 1:
                add([partial(_only, fetch) for fetch in fetched(k, 1)], k)
            else:
                loaded = [fetch() for fetch in fetched(k, multiply.steps)]
                for i in range(multiply.steps):
                    add([partial(itemgetter(i), groups) for groups in loaded], k + i * group)
    k = whole * step
    while length - k >= group:
        add([partial(_only, fetch) for fetch in fetched(k, 1)], k)
        k += group
    if k < length:
        at = [rows.start + offset + k for offset in rows.offsets]
        add([partial(multiply.load_rest, rows.buffer, place, length - k) for place in at], k)


def _only(fetch: Callable[[], list[Any]]) -> Any:
    return fetch()[0]
