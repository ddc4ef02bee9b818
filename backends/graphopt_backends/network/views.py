"""Tensors as views of memory: what moves elements in ONNX mostly moves none here.

Transposing, slicing, splitting and most reshaping make another view of the same buffer. Elements are copied only where
a kernel cannot read a view as it lies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

__all__ = ["Buffer", "View", "contiguous_strides"]

Origin = Literal["input", "output", "weight", "temporary"]


@dataclass(eq=False)
class Buffer:
    """A piece of memory.

    Attributes:
        dtype: NumPy name of the element type.
        size: Elements.
        origin: Where it lies: with the caller, in the weights, or in the workspace.
        name: Of an input or output.
        offset: Bytes from the beginning of the weights to a weight.
    """

    dtype: str
    size: int
    origin: Origin = "temporary"
    name: str = ""
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.size * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class View:
    """Elements of a buffer as a tensor.

    Attributes:
        buffer: Where they lie.
        shape: Sizes of the axes.
        strides: Elements from one to the next along each axis; 0 repeats one.
        offset: Elements before the first.
    """

    buffer: Buffer
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @property
    def dtype(self) -> str:
        """Element type."""
        return self.buffer.dtype

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def rank(self) -> int:
        """Axes."""
        return len(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Elements follow one another in the order of the axes."""
        return _normal(self.shape, self.strides) == _normal(self.shape, contiguous_strides(self.shape))

    @property
    def is_dense(self) -> bool:
        """Elements fill their memory in some order of the axes."""
        order = self.order
        return self.permuted(order).is_contiguous

    @property
    def order(self) -> tuple[int, ...]:
        """Axes from the slowest to the fastest in memory; of axes of one element, and of equal ones, as they stand."""
        return tuple(sorted(range(self.rank), key=lambda i: (-self.strides[i] if self.shape[i] > 1 else -math.inf, i)))

    def permuted(self, axes: Sequence[int]) -> View:
        """The same elements with other axes first."""
        return replace(self, shape=tuple(self.shape[i] for i in axes), strides=tuple(self.strides[i] for i in axes))

    def sliced(self, axis: int, start: int, size: int, step: int = 1) -> View:
        """A part along one axis; a negative step goes backwards."""
        shape, strides = list(self.shape), list(self.strides)
        shape[axis], strides[axis] = size, strides[axis] * step
        offset = self.offset + start * self.strides[axis]
        return replace(self, shape=tuple(shape), strides=tuple(strides), offset=offset)

    def broadcast(self, shape: Sequence[int]) -> View:
        """Repeated to a shape by the rules of ONNX."""
        missing = len(shape) - self.rank
        own, strides = (1,) * missing + self.shape, (0,) * missing + self.strides
        repeated = tuple(0 if have == 1 and want != 1 else s for have, want, s in zip(own, shape, strides, strict=True))
        return replace(self, shape=tuple(shape), strides=repeated)

    def reshaped(self, shape: Sequence[int]) -> View | None:
        """The same elements, in order, with other axes; None where only a copy can have them."""
        strides = _reshaped_strides(self.shape, self.strides, tuple(shape))
        return None if strides is None else replace(self, shape=tuple(shape), strides=strides)


def contiguous_strides(shape: Sequence[int], order: Sequence[int] | None = None) -> tuple[int, ...]:
    """Strides of elements that follow one another.

    Args:
        shape: Sizes of the axes.
        order: Axes from the slowest to the fastest; None: as they stand.
    """
    strides, step = [0] * len(shape), 1
    for axis in reversed(order if order is not None else range(len(shape))):
        strides[axis] = step
        step *= max(1, shape[axis])
    return tuple(strides)


def _normal(shape: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    return [(size, stride) for size, stride in zip(shape, strides, strict=True) if size != 1]


def _reshaped_strides(
    shape: tuple[int, ...], strides: tuple[int, ...], wanted: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Match runs of axes with equal products; inside of each, the old ones must be contiguous."""
    if math.prod(shape) == 0 or math.prod(wanted) == 0:
        return contiguous_strides(wanted)
    old = _normal(shape, strides)
    found: list[int] = []
    i = j = 0
    while i < len(old) or j < len(wanted):
        if j < len(wanted) and wanted[j] == 1:
            found.append(0)
            j += 1
            continue
        if i >= len(old) or j >= len(wanted):
            return None
        first, start = i, j
        have, want = old[i][0], wanted[j]
        i, j = i + 1, j + 1
        while have != want:
            if have < want:
                have *= old[i][0]
                i += 1
            else:
                want *= wanted[j]
                j += 1
        for (_, outer), (size, inner) in zip(old[first:i], old[first + 1 : i], strict=False):
            if outer != size * inner:
                return None
        step, part = old[i - 1][1], list[int]()
        for size in reversed(wanted[start:j]):
            part.insert(0, step)
            step *= size
        found += part
    return tuple(found)
