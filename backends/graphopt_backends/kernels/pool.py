"""Pooling over images whose channels lie together (NHWC): a vector of channels at a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

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
    local,
    loop,
    primitive,
    share,
    spread,
    store,
    store_first,
    tirx,
)  # fmt: skip
from graphopt_backends.kernels.epilogue import SUM
from graphopt_backends.kernels.expression import Expression, evaluate
from graphopt_backends.kernels.kernel import Kernel

__all__ = ["Pool"]


@dataclass(frozen=True)
class Pool(Kernel):
    """Y = the greatest element, or the mean, under a window.

    Attributes:
        isa: The CPU.
        kind: What is taken.
        dtype: Element type of the image; means, and sums for them, are float32.
        batch: Images.
        height: Of an image, in pixels.
        width: Of an image, in pixels.
        channels: Of the image.
        window: Taps.
        counts_border: The mean counts the border.
        result_size: Height and width of the result.
        source_pitch: Elements from pixel to pixel of the image; 0: `channels`.
        result_pitch: Elements from pixel to pixel of the result; 0: `channels`.
        after: What is stored, a function of the mean.
    """

    isa: Isa
    kind: Literal["max", "mean"]
    dtype: str
    batch: int
    height: int
    width: int
    channels: int
    window: Window
    result_size: tuple[int, int]
    counts_border: bool = False
    source_pitch: int = 0
    result_pitch: int = 0
    after: Expression = SUM

    @property
    def operations(self) -> int:
        """Comparisons or additions."""
        pixels = self.batch * self.result_size[0] * self.result_size[1]
        return pixels * self.channels * self.window.size[0] * self.window.size[1]

    @cached_property
    def _lanes(self) -> int:
        return self.isa.vector_bits // (8 * np.dtype(self._held).itemsize)

    @property
    def _held(self) -> str:
        """Element type of what is held in registers, and of the result."""
        return self.dtype if self.kind == "max" else "float32"

    @property
    def _reaches_out(self) -> bool:
        """Some windows are not all inside of the image: there is a border, or the last ones are cut."""
        ends = [
            (count - 1) * stride + dilation * (size - 1)
            for count, stride, dilation, size in zip(
                self.result_size, self.window.strides, self.window.dilations, self.window.size, strict=True
            )
        ]
        return any(self.window.pads) or ends[0] >= self.height or ends[1] >= self.width

    def primitive(self, name: str) -> Any:
        """The function: (source, result, task, tasks)."""
        pixels, results = (
            self.batch * height * width for height, width in ((self.height, self.width), self.result_size)
        )
        pointers = [
            Pointer("source", self.dtype, (pixels - 1) * (self.source_pitch or self.channels) + self.channels),
            Pointer("result", self._held, (results - 1) * (self.result_pitch or self.channels) + self.channels),
        ]
        return primitive(name, pointers, self._body)

    def _body(self, frame: Frame) -> None:
        rows, columns = self.result_size
        with share(frame, self.batch * rows) as (unit, _):
            image, row = bind(tirx.truncdiv(unit, rows)), bind(tirx.truncmod(unit, rows))
            top = self.window.inside(row, 0, self.height)
            with loop(columns) as column:
                left = self.window.inside(column, 1, self.width)
                at = bind((unit * columns + column) * (self.result_pitch or self.channels))
                whole, rest = divmod(self.channels, self._lanes)
                if whole:
                    with loop(whole) as i:
                        self._vector(frame, image, top, left, at, i * self._lanes, self._lanes)
                if rest:
                    self._vector(frame, image, top, left, at, whole * self._lanes, rest)

    def _vector(
        self, frame: Frame, image: Any, top: tuple[Any, Any, Any], left: tuple[Any, Any, Any], at: Any, channel: Any,
        count: int,
    ) -> None:  # fmt: skip
        lanes, pitch = self._lanes, self.source_pitch or self.channels
        total = local(lanes, self._held)
        store(total, constant(self._start(), self._held, lanes), 0, lanes)
        with loop(top[2] - top[1], top[1]) as tap_y:
            y = top[0] + tap_y * self.window.dilations[0]
            row = bind((image * self.height + y) * (self.width * pitch) + channel)
            with loop(left[2] - left[1], left[1]) as tap_x:
                x = left[0] + tap_x * self.window.dilations[1]
                value = load_first(frame["source"], row + x * pitch, lanes, count, self.dtype)
                if self._held != self.dtype:
                    value = cast(cast(value, "int32", lanes), self._held, lanes)
                seen = load(total, 0, lanes)
                store(total, tirx.max(seen, value) if self.kind == "max" else seen + value, 0, lanes)
        result = load(total, 0, lanes)
        if self.kind == "mean":
            taps = self.window.size[0] * self.window.size[1]
            if self.counts_border or not self._reaches_out:
                result = result * constant(1 / taps, self._held, lanes)
            else:
                seen = (top[2] - top[1]) * (left[2] - left[1])
                result = result / spread(cast(seen, self._held, 1), lanes)
            result = evaluate(self.after, [bind(result)], lanes)
        store_first(frame["result"], result, at + channel, lanes, count)

    def _start(self) -> float:
        if self.kind == "mean":
            return 0
        kind = np.dtype(self.dtype)
        return float("-inf") if kind.kind == "f" else int(np.iinfo(kind).min)
