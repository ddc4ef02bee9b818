"""Depthwise convolutions over images whose channels lie together (NHWC): vectors of channels, no copy of the image."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
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
from graphopt_backends.kernels.epilogue import PLAIN, Epilogue, Result, begin, finish
from graphopt_backends.kernels.multiply import Multiply

__all__ = ["Depthwise"]

_MOST_PIXELS = 7


@dataclass(frozen=True)
class Depthwise:
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
    def scratch(self) -> int:
        """It needs none."""
        return 0

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

    def _body(self, frame: Frame) -> None:
        rows = self.result_size[0]
        with share(frame, self.batch * rows) as (unit, _):
            image, row = bind(tirx.truncdiv(unit, rows)), bind(tirx.truncmod(unit, rows))
            first, least, most = self.window.inside(row, 0, self.height)
            place = _Row(unit, image, first, least, most)
            lanes = self.multiply.lanes
            whole, rest = divmod(self.channels, lanes)
            if whole:
                with loop(whole) as i:
                    self._columns(frame, place, bind(i * lanes), lanes)
            if rest:
                self._columns(frame, place, whole * lanes, rest)

    def _columns(self, frame: Frame, place: _Row, channel: Any, count: int) -> None:
        """Tiles along a row; those whose taps all lie inside share one loop."""
        for start, blocks, wide in splits(self.result_size[1], _MOST_PIXELS):
            safe = [i for i in range(blocks) if self._inside(start + i * wide, wide)]
            low, high = (safe[0], safe[-1] + 1) if safe else (blocks, blocks)
            for i in range(low):
                self._tile(frame, place, channel, count, start + i * wide, wide, start + i * wide)
            if high > low:
                with loop(high - low) as i:
                    self._tile(frame, place, channel, count, start + low * wide + i * wide, wide, None)
            for i in range(high, blocks):
                self._tile(frame, place, channel, count, start + i * wide, wide, start + i * wide)

    def _inside(self, first: int, wide: int) -> bool:
        begin_x = first * self.window.strides[1] - self.window.pads[1]
        end_x = begin_x + (wide - 1) * self.window.strides[1] + (self.window.size[1] - 1) * self.window.dilations[1]
        return begin_x >= 0 and end_x < self.width

    def _tile(
        self, frame: Frame, place: _Row, channel: Any, count: int, column: Any, wide: int, fixed: int | None
    ) -> None:
        lanes, pitch, window = self.multiply.lanes, self.source_pitch or self.channels, self.window
        totals = begin(frame, self.multiply, self.epilogue, wide, 1, channel)
        zero = constant(self.zero_point or 0, "float32")
        if self.zero_point is None:
            zero = bind(cast(cast(frame["zero"][0], "int32", 1), "float32", 1))
        left = bind((column * window.strides[1] - window.pads[1]) * pitch + channel)
        with loop(place.most - place.least, place.least) as tap:
            y = place.first + tap * window.dilations[0]
            row = bind((place.image * self.height + y) * (self.width * pitch) + left)
            for kx in range(window.size[1]):
                weight = bind(load(frame["weight"], (tap * window.size[1] + kx) * self._padded + channel, lanes))
                for i in range(wide):
                    along = i * window.strides[1] + kx * window.dilations[1]
                    if fixed is not None and not 0 <= fixed * window.strides[1] - window.pads[1] + along < self.width:
                        continue
                    value = load_first(frame["source"], row + along * pitch, lanes, count, self.dtype)
                    if self.dtype != "float32":
                        value = cast(cast(value, "int32", lanes), "float32", lanes)
                    if self.zero_point != 0:
                        value = value - spread(zero, lanes)
                    store(totals[i][0], load(totals[i][0], 0, lanes) + value * weight, 0, lanes)
        rows = [place.unit * self.result_size[1] + column + i for i in range(wide)]
        at = [row * (self.result_pitch or self.channels) + channel for row in rows]
        finish(frame, self.multiply, self.epilogue, totals, Result(at, rows, channel, count))


@dataclass(frozen=True)
class _Row:
    """A row of the result: its number, its image, where its first tap lies, and which taps lie inside."""

    unit: Any
    image: Any
    first: Any
    least: Any
    most: Any
