"""Sums, means and extremes along axes, in vectors over what is kept or over what is reduced."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from graphopt.targets import Isa
from graphopt_backends.kernels.emit import (
    Frame,
    Pointer,
    bind,
    cast,
    constant,
    first_lanes,
    lane,
    load,
    load_first,
    local,
    loop,
    primitive,
    share,
    share_vectors,
    store,
    store_first,
    tirx,
)  # fmt: skip
from graphopt_backends.kernels.epilogue import SUM
from graphopt_backends.kernels.expression import Expression, evaluate
from graphopt_backends.kernels.kernel import Kernel

__all__ = ["Operator", "Reduce", "fold", "horizontal"]

Operator = Literal["sum", "mean", "max", "min"]

_COMBINE: Mapping[str, Callable[[Any, Any], Any]] = {
    "sum": lambda a, b: a + b, "mean": lambda a, b: a + b, "max": tirx.max, "min": tirx.min,
}  # fmt: skip
_START = {"sum": 0.0, "mean": 0.0, "max": float("-inf"), "min": float("inf")}
_PARALLEL = 4
_BLOCK = 32


@dataclass(frozen=True)
class Reduce(Kernel):
    """Y[outer, inner] = reduction of X[outer, reduced, inner], all contiguous.

    Sums are float32; those of 8-bit integers are exact there, if there are no more than 65,000.

    Attributes:
        isa: The CPU.
        operator: What is computed.
        outer: Elements of the axes before.
        reduced: Elements of the axes that go.
        inner: Elements of the axes behind.
        before: What is reduced, a function of the element.
        after: What is stored, a function of the reduction.
        dtype: Element type of X; what is stored is float32.
    """

    isa: Isa
    operator: Operator
    outer: int
    reduced: int
    inner: int
    before: Expression = SUM
    after: Expression = SUM
    dtype: str = "float32"

    @property
    def operations(self) -> int:
        """Elements that are read."""
        return self.outer * self.reduced * self.inner

    def primitive(self, name: str) -> Any:
        """The function: (source, result, task, tasks)."""
        pointers = [
            Pointer("source", self.dtype, self.outer * self.reduced * self.inner),
            Pointer("result", "float32", self.outer * self.inner),
        ]
        return primitive(name, pointers, self._rows if self.inner == 1 else self._columns)

    def _rows(self, frame: Frame) -> None:
        with share(frame, self.outer) as (row, _):
            start = row * self.reduced
            total = fold(self.isa, self.operator, self.reduced, lambda i, n: self._element(frame, start + i, n))
            store(frame["result"], self._finished(total, 1), row, 1)

    def _columns(self, frame: Frame) -> None:
        lanes = self.isa.vector_bits // 32
        share_vectors(frame, self.outer, self.inner, lanes, lambda *place: self._column(frame, *place))

    def _column(self, frame: Frame, row: Any, column: Any, count: int) -> None:
        lanes, combine = self.isa.vector_bits // 32, _COMBINE[self.operator]
        totals = [local(lanes, "float32") for _ in range(min(_PARALLEL, self.reduced))]
        for total in totals:
            store(total, constant(_START[self.operator], "float32", lanes), 0, lanes)
        start = bind(row * (self.reduced * self.inner) + column)

        def take(total: Any, i: Any) -> None:
            value = self._element(frame, start + i * self.inner, count)
            store(total, combine(load(total, 0, lanes), value), 0, lanes)

        def turn(i: Any) -> None:
            for j, total in enumerate(totals):
                take(total, i * len(totals) + j)

        turns, more = divmod(self.reduced, len(totals))
        held = _in_blocks(self.operator, totals, turns, lanes, turn)
        for j in range(more):
            take(totals[j], turns * len(totals) + j)
        vector = load(totals[0], 0, lanes)
        for total in (*totals[1:], *held):
            vector = combine(vector, load(total, 0, lanes))
        store_first(frame["result"], self._finished(bind(vector), lanes), row * self.inner + column, lanes, count)

    def _element(self, frame: Frame, at: Any, count: int) -> Any:
        """A vector of what is reduced."""
        lanes = self.isa.vector_bits // 32
        value = load_first(frame["source"], at, lanes, count, self.dtype)
        if self.dtype != "float32":
            value = cast(cast(value, "int32", lanes), "float32", lanes)
        return evaluate(self.before, [bind(value)], lanes)

    def _finished(self, total: Any, lanes: int) -> Any:
        if self.operator == "mean":
            total = total * constant(1 / self.reduced, "float32", lanes)
        return evaluate(self.after, [total], lanes)


def horizontal(isa: Isa, operator: Operator, source: Any, start: Any, count: int) -> Any:
    """Reduce consecutive elements to one number.

    Args:
        isa: The CPU.
        operator: sum, max or min.
        source: Elements, float32.
        start: Where they begin.
        count: How many there are.
    """
    lanes = isa.vector_bits // 32
    return fold(isa, operator, count, lambda index, valid: load_first(source, start + index, lanes, valid, "float32"))


def fold(isa: Isa, operator: Operator, count: int, fetch: Callable[[Any, int], Any], *, unrolled: bool = False) -> Any:
    """Reduce vectors to one number; several accumulators hide the latency of the additions.

    Args:
        isa: The CPU.
        operator: sum, max or min.
        count: Elements.
        fetch: Gives the vector that begins with an element, of which so many are there; others do not count.
        unrolled: No loop: elements have fixed numbers.
    """
    lanes, combine = isa.vector_bits // 32, _COMBINE[operator]
    whole, rest = divmod(count, lanes)
    turns, more = divmod(whole, _PARALLEL)
    totals = [local(lanes, "float32") for _ in range(_PARALLEL if turns else max(1, more))]
    start = constant(_START[operator], "float32", lanes)
    for total in totals:
        store(total, start, 0, lanes)

    def take(total: Any, index: Any, valid: int) -> None:
        value = fetch(index, valid)
        if valid < lanes:
            value = tirx.Select(first_lanes(lanes, valid), value, start)
        store(total, combine(load(total, 0, lanes), value), 0, lanes)

    def turn(i: Any) -> None:
        for j, total in enumerate(totals):
            take(total, (i * _PARALLEL + j) * lanes, lanes)

    held: Sequence[Any] = ()
    if unrolled:
        for j in range(turns * _PARALLEL):
            take(totals[j % _PARALLEL], j * lanes, lanes)
    elif turns:
        held = _in_blocks(operator, totals, turns, lanes, turn)
    for j in range(more):
        take(totals[j], (turns * _PARALLEL + j) * lanes, lanes)
    if rest:
        take(totals[-1], whole * lanes, rest)
    vector = load(totals[0], 0, lanes)
    for total in (*totals[1:], *held):
        vector = combine(vector, load(total, 0, lanes))
    return bind(_across(vector, lanes, combine))


def _in_blocks(
    operator: Operator, totals: Sequence[Any], turns: int, lanes: int, turn: Callable[[Any], None]
) -> Sequence[Any]:
    """Run turns that add to totals; long sums are sums of short ones, which keeps their error small (Higham 1993).

    Returns:
        Sums of the blocks that are done; the last one's are in the totals.
    """
    blocks, rest = divmod(turns, _BLOCK)
    if operator not in ("sum", "mean") or blocks < 2:
        with loop(turns) as i:
            turn(i)
        return ()
    zero = constant(0.0, "float32", lanes)
    sums = [local(lanes, "float32") for _ in totals]
    for total in sums:
        store(total, zero, 0, lanes)
    with loop(blocks) as block:
        with loop(_BLOCK) as i:
            turn(block * _BLOCK + i)
        for total, own in zip(sums, totals, strict=True):
            store(total, load(total, 0, lanes) + load(own, 0, lanes), 0, lanes)
            store(own, zero, 0, lanes)
    if rest:
        with loop(rest) as i:
            turn(blocks * _BLOCK + i)
    return sums


def _across(vector: Any, lanes: int, combine: Callable[[Any, Any], Any]) -> Any:
    """Combine the lanes of a vector, half with half."""
    while lanes > 1:
        vector, half = bind(vector), lanes // 2
        if half == 1:
            return combine(lane(vector, 0), lane(vector, 1))
        low, high = (tirx.Shuffle([vector], list(range(i, i + half))) for i in (0, half))
        vector, lanes = combine(low, high), half
    return vector
