"""Reductions of any element type along an axis: integers, and products."""

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
    each_vector,
    load,
    local,
    loop,
    primitive,
    share,
    store,
    tirx,
)
from graphopt_backends.kernels.kernel import Kernel

__all__ = ["Combination", "Total"]

Combination = Literal["sum", "product", "max", "min"]

_COMBINE: Mapping[Combination, Callable[[Any, Any], Any]] = {
    "sum": lambda a, b: a + b, "product": lambda a, b: a * b, "max": tirx.max, "min": tirx.min,
}  # fmt: skip


@dataclass(frozen=True)
class Total(Kernel):
    """Y[outer, inner] = combination of X[outer, :, inner], all contiguous.

    Attributes:
        isa: The CPU.
        combination: How elements are combined.
        dtype: Element type.
        outer: Elements of the axes before.
        length: Elements of the axes that go, one at least.
        inner: Elements of the axes behind.
    """

    isa: Isa
    combination: Combination
    dtype: str
    outer: int
    length: int
    inner: int

    @property
    def operations(self) -> int:
        """Elements that are read."""
        return self.outer * self.length * self.inner

    def primitive(self, name: str) -> Any:
        """The function: (source, result, task, tasks)."""
        pointers = [
            Pointer("source", self.dtype, self.operations),
            Pointer("result", self.dtype, self.outer * self.inner),
        ]
        return primitive(name, pointers, self._body)

    def _body(self, frame: Frame) -> None:
        lanes = self.isa.vector_bits // (8 * np.dtype(self.dtype).itemsize)
        with share(frame, self.outer) as (unit, _):
            each_vector(self.inner, lanes, lambda i, n: self._run(frame, bind(unit), i, n))

    def _run(self, frame: Frame, unit: Any, column: Any, lanes: int) -> None:
        total, start = local(lanes, self.dtype), bind(unit * (self.length * self.inner) + column)
        store(total, load(frame["source"], start, lanes), 0, lanes)
        with loop(self.length - 1, 1) as i:
            value = load(frame["source"], start + i * self.inner, lanes)
            store(total, _COMBINE[self.combination](load(total, 0, lanes), value), 0, lanes)
        store(frame["result"], load(total, 0, lanes), unit * self.inner + column, lanes)
