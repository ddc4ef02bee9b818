"""Copies that exchange two axes: squares of elements are turned in registers; whole rows are read and written."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.targets import Isa
from graphopt_backends.kernels.batched import begin_of, transposed
from graphopt_backends.kernels.emit import (
    Frame,
    Pointer,
    bind,
    constant,
    load_first,
    loop,
    primitive,
    reach,
    share,
    store_first,
    tirx,
    when,
)
from graphopt_backends.kernels.kernel import Kernel
from graphopt_backends.kernels.loops import merged_axes

__all__ = ["Transpose", "transpose_of"]

_RUN = 16  # squares of a unit of work along the longer axis, which are read or written one behind the other
_BESIDE = 4  # and along the other
_FEW = 4  # elements of an axis that are better shuffled than turned
_WORDS = {1: "uint8", 2: "uint16", 4: "float32", 8: "int64"}


@dataclass(frozen=True)
class Transpose(Kernel):
    """result[outer, i, j] = source[outer, i, j], where i is contiguous in the source and j in the result.

    Attributes:
        isa: The CPU.
        dtype: Element type; only its size counts.
        outer: Sizes of the other axes.
        sizes: Of i and j.
        source: Strides of the source: other axes, then j.
        result: Strides of the result: other axes, then i.
    """

    isa: Isa
    dtype: str
    outer: tuple[int, ...]
    sizes: tuple[int, int]
    source: tuple[int, ...]
    result: tuple[int, ...]

    @property
    def _lanes(self) -> int:
        """Side of a square; of bytes there are as many as 128 bits hold."""
        size = np.dtype(self.dtype).itemsize
        return 16 if size == 1 else 8 if size == 2 else self.isa.vector_bits // (8 * size)

    @property
    def _most(self) -> tuple[int, int]:
        """Squares along i and j that are a unit of work: CPUs fetch what comes next of few long runs, not of many."""
        return (_RUN, _BESIDE) if self.sizes[0] > self.sizes[1] else (_BESIDE, _RUN)

    @property
    def operations(self) -> int:
        """Elements."""
        return math.prod((*self.outer, *self.sizes))

    def primitive(self, name: str) -> Any:
        """The function: (source, result, task, tasks)."""
        height, width = self.sizes
        pointers = [
            Pointer("source", self.dtype, reach((*self.outer, width), self.source) + height),
            Pointer("result", self.dtype, reach((*self.outer, height), self.result) + width),
        ]
        return primitive(name, pointers, self._body)

    def _body(self, frame: Frame) -> None:
        chunks = [-(-size // (self._lanes * most)) for size, most in zip(self.sizes, self._most, strict=True)]
        square, undivided = self._square, None
        if self.sizes[1] <= _FEW and self.result[-1] == self.sizes[1]:
            square, undivided = self._woven, 1
        elif self.sizes[0] <= _FEW and self.source[-1] == self.sizes[0]:
            square, undivided = self._unwoven, 0
        if undivided is not None:
            chunks[undivided] = 1
        with share(frame, math.prod(self.outer) * chunks[0] * chunks[1]) as (unit, _):
            number = bind(tirx.truncdiv(unit, chunks[0] * chunks[1]))
            chunk_i = bind(tirx.truncmod(tirx.truncdiv(unit, chunks[1]), chunks[0]))
            chunk_j = bind(tirx.truncmod(unit, chunks[1]))
            source, result = (bind(begin_of(self.outer, number, strides)) for strides in (self.source, self.result))

            def each(axis: int, body: Callable[[Any, int], None]) -> None:
                if axis == undivided:
                    body(0, self.sizes[axis])
                else:
                    self._blocks(axis, chunks[axis], (chunk_i, chunk_j)[axis], body)

            def at(i: Any, high: int, j: Any, wide: int) -> None:
                square(
                    frame, bind(source + j * self.source[-1] + i), bind(result + i * self.result[-1] + j), high, wide
                )

            if self.sizes[0] > self.sizes[1]:
                each(1, lambda j, wide: each(0, lambda i, high: at(i, high, j, wide)))
            else:
                each(0, lambda i, high: each(1, lambda j, wide: at(i, high, j, wide)))

    def _blocks(self, axis: int, chunks: int, chunk: Any, body: Callable[[Any, int], None]) -> None:
        """Squares of a chunk along an axis, whole ones first."""
        lanes = self._lanes
        whole, rest = divmod(self.sizes[axis], lanes)
        if whole:
            first = bind(chunk * self._most[axis])
            last = bind(tirx.min(first + self._most[axis], whole))
            with loop(last - first if chunks > 1 else whole, first if chunks > 1 else 0) as block:
                body(bind(block * lanes), lanes)
        if rest and chunks > 1:
            when(chunk == chunks - 1, lambda: body(whole * lanes, rest))
        elif rest:
            body(whole * lanes, rest)

    def _square(self, frame: Frame, source: Any, result: Any, high: int, wide: int) -> None:
        lanes, dtype = self._lanes, self.dtype
        rows = [
            bind(load_first(frame["source"], source + j * self.source[-1], lanes, high, dtype))
            if j < wide
            else constant(0, dtype, lanes)
            for j in range(lanes)
        ]
        for i, row in enumerate(transposed(rows, lanes)[:high]):
            store_first(frame["result"], row, result + i * self.result[-1], lanes, wide)

    def _woven(self, frame: Frame, source: Any, result: Any, high: int, wide: int) -> None:
        """A few rows become one: their elements take turns."""
        lanes = self._lanes
        rows = [bind(load_first(frame["source"], source + j * self.source[-1], lanes, high, self.dtype))
                for j in range(wide)]  # fmt: skip
        for part in range(wide):
            order = [(place % wide) * lanes + place // wide for place in range(part * lanes, (part + 1) * lanes)]
            valid = min(lanes, high * wide - part * lanes)
            if valid > 0:
                value = _picked(rows, order)
                store_first(frame["result"], value, result + part * lanes, lanes, valid)

    def _unwoven(self, frame: Frame, source: Any, result: Any, high: int, wide: int) -> None:
        """One row becomes a few: its elements go to each in turn."""
        lanes = self._lanes
        parts = [
            bind(
                load_first(frame["source"], source + k * lanes, lanes, min(lanes, high * wide - k * lanes), self.dtype)
            )
            if k * lanes < high * wide
            else constant(0, self.dtype, lanes)
            for k in range(high)
        ]
        for i in range(high):
            value = _picked(parts, [lane * high + i for lane in range(lanes)])
            store_first(frame["result"], value, result + i * self.result[-1], lanes, wide)


def _picked(rows: Sequence[Any], order: Sequence[int]) -> Any:
    """A vector of elements of several, by their numbers in all of them; one more vector at a time."""
    lanes, found = len(order), rows[0]
    for k, row in enumerate(rows[1:], 1):
        indices: list[int] = []
        for place, wanted in enumerate(order):
            of, at = divmod(wanted, lanes)
            kept = at if k == 1 and not of else place
            indices.append(lanes + at if of == k else kept)
        found = bind(tirx.Shuffle([found, row], indices))
    return found


def transpose_of(
    isa: Isa, dtype: str, shape: Sequence[int], source: Sequence[int], result: Sequence[int]
) -> Transpose | None:
    """The kernel that copies elements between strides; None where no axis is contiguous on one side alone.

    Args:
        isa: The CPU.
        dtype: Element type.
        shape: Of both sides.
        source: Strides of what is read.
        result: Strides of what is written.
    """
    size = np.dtype(dtype).itemsize if dtype != "bool" else 1
    sizes, (read, written) = merged_axes(shape, [source, result])
    if written[-1] != 1 or read[-1] < 2 or 1 not in read or size not in _WORDS:
        return None
    inner = read.index(1)
    outer = [axis for axis in range(len(sizes) - 1) if axis != inner]
    return Transpose(
        isa, _WORDS[size], tuple(sizes[axis] for axis in outer), (sizes[inner], sizes[-1]),
        (*(read[axis] for axis in outer), read[-1]), (*(written[axis] for axis in outer), written[inner]),
    )  # fmt: skip
