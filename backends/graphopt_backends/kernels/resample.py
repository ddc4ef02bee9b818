"""Images in another size (NHWC): every pixel is a weighted sum of a few, which tables name for each row and column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.targets import Isa
from graphopt_backends.kernels.emit import (
    Frame,
    Pointer,
    bind,
    load_first,
    loop,
    primitive,
    share,
    spread,
    store_first,
    tirx,
)
from graphopt_backends.kernels.kernel import Kernel

__all__ = ["Resample"]


@dataclass(frozen=True)
class Resample(Kernel):
    """Y[n, i, j] = sum of X[n, rows[i, a], columns[j, b]] * row_weights[i, a] * column_weights[j, b].

    Attributes:
        isa: The CPU.
        dtype: Element type; other than float32 only where one pixel is taken as it is.
        batch: Images.
        size: Height and width of an image.
        channels: Of an image.
        result_size: Height and width of the result.
        taps: Rows and columns that a pixel is made of; (1, 1): it is a copy of one.
        source_pitch: Elements from pixel to pixel of the image; 0: `channels`.
    """

    isa: Isa
    dtype: str
    batch: int
    size: tuple[int, int]
    channels: int
    result_size: tuple[int, int]
    taps: tuple[int, int]
    source_pitch: int = 0

    @property
    def operations(self) -> int:
        """Elements that are read."""
        pixels = self.batch * self.result_size[0] * self.result_size[1]
        return pixels * self.channels * self.taps[0] * self.taps[1]

    @property
    def _copies(self) -> bool:
        return self.taps == (1, 1)

    def primitive(self, name: str) -> Any:
        """The function: (source, rows, columns, row_weights?, column_weights?, result, task, tasks)."""
        pixels = self.batch * self.size[0] * self.size[1]
        pointers = [
            Pointer("source", self.dtype, (pixels - 1) * (self.source_pitch or self.channels) + self.channels),
            Pointer("rows", "int32", self.result_size[0] * self.taps[0]),
            Pointer("columns", "int32", self.result_size[1] * self.taps[1]),
        ]
        if not self._copies:
            pointers += [
                Pointer("row_weights", "float32", self.result_size[0] * self.taps[0]),
                Pointer("column_weights", "float32", self.result_size[1] * self.taps[1]),
            ]
        size = self.batch * self.result_size[0] * self.result_size[1] * self.channels
        return primitive(name, [*pointers, Pointer("result", self.dtype, size)], self._body)

    def _body(self, frame: Frame) -> None:
        height, width = self.result_size
        lanes = self.isa.vector_bits // (8 * np.dtype(self.dtype).itemsize)
        with share(frame, self.batch * height) as (unit, _):
            image, i = bind(tirx.truncdiv(unit, height)), bind(tirx.truncmod(unit, height))
            with loop(width) as j:
                at = bind((unit * width + j) * self.channels)
                whole, rest = divmod(self.channels, lanes)
                if whole:
                    with loop(whole) as v:
                        self._vector(frame, image, i, j, at, v * lanes, lanes, lanes)
                if rest:
                    self._vector(frame, image, i, j, at, whole * lanes, lanes, rest)

    def _vector(self, frame: Frame, image: Any, i: Any, j: Any, at: Any, channel: Any, lanes: int, count: int) -> None:
        total = None
        pitch = self.source_pitch or self.channels
        for a in range(self.taps[0]):
            row = image * self.size[0] + frame["rows"][(i * self.taps[0] + a,)]
            for b in range(self.taps[1]):
                pixel = row * self.size[1] + frame["columns"][(j * self.taps[1] + b,)]
                value = load_first(frame["source"], pixel * pitch + channel, lanes, count, self.dtype)
                if not self._copies:
                    weight = frame["row_weights"][(i * self.taps[0] + a,)]
                    weight = weight * frame["column_weights"][(j * self.taps[1] + b,)]
                    value = value * spread(weight, lanes)
                total = bind(value if total is None else total + value)
        assert total is not None
        store_first(frame["result"], total, at + channel, lanes, count)
