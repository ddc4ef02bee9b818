"""Images read at places that a grid names (NHWC): optical flow, spatial transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graphopt.targets import Isa
from graphopt_backends.kernels.emit import (
    Frame,
    Pointer,
    bind,
    cast,
    constant,
    load_first,
    loop,
    primitive,
    share,
    spread,
    store_first,
    tirx,
)
from graphopt_backends.kernels.functions import at_least, at_most
from graphopt_backends.kernels.kernel import Kernel

__all__ = ["Sample"]


@dataclass(frozen=True)
class Sample(Kernel):
    """Y[n, i, j] = X[n] at the place G[n, i, j], float32.

    Places run from -1 to 1 along both axes, width before height.

    Attributes:
        isa: The CPU.
        batch: Images.
        size: Height and width of an image.
        channels: Of an image.
        result_size: Height and width of the result.
        linear: Neighbours are weighted by their distance, instead of taking the nearest pixel.
        border: Places outside of the image are moved to its border, instead of being 0.
        corners: -1 and 1 are the middles of the outermost pixels, instead of their edges.
        source_pitch: Elements from pixel to pixel of the image.
    """

    isa: Isa
    batch: int
    size: tuple[int, int]
    channels: int
    result_size: tuple[int, int]
    linear: bool
    border: bool
    corners: bool
    source_pitch: int

    @property
    def operations(self) -> int:
        """Elements that are read."""
        return self.batch * self.result_size[0] * self.result_size[1] * self.channels * (4 if self.linear else 1)

    def primitive(self, name: str) -> Any:
        """The function: (source, grid, result, task, tasks)."""
        pixels, places = (self.batch * size[0] * size[1] for size in (self.size, self.result_size))
        pointers = [
            Pointer("source", "float32", (pixels - 1) * self.source_pitch + self.channels),
            Pointer("grid", "float32", 2 * places),
            Pointer("result", "float32", places * self.channels),
        ]
        return primitive(name, pointers, self._body)

    def _body(self, frame: Frame) -> None:
        lanes = self.isa.vector_bits // 32
        places = self.result_size[0] * self.result_size[1]
        with share(frame, self.batch * places) as (unit, _):
            image = bind(tirx.truncdiv(unit, places) * (self.size[0] * self.size[1]))
            x, y = (self._place(frame["grid"][(2 * unit + i,)], self.size[1 - i]) for i in (0, 1))
            across, down = self._neighbours(x, self.size[1]), self._neighbours(y, self.size[0])
            taps = [
                (bind((image + row * self.size[1] + column) * self.source_pitch), bind(a * b))
                for row, b in down
                for column, a in across
            ]
            whole, rest = divmod(self.channels, lanes)
            if whole:
                with loop(whole) as v:
                    self._vector(frame, unit, taps, v * lanes, lanes)
            if rest:
                self._vector(frame, unit, taps, whole * lanes, rest)

    def _place(self, at: Any, size: int) -> Any:
        """A place in pixels, not too far outside of the image for an integer."""
        if self.corners:
            place = (at + _number(1)) * _number((size - 1) / 2)
        else:
            place = (at + _number(1)) * _number(size / 2) - _number(0.5)
        least, most = (0, size - 1) if self.border else (-2, size + 1)
        return bind(at_most(at_least(bind(place), _number(least)), _number(most)))

    def _neighbours(self, place: Any, size: int) -> list[tuple[Any, Any]]:
        """Pixels along an axis and their weights; outside of the image the weight is 0."""
        if self.linear:
            floor = bind(tirx.floor(place))
            part = bind(place - floor)
            first = bind(cast(floor, "int32", 1))
            found = [(first, bind(_number(1) - part)), (bind(first + 1), part)]
        else:
            found = [(bind(cast(tirx.nearbyint(place), "int32", 1)), _number(1))]
        return [
            (
                bind(tirx.max(0, tirx.min(pixel, size - 1))),
                bind(tirx.Select(tirx.all(pixel >= 0, pixel < size), weight, _number(0))),
            )
            for pixel, weight in found
        ]

    def _vector(self, frame: Frame, unit: Any, taps: list[tuple[Any, Any]], channel: Any, count: int) -> None:
        lanes = self.isa.vector_bits // 32
        total = constant(0.0, "float32", lanes)
        for at, weight in taps:
            value = load_first(frame["source"], at + channel, lanes, count, "float32")
            total = bind(total + value * spread(weight, lanes))
        store_first(frame["result"], total, unit * self.channels + channel, lanes, count)


def _number(value: float) -> Any:
    return constant(value, "float32")
