"""Which weights of a tensor share a codebook."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt_passes.quant.blockwise.layout import Layout

__all__ = ["Cut", "cut_of"]

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Cut:
    """A tensor cut into groups of neighbouring channels.

    Attributes:
        shape: Of the tensor.
        axis: Axis of the channels.
        groups: How many there are, of equal size.
        width: Weights that one code stands for, neighbours in memory; 1 where there are several groups.
    """

    shape: tuple[int, ...]
    axis: int
    groups: int = 1
    width: int = 1

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def codes(self) -> int:
        """Number of codes."""
        return self.size // self.width

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Shape that codes are stored in.

        That of the tensor where it has one codebook, or is a matrix with one for each row or column: then the lookup
        makes the tensor as it is. Else groups, each with its codes in order; those of vectors are cut into rows, as
        weights are, if they fill them.
        """
        if self.width > 1:
            rows = 1 if self.codes % self.shape[0] else self.shape[0]
            return rows, self.codes // rows
        return self.shape if self.is_plain else (self.groups, self.codes // self.groups)

    @property
    def is_plain(self) -> bool:
        """A lookup of codes in the shape of the tensor makes the tensor."""
        single = self.groups == 1 and self.width == 1
        return single or (len(self.shape) == 2 and self.groups == self.shape[self.axis])

    @property
    def moved(self) -> tuple[int, ...]:
        """Shape of the tensor with its channels first."""
        return self.shape[self.axis], *(size for i, size in enumerate(self.shape) if i != self.axis)

    def split(self, tensor: Array) -> Array:
        """`[groups, members]`; a view where it can be."""
        if self.groups == 1:
            return tensor.reshape(1, -1)
        return np.moveaxis(tensor, self.axis, 0).reshape(self.groups, -1)

    def join(self, members: Array) -> Array:
        """The tensor again."""
        if self.groups == 1:
            return members.reshape(self.shape)
        return np.ascontiguousarray(np.moveaxis(members.reshape(self.moved), 0, self.axis))

    def owner(self, layout: Layout) -> Array:
        """`[outputs]` group of each column of the tensor as a matrix, whose inputs all have the same."""
        if self.groups == 1:
            return np.zeros(layout.outputs, np.int32)
        ids = np.arange(self.groups, dtype=np.int32).repeat(self.shape[self.axis] // self.groups)
        spread = ids.reshape([-1 if i == self.axis else 1 for i in range(len(self.shape))])
        return layout.matrix(np.broadcast_to(spread, self.shape))[0].copy()


def cut_of(shape: tuple[int, ...], axis: int, channels: int, width: int) -> Cut:
    """Groups of `channels` channels, or of the next smaller number that all groups can have; 0: one group."""
    if channels == 0 or channels >= shape[axis]:
        return Cut(shape, axis, 1, width)
    fits = max(number for number in range(1, channels + 1) if shape[axis] % number == 0)
    return Cut(shape, axis, shape[axis] // fits, width)
