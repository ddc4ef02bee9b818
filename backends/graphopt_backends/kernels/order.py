"""What depends on the order along an axis: running sums, places of extremes, the greatest elements."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.targets import Isa
from graphopt_backends.kernels.emit import (
    Frame,
    Pointer,
    bind,
    cast,
    constant,
    each_vector,
    lane,
    load,
    local,
    loop,
    primitive,
    share,
    store,
    tirx,
    when,
)
from graphopt_backends.kernels.kernel import Kernel

__all__ = ["Cumulate", "Extreme", "Top"]


@dataclass(frozen=True)
class Cumulate(Kernel):
    """Y[outer, i, inner] = sum of X[outer, 0..i, inner], all contiguous.

    Attributes:
        isa: The CPU.
        dtype: Element type.
        outer: Elements of the axes before.
        length: Elements of the axis.
        inner: Elements of the axes behind.
        exclusive: Without the element itself.
        reverse: From the end.
    """

    isa: Isa
    dtype: str
    outer: int
    length: int
    inner: int
    exclusive: bool = False
    reverse: bool = False

    @property
    def operations(self) -> int:
        """Additions."""
        return self.outer * self.length * self.inner

    def primitive(self, name: str) -> Any:
        """The function: (source, result, task, tasks)."""
        pointers = [Pointer(side, self.dtype, self.operations) for side in ("source", "result")]
        return primitive(name, pointers, self._body)

    def _body(self, frame: Frame) -> None:
        lanes = self.isa.vector_bits // (8 * np.dtype(self.dtype).itemsize)
        with share(frame, self.outer) as (unit, _):
            each_vector(self.inner, lanes, lambda i, n: self._run(frame, bind(unit * self.length * self.inner + i), n))

    def _run(self, frame: Frame, start: Any, lanes: int) -> None:
        total = local(lanes, self.dtype)
        store(total, constant(0, self.dtype, lanes), 0, lanes)
        with loop(self.length) as turn:
            at = bind(start + (self.length - 1 - turn if self.reverse else turn) * self.inner)
            before = load(total, 0, lanes)
            value = bind(before + load(frame["source"], at, lanes))
            store(frame["result"], before if self.exclusive else value, at, lanes)
            store(total, value, 0, lanes)


@dataclass(frozen=True)
class Extreme(Kernel):
    """Y[outer, inner] = place of the greatest (or least) element of X[outer, :, inner], int64; all contiguous.

    Attributes:
        isa: The CPU.
        dtype: Element type.
        outer: Elements of the axes before.
        length: Elements of the axis.
        inner: Elements of the axes behind.
        least: The least element.
        last: The last of equal ones instead of the first.
    """

    isa: Isa
    dtype: str
    outer: int
    length: int
    inner: int
    least: bool = False
    last: bool = False

    @property
    def operations(self) -> int:
        """Comparisons."""
        return self.outer * self.length * self.inner

    @property
    def _lanes(self) -> int:
        return self.isa.vector_bits // (8 * max(4, np.dtype(self.dtype).itemsize))

    def primitive(self, name: str) -> Any:
        """The function: (source, result, task, tasks)."""
        pointers = [Pointer("source", self.dtype, self.operations), Pointer("result", "int64", self.outer * self.inner)]
        return primitive(name, pointers, self._body)

    def _body(self, frame: Frame) -> None:
        with share(frame, self.outer) as (unit, _):
            start = bind(unit * (self.length * self.inner))
            if self.inner == 1:
                self._row(frame, start, unit)
                return
            each_vector(self.inner, self._lanes, lambda i, n: self._columns(frame, start + i, unit * self.inner + i, n))

    def _better(self, value: Any, best: Any) -> Any:
        """A later element takes the place of an earlier one."""
        if self.last:
            return value <= best if self.least else value >= best
        return value < best if self.least else value > best

    def _columns(self, frame: Frame, start: Any, to: Any, lanes: int) -> None:
        """Elements of neighbouring columns side by side."""
        best, place = self._first(frame, start, lanes)
        with loop(self.length - 1, 1) as i:
            value = bind(load(frame["source"], start + i * self.inner, lanes))
            self._take(best, place, value, i, lanes)
        store(frame["result"], cast(load(place, 0, lanes), "int64", lanes), to, lanes)

    def _first(self, frame: Frame, start: Any, lanes: int) -> tuple[Any, Any]:
        best, place = local(lanes, self.dtype), local(lanes, "int32")
        store(best, load(frame["source"], start, lanes), 0, lanes)
        store(place, constant(0, "int32", lanes), 0, lanes)
        return best, place

    def _take(self, best: Any, place: Any, value: Any, number: Any, lanes: int) -> None:
        better = self._better(value, load(best, 0, lanes))
        numbers = tirx.Broadcast(number, lanes) if lanes > 1 else number
        store(place, tirx.Select(better, numbers, load(place, 0, lanes)), 0, lanes)
        store(best, tirx.Select(better, value, load(best, 0, lanes)), 0, lanes)

    def _row(self, frame: Frame, start: Any, to: Any) -> None:
        """Every lane finds the best of its elements, of which the best is taken, and then the rest looked at."""
        lanes, vectors = self._lanes, self.length // self._lanes
        best, place = self._first(frame, start, 1)
        if vectors:
            bests, places = self._first(frame, start, lanes)
            with loop(vectors - 1, 1) as i:
                self._take(bests, places, bind(load(frame["source"], start + i * lanes, lanes)), i, lanes)
            values, numbers = bind(load(bests, 0, lanes)), bind(load(places, 0, lanes))
            for i in range(lanes):
                self._compare(best, place, bind(lane(values, i)), bind(lane(numbers, i) * lanes + i))
        with loop(self.length - vectors * lanes, vectors * lanes) as i:
            self._take(best, place, bind(load(frame["source"], start + i, 1)), i, 1)
        store(frame["result"], cast(load(place, 0, 1), "int64", 1), to, 1)

    def _compare(self, best: Any, place: Any, value: Any, number: Any) -> None:
        """Lanes come in no order: of equal elements places decide."""
        held, at = bind(load(best, 0, 1)), bind(load(place, 0, 1))
        beyond = value < held if self.least else value > held
        nearer = number > at if self.last else number < at
        better = bind(tirx.any(beyond, tirx.all(value == held, nearer)))
        store(best, tirx.Select(better, value, held), 0, 1)
        store(place, tirx.Select(better, number, at), 0, 1)


@dataclass(frozen=True)
class Top(Kernel):
    """The greatest (or least) elements of rows in order, with their places, the first of equal ones first.

    A heap holds the best so far, the worst of them on top; most elements are compared with that alone. At the end the
    heap is taken apart from the top, which puts it in order (heapsort, Williams 1964).

    Attributes:
        isa: The CPU.
        dtype: Element type.
        rows: Rows.
        length: Elements of a row.
        count: How many are taken.
        least: The least elements.
    """

    isa: Isa
    dtype: str
    rows: int
    length: int
    count: int
    least: bool = False

    @property
    def operations(self) -> int:
        """Comparisons, at the least."""
        return self.rows * self.length

    def primitive(self, name: str) -> Any:
        """The function: (source, values, places, task, tasks)."""
        taken = self.rows * self.count
        pointers = [
            Pointer("source", self.dtype, self.rows * self.length), Pointer("values", self.dtype, taken),
            Pointer("places", "int64", taken),
        ]  # fmt: skip
        return primitive(name, pointers, self._body)

    def _body(self, frame: Frame) -> None:
        if not self.count:
            return
        with share(frame, self.rows) as (row, _):
            source, heap = bind(row * self.length), bind(row * self.count)
            values, places = frame["values"], frame["places"]
            with loop(self.count) as i:
                store(values, load(frame["source"], source + i, 1), heap + i, 1)
                store(places, cast(i, "int64", 1), heap + i, 1)
            with loop(self.count // 2) as i:
                self._sink(frame, heap, bind(self.count // 2 - 1 - i), self.count)
            with loop(self.length - self.count, self.count) as i:
                value = bind(load(frame["source"], source + i, 1))
                top = load(values, heap, 1)

                def replace(value: Any = value, i: Any = i) -> None:
                    store(values, value, heap, 1)
                    store(places, cast(i, "int64", 1), heap, 1)
                    self._sink(frame, heap, 0, self.count)

                when(value < top if self.least else value > top, replace)
            with loop(self.count - 1) as i:
                last = bind(self.count - 1 - i)
                self._swap(frame, heap, heap + last)
                self._sink(frame, heap, 0, last)

    def _worse(self, a: tuple[Any, Any], b: tuple[Any, Any]) -> Any:
        """An element, with its place, stands behind another in the result."""
        beyond = a[0] > b[0] if self.least else a[0] < b[0]
        return tirx.any(beyond, tirx.all(a[0] == b[0], a[1] > b[1]))

    def _at(self, frame: Frame, place: Any) -> tuple[Any, Any]:
        return bind(load(frame["values"], place, 1)), bind(load(frame["places"], place, 1))

    def _swap(self, frame: Frame, a: Any, b: Any) -> None:
        a, b = bind(a), bind(b)
        for buffer in (frame["values"], frame["places"]):
            first, second = bind(load(buffer, a, 1)), bind(load(buffer, b, 1))
            store(buffer, second, a, 1)
            store(buffer, first, b, 1)

    def _sink(self, frame: Frame, heap: Any, start: Any, size: Any) -> None:
        """Let an element sink to where no element below it is worse."""
        where = local(1, "int32")
        store(where, tirx.const(start, "int32") if isinstance(start, int) else start, 0, 1)
        with loop(max(1, math.ceil(math.log2(self.count + 1)))):
            own = bind(load(where, 0, 1))
            left, right = bind(2 * own + 1), bind(2 * own + 2)

            def lower(own: Any = own, left: Any = left, right: Any = right) -> None:
                near, far = self._at(frame, heap + left), self._at(frame, heap + tirx.min(right, size - 1))
                below = bind(tirx.Select(tirx.all(right < size, self._worse(far, near)), right, left))

                def exchange() -> None:
                    self._swap(frame, heap + own, heap + below)
                    store(where, below, 0, 1)

                when(self._worse(self._at(frame, heap + below), self._at(frame, heap + own)), exchange)

            when(left < size, lower)
