"""Register tiles: how many rows and vectors of a result are computed at once, and the loop over k that does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from operator import itemgetter
from typing import Any

from graphopt_backends.kernels.emit import (
    bind,
    cast,
    constant,
    either,
    load,
    local,
    loop,
    prefetch,
    splits,
    start_of,
    store,
    tirx,
)
from graphopt_backends.kernels.multiply import Multiply

__all__ = ["SET_BYTES", "Panel", "Rows", "Tiles", "Walk", "accumulate", "rectangle_of", "tile_of", "whole_bands"]

SET_BYTES = 2048
"""Rows that lie a multiple of this apart share the few places that a cache has for them."""

_LINE_BYTES = 64
_MOST_ROWS = 16
_MOST_HIGH = 4
_MOST_VECTORS = 4
_MOST_WIDE = 6  # where an instruction takes two rows, and few of them share a vector of weights
_MOST_STRIPS = 8
_ENOUGH = 28  # accumulators that hide the latency of every CPU there is
_FEW_ROWS = 4
_UNROLLED = 2  # turns of a loop whose instructions take two rows: there are few of them in one

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
    most = _MOST_STRIPS if few else _MOST_WIDE if multiply.rows > 1 else _MOST_VECTORS
    best, found = -1.0, (1, 1)
    for wide in range(1, min(vectors, most) + 1):
        for high in range(1, min(rows, _MOST_ROWS) + 1):
            if multiply.registers(high, wide) > multiply.isa.registers:
                break
            mean_rows = rows / -(-rows // high)
            mean_vectors = vectors / -(-vectors // wide)
            held = mean_rows * mean_vectors
            loads = multiply.loads(mean_rows, mean_vectors)
            worth = held if few else min(held, _ENOUGH) * min(1.0, held / loads / _enough(multiply))
            worth *= _filled(multiply, (rows, high))
            if worth > best + 1e-9:
                best, found = worth, (high, wide)
    return found


def rectangle_of(
    multiply: Multiply, height: int, width: int, vectors: int, *, bands: bool = False
) -> tuple[int, int, int]:
    """Rows and columns of pixels, and vectors, of the tile of an image; see `tile_of`.

    Args:
        multiply: What is done in it.
        height: Rows of the result.
        width: Columns of the result.
        vectors: Vectors of its channels.
        bands: Pixels of a row were brought together before, in as many as instructions take.
    """
    best, found = -1.0, (1, 1, 1)
    for wide in range(1, min(vectors, _MOST_VECTORS) + 1):
        for high in range(1, min(height, _MOST_HIGH) + 1):
            for columns in range(1, min(width, _MOST_ROWS // high) + 1):
                rows = high * -(-columns // multiply.rows) * multiply.rows if bands else high * columns
                if multiply.registers(rows, wide) + _apart(multiply, rows, bands=bands) > multiply.isa.registers:
                    break
                if high > 1 and columns < width:
                    continue  # a second row pays where one is short
                mean_rows = width / -(-width // columns) * (height / -(-height // high))
                mean_vectors = vectors / -(-vectors // wide)
                held = mean_rows * mean_vectors
                loads = multiply.loads(mean_rows, mean_vectors)
                worth = min(held, _ENOUGH) * min(1.0, held / loads / _enough(multiply)) - 0.1 * (high - 1)
                worth *= _filled(multiply, *([] if bands else [(height, high)]), (width, columns))
                if worth > best + 1e-9:
                    best, found = worth, (high, columns, wide)
    return found


def _enough(multiply: Multiply) -> float:
    """Multiplications for each load that keep a CPU busy; a load on ARM is often one of two vectors."""
    if multiply.rows > 1:
        return 4.5
    return 3.0 if multiply.isa.lane_operands else 1.5


def _apart(multiply: Multiply, rows: int, *, bands: bool) -> int:
    """Registers that rows of pixels take besides: two groups of each, and what brings them together if that is left."""
    if multiply.rows == 1:
        return 0
    return rows // multiply.rows - 1 if bands else rows + rows // multiply.rows + 2


def _filled(multiply: Multiply, *axes: tuple[int, int]) -> float:
    """Part of the rows which instructions take that are there; the last of a tile may take one that is not.

    Args:
        multiply: How many they take.
        axes: Rows or columns of an image, and the most that a tile has.
    """
    sizes = [1]
    for total, most in axes:
        sizes = [size * part for size in sizes for _, count, part in splits(total, most) for _ in range(count)]
    return sum(sizes) / sum(-(-size // multiply.rows) * multiply.rows for size in sizes)


@dataclass(frozen=True)
class Tiles:
    """Rows cut into tiles of one or two heights, as even as possible.

    Attributes:
        rows: How many there are.
        most: Rows of a tile at most.
    """

    rows: int
    most: int

    @cached_property
    def _blocks(self) -> tuple[tuple[int, int, int], ...]:
        return splits(self.rows, self.most)

    @property
    def count(self) -> int:
        """Number of tiles."""
        return sum(block[1] for block in self._blocks)

    @property
    def highest(self) -> int:
        """Rows of the highest."""
        return max(block[2] for block in self._blocks)

    def start(self, index: Any) -> Any:
        """The first row of a tile; one behind the last gives the number of rows."""
        return start_of(self._blocks, index)

    def visit(self, index: Any, body: Callable[[Any, int], None]) -> None:
        """Emit code for a tile of either height: `body(first row, rows)`."""
        row = bind(self.start(index))
        if len(self._blocks) == 1:
            body(row, self._blocks[0][2])
        else:
            (_, count, high), (_, _, low) = self._blocks
            either(index < count, lambda: body(row, high), lambda: body(row, low))


@dataclass(frozen=True)
class Rows:
    """Activations of a tile: `offsets` elements behind `start`, each row begins.

    Where rows were brought together as instructions take them, each offset is that of as many rows as one takes.

    Attributes:
        buffer: Where they are.
        start: The first element.
        offsets: From there to each row.
        together: Rows that lie together, a group of each in turn; 0: every row for itself.
    """

    buffer: Any
    start: Any
    offsets: Sequence[Any]
    together: int = 0

    def far(self) -> Rows:
        """With 64-bit indices: LLVM then adds what is constant to an address where it loads, and needs no more."""
        return replace(self, start=_far(self.start))


@dataclass(frozen=True)
class Panel:
    """Packed weights [k / group, width, group] of a tile, beginning at an element.

    Attributes:
        buffer: Where they are.
        start: Their first element.
        width: Columns.
        ahead: An element of weights that other tiles need next: they come into the cache while these are multiplied.
        pace: How many of them come for each k; 0: none do.
    """

    buffer: Any
    start: Any
    width: int
    ahead: Any = 0
    pace: int = 0

    def far(self) -> Panel:
        """See `Rows.far`."""
        return replace(self, start=_far(self.start), ahead=_far(self.ahead))

    def below(self, rows: Any) -> Panel:
        """The same some rows of weights further down."""
        return replace(self, start=self.start + rows * self.width, ahead=self.ahead + rows * self.pace)

    def fetch(self, k: Any, count: int, weight_bytes: int) -> None:
        """Let come what comes for `count` elements along k."""
        for first in range(0, count * self.pace, _LINE_BYTES // weight_bytes):
            prefetch(self.buffer, self.ahead + k * self.pace + first)


def _far(index: Any) -> Any:
    return index if isinstance(index, int) else bind(cast(index, "int64", 1))


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
    if multiply.rows > 1:
        totals = whole_bands(multiply, totals)
        _exchange_halves(multiply, totals)
    if multiply.isa.lane_operands:
        rows, panel = rows.far(), panel.far()
    _walk(multiply, totals, rows, panel, walks)
    if multiply.rows > 1:
        _exchange_halves(multiply, totals)


def whole_bands(multiply: Multiply, totals: Sequence[Sequence[Any]]) -> Sequence[Sequence[Any]]:
    """Accumulators of as many rows as instructions take; further ones belong to rows that are not there."""
    missing = -len(totals) % multiply.rows
    lanes = multiply.lanes
    zeros = [[local(lanes, multiply.sum) for _ in totals[0]] for _ in range(missing)]
    for total in (total for row in zeros for total in row):
        store(total, constant(0, multiply.sum, lanes), 0, lanes)
    return [*totals, *zeros]


def _exchange_halves(multiply: Multiply, totals: Sequence[Sequence[Any]]) -> None:
    """Let the accumulators of two rows be one for the first half of the columns and one for the second, and back."""
    lanes, half = multiply.lanes, multiply.lanes // 2
    for upper, lower in zip(totals[::2], totals[1::2], strict=True):
        for first, second in zip(upper, lower, strict=True):
            pair = [bind(load(first, 0, lanes)), bind(load(second, 0, lanes))]
            for i, total in enumerate((first, second)):
                places = [*range(i * half, i * half + half), *range(lanes + i * half, lanes + i * half + half)]
                store(total, tirx.Shuffle(pair, places), 0, lanes)


def _walk(multiply: Multiply, totals: Sequence[Sequence[Any]], rows: Rows, panel: Panel, walks: Sequence[Walk]) -> None:
    """See `accumulate`."""
    if len(walks) > 1:
        turns, stride, weight_rows = walks[0]
        with loop(turns) as i:
            further = replace(rows, start=rows.start + i * (stride * max(1, rows.together)))
            _walk(multiply, totals, further, panel.below(i * weight_rows), walks[1:])
        return
    group = multiply.group
    unrolled = _UNROLLED if multiply.rows > 1 else 1
    length, step = walks[0][0], group * multiply.steps * unrolled
    whole = length // step
    bands = _bands(multiply, totals)

    def add(activations: Sequence[Callable[[], Any]], k: Any) -> None:
        """One group: what there is more of is fetched right before it is used, which needs one register."""
        first, size = panel.start + k * panel.width, multiply.weight_elements
        places = [first + i * size for i in range(len(bands[0]))]
        if multiply.rows > 1:
            ready = [multiply.ready(fetch()) for fetch in activations]
            for i, place in enumerate(places):
                column = multiply.load_weight(panel.buffer, place)
                for band, activation in zip(bands, ready, strict=True):
                    _add(multiply, band[i], activation, column)
            return
        weights = [multiply.load_weight(panel.buffer, place) for place in places]
        for band, fetch in zip(bands, activations, strict=True):
            activation = multiply.ready(fetch())
            for total, column in zip(band, weights, strict=True):
                _add(multiply, total, activation, column)

    def places(k: Any) -> list[list[Any]]:
        """Where the activations of each band are."""
        at = [rows.start + offset + k for offset in rows.offsets]
        return [at[i : i + multiply.rows] for i in range(0, len(at), multiply.rows)]

    def fetched(k: Any, groups: int) -> list[Callable[[], list[Any]]]:
        return [partial(multiply.load_activation, rows.buffer, place, groups) for place in places(k)]

    def one(k: Any) -> None:
        """One group, which is loaded for itself."""
        if rows.together:
            at = [rows.start + offset + k * rows.together for offset in rows.offsets]
            add([partial(multiply.load_band, rows.buffer, place) for place in at], k)
        else:
            add([partial(_only, fetch) for fetch in fetched(k, 1)], k)

    def some(k: Any) -> None:
        """As many groups as are loaded together."""
        if multiply.steps == 1 or rows.together:
            for i in range(multiply.steps):
                one(k + i * group)
            return
        loaded = [fetch() for fetch in fetched(k, multiply.steps)]
        for i in range(multiply.steps):
            add([partial(itemgetter(i), groups) for groups in loaded], k + i * group)

    if whole:
        with loop(whole) as turn:
            k = turn * step if whole > 1 else 0
            panel.fetch(k, step, multiply.weight_bytes)
            for first in range(0, step, group * multiply.steps):
                some(k + first)
    k = whole * step
    while length - k >= group:
        one(k)
        k += group
    if k < length:
        add([partial(multiply.load_rest, rows.buffer, place, length - k) for place in places(k)], k)


def _add(multiply: Multiply, total: Any, activation: Any, weight: Any) -> None:
    store(total, multiply.add(load(total, 0, multiply.lanes), activation, weight), 0, multiply.lanes)


def _bands(multiply: Multiply, totals: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Accumulators by the rows that one instruction takes, in the order of the vectors of weights."""
    bands = [totals[i : i + multiply.rows] for i in range(0, len(totals), multiply.rows)]
    return [[total for vector in zip(*band, strict=True) for total in vector] for band in bands]


def _only(fetch: Callable[[], list[Any]]) -> Any:
    return fetch()[0]
