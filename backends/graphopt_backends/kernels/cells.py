"""What LSTM, GRU and RNN do in a step once the sums of their gates are there: arithmetic on vectors of units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graphopt_backends.kernels.emit import bind, constant
from graphopt_backends.kernels.expression import Expression, evaluate

__all__ = ["Gates", "gru", "lstm"]

Vector = Any


@dataclass(frozen=True)
class Gates:
    """Functions of gates, and how many units a vector has."""

    functions: Sequence[Expression]
    lanes: int

    def __call__(self, index: int, total: Vector) -> Vector:
        """A function of a vector."""
        return bind(evaluate(self.functions[index], {0: bind(total)}, self.lanes))


def lstm(
    gates: Gates, sums: Sequence[Vector], cell: Vector, peepholes: Sequence[Vector], *, coupled: bool
) -> tuple[Vector, Vector]:
    """The new hidden state and the new cell.

    Args:
        gates: Functions of gates, candidate and result.
        sums: Of the gates in ONNX's order: input, output, forget, cell.
        cell: The cell so far.
        peepholes: Factors of the cell in the input, output and forget gate; none: they do not see it.
        coupled: What the input gate lets in, the forget gate takes away.
    """
    inward, outward, forgotten, candidate = sums
    if peepholes:
        inward, forgotten = inward + peepholes[0] * cell, forgotten + peepholes[2] * cell
    let_in = gates(0, inward)
    kept = constant(1.0, "float32", gates.lanes) - let_in if coupled else gates(0, forgotten)
    new = bind(kept * cell + let_in * gates(1, candidate))
    if peepholes:
        outward = outward + peepholes[1] * new
    return bind(gates(0, outward) * gates(2, new)), new


def gru(gates: Gates, update: Vector, candidate: Vector, before: Vector) -> Vector:
    """The new hidden state: (1 - update) * new + update * before."""
    new = gates(1, candidate)
    return bind(new + update * (before - new))
