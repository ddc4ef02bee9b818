"""What the kernel of LSTM, GRU and RNN reads and writes: sizes, weights as it wants them, its parameters."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from graphopt.targets import Isa
from graphopt_backends.kernels.emit import Frame, Pointer, primitive, splits
from graphopt_backends.kernels.expression import Expression
from graphopt_backends.kernels.gemm import pack_columns, pack_matrix
from graphopt_backends.kernels.kernel import Kernel
from graphopt_backends.kernels.multiply import Multiply, Stored

__all__ = ["Cell", "Sequences"]

Cell = Literal["lstm", "gru", "rnn"]

_MOST_ROWS = 4
_MOST_VECTORS = 2


@dataclass(frozen=True)
class Sequences(Kernel):
    """Hidden states of sequences, float32.

    Attributes:
        isa: The CPU.
        cell: What a step computes.
        steps: Length of the sequences.
        batch: Sequences.
        hidden: Hidden units.
        reverse: For each direction, whether it runs from the end.
        activations: Functions of the gates (LSTM: gates, candidate, result; GRU: gates, candidate; RNN: result).
        late: A GRU resets the product with the hidden state instead of the hidden state (`linear_before_reset`).
        states: First states that are given: the hidden one, and that of the cell.
        lengths: Sequences have lengths of their own; behind their ends are zeros.
        peepholes: Gates of an LSTM see its cell.
        coupled: An LSTM forgets what it lets in (`input_forget`).
        stored: What recurrent weights are stored as.
    """

    isa: Isa
    cell: Cell
    steps: int
    batch: int
    hidden: int
    reverse: tuple[bool, ...]
    activations: tuple[Expression, ...]
    late: bool = False
    states: tuple[bool, bool] = (False, False)
    lengths: bool = False
    peepholes: bool = False
    coupled: bool = False
    stored: Stored = "float32"

    @cached_property
    def multiply(self) -> Multiply:
        """Its inner loop."""
        return Multiply(self.isa, "f32", self.stored)

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
                padded = np.zeros((count, self._padded, self.hidden), weight.dtype)
                padded[:, : self.hidden] = own[first : first + count]
                panels = padded.reshape(count, self._panels, self._width, self.hidden).transpose(1, 3, 0, 2)
                columns = panels.reshape(self._panels, self.hidden, count * self._width)
                parts += [pack_matrix(panel, count * self._width, 1).reshape(-1) for panel in columns]
                first += count
        return np.concatenate(parts)

    def pack_column(self, values: np.ndarray) -> np.ndarray:
        """Lay out numbers [directions, hidden], or some of them, for each hidden unit."""
        return np.concatenate([pack_columns(own, self._padded) for own in values.reshape(-1, self.hidden)])

    def primitive(self, name: str) -> Any:
        """The function: (gates, weight, options..., sequence, last hidden, last cell?).

        Options are the late bias, peepholes, lengths, the first hidden state and the first cell. Gates are [steps,
        batch, directions, gates, hidden], first and last states [directions, batch, hidden], peepholes [directions, 3,
        hidden], lengths [batch], and the sequence of hidden states [steps, batch, directions, hidden].
        """
        directions = len(self.reverse)
        rows, state = self.steps * self.batch * directions, directions * self.batch * self.hidden
        pointers = [
            Pointer("gates", "float32", rows * self.gates * self.hidden),
            Pointer("weight", self.multiply.weight, directions * self.gates * self._padded * self.hidden),
        ]
        if self.late:
            pointers.append(Pointer("late_bias", "float32", directions * self._padded))
        if self.peepholes:
            pointers.append(Pointer("peepholes", "float32", directions * 3 * self._padded))
        if self.lengths:
            pointers.append(Pointer("lengths", "int32", self.batch))
        given = [n for n, there in zip(("first_hidden", "first_cell"), self.states, strict=True) if there]
        made = ["last_hidden", "last_cell"] if self.cell == "lstm" else ["last_hidden"]
        pointers += [Pointer(n, "float32", state) for n in given]
        pointers.append(Pointer("sequence", "float32", rows * self.hidden))
        pointers += [Pointer(n, "float32", state) for n in made]
        return primitive(name, [*pointers, Pointer("scratch", "float32", self.scratch // 4)], self._body)

    @abc.abstractmethod
    def _body(self, frame: Frame) -> None:
        """Emit the code."""
