"""Rows written to places that numbers name: ScatterND and ScatterElements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from graphopt.targets import Isa
from graphopt_backends.kernels.emit import (
    Frame,
    Pointer,
    bind,
    cast,
    each_vector,
    load,
    loop,
    primitive,
    store,
    tirx,
    when,
)
from graphopt_backends.kernels.kernel import Kernel

__all__ = ["Combine", "Scatter"]

Combine = Literal["none", "add", "mul", "max", "min"]

_COMBINE: Mapping[Combine, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b, "mul": lambda a, b: a * b, "max": tirx.max, "min": tirx.min,
}  # fmt: skip


@dataclass(frozen=True)
class Scatter(Kernel):
    """Y[numbers[i]] = X[i], row by row in order, or combined with what is there.

    Attributes:
        isa: The CPU.
        dtype: Element type.
        count: Rows that are written.
        length: Rows of the result.
        inner: Elements of a row.
        numbers: Element type of the numbers.
        combine: What becomes of a row that is there.
    """

    isa: Isa
    dtype: str
    count: int
    length: int
    inner: int
    numbers: str = "int64"
    combine: Combine = "none"

    @property
    def operations(self) -> int:
        """Elements that are written."""
        return self.count * self.inner

    def primitive(self, name: str) -> Any:
        """The function: (source, numbers, result, task, tasks)."""
        pointers = [
            Pointer("source", self.dtype, self.count * self.inner),
            Pointer("numbers", self.numbers, self.count),
            Pointer("result", self.dtype, self.length * self.inner),
        ]
        return primitive(name, pointers, self._body)

    def _body(self, frame: Frame) -> None:
        """Every task looks at all numbers and writes the rows that are its own, so that the last of equal ones wins."""
        first = bind(tirx.truncdiv(frame.task * self.length, frame.tasks))
        last = bind(tirx.truncdiv((frame.task + 1) * self.length, frame.tasks))
        with loop(self.count) as i:
            number = bind(cast(frame["numbers"][(i,)], "int32", 1))
            row = bind(tirx.Select(number < 0, number + self.length, number))
            when(tirx.all(row >= first, row < last), lambda: self._row(frame, i * self.inner, row * self.inner))

    def _row(self, frame: Frame, source: Any, target: Any) -> None:
        def move(j: Any, n: int) -> None:
            value = load(frame["source"], source + j, n)
            if self.combine != "none":
                value = _COMBINE[self.combine](load(frame["result"], target + j, n), value)
            store(frame["result"], value, target + j, n)

        each_vector(self.inner, self.isa.vector_bits // (8 * np.dtype(self.dtype).itemsize), move)
