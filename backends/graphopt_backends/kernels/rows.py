"""Kernels over rows: softmax and the normalizations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from graphopt.targets import Isa
from graphopt_backends.kernels.emit import (
    Frame,
    Pointer,
    bind,
    constant,
    each_part,
    load,
    load_first,
    local,
    loop,
    primitive,
    share,
    share_vectors,
    spread,
    store,
    store_first,
    tirx,
)
from graphopt_backends.kernels.functions import exp_of_negative, log
from graphopt_backends.kernels.kernel import Kernel
from graphopt_backends.kernels.reduce import Operator, fold

__all__ = ["Normalize", "Softmax"]


class _Row:
    """A row of float32: in registers from its first use on where it fits, else in memory."""

    def __init__(self, isa: Isa, source: Any, start: Any, count: int) -> None:
        self._isa, self._lanes = isa, isa.vector_bits // 32
        self._source, self._start, self._count = source, start, count
        self._stays = -(-count // self._lanes) <= isa.registers // 2
        self._held: dict[int, Any] = {}

    def _at(self, index: Any, valid: int) -> Any:
        if index in self._held:
            return self._held[index]
        value = bind(load_first(self._source, self._start + index, self._lanes, valid, "float32"))
        if self._stays:
            self._held[index] = value
        return value

    def fold(self, operator: Operator, function: Callable[[Any], Any] | None = None) -> Any:
        """Reduce what a function makes of the elements."""

        def fetch(index: Any, valid: int) -> Any:
            value = self._at(index, valid)
            return function(value) if function else value

        return fold(self._isa, operator, self._count, fetch, unrolled=self._stays)

    def replace(self, operator: Operator, function: Callable[[Any], Any], target: Any) -> Any:
        """Put what a function makes of the elements in their place, and reduce it.

        Args:
            operator: How to reduce.
            function: Of vectors.
            target: Where a row in memory goes, as it must not change where it is; from then on it is read there.
        """

        def fetch(index: Any, valid: int) -> Any:
            value = function(self._at(index, valid))
            if self._stays:
                self._held[index] = value
            else:
                store_first(target, value, self._start + index, self._lanes, valid)
            return value

        reduced = fold(self._isa, operator, self._count, fetch, unrolled=self._stays)
        self._source = target
        return reduced

    def write(self, target: Any, function: Callable[[Any, Any, int], Any]) -> None:
        """Store `function(elements, index, how many of them are there)`."""

        def part(index: Any, valid: int) -> None:
            value = function(self._at(index, valid), index, valid)
            store_first(target, value, self._start + index, self._lanes, valid)

        if self._stays:
            for index in range(0, self._count, self._lanes):
                part(index, min(self._lanes, self._count - index))
        else:
            each_part(self._count, self._lanes, part)


@dataclass(frozen=True)
class Softmax(Kernel):
    """Y[outer, :, inner] = softmax of X[outer, :, inner], or its logarithm; float32, all contiguous.

    Attributes:
        isa: The CPU.
        rows: Elements of the axes before.
        columns: Elements of the axis.
        logarithm: LogSoftmax.
        inner: Elements of the axes behind.
    """

    isa: Isa
    rows: int
    columns: int
    logarithm: bool = False
    inner: int = 1

    @property
    def operations(self) -> int:
        """Elements."""
        return self.rows * self.columns * self.inner

    def primitive(self, name: str) -> Any:
        """The function: (source, result, task, tasks)."""
        pointers = [Pointer(side, "float32", self.operations) for side in ("source", "result")]
        return primitive(name, pointers, self._rows if self.inner == 1 else self._columns)

    def _rows(self, frame: Frame) -> None:
        lanes = self.isa.vector_bits // 32
        with share(frame, self.rows) as (number, _):
            row = _Row(self.isa, frame["source"], bind(number * self.columns), self.columns)
            most = spread(row.fold("max"), lanes)
            if self.logarithm:
                total = row.fold("sum", lambda x: exp_of_negative(x - most, lanes))
                shift = bind(most + spread(log(total, 1), lanes))
                row.write(frame["result"], lambda x, _index, _valid: x - shift)
                return
            total = row.replace("sum", lambda x: exp_of_negative(x - most, lanes), frame["result"])
            factor = bind(spread(constant(1.0, "float32") / total, lanes))
            row.write(frame["result"], lambda x, _index, _valid: x * factor)

    def _columns(self, frame: Frame) -> None:
        """Vectors of neighbours, each along the axis."""
        lanes = self.isa.vector_bits // 32

        def column(row: Any, first: Any, valid: int) -> None:
            self._column(frame, bind(row * (self.columns * self.inner) + first), valid)

        share_vectors(frame, self.rows, self.inner, lanes, column)

    def _column(self, frame: Frame, start: Any, valid: int) -> None:
        lanes, result = self.isa.vector_bits // 32, frame["result"]

        def value(source: Any, i: Any) -> Any:
            return load_first(source, start + i * self.inner, lanes, valid, "float32")

        most, total = local(lanes, "float32"), local(lanes, "float32")
        store(most, constant(float("-inf"), "float32", lanes), 0, lanes)
        store(total, constant(0, "float32", lanes), 0, lanes)
        with loop(self.columns) as i:
            store(most, tirx.max(load(most, 0, lanes), value(frame["source"], i)), 0, lanes)
        with loop(self.columns) as i:
            weight = exp_of_negative(value(frame["source"], i) - load(most, 0, lanes), lanes)
            if not self.logarithm:
                store_first(result, weight, start + i * self.inner, lanes, valid)
            store(total, load(total, 0, lanes) + weight, 0, lanes)
        shift = bind(load(most, 0, lanes) + log(load(total, 0, lanes), lanes)) if self.logarithm else None
        factor = None if self.logarithm else bind(constant(1, "float32", lanes) / load(total, 0, lanes))
        with loop(self.columns) as i:
            made = value(frame["source"], i) - shift if self.logarithm else value(result, i) * factor
            store_first(result, made, start + i * self.inner, lanes, valid)


@dataclass(frozen=True)
class Normalize(Kernel):
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
        lanes = self.isa.vector_bits // 32
        part = constant(1 / self.columns, "float32")
        with share(frame, self.rows) as (number, _):
            row = _Row(self.isa, frame["source"], bind(number * self.columns), self.columns)
            mean = bind(spread(row.fold("sum") * part, lanes)) if self.kind == "layer" else None

            def centred(x: Any) -> Any:
                return x if mean is None else bind(x - mean)

            variance = row.fold("sum", lambda x: centred(x) * centred(x)) * part
            deviation = tirx.sqrt(variance + constant(self.epsilon, "float32"))
            factor = bind(spread(constant(1.0, "float32") / deviation, lanes))

            def normal(x: Any, index: Any, valid: int) -> Any:
                value = centred(x) * factor * load_first(frame["scale"], index, lanes, valid, "float32")
                if not self.bias:
                    return value
                return value + load_first(frame["bias"], index, lanes, valid, "float32")

            row.write(frame["result"], normal)
