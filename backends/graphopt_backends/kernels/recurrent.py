"""LSTM, GRU and RNN: all steps of a sequence in one kernel.

What the gates get from the input is a matrix product of all steps, made before. A step adds the product of the last
hidden state with the recurrent weight, a register tile of all gates of some hidden units at once, and applies the
gates in registers. A task computes whole sequences: those of one direction and some entries of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from graphopt.targets import Isa
from graphopt_backends.kernels import functions
from graphopt_backends.kernels.emit import (
    Frame,
    Pointer,
    bind,
    constant,
    each_vector,
    either,
    load,
    load_first,
    local,
    loop,
    primitive,
    share,
    splits,
    store,
    store_first,
    tirx,
    when,
)
from graphopt_backends.kernels.gemm import pack_columns, pack_matrix
from graphopt_backends.kernels.kernel import Kernel
from graphopt_backends.kernels.multiply import Multiply
from graphopt_backends.kernels.tile import Panel, Rows, accumulate

__all__ = ["ACTIVATIONS", "Cell", "Recurrent"]

Cell = Literal["lstm", "gru", "rnn"]

ACTIVATIONS: Mapping[str, Callable[[Any, int], Any]] = {
    "relu": lambda x, lanes: functions.at_least(x, constant(0.0, "float32", lanes)),
    "sigmoid": functions.sigmoid,
    "tanh": functions.tanh,
}
"""Functions that gates may have."""

_MOST_ROWS = 4
_MOST_VECTORS = 2


@dataclass(frozen=True)
class Recurrent(Kernel):
    """Hidden states of sequences, float32.

    Attributes:
        isa: The CPU.
        cell: What a step computes.
        steps: Length of the sequences.
        batch: Sequences.
        hidden: Hidden units.
        reverse: For each direction, whether it runs from the end.
        activations: Of the gates (LSTM: gates, candidate, result; GRU: gates, candidate; RNN: result).
        late: A GRU resets the product with the hidden state instead of the hidden state (`linear_before_reset`).
        states: First states that are given: the hidden one, and that of the cell.
    """

    isa: Isa
    cell: Cell
    steps: int
    batch: int
    hidden: int
    reverse: tuple[bool, ...]
    activations: tuple[str, ...]
    late: bool = False
    states: tuple[bool, bool] = (False, False)

    @cached_property
    def multiply(self) -> Multiply:
        """Its inner loop."""
        return Multiply(self.isa, "f32")

    @property
    def gates(self) -> int:
        """Gates of a hidden unit."""
        return {"lstm": 4, "gru": 3, "rnn": 1}[self.cell]

    @property
    def _twice(self) -> bool:
        """The candidate needs the reset gates of all hidden units, so that a step has two products."""
        return self.cell == "gru" and not self.late

    @cached_property
    def _vectors(self) -> int:
        return min(_MOST_VECTORS, -(-self.hidden // self.multiply.lanes))

    @property
    def _width(self) -> int:
        """Hidden units of a panel."""
        return self._vectors * self.multiply.lanes

    @property
    def _panels(self) -> int:
        return -(-self.hidden // self._width)

    @property
    def _padded(self) -> int:
        return self._panels * self._width

    @cached_property
    def _blocks(self) -> tuple[tuple[int, int, int], ...]:
        """Entries of the batch that run together: start, number of blocks, size."""
        most = 1
        while most < _MOST_ROWS and self.multiply.registers(most + 1, self.gates * self._vectors) <= self.isa.registers:
            most += 1
        return splits(self.batch, most)

    @property
    def _state(self) -> int:
        """Elements of the states of a block."""
        return max(block[2] for block in self._blocks) * self._padded

    @property
    def scratch(self) -> int:
        """Bytes of memory that every task needs for itself: two hidden states, the cell's or a reset one, gates."""
        return 4 * 4 * self._state

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.steps * self.batch * len(self.reverse) * self.gates * self.hidden * self.hidden

    def pack(self, weight: np.ndarray) -> np.ndarray:
        """Lay out recurrent weights [directions, gates * hidden, hidden] as this kernel reads them."""
        split = (self.gates - 1, 1) if self._twice else (self.gates,)
        parts: list[np.ndarray] = []
        for own in weight.reshape(len(self.reverse), self.gates, self.hidden, self.hidden):
            first = 0
            for count in split:
                padded = np.zeros((count, self._padded, self.hidden), np.float32)
                padded[:, : self.hidden] = own[first : first + count]
                panels = padded.reshape(count, self._panels, self._width, self.hidden).transpose(1, 3, 0, 2)
                columns = panels.reshape(self._panels, self.hidden, count * self._width)
                parts += [pack_matrix(panel, count * self._width, 1).reshape(-1) for panel in columns]
                first += count
        return np.concatenate(parts)

    def pack_column(self, values: np.ndarray) -> np.ndarray:
        """Lay out numbers [directions, hidden] for each hidden unit."""
        return np.concatenate([pack_columns(own, self._padded) for own in values.reshape(len(self.reverse), -1)])

    def primitive(self, name: str) -> Any:
        """The function: (gates, weight, late bias?, first hidden?, first cell?, sequence, last hidden, last cell?).

        Gates are [steps, batch, directions, gates, hidden], first and last states [directions, batch, hidden], and the
        sequence of hidden states [steps, batch, directions, hidden].
        """
        directions = len(self.reverse)
        rows, state = self.steps * self.batch * directions, directions * self.batch * self.hidden
        pointers = [
            Pointer("gates", "float32", rows * self.gates * self.hidden),
            Pointer("weight", "float32", directions * self.gates * self._padded * self.hidden),
        ]
        if self.late:
            pointers.append(Pointer("late_bias", "float32", directions * self._padded))
        given = [n for n, there in zip(("first_hidden", "first_cell"), self.states, strict=True) if there]
        made = ["last_hidden", "last_cell"] if self.cell == "lstm" else ["last_hidden"]
        pointers += [Pointer(n, "float32", state) for n in given]
        pointers.append(Pointer("sequence", "float32", rows * self.hidden))
        pointers += [Pointer(n, "float32", state) for n in made]
        return primitive(name, [*pointers, Pointer("scratch", "float32", self.scratch // 4)], self._body)

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
            step = self._number(block, turn)
            odd = tirx.truncmod(turn, 2) if self.steps > 1 else 0
            before, after = bind(odd * self._state), bind((1 - odd) * self._state)
            moment = _Moment(block, step, before, after)
            if self._twice:
                self._panelled(lambda panel: self._reset(frame, moment, panel))
            self._panelled(lambda panel: self._step(frame, moment, panel))
        self._end(frame, block, self.steps % 2 * self._state, "last_hidden")
        if self.cell == "lstm":
            self._end(frame, block, cell, "last_cell")

    def _number(self, block: _Block, turn: Any) -> Any:
        """Step of the sequence that a turn computes."""
        if not any(self.reverse):
            return turn
        backward = self.steps - 1 - turn
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
                self._move(frame[name], source, frame["scratch"], at + r * self._padded)

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
        number = (moment.step * self.batch + block.first + row) * len(self.reverse) + block.direction
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
        value = bind(value)
        number = (moment.step * self.batch + block.first + row) * len(self.reverse) + block.direction
        at = bind(number * self.hidden + first)
        store(frame["scratch"], value, moment.after + row * self._padded + first, lanes)
        last = panel == self._panels - 1
        if count == lanes:
            store(frame["sequence"], value, at, lanes)
            return
        if self._panels > 1:
            when(tirx.Not(last), lambda: store(frame["sequence"], value, at, lanes))
        if count:
            when(last, lambda: store_first(frame["sequence"], value, at, lanes, count))

    def _reset(self, frame: Frame, moment: _Moment, panel: Any) -> None:
        """Update gates, and hidden states times reset gates, for the product of the candidate."""
        lanes, apply = self.multiply.lanes, ACTIVATIONS[self.activations[0]]
        totals = self._product(frame, moment, panel, (0, 1), moment.before, 0)
        for r, row in enumerate(totals):
            for v in range(self._vectors):
                at = bind(r * self._padded + panel * self._width + v * lanes)
                update, reset = (apply(load(row[g * self._vectors + v], 0, lanes), lanes) for g in (0, 1))
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
                    value = self._lstm(frame, sums, at)
                elif self.cell == "gru":
                    inward = self._input(frame, moment, panel, r, 2, v) if self.late else None
                    value = self._gru(frame, sums, bind(moment.before + at), at, inward)
                else:
                    value = ACTIVATIONS[self.activations[0]](bind(sums[0]), lanes)
                self._write(frame, moment, panel, r, v, value)

    def _lstm(self, frame: Frame, sums: Sequence[Any], at: Any) -> Any:
        """Gates in ONNX's order: input, output, forget, cell."""
        lanes, place = self.multiply.lanes, bind(2 * self._state + at)
        gate, candidate, result = (ACTIVATIONS[name] for name in self.activations)
        i, o, f = (gate(bind(total), lanes) for total in sums[:3])
        cell = f * load(frame["scratch"], place, lanes) + i * candidate(bind(sums[3]), lanes)
        cell = bind(cell)
        store(frame["scratch"], cell, place, lanes)
        return o * result(cell, lanes)

    def _gru(self, frame: Frame, sums: Sequence[Any], before: Any, at: Any, inward: Any) -> Any:
        """Gates in ONNX's order: update, reset, hidden."""
        lanes = self.multiply.lanes
        gate, candidate = (ACTIVATIONS[name] for name in self.activations)
        if self.late:
            update, reset = (gate(bind(total), lanes) for total in sums[:2])
            new = candidate(bind(inward + reset * sums[2]), lanes)
        else:
            update = load(frame["scratch"], 3 * self._state + at, lanes)
            new = candidate(bind(sums[0]), lanes)
        # (1 - update) * new + update * before
        return new + update * (load(frame["scratch"], before, lanes) - new)


@dataclass(frozen=True)
class _Block:
    """Sequences that run together: their direction, the first, and how many."""

    direction: Any
    first: Any
    rows: int


@dataclass(frozen=True)
class _Moment:
    """A step of some sequences: which, and where in scratch memory the hidden states before and after it are."""

    block: _Block
    step: Any
    before: Any
    after: Any
