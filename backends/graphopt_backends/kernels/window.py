"""Taps of convolutions and poolings, and the image that a convolution reads through them: bordered rows of pixels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from graphopt_backends.kernels.emit import (
    Frame,
    bind,
    constant,
    each_vector,
    either,
    load,
    loop,
    spread,
    store,
    tirx,
)
from graphopt_backends.kernels.multiply import Multiply
from graphopt_backends.kernels.tile import SET_BYTES

__all__ = ["Bordered", "Window"]


@dataclass(frozen=True)
class Window:
    """The taps of a convolution or pooling, height before width.

    Attributes:
        size: Taps.
        strides: Pixels of the image from result to result.
        dilations: Pixels from tap to tap.
        pads: Border before and behind: top, left, bottom, right.
    """

    size: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)

    def result(self, height: int, width: int) -> tuple[int, int]:
        """Sizes of the result for an image."""
        return tuple(
            (size + self.pads[i] + self.pads[i + 2] - self.dilations[i] * (self.size[i] - 1) - 1) // self.strides[i] + 1
            for i, size in enumerate((height, width))
        )  # pyright: ignore[reportReturnType]

    def inside(self, index: Any, axis: int, size: int) -> tuple[Any, Any, Any]:
        """For one result along an axis: where its first tap lies, and its first and last tap inside of the image."""
        dilation = self.dilations[axis]
        first = bind(index * self.strides[axis] - self.pads[axis])
        least = bind(tirx.max(0, tirx.truncdiv(dilation - 1 - first, dilation)))
        most = bind(tirx.min(self.size[axis], tirx.truncdiv(size - first + dilation - 1, dilation)))
        return first, least, most


@dataclass(frozen=True)
class Bordered:
    """Copied rows of an image, with their border.

    In bands, groups of two results alternate: behind a group of elements along k, as instructions take them, lies the
    group that the next result sees through the same tap. Every element then lies there twice.

    Attributes:
        multiply: What they are copied for.
        window: Taps.
        height: Of an image, in pixels.
        width: Of an image, in pixels.
        channels: Of a pixel.
        source_pitch: Elements from pixel to pixel of the image.
        border: What is around it; None: a parameter tells it.
        in_bands: Results are paired; channels are whole groups.
    """

    multiply: Multiply
    window: Window
    height: int
    width: int
    channels: int
    source_pitch: int
    border: int | None
    in_bands: bool

    @cached_property
    def row(self) -> int:
        """Elements from row to row, those that lie there twice counted once."""
        row = (self.window.pads[1] + self.width + self.window.pads[3]) * self.channels
        row = -(-row // self._lanes) * self._lanes
        return row + self._lanes if row * self.multiply.element_bytes % SET_BYTES == 0 else row

    @property
    def times(self) -> int:
        """How often an element lies there."""
        return self.multiply.rows if self.in_bands else 1

    @property
    def first(self) -> int:
        """Where the first element lies, behind room for what the result before the first would see."""
        return self.times * self._apart if self.in_bands else 0

    @property
    def _apart(self) -> int:
        """Elements from one result to the next."""
        return self.window.strides[1] * self.channels

    @property
    def _lanes(self) -> int:
        return self.multiply.isa.vector_bits // (8 * self.multiply.element_bytes)

    def size(self, rows: int) -> int:
        """Elements that rows take."""
        return self.first + rows * self.row * self.times

    def copy(self, frame: Frame, image: Any, top: Any, rows: int) -> None:
        """Copy rows into scratch memory.

        Args:
            frame: Its parameters `source`, `scratch` and perhaps `border`.
            image: Number of the image.
            top: The first row, which may lie in the border.
            rows: How many.
        """
        left, row = self.window.pads[1] * self.channels, self.width * self.channels
        with loop(rows) as i:
            y, to = bind(top + i), bind(i * self.row)

            def inside(y: Any = y, to: Any = to) -> None:
                at = bind((image * self.height + y) * (self.width * self.source_pitch))
                self._fill(frame, to, left)
                if self.source_pitch == self.channels:
                    self._move(frame, to + left, at, row)
                else:
                    with loop(self.width) as x:
                        self._move(frame, to + left + x * self.channels, at + x * self.source_pitch, self.channels)
                self._fill(frame, to + left + row, self.row - left - row)

            either(tirx.all(y >= 0, y < self.height), inside, lambda to=to: self._fill(frame, to, self.row))

    def _fill(self, frame: Frame, to: Any, count: int) -> None:
        border = frame["border"][0] if self.border is None else constant(self.border, self.multiply.activation)
        each_vector(count, self._step, lambda i, n: self._put(frame, spread(border, n), to + i, n))

    def _move(self, frame: Frame, to: Any, at: Any, count: int) -> None:
        each_vector(count, self._step, lambda i, n: self._put(frame, load(frame["source"], at + i, n), to + i, n))

    @property
    def _step(self) -> int:
        """Elements that are copied together."""
        return self.multiply.group if self.in_bands else self._lanes

    def _put(self, frame: Frame, value: Any, to: Any, count: int) -> None:
        """Write elements; in bands to where a result sees them, and where the one before it has its neighbour."""
        if self.in_bands:
            value = bind(value)
            store(frame["scratch"], value, to * self.times + self.multiply.group, count)
        store(frame["scratch"], value, to * self.times + self.first, count)
