"""Rows of a table by number: embeddings, and Gather along any axis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.targets import Isa
from graphopt_backends.kernels.emit import (
    Frame,
    Pointer,
    bind,
    cast,
    load,
    load_first,
    loop,
    primitive,
    share,
    store,
    store_first,
    tirx,
)
from graphopt_backends.kernels.kernel import Kernel

__all__ = ["Lookup"]


@dataclass(frozen=True)
class Lookup(Kernel):
    """Y[outer, i, inner] = X[outer, numbers[i], inner]; negative numbers count from the end.

    Attributes:
        isa: The CPU.
        dtype: Element type of the table.
        outer: Elements of the axes before.
        length: Rows of the table.
        inner: Elements of a row.
        count: How many rows are looked up.
        numbers: Element type of the numbers.
    """

    isa: Isa
    dtype: str
    outer: int
    length: int
    inner: int
    count: int
    numbers: str = "int64"

    @property
    def operations(self) -> int:
        """Elements that are copied."""
        return self.outer * self.count * self.inner

    def primitive(self, name: str) -> Any:
        """The function: (source, numbers, result, task, tasks)."""
        pointers = [
            Pointer("source", self.dtype, self.outer * self.length * self.inner),
            Pointer("numbers", self.numbers, self.count),
            Pointer("result", self.dtype, self.outer * self.count * self.inner),
        ]
        return primitive(name, pointers, self._body)

    def _body(self, frame: Frame) -> None:
        lanes = self.isa.vector_bits // (8 * np.dtype(self.dtype).itemsize)
        with share(frame, self.outer * self.count) as (unit, _):
            outer, i = bind(tirx.truncdiv(unit, self.count)), bind(tirx.truncmod(unit, self.count))
            number = bind(cast(frame["numbers"][(i,)], "int32", 1))
            # a number outside of the table must not read outside of it
            row = bind(tirx.Select(number < 0, number + self.length, number))
            row = bind(tirx.max(0, tirx.min(row, self.length - 1)))
            source, target = bind((outer * self.length + row) * self.inner), bind(unit * self.inner)
            whole, rest = divmod(self.inner, lanes)
            if whole:
                with loop(whole) as j:
                    value = load(frame["source"], source + j * lanes, lanes)
                    store(frame["result"], value, target + j * lanes, lanes)
            if rest and np.dtype(self.dtype).itemsize == 4:
                value = load_first(frame["source"], source + whole * lanes, lanes, rest, self.dtype)
                store_first(frame["result"], value, target + whole * lanes, lanes, rest)
            elif rest:
                with loop(rest) as j:
                    at = whole * lanes + j
                    store(frame["result"], load(frame["source"], source + at, 1), target + at, 1)
