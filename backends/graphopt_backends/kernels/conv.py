"""Convolutions over images whose channels lie together (NHWC), as products without unfolding the image.

A tile of a result is a rectangle of pixels times some vectors of filters. All its sums walk along the same rows of the
kernel window at once; where neighbouring taps are neighbours in memory, along all of a row's taps in one go. Images
with a border are copied into scratch memory band by band, so that the loops need no conditions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from graphopt.targets import Isa
from graphopt_backends.kernels.emit import (
    Frame,
    Pointer,
    bind,
    cast,
    either,
    known_late,
    loop,
    primitive,
    share,
    splits,
    tirx,
    when,
)  # fmt: skip
from graphopt_backends.kernels.epilogue import PLAIN, Epilogue, Result, begin, finish
from graphopt_backends.kernels.gemm import pack_columns, pack_matrix
from graphopt_backends.kernels.kernel import Kernel
from graphopt_backends.kernels.multiply import Kind, Multiply, Stored
from graphopt_backends.kernels.tile import Panel, Rows, Tiles, Walk, accumulate, rectangle_of, whole_bands
from graphopt_backends.kernels.window import Bordered, Window

__all__ = ["Conv", "Window"]

_UNITS = 4  # for each core, where some have one more than others
_NEAR_BYTES = 1024  # how far behind an address ARM CPUs load two vectors at once


@dataclass(frozen=True)
class Conv(Kernel):
    """Y = epilogue(X convolved with W), for one or more groups of channels.

    Attributes:
        isa: The CPU.
        kind: Element types.
        batch: Images.
        height: Of an image, in pixels.
        width: Of an image, in pixels.
        channels: Of the image.
        filters: Channels of the result.
        window: Taps.
        groups: Parts of the channels that are convolved separately.
        epilogue: What happens to the sums.
        border: What the border is filled with: the zero point of integers; None: a parameter tells it.
        source_pitch: Elements from pixel to pixel of the image; 0: `channels`.
        result_pitch: Elements from pixel to pixel of the result; 0: `filters`.
        stored: What weights are stored as, if they are floats.
    """

    isa: Isa
    kind: Kind
    batch: int
    height: int
    width: int
    channels: int
    filters: int
    window: Window
    groups: int = 1
    epilogue: Epilogue = PLAIN
    border: int | None = 0
    source_pitch: int = 0
    result_pitch: int = 0
    stored: Stored = "float32"

    @cached_property
    def multiply(self) -> Multiply:
        """Its inner loop."""
        return Multiply(self.isa, self.kind, self.stored)

    @cached_property
    def result_size(self) -> tuple[int, int]:
        """Height and width of the result."""
        return self.window.result(self.height, self.width)

    @cached_property
    def tile(self) -> tuple[int, int, int]:
        """Rows and columns of pixels, and vectors, of a register tile."""
        vectors = -(-self._group_filters // self.multiply.lanes)
        return rectangle_of(self.multiply, *self.result_size, vectors, bands=self._in_bands)

    @property
    def _group_channels(self) -> int:
        return self.channels // self.groups

    @property
    def _group_filters(self) -> int:
        return self.filters // self.groups

    @property
    def _panel(self) -> int:
        """Columns of a panel of the packed weight."""
        return self.tile[2] * self.multiply.lanes

    @property
    def _group_panels(self) -> int:
        return -(-self._group_filters // self._panel)

    @property
    def _in_bands(self) -> bool:
        """Pixels are brought together as instructions take them: where a tap begins, a group of elements begins."""
        return self.multiply.rows > 1 and self._group_channels % self.multiply.group == 0

    @property
    def _copies(self) -> bool:
        return self._in_bands or any(self.window.pads)

    @cached_property
    def _copied(self) -> Bordered:
        pitch = self.source_pitch or self.channels
        return Bordered(
            self.multiply, self.window, self.height, self.width, self.channels, pitch, self.border, self._in_bands
        )

    @property
    def _times(self) -> int:
        """How often an element lies where the loops read."""
        return self._copied.times if self._copies else 1

    @cached_property
    def _pixel(self) -> int:
        """Elements from pixel to pixel where the loops read."""
        return self.channels if self._copies else self.source_pitch or self.channels

    @cached_property
    def _row(self) -> int:
        """Elements from row to row where the loops read."""
        return self._copied.row if self._copies else self.width * self._pixel

    @cached_property
    def _run(self) -> int:
        """Consecutive elements along k."""
        merged = self.groups == 1 and self.window.dilations[1] == 1 and self._pixel == self.channels
        return self.window.size[1] * self.channels if merged else self._group_channels

    @cached_property
    def _packed_run(self) -> int:
        group = self.multiply.group
        return -(-self._run // group) * group

    @cached_property
    def _runs(self) -> int:
        """Runs that a row of the window consists of."""
        return self.window.size[1] * self._group_channels // self._run

    @property
    def packed_depth(self) -> int:
        """Rows of the packed weight."""
        return self.window.size[0] * self._runs * self._packed_run

    @cached_property
    def _blocks(self) -> Tiles:
        """Blocks of rows of the result."""
        return Tiles(self.result_size[0], self.tile[0])

    @cached_property
    def _band(self) -> int:
        """Blocks of a band: what the loops read for it takes half of the cache, and bands suffice for all cores."""
        count, panels, bands = self._blocks.count, self.batch * self.groups * self._group_panels, 1
        if self._copies:
            row = self._row * self._times * self.multiply.element_bytes
            rows = max(1, self.isa.level2_bytes // 2 // row - self._reach)
            bands = -(-count // max(1, rows // (self.tile[0] * self.window.strides[0])))
        enough = _UNITS * self.isa.cores
        while bands < count and bands * panels < enough and bands * panels % self.isa.cores:
            bands += 1
        return -(-count // bands)

    @property
    def _reach(self) -> int:
        """Rows of the image below the first that a row of the result sees."""
        return self.window.dilations[0] * (self.window.size[0] - 1)

    @property
    def _bands(self) -> int:
        return -(-self._blocks.count // self._band)

    @property
    def _band_rows(self) -> int:
        """Rows of the image that a band needs at most."""
        return (self._band * self._blocks.highest - 1) * self.window.strides[0] + self._reach + 1

    @cached_property
    def _pace(self) -> int:
        """Weights of the next panel fetched for each k of a tile; ARM CPUs see by themselves what comes next."""
        weight = self.groups * self._group_panels * self._panel * self.packed_depth * self.multiply.weight_bytes
        stays = self.isa.lane_operands or weight <= self.isa.level2_bytes // 2
        return 0 if stays else -(-self._panel // (self._band * self._row_tiles))

    @cached_property
    def _row_tiles(self) -> int:
        """Tiles of a block of rows."""
        return sum(tiles[1] for tiles in splits(self.result_size[1], self.tile[1]))

    @property
    def scratch(self) -> int:
        """Bytes of memory that every task needs for itself."""
        return self._copied.size(self._band_rows) * self.multiply.element_bytes if self._copies else 0

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        pixels = self.batch * self.result_size[0] * self.result_size[1]
        return 2 * pixels * self.filters * self._group_channels * self.window.size[0] * self.window.size[1]

    def pack(self, weight: np.ndarray) -> np.ndarray:
        """Lay out a weight [filters, channels / groups, height, width] as this kernel reads it."""
        parts: list[np.ndarray] = []
        for part in np.split(weight, self.groups):
            rows = part.transpose(2, 3, 1, 0).reshape(self.window.size[0] * self._runs, self._run, -1)
            padded = np.zeros((rows.shape[0], self._packed_run, rows.shape[2]), weight.dtype)
            padded[:, : self._run] = rows
            matrix = padded.reshape(self.packed_depth, -1)
            packed = pack_matrix(matrix, self._panel, self.multiply.group)
            parts.append(self.multiply.arranged(packed))
        return np.concatenate(parts)

    def pack_column(self, values: np.ndarray) -> np.ndarray:
        """Lay out numbers for each filter."""
        padded = self._group_panels * self._panel
        return np.concatenate([pack_columns(part, padded) for part in np.split(values.reshape(-1), self.groups)])

    def primitive(self, name: str) -> Any:
        """The function: (source, weight, bias?, operands..., border?, result, scratch?, task, tasks)."""
        multiply, padded = self.multiply, self.groups * self._group_panels * self._panel
        pixels, pitch = self.batch * self.result_size[0] * self.result_size[1], self.result_pitch or self.filters
        image = (self.batch * self.height * self.width - 1) * (self.source_pitch or self.channels) + self.channels
        pointers = [
            Pointer("source", multiply.activation, image),
            Pointer("weight", multiply.weight, padded * self.packed_depth),
            *self.epilogue.pointers(multiply, pixels, self.filters, padded),
            *([Pointer("border", multiply.activation, 1)] if self.border is None else []),
            Pointer("result", self.epilogue.dtype, (pixels - 1) * pitch + self.filters),
        ]
        if self.scratch:
            pointers.append(Pointer("scratch", multiply.activation, self.scratch // self.multiply.element_bytes))
        return primitive(name, pointers, self._body)

    def _body(self, frame: Frame) -> None:
        panels = self.groups * self._group_panels
        with share(frame, self.batch * self._bands * panels) as (unit, first):
            panel = bind(tirx.truncmod(unit, panels))
            band = bind(tirx.truncmod(tirx.truncdiv(unit, panels), self._bands))
            image = bind(tirx.truncdiv(unit, panels * self._bands))
            if self._copies:
                when(tirx.any(panel == 0, unit == first), lambda: self._copy(frame, image, band))
            count = self._blocks.count
            blocks = bind(tirx.min(self._band, count - band * self._band)) if self._bands > 1 else count
            self._rows_of_band(frame, image, band, blocks, panel)

    def _rows_of_band(self, frame: Frame, image: Any, band: Any, blocks: Any, panel: Any) -> None:
        with loop(blocks) as i:
            self._block(frame, image, band, i, panel)

    def _copy(self, frame: Frame, image: Any, band: Any) -> None:
        """Copy the rows of the image that a band needs."""
        top = self._blocks.start(band * self._band) * self.window.strides[0] - self.window.pads[0]
        self._copied.copy(frame, image, bind(top), self._band_rows)

    def _block(self, frame: Frame, image: Any, band: Any, number: Any, panel: Any) -> None:
        block = bind(band * self._band + number)
        row = bind(self._blocks.start(block))
        if self._copies:
            below = row - self._blocks.start(band * self._band)
            start = bind(below * (self.window.strides[0] * self._row * self._times) + self._copied.first)
        else:
            start = bind((image * self.height + row * self.window.strides[0]) * self._row)
        ahead = 0
        if self._pace:
            below = (panel + 1) * (self.packed_depth * self._panel)
            ahead = bind(below + number * (self._row_tiles * self.packed_depth * self._pace))
        place = _Place(image, row, start, panel, ahead)
        self._blocks.visit(block, lambda _, high: self._columns(frame, place, high))

    def _columns(self, frame: Frame, place: _Place, high: int) -> None:
        before = 0
        for first, count, wide in splits(self.result_size[1], self.tile[1]):
            with loop(count) as i:
                ahead = place.ahead + (before + i) * (self.packed_depth * self._pace)
                self._panels(frame, replace(place, ahead=ahead), high, wide, first + i * wide)
            before += count

    def _panels(self, frame: Frame, place: _Place, high: int, wide: int, column: Any) -> None:
        """The last panel of a group may have fewer filters."""
        whole, rest = divmod(self._group_filters, self._panel)
        if not rest or not whole:
            self._tile(frame, place, high, wide, column, rest or self._panel)
        else:
            either(
                tirx.truncmod(place.panel, self._group_panels) < whole,
                lambda: self._tile(frame, place, high, wide, column, self._panel),
                lambda: self._tile(frame, place, high, wide, column, rest),
            )

    def _tile(self, frame: Frame, place: _Place, high: int, wide: int, column: Any, filters: int) -> None:
        multiply = self.multiply
        vectors = -(-filters // multiply.lanes)
        totals = begin(frame, multiply, self.epilogue, high * wide, vectors, place.panel * self._panel)
        start = place.start + column * (self._times * self.window.strides[1] * self._pixel)
        group: Any = 0
        if self.groups > 1:
            group = bind(tirx.truncdiv(place.panel, self._group_panels))
            start = start + group * (self._times * self._group_channels)
        weight = place.panel * (self.packed_depth * self._panel)
        ahead = bind(place.ahead) if self._pace else 0
        panel = Panel(frame["weight"], bind(weight), self._panel, ahead, self._pace)
        sums = totals
        if self._in_bands:  # of pixels of one row
            lines = [whole_bands(multiply, totals[y * wide : (y + 1) * wide]) for y in range(high)]
            sums = [row for line in lines for row in line]
        accumulate(multiply, sums, self._pixels(frame, bind(start), high, wide), panel, self._walks())
        first_filter = place.panel * self._panel
        if self.groups > 1:
            first_filter = group * self._group_filters + (place.panel - group * self._group_panels) * self._panel
        size, pitch = self.result_size, self.result_pitch or self.filters
        corner = (place.image * size[0] + place.row) * size[1] + column
        rows = [corner + y * size[1] + x for y in range(high) for x in range(wide)]
        at = [row * pitch + first_filter for row in rows]
        finish(frame, multiply, self.epilogue, totals, Result(at, rows, first_filter, filters))

    def _pixels(self, frame: Frame, start: Any, high: int, wide: int) -> Rows:
        """Activations of a tile: of its pixels, or of bands of them."""
        down, right = (
            stride * size for stride, size in zip(self.window.strides, (self._row, self._pixel), strict=True)
        )
        step = self.multiply.rows if self._in_bands else 1
        offsets: list[Any] = [
            self._times * (y * down + x * right) for y in range(high) for x in range(0, wide, step)
        ]  # fmt: skip
        if not self._in_bands:
            return Rows(frame["scratch"] if self._copies else frame["source"], start, offsets)
        if offsets[-1] > _NEAR_BYTES:
            offsets = [cast(known_late(frame, offset), "int64", 1) for offset in offsets]
        return Rows(frame["scratch"], start, offsets, self._times)

    def _walks(self) -> Sequence[Walk]:
        size, dilations = self.window.size, self.window.dilations
        walks = [(size[0], dilations[0] * self._row, self._runs * self._packed_run)] if size[0] > 1 else []
        if self._runs > 1:
            walks.append((self._runs, dilations[1] * self._pixel, self._packed_run))
        return [*walks, (self._run, 1, 1)]


@dataclass(frozen=True)
class _Place:
    """Where a block of rows lies.

    Attributes:
        image: Its image.
        row: First row of the result.
        start: Where that begins in memory.
        panel: Panel of filters.
        ahead: Weights that are needed when this panel is done.
    """

    image: Any
    row: Any
    start: Any
    panel: Any
    ahead: Any
