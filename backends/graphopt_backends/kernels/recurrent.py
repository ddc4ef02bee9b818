"""LSTM, GRU and RNN: all steps of a sequence in one kernel.

What the gates get from the input is a matrix product of all steps, made before. A step adds the product of the last
hidden state with the recurrent weight, a register tile of all gates of some hidden units at once, and applies the
gates in registers. A task computes whole sequences: those of one direction and some entries of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from graphopt_backends.kernels.cells import Gates, gru, lstm
from graphopt_backends.kernels.emit import (
    Frame,
    bind,
    constant,
    each_vector,
    either,
    load,
    load_first,
    local,
    loop,
    share,
    spread,
    store,
    store_first,
    tirx,
    when,
)
from graphopt_backends.kernels.sequences import Sequences
from graphopt_backends.kernels.tile import Panel, Rows, accumulate

__all__ = ["Recurrent"]


@dataclass(frozen=True)
class Recurrent(Sequences):
    """Hidden states of sequences, float32; see `Sequences`."""

    @cached_property
    def _functions(self) -> Gates:
        return Gates(self.activations, self.multiply.lanes)

    def _body(self, frame: Frame) -> None:
        count = sum(block[1] for block in self._blocks)
        with share(frame, len(self.reverse) * count) as (unit, _):
            direction, block = bind(tirx.truncdiv(unit, count)), bind(tirx.truncmod(unit, count))
            if len(self._blocks) == 1:
                high = self._blocks[0][2]
                self._sequences(frame, _Block(direction, bind(block * high), high))
                return
            (_, first, high), (start, _, low) = self._blocks
            either(
                block < first,
                lambda: self._sequences(frame, _Block(direction, bind(block * high), high)),
                lambda: self._sequences(frame, _Block(direction, bind(start + (block - first) * low), low)),
            )

    def _sequences(self, frame: Frame, block: _Block) -> None:
        """All steps of some sequences; the hidden state is read from one half of its memory and goes to the other."""
        hidden, cell = 0, 2 * self._state
        self._begin(frame, block, hidden, "first_hidden" if self.states[0] else "")
        if self.cell == "lstm":
            self._begin(frame, block, cell, "first_cell" if self.states[1] else "")
        with loop(self.steps) as turn:
            odd = tirx.truncmod(turn, 2) if self.steps > 1 else 0
            before, after = bind(odd * self._state), bind((1 - odd) * self._state)
            moment = _Moment(block, *self._steps(frame, block, turn), before, after)
            if self._twice:
                self._panelled(lambda panel: self._reset(frame, moment, panel))
            self._panelled(lambda panel: self._step(frame, moment, panel))
        self._end(frame, block, self.steps % 2 * self._state, "last_hidden")
        if self.cell == "lstm":
            self._end(frame, block, cell, "last_cell")

    def _steps(self, frame: Frame, block: _Block, turn: Any) -> tuple[list[Any], list[Any]]:
        """For each row, the step of its sequence that a turn computes, and if it may have none, whether it has one."""
        if not self.lengths:
            return [self._number(block, turn, self.steps)] * block.rows, []
        lengths = [bind(frame["lengths"][(block.first + r,)]) for r in range(block.rows)]
        there = [turn < length for length in lengths]
        numbers = [self._number(block, turn, length) for length in lengths]
        pairs = zip(there, numbers, strict=True)
        return [bind(tirx.Select(is_there, number, turn)) for is_there, number in pairs], there

    def _number(self, block: _Block, turn: Any, length: Any) -> Any:
        """Step of a sequence of some length that a turn computes."""
        if not any(self.reverse):
            return turn
        backward = length - 1 - turn
        if all(self.reverse):
            return bind(backward)
        return bind(tirx.Select(block.direction == self.reverse.index(True), backward, turn))

    def _panelled(self, body: Callable[[Any], None]) -> None:
        with loop(self._panels) as panel:
            body(panel)

    def _begin(self, frame: Frame, block: _Block, at: int, name: str) -> None:
        """States before the first step, zeros behind their end."""
        lanes = self.multiply.lanes
        each_vector(
            block.rows * self._padded, lanes,
            lambda i, n: store(frame["scratch"], constant(0.0, "float32", n), at + i, n),
        )  # fmt: skip
        if name:
            for r in range(block.rows):
                source = (block.direction * self.batch + block.first + r) * self.hidden

                def move(source: Any = source, r: int = r) -> None:
                    self._move(frame[name], source, frame["scratch"], at + r * self._padded)

                if self.lengths:  # a sequence without steps ends with zeros
                    when(frame["lengths"][(block.first + r,)] > 0, move)
                else:
                    move()

    def _end(self, frame: Frame, block: _Block, at: int, name: str) -> None:
        for r in range(block.rows):
            target = (block.direction * self.batch + block.first + r) * self.hidden
            self._move(frame["scratch"], at + r * self._padded, frame[name], target)

    def _move(self, source: Any, start: Any, target: Any, to: Any) -> None:
        start, to = bind(start), bind(to)
        each_vector(self.hidden, self.multiply.lanes, lambda i, n: store(target, load(source, start + i, n), to + i, n))

    def _product(
        self, frame: Frame, moment: _Moment, panel: Any, gates: Sequence[int], state: Any, part: int
    ) -> list[list[Any]]:
        """Sums of some gates: accumulators by row, then by gate and vector.

        Args:
            frame: Memory.
            moment: When.
            panel: Hidden units.
            gates: Their numbers.
            state: Where in scratch memory the states are that are multiplied.
            part: Columns of the direction's weight before that of these gates.
        """
        block, lanes = moment.block, self.multiply.lanes
        vectors = len(gates) * self._vectors
        totals = [[local(lanes, "float32") for _ in range(vectors)] for _ in range(block.rows)]
        for r, row in enumerate(totals):
            for i, total in enumerate(row):
                gate, v = gates[i // self._vectors], i % self._vectors
                store(total, self._start(frame, moment, panel, r, gate, v), 0, lanes)
        whole = self.gates * self._padded * self.hidden
        start = block.direction * whole + part * self._padded * self.hidden
        width = vectors * lanes
        weight = Panel(frame["weight"], bind(start + panel * (self.hidden * width)), width)
        source = Rows(frame["scratch"], state, [r * self._padded for r in range(block.rows)])
        accumulate(self.multiply, totals, source, weight, [(self.hidden, 1, 1)])
        return totals

    def _start(self, frame: Frame, moment: _Moment, panel: Any, row: int, gate: int, vector: int) -> Any:
        """What a sum begins with: the input's part, or the bias of a candidate whose product is reset."""
        lanes = self.multiply.lanes
        if self.late and gate == 2:
            at = moment.block.direction * self._padded + panel * self._width + vector * lanes
            return bind(load(frame["late_bias"], at, lanes))
        return self._input(frame, moment, panel, row, gate, vector)

    def _input(self, frame: Frame, moment: _Moment, panel: Any, row: int, gate: int, vector: int) -> Any:
        """A vector of what a gate gets from the input."""
        block, first = moment.block, panel * self._width + vector * self.multiply.lanes
        number = (moment.steps[row] * self.batch + block.first + row) * len(self.reverse) + block.direction
        at = (number * self.gates + gate) * self.hidden + first
        return self._masked(frame["gates"], at, panel, vector)

    def _count(self, vector: int) -> int:
        """Hidden units of a vector of the last panel."""
        rest = self.hidden - (self._panels - 1) * self._width
        return max(0, min(self.multiply.lanes, rest - vector * self.multiply.lanes))

    def _masked(self, buffer: Any, at: Any, panel: Any, vector: int) -> Any:
        """A vector of hidden units; in the last panel there may be fewer than lanes."""
        lanes, count = self.multiply.lanes, self._count(vector)
        if count == lanes:
            return bind(load(buffer, at, lanes))
        found = local(lanes, "float32")
        at = bind(at)

        def some() -> None:
            value = load_first(buffer, at, lanes, count, "float32") if count else constant(0.0, "float32", lanes)
            store(found, value, 0, lanes)

        if self._panels == 1:
            some()
        else:
            either(panel < self._panels - 1, lambda: store(found, load(buffer, at, lanes), 0, lanes), some)
        return load(found, 0, lanes)

    def _write(self, frame: Frame, moment: _Moment, panel: Any, row: int, vector: int, value: Any) -> None:
        """Store a hidden state for the next step and in the sequence."""
        block, lanes, count = moment.block, self.multiply.lanes, self._count(vector)
        first = bind(panel * self._width + vector * lanes)
        number = (moment.steps[row] * self.batch + block.first + row) * len(self.reverse) + block.direction
        at, place = bind(number * self.hidden + first), row * self._padded + first
        kept = self._if_there(moment, row, value, load(frame["scratch"], moment.before + place, lanes))
        store(frame["scratch"], kept, moment.after + place, lanes)
        value = self._if_there(moment, row, value, constant(0.0, "float32", lanes))
        last = panel == self._panels - 1
        if count == lanes:
            store(frame["sequence"], value, at, lanes)
            return
        if self._panels > 1:
            when(tirx.Not(last), lambda: store(frame["sequence"], value, at, lanes))
        if count:
            when(last, lambda: store_first(frame["sequence"], value, at, lanes, count))

    def _if_there(self, moment: _Moment, row: int, value: Any, otherwise: Any) -> Any:
        """A value if the sequence of a row has this step."""
        return bind(
            tirx.Select(spread(moment.there[row], self.multiply.lanes), value, otherwise) if moment.there else value
        )

    def _reset(self, frame: Frame, moment: _Moment, panel: Any) -> None:
        """Update gates, and hidden states times reset gates, for the product of the candidate."""
        lanes = self.multiply.lanes
        totals = self._product(frame, moment, panel, (0, 1), moment.before, 0)
        for r, row in enumerate(totals):
            for v in range(self._vectors):
                at = bind(r * self._padded + panel * self._width + v * lanes)
                update, reset = (self._functions(0, load(row[g * self._vectors + v], 0, lanes)) for g in (0, 1))
                store(frame["scratch"], update, 3 * self._state + at, lanes)
                before = load(frame["scratch"], moment.before + at, lanes)
                store(frame["scratch"], reset * before, 2 * self._state + at, lanes)

    def _step(self, frame: Frame, moment: _Moment, panel: Any) -> None:
        """New states of a panel of hidden units."""
        lanes, gates = self.multiply.lanes, tuple(range(self.gates))
        if self._twice:
            totals = self._product(frame, moment, panel, (2,), 2 * self._state, 2)
        else:
            totals = self._product(frame, moment, panel, gates, moment.before, 0)
        for r, row in enumerate(totals):
            for v in range(self._vectors):
                sums = [load(row[i], 0, lanes) for i in range(v, len(row), self._vectors)]
                at = bind(r * self._padded + panel * self._width + v * lanes)
                if self.cell == "lstm":
                    value = self._lstm(frame, moment, panel, (r, v), sums, at)
                elif self.cell == "gru":
                    inward = self._input(frame, moment, panel, r, 2, v) if self.late else None
                    value = self._gru(frame, sums, bind(moment.before + at), at, inward)
                else:
                    value = self._functions(0, sums[0])
                self._write(frame, moment, panel, r, v, value)

    def _lstm(
        self, frame: Frame, moment: _Moment, panel: Any, place: tuple[int, int], sums: Sequence[Any], at: Any
    ) -> Any:
        lanes, scratch, (row, vector) = self.multiply.lanes, frame["scratch"], place
        first = moment.block.direction * (3 * self._padded) + panel * self._width + vector * lanes
        peepholes = [
            bind(load(frame["peepholes"], first + i * self._padded, lanes)) for i in range(3 if self.peepholes else 0)
        ]
        before = bind(load(scratch, 2 * self._state + at, lanes))
        value, cell = lstm(self._functions, sums, before, peepholes, coupled=self.coupled)
        store(scratch, self._if_there(moment, row, cell, before), 2 * self._state + at, lanes)
        return value

    def _gru(self, frame: Frame, sums: Sequence[Any], before: Any, at: Any, inward: Any) -> Any:
        """Gates in ONNX's order: update, reset, hidden."""
        lanes = self.multiply.lanes
        if self.late:
            update, reset = (self._functions(0, total) for total in sums[:2])
            candidate = inward + reset * sums[2]
        else:
            update, candidate = load(frame["scratch"], 3 * self._state + at, lanes), sums[0]
        return gru(self._functions, update, candidate, load(frame["scratch"], before, lanes))


@dataclass(frozen=True)
class _Block:
    """Sequences that run together: their direction, the first, and how many."""

    direction: Any
    first: Any
    rows: int


@dataclass(frozen=True)
class _Moment:
    """A step of some sequences, and where in scratch memory the hidden states before and after it are.

    Attributes:
        block: The sequences.
        steps: Number of the step for each.
        there: Whether each has this step; empty: all have.
        before: Hidden states.
        after: Hidden states.
    """

    block: _Block
    steps: Sequence[Any]
    there: Sequence[Any]
    before: Any
    after: Any
