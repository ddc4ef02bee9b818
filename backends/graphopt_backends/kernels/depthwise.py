"""Depthwise convolutions over images whose channels lie together (NHWC): vectors of channels, no copy of the image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from graphopt.targets import Isa
from graphopt_backends.kernels.conv import Window
from graphopt_backends.kernels.emit import (
    Frame,
    Pointer,
    bind,
    cast,
    constant,
    either,
    known_late,
    load,
    load_first,
    loop,
    primitive,
    share,
    splits,
    spread,
    store,
    tirx,
)  # fmt: skip
from graphopt_backends.kernels.epilogue import PLAIN, Epilogue, Result, Tile, begin, finish
from graphopt_backends.kernels.kernel import Kernel
from graphopt_backends.kernels.multiply import Multiply

__all__ = ["Depthwise"]

_MOST_ROWS = 2
_MOST_COLUMNS = 7
_MOST_TAPS = 9  # of a window whose rows are not a loop


@dataclass(frozen=True)
class Depthwise(Kernel):
    """Y = epilogue(X convolved with one filter for each channel), summed in float32.

    Sums of 8-bit integers are exact there: those of 500 taps stay below 2^24.

    Attributes:
        isa: The CPU.
        batch: Images.
        height: Of an image, in pixels.
        width: Of an image, in pixels.
        channels: Of the image and of the result.
        window: Taps.
        epilogue: What happens to the sums.
        dtype: Element type of the image.
        zero_point: What is subtracted from its elements; None: a parameter tells it.
        source_pitch: Elements from pixel to pixel of the image; 0: `channels`.
        result_pitch: Elements from pixel to pixel of the result; 0: `channels`.
    """

    isa: Isa
    batch: int
    height: int
    width: int
    channels: int
    window: Window
    epilogue: Epilogue = PLAIN
    dtype: str = "float32"
    zero_point: int | None = 0
    source_pitch: int = 0
    result_pitch: int = 0

    @property
    def multiply(self) -> Multiply:
        """Only its element types count here."""
        return Multiply(self.isa, "f32")

    @cached_property
    def result_size(self) -> tuple[int, int]:
        """Height and width of the result."""
        return self.window.result(self.height, self.width)

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        pixels = self.batch * self.result_size[0] * self.result_size[1]
        return 2 * pixels * self.channels * self.window.size[0] * self.window.size[1]

    @property
    def _padded(self) -> int:
        lanes = self.multiply.lanes
        return -(-self.channels // lanes) * lanes

    def pack(self, weight: np.ndarray) -> np.ndarray:
        """Lay out a weight [channels, 1, height, width] as this kernel reads it: [taps, channels]."""
        found = np.zeros((self.window.size[0] * self.window.size[1], self._padded), np.float32)
        found[:, : self.channels] = weight.reshape(self.channels, -1).T
        return found

    def pack_column(self, values: np.ndarray) -> np.ndarray:
        """Lay out numbers for each channel."""
        found = np.zeros(self._padded, np.float32)
        found[: self.channels] = values.reshape(-1)
        return found

    def primitive(self, name: str) -> Any:
        """The function: (source, weight, bias?, operands..., zero?, result, task, tasks)."""
        pixels, results = (
            self.batch * height * width for height, width in ((self.height, self.width), self.result_size)
        )
        pitch = self.result_pitch or self.channels
        pointers = [
            Pointer("source", self.dtype, (pixels - 1) * (self.source_pitch or self.channels) + self.channels),
            Pointer("weight", "float32", self.window.size[0] * self.window.size[1] * self._padded),
            *self.epilogue.pointers(self.multiply, results, self.channels, self._padded),
            *([Pointer("zero", self.dtype, 1)] if self.zero_point is None else []),
            Pointer("result", self.epilogue.dtype, (results - 1) * pitch + self.channels),
        ]
        return primitive(name, pointers, self._body)

    @cached_property
    def _block(self) -> int:
        """Rows of the result that are computed together where all their taps lie inside; they share what is loaded."""
        return min(_MOST_ROWS, self.result_size[0]) if math.prod(self.window.size) <= _MOST_TAPS else 1

    @property
    def _blocks(self) -> int:
        return -(-self.result_size[0] // self._block)

    @cached_property
    def _strip(self) -> int:
        """Vectors of a strip of channels, whose pixels and weights stay in the first cache."""
        vectors = self._padded // self.multiply.lanes
        pixels = (self._block + self.window.size[0]) * (_MOST_COLUMNS + self.window.size[1])
        most = max(1, self.isa.level1_bytes // (self.isa.vector_bits // 8 * (pixels + math.prod(self.window.size))))
        return -(-vectors // -(-vectors // most))

    @property
    def _strips(self) -> int:
        return -(-self._padded // (self.multiply.lanes * self._strip))

    @cached_property
    def _columns(self) -> Sequence[tuple[int, int, int]]:
        """Tiles along a row: first column, how many, columns of each. Taps of those in a loop lie inside."""
        size, stride, pad, total = self.window.size[1], self.window.strides[1], self.window.pads[1], self.result_size[1]
        reach = (size - 1) * self.window.dilations[1]
        low = min(-(-pad // stride), total)
        high = max(low, min(total, (self.width - 1 - reach + pad) // stride + 1))
        most = max(1, min(_MOST_COLUMNS, self.isa.registers * 7 // 16 // self._block))
        if total <= 2 * most:
            return _each(0, total, most)
        even = [wide for wide in range(most, most // 2, -1) if (high - low) % wide == 0]
        inside = splits(high - low, even[0] if even else most) if high > low else ()
        loops = [(low + first, tiles, wide) for first, tiles, wide in inside]
        return [*_each(0, low, most), *loops, *_each(high, total, most)]

    def _body(self, frame: Frame) -> None:
        blocks, strips, high = self._blocks, self._strips, self._block
        with share(frame, self.batch * blocks * strips) as (unit, _):
            strip = bind(tirx.truncmod(unit, strips))
            row = bind(tirx.truncmod(tirx.truncdiv(unit, strips), blocks) * high)
            image = bind(tirx.truncdiv(unit, strips * blocks))

            def one_by_one() -> None:
                with loop(bind(tirx.min(high, self.result_size[0] - row)) if high > 1 else 1, row) as y:
                    self._rows(frame, _Place(image, bind(y), strip, 1))

            if high == 1:
                one_by_one()
                return
            top = row * self.window.strides[0] - self.window.pads[0]
            reach = (high - 1) * self.window.strides[0] + (self.window.size[0] - 1) * self.window.dilations[0]
            inside = tirx.all(top >= 0, top + reach < self.height, row + high <= self.result_size[0])
            either(inside, lambda: self._rows(frame, _Place(image, row, strip, high)), one_by_one)

    def _rows(self, frame: Frame, place: _Place) -> None:
        """Memory is read and written in its order: pixel after pixel, all channels of a strip in each tile."""
        for first, blocks, wide in self._columns:
            with loop(blocks) as i:
                column = first + i * wide if blocks > 1 else first
                self._channels(frame, place.strip, partial(self._tile, frame, place, column, wide))

    def _channels(self, frame: Frame, strip: Any, body: Callable[[Any, int], None]) -> None:
        """The last vector ends with the channels: some are computed twice, to the same numbers."""
        lanes, vectors = self.multiply.lanes, self._padded // self.multiply.lanes
        if self.channels < lanes:
            body(0, self.channels)
            return
        first = bind(strip * self._strip)
        with loop(known_late(frame, tirx.min(self._strip, vectors - first)), first) as i:
            channel = i * lanes if self._padded == self.channels else tirx.min(i * lanes, self.channels - lanes)
            body(bind(cast(channel, "int64", 1)), lanes)  # LLVM then adds what is constant where it loads and stores

    def _tile(self, frame: Frame, place: _Place, column: Any, wide: int, channel: Any, count: int) -> None:
        window, size = self.window, self.result_size
        totals = begin(frame, self.multiply, self.epilogue, place.high * wide, 1, channel)
        zero = constant(self.zero_point or 0, "float32", self.multiply.lanes)
        if self.zero_point is None:
            zero = bind(spread(cast(cast(frame["zero"][0], "int32", 1), "float32", 1), self.multiply.lanes))
        left = column * window.strides[1] - window.pads[1]

        def along(y: Any, rows: Sequence[tuple[int, Any]]) -> None:
            """A row of the image is added to rows of the tile, each with its tap."""
            line = (place.image * self.height + y) * self.width + left
            sums = [totals[r * wide : (r + 1) * wide] for r, _ in rows]
            self._add(frame, bind(line), left, zero, channel, count, sums, [tap for _, tap in rows])

        top = bind(place.row * window.strides[0] - window.pads[0])
        if place.high > 1:
            for offset, rows in _seen(place.high, window, 0).items():
                along(top + offset, rows)
        else:
            _, least, most = window.inside(place.row, 0, self.height)
            with loop(known_late(frame, most - least), least) as tap:
                along(top + tap * window.dilations[0], [(0, tap)])
        corner = bind((place.image * size[0] + place.row) * size[1] + column)
        numbers = [corner + y * size[1] + x for y in range(place.high) for x in range(wide)]
        at = [number * (self.result_pitch or self.channels) + channel for number in numbers]
        finish(frame, self.multiply, self.epilogue, totals, Result(at, numbers, channel, count))

    def _add(
        self, frame: Frame, line: Any, left: Any, zero: Any, channel: Any, count: int, sums: Sequence[Tile],
        taps: Sequence[Any],
    ) -> None:  # fmt: skip
        """Every pixel is loaded once for all the sums that it belongs to."""
        lanes, pitch, wide = self.multiply.lanes, self.source_pitch or self.channels, self.window.size[1]
        weights = [
            [bind(load(frame["weight"], (tap * wide + k) * self._padded + channel, lanes)) for k in range(wide)]
            for tap in taps
        ]
        start = bind(cast(line * pitch, "int64", 1) + channel)
        for offset, columns in _seen(len(sums[0]), self.window, 1).items():
            if isinstance(left, int) and not 0 <= left + offset < self.width:
                continue
            pixel = load_first(frame["source"], start + offset * pitch, lanes, count, self.dtype)
            if self.dtype != "float32":
                pixel = cast(cast(pixel, "int32", lanes), "float32", lanes)
            pixel = bind(pixel if self.zero_point == 0 else pixel - zero)
            for row, weight in zip(sums, weights, strict=True):
                for x, k in columns:
                    store(row[x][0], load(row[x][0], 0, lanes) + pixel * weight[k], 0, lanes)


def _each(first: int, last: int, most: int) -> list[tuple[int, int, int]]:
    """Tiles from one column to another, every one for itself."""
    cut = splits(last - first, most) if last > first else ()
    return [(first + start + i * wide, 1, wide) for start, tiles, wide in cut for i in range(tiles)]


def _seen(count: int, window: Window, axis: int) -> dict[int, list[tuple[int, int]]]:
    """By its distance from the first, each pixel along an axis: the results that see it, and through which tap."""
    found: dict[int, list[tuple[int, int]]] = {}
    for i in range(count):
        for tap in range(window.size[axis]):
            found.setdefault(i * window.strides[axis] + tap * window.dilations[axis], []).append((i, tap))
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class _Place:
    """Where a block of the result lies.

    Attributes:
        image: Its image.
        row: First row.
        strip: Strip of channels.
        high: Rows.
    """

    image: Any
    row: Any
    strip: Any
    high: int
