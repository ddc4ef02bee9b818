"""Convolutions of bytes by AMX: tiles of neighbouring pixels of a row; see `tiles.py`.

A tile of activations is read where the image lies, one pixel a row, for every tap and all channels in turn. What lies
where, how images get a border and how work is shared is as in `Conv`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from graphopt_backends.kernels.conv import Conv
from graphopt_backends.kernels.emit import Frame, bind, either, loop, tirx
from graphopt_backends.kernels.gemm import pack_matrix
from graphopt_backends.kernels.tiles import (
    ACROSS,
    COLUMNS,
    CONFIGURATION_BYTES,
    GROUP,
    LINE_BYTES,
    WIDTH,
    Block,
    Chunks,
    configured,
    sixteenths,
    tiles_pay,
)

__all__ = ["TileConv"]


@dataclass(frozen=True)
class TileConv(Conv):
    """Y = epilogue(X convolved with W) on bytes, for one group of channels; see `Conv`."""

    @property
    def pays(self) -> bool:
        """True if tiles are faster than vectors."""
        return self.groups == 1 and tiles_pay(self.isa, self.kind, self.tile[1], self.filters, self._run)

    @cached_property
    def tile(self) -> tuple[int, int, int]:
        """Rows and columns of pixels, and vectors, of a tile."""
        return 1, sixteenths(self.result_size[1])[1], WIDTH // self.multiply.lanes

    @cached_property
    def chunks(self) -> Chunks:
        """Tiles along a run."""
        return Chunks(self._run)

    @cached_property
    def block(self) -> Block:
        """Tiles that are multiplied together."""
        high = min(ACROSS, self.result_size[0] * self._across)
        return Block(self.kind, high, self.tile[1], self.chunks.length)

    @property
    def _across(self) -> int:
        """Tiles of a row of pixels."""
        return sixteenths(self.result_size[1])[0]

    @cached_property
    def _packed_run(self) -> int:
        return self.chunks.count * self.chunks.length

    @property
    def _tiles_at(self) -> int:
        """Where the configuration lies in scratch memory, behind the image."""
        image = self._band_rows * self._row if self._copies else 0
        return -(-image // CONFIGURATION_BYTES) * CONFIGURATION_BYTES

    @cached_property
    def _lines(self) -> int:
        """Cache lines of the next panel that come with every tile along k; none where all weights stay in the cache."""
        stays = self._group_panels * WIDTH * self.packed_depth <= self.isa.level2_bytes // 2
        return 0 if stays else self.block.lines(-(-self._band * self._across // self.block.high))

    @property
    def scratch(self) -> int:
        """Bytes of memory that every task needs for itself."""
        return self._tiles_at + CONFIGURATION_BYTES + self.block.sum_bytes

    def pack(self, weight: np.ndarray) -> np.ndarray:
        """Lay out a weight [filters, channels, height, width] as this kernel reads it."""
        runs = weight.transpose(2, 3, 1, 0).reshape(self.window.size[0] * self._runs, self._run, -1)
        filters = -(-self.filters // WIDTH) * WIDTH
        padded = np.zeros((self.packed_depth, filters), weight.dtype)
        padded[:, : self.filters] = np.concatenate([self.chunks.cut(run) for run in runs])
        return pack_matrix(padded, COLUMNS, GROUP)

    def _body(self, frame: Frame) -> None:
        with configured(self.block, frame["scratch"], self._tiles_at):
            super()._body(frame)

    def _rows_of_band(self, frame: Frame, image: Any, band: Any, blocks: Any, panel: Any) -> None:
        """Tiles are numbered along the rows of the band; the last of an odd number is computed twice."""
        count = bind(blocks * self._across)
        whole, rest = divmod(self.filters, WIDTH)
        full, narrow = self.block, replace(self.block, columns=rest or WIDTH)
        with loop(tirx.truncdiv(count + (self.block.high - 1), self.block.high)) as number:
            first, last = bind(number * self.block.high), bind(count - 1)

            def multiplied(block: Block) -> None:
                self._tiles(frame, block, _Place(image, band, panel, number, first, last))

            if not rest or not whole:
                multiplied(narrow)
            else:
                either(panel < whole, lambda: multiplied(full), lambda: multiplied(narrow))

    def _tiles(self, frame: Frame, block: Block, place: _Place) -> None:
        strides, dilations, size = self.window.strides, self.window.dilations, self.window.size
        column = bind(place.panel * WIDTH)
        rows = [bind(self._start(place, i)) for i in range(block.high)]
        weights = [bind((place.panel * ACROSS + j) * (self.packed_depth * COLUMNS)) for j in range(block.wide)]
        turn_bytes = self.packed_depth // block.length * self._lines * LINE_BYTES
        next_panel = (place.panel + 1) * (self.packed_depth * WIDTH)
        ahead = bind(next_panel + place.turn * turn_bytes) if self._lines else 0
        block.begin(frame["bias"] if self.epilogue.bias else None, column)
        with loop(size[0]) as y, loop(self._runs) as x, loop(self.chunks.count) as chunk:
            tap = bind(y * (dilations[0] * self._row) + x * (dilations[1] * self._pixel) + self.chunks.start(chunk))
            tile = bind((y * self._runs + x) * self.chunks.count + chunk)
            below = bind(tile * block.weight_bytes)
            block.fetch(frame["weight"], ahead + tile * (self._lines * LINE_BYTES), self._lines)
            left, right = [row + tap for row in rows], [weight + below for weight in weights]
            source = frame["scratch"] if self._copies else frame["source"]
            block.add(source, left, strides[1] * self._pixel, frame["weight"], right)
        sums = self._tiles_at + CONFIGURATION_BYTES
        block.put(frame["scratch"], sums)
        pitch = self.result_pitch or self.filters
        block.finish(frame, self.multiply, self.epilogue, sums, lambda i: self._pixel_of(place, i), pitch, column)

    def _where(self, place: _Place, number: Any) -> tuple[Any, Any]:
        """Row in its band, and first column, of one of the tiles that are multiplied together."""
        tile = bind(tirx.min(place.first + number, place.last))
        y, x = bind(tirx.truncdiv(tile, self._across)), bind(tirx.truncmod(tile, self._across) * self.block.height)
        over = self.result_size[1] - self.block.height
        return y, tirx.min(x, over) if over % self.block.height else x

    def _start(self, place: _Place, number: Any) -> Any:
        """The first element of a tile for the first tap."""
        y, x = self._where(place, number)
        if not self._copies:
            y = y + place.band * self._band
        row = y * (self.window.strides[0] * self._row) + x * (self.window.strides[1] * self._pixel)
        return row if self._copies else row + place.image * (self.height * self._row)

    def _pixel_of(self, place: _Place, number: Any) -> Any:
        """Number of the first pixel of a tile in the result."""
        y, x = self._where(place, number)
        height, width = self.result_size
        return (place.image * height + place.band * self._band + y) * width + x


@dataclass(frozen=True)
class _Place:
    """Where tiles lie.

    Attributes:
        image: Their image.
        band: Their band of rows.
        panel: Panel of filters.
        turn: How many tiles of the band, taken together, come before.
        first: The number of the first one in the band.
        last: That of the band's last one.
    """

    image: Any
    band: Any
    panel: Any
    turn: Any
    first: Any
    last: Any
