"""Union-find over whole arrays of integers, for index maps with millions of entries."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["Indices", "Partition"]

Indices = np.ndarray[Any, np.dtype[np.int64]]


class Partition:
    """Disjoint sets of atoms 0, 1, 2, ...; a set may carry a mark, which survives a union.

    The smallest atom names its set, so that results do not depend on the order of unions.
    """

    def __init__(self) -> None:
        self._parent: Indices = np.arange(1024, dtype=np.int64)
        self._marked = np.zeros(1024, dtype=np.bool_)
        self._used = 0

    def __len__(self) -> int:
        return self._used

    def new(self, count: int) -> Indices:
        """Make `count` atoms, each a set of its own."""
        start, self._used = self._used, self._used + count
        if self._used > len(self._parent):
            size = max(self._used, 2 * len(self._parent))
            self._parent = np.concatenate([self._parent, np.arange(len(self._parent), size, dtype=np.int64)])
            self._marked = np.concatenate([self._marked, np.zeros(size - len(self._marked), dtype=np.bool_)])
        return np.arange(start, self._used, dtype=np.int64)

    def find(self, atoms: Indices) -> Indices:
        """The names of the sets that hold `atoms`."""
        roots = self._parent[atoms]
        while True:
            above = self._parent[roots]
            if (above == roots).all():
                self._parent[atoms] = roots
                return roots
            roots = above

    def unite(self, left: Indices, right: Indices) -> None:
        """Join the sets of `left[i]` and `right[i]` for every i."""
        a, b = self.find(left), self.find(right)
        apart = a != b
        if not apart.any():
            return
        left, right = a[apart], b[apart]
        marked = self._marked[left] | self._marked[right]
        a, b = left, right
        while apart.any():
            np.minimum.at(self._parent, np.maximum(a, b), np.minimum(a, b))
            a, b = self.find(left), self.find(right)
            apart = a != b
        np.logical_or.at(self._marked, a, marked)

    def mark(self, atoms: Indices) -> None:
        """Mark the sets that hold `atoms`."""
        self._marked[self.find(atoms)] = True

    def marked(self, atoms: Indices) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Whether the set of each atom is marked."""
        return self._marked[self.find(atoms)]
