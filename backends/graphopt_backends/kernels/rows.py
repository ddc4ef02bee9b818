"""Kernels over rows: softmax and the normalizations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from graphopt.targets import Isa
from graphopt_backends.kernels.emit import (
    Frame,
    Pointer,
    bind,
    constant,
    each_vector,
    load,
    primitive,
    share,
    spread,
    store,
    tirx,
)
from graphopt_backends.kernels.functions import exp_of_negative, log
from graphopt_backends.kernels.reduce import horizontal

__all__ = ["Normalize", "Softmax"]


@dataclass(frozen=True)
class Softmax:
    """Y = softmax over rows of X * factor, or its logarithm; float32.

    Attributes:
        isa: The CPU.
        rows: Rows.
        columns: Elements of a row.
        logarithm: LogSoftmax.
    """

    isa: Isa
    rows: int
    columns: int
    logarithm: bool = False

    @property
    def scratch(self) -> int:
        """It needs none."""
        return 0

    @property
    def operations(self) -> int:
        """Elements."""
        return self.rows * self.columns

    def primitive(self, name: str) -> Any:
        """The function: (source, result, task, tasks)."""
        size = self.rows * self.columns
        return primitive(name, [Pointer("source", "float32", size), Pointer("result", "float32", size)], self._body)

    def _body(self, frame: Frame) -> None:
        source, result, columns = frame["source"], frame["result"], self.columns
        with share(frame, self.rows) as (row, _):
            start = bind(row * columns)
            most = horizontal(self.isa, "max", source, start, columns)
            if self.logarithm:
                total = horizontal(
                    self.isa, "sum", source, start, columns, lambda x, n: exp_of_negative(x - spread(most, n), n)
                )
                shift = bind(most + log(total, 1))
                each_vector(columns, self.isa.vector_bits // 32, lambda i, n: store(
                    result, load(source, start + i, n) - spread(shift, n), start + i, n
                ))  # fmt: skip
                return
            each_vector(columns, self.isa.vector_bits // 32, lambda i, n: store(
                result, exp_of_negative(load(source, start + i, n) - spread(most, n), n), start + i, n
            ))  # fmt: skip
            factor = bind(constant(1.0, "float32") / horizontal(self.isa, "sum", result, start, columns))
            each_vector(columns, self.isa.vector_bits // 32, lambda i, n: store(
                result, load(result, start + i, n) * spread(factor, n), start + i, n
            ))  # fmt: skip


@dataclass(frozen=True)
class Normalize:
    """LayerNormalization or RMSNormalization of rows, with scale and bias; float32.

    Attributes:
        isa: The CPU.
        kind: Whether the mean is taken away.
        rows: Rows.
        columns: Elements of a row.
        epsilon: Added to the variance.
        bias: There is one.
    """

    isa: Isa
    kind: Literal["layer", "rms"]
    rows: int
    columns: int
    epsilon: float
    bias: bool

    @property
    def scratch(self) -> int:
        """It needs none."""
        return 0

    @property
    def operations(self) -> int:
        """Elements."""
        return self.rows * self.columns

    def primitive(self, name: str) -> Any:
        """The function: (source, scale, bias?, result, task, tasks)."""
        size = self.rows * self.columns
        pointers = [Pointer("source", "float32", size), Pointer("scale", "float32", self.columns)]
        if self.bias:
            pointers.append(Pointer("bias", "float32", self.columns))
        return primitive(name, [*pointers, Pointer("result", "float32", size)], self._body)

    def _body(self, frame: Frame) -> None:
        source, columns = frame["source"], self.columns
        part = constant(1 / columns, "float32")
        with share(frame, self.rows) as (row, _):
            start = bind(row * columns)
            mean = constant(0.0, "float32")
            if self.kind == "layer":
                mean = bind(horizontal(self.isa, "sum", source, start, columns) * part)

            def square(x: Any, lanes: int) -> Any:
                centred = bind(x - spread(mean, lanes)) if self.kind == "layer" else x
                return centred * centred

            variance = horizontal(self.isa, "sum", source, start, columns, square) * part
            factor = bind(constant(1.0, "float32") / tirx.sqrt(variance + constant(self.epsilon, "float32")))

            def write(i: Any, n: int) -> None:
                value = load(source, start + i, n)
                if self.kind == "layer":
                    value = value - spread(mean, n)
                value = value * spread(factor, n) * load(frame["scale"], i, n)
                store(frame["result"], value + load(frame["bias"], i, n) if self.bias else value, start + i, n)

            each_vector(columns, self.isa.vector_bits // 32, write)
