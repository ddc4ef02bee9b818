"""A layer's input as rows, all of them, and the way back from rows to an input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from graphopt.analyses.windows import window_rows

__all__ = ["Windows"]


@dataclass(frozen=True)
class Windows:
    """Where a convolution without groups looks; with no axes, a matrix that reads the last axis.

    Attributes:
        kernel: Kernel sizes, one a spatial axis.
        strides: Of the windows.
        dilations: Of the kernel.
        pads: Zeros before and after each spatial axis.
    """

    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[tuple[int, int], ...] = ()

    @property
    def size(self) -> int:
        """Elements of the kernel."""
        return int(np.prod(self.kernel, dtype=np.int64))

    def rows(self, x: np.ndarray) -> np.ndarray:
        """`[rows, channels * kernel]` of an input `[samples, channels, *sizes]` (of a matrix: `[..., channels]`)."""
        if not self.kernel:
            return x.reshape(-1, x.shape[-1])
        if self.size == 1 and set(self.strides) == {1} and not any(map(any, self.pads)):
            return flat(x)
        rows = window_rows(x, self.kernel, self.strides, self.dilations, self.pads)
        return rows.reshape(len(rows), -1)

    def sizes(self, sizes: Sequence[int]) -> list[int]:
        """Spatial sizes of the output, from those of the input."""
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilations, self.kernel, strict=True)]
        padded = [size + sum(pads) for size, pads in zip(sizes, self.pads, strict=True)]
        return [(size - r) // s + 1 for size, r, s in zip(padded, reach, self.strides, strict=True)]

    def back(self, rows: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """The adjoint of `rows`: what each element of an input of this shape gets from the rows it is in."""
        if not self.kernel:
            return rows.reshape(shape)
        count, channels, *sizes = shape
        out = self.sizes(sizes)
        padded = [size + sum(pads) for size, pads in zip(sizes, self.pads, strict=True)]
        found = np.zeros((count, channels, *padded), dtype=rows.dtype)
        table = np.moveaxis(rows.reshape(count, *out, channels, *self.kernel), 1 + len(out), 1)
        for at in product(*map(range, self.kernel)):
            spots = tuple(
                slice(d * i, d * i + s * (n - 1) + 1, s)
                for i, d, s, n in zip(at, self.dilations, self.strides, out, strict=True)
            )
            found[(slice(None), slice(None), *spots)] += table[(..., *at)]
        inside = tuple(slice(before, before + size) for (before, _), size in zip(self.pads, sizes, strict=True))
        return found[(slice(None), slice(None), *inside)]

    def image(self, rows: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """Rows `[rows, channels]`, one a position, as an input of this shape."""
        if not self.kernel:
            return rows.reshape(shape)
        count, channels, *sizes = shape
        return np.ascontiguousarray(np.moveaxis(rows.reshape(count, *sizes, channels), -1, 1))

    def flat(self, x: np.ndarray) -> np.ndarray:
        """The way back from `image`: `[rows, channels]`."""
        return flat(x) if self.kernel else x.reshape(-1, x.shape[-1])


def flat(x: np.ndarray) -> np.ndarray:
    """`[samples, channels, *sizes]` as `[rows, channels]`."""
    return np.moveaxis(x, 1, -1).reshape(-1, x.shape[1])
