"""LSTM and GRU of a fixed, short length as plain operators, one copy of the cell for each step.

Only what stands in the operators' formulas with default activations is unrolled; everything else (peepholes, sequence
lengths, clipping, other activations, long sequences) is left for the caller to refuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

from graphopt_backends._fold import is_constant, static_shape

__all__ = ["unroll"]

_STEPS = 128
_GATES = {"LSTM": 4, "GRU": 3}
_DEFAULTS = {"LSTM": ("sigmoid", "tanh", "tanh"), "GRU": ("sigmoid", "tanh")}
_PEEPHOLES, _LENGTHS = 7, 4


class Make(Protocol):
    """Adds a node before the one that is replaced."""

    def __call__(self, op: str, inputs: list[ir.Value | None], **attributes: int) -> ir.Value: ...
    def array(self, array: np.ndarray) -> ir.Value: ...
    def ints(self, values: Sequence[int]) -> ir.Value: ...
    def split(self, value: ir.Value, parts: int, axis: int, size: int) -> list[ir.Value]: ...


@dataclass(frozen=True)
class _Direction:
    """Weights of one direction: input (I, G*H), recurrence (H, G*H), both biases (G*H)."""

    input: np.ndarray
    recurrence: np.ndarray
    input_bias: np.ndarray
    recurrence_bias: np.ndarray


def unroll(node: ir.Node, make: Make) -> list[ir.Value | None] | None:
    """Make the outputs Y, Y_h (and Y_c) of an LSTM or GRU; None if it is not one that can be unrolled."""
    shape = static_shape(node.inputs[0])
    if shape is None or not _plain(node) or node.attributes.get_int("layout", 0):
        return None
    hidden = node.attributes.get_int("hidden_size", 0) or (static_shape(node.inputs[2]) or (0,))[-1]
    mode = node.attributes.get_string("direction", "forward")
    count = 2 if mode == "bidirectional" else 1
    steps, batch = shape[0], shape[1]
    if steps * count > _STEPS:
        return None
    starts = _starts(node, make, count, (batch, hidden))
    rows: list[list[ir.Value]] = []
    last_hidden: list[ir.Value] = []
    last_cell: list[ir.Value] = []
    for d in range(count):
        weights = _weights(node, d)
        backward = mode == "reverse" or d == 1
        order = range(steps - 1, -1, -1) if backward else range(steps)
        outputs, state = _run(node, make, weights, [s[d] for s in starts], order, hidden)
        rows.append(outputs[::-1] if backward else outputs)
        last_hidden.append(state[0])
        last_cell.extend(state[1:])
    return [
        _stack_rows(make, rows, (batch, hidden)),
        _stack(make, last_hidden, (batch, hidden)),
        *([_stack(make, last_cell, (batch, hidden))] if node.op_type == "LSTM" else []),
    ]


def _plain(node: ir.Node) -> bool:
    attributes = node.attributes
    count = 2 if attributes.get_string("direction", "forward") == "bidirectional" else 1
    given = attributes.get_strings("activations")
    if given and tuple(name.lower() for name in given) != _DEFAULTS[node.op_type] * count:
        return False
    if attributes.get_float("clip", 0.0) or attributes.get_int("input_forget", 0):
        return False
    inputs = [*node.inputs, *([None] * 8)]
    if inputs[_LENGTHS] is not None or (node.op_type == "LSTM" and inputs[_PEEPHOLES] is not None):
        return False
    bias = inputs[3]
    return is_constant(inputs[1]) and is_constant(inputs[2]) and (bias is None or is_constant(bias))


def _weights(node: ir.Node, direction: int) -> _Direction:
    def array(i: int) -> np.ndarray:
        return node.inputs[i].const_value.numpy()[direction]  # type: ignore[union-attr]

    inward, recurrent = array(1), array(2)
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        first, second = np.split(array(3), 2)
    else:
        first = second = np.zeros(inward.shape[0], inward.dtype)
    return _Direction(inward.T.copy(), recurrent.T.copy(), first, second)


def _starts(node: ir.Node, make: Make, count: int, shape: tuple[int, int]) -> list[list[ir.Value]]:
    """First hidden state (and cell) of each direction, (N, H)."""
    found: list[list[ir.Value]] = []
    for i in (5, 6) if node.op_type == "LSTM" else (5,):
        given = node.inputs[i] if len(node.inputs) > i else None
        if given is None:
            zeros = np.zeros(shape, node.inputs[1].const_value.dtype.numpy())  # type: ignore[union-attr]
            found.append([make.array(zeros) for _ in range(count)])
        else:
            found.append(_rows(make, given, count, shape))
    return found


def _rows(make: Make, value: ir.Value, count: int, shape: tuple[int, ...]) -> list[ir.Value]:
    """The entries of the first axis. One Split, so that the steps after it are the same function for the compiler."""
    return [make("Reshape", [row, make.ints(shape)]) for row in make.split(value, count, 0, 1)]


def _run(
    node: ir.Node, make: Make, weights: _Direction, state: list[ir.Value], order: Sequence[int], hidden: int
) -> tuple[list[ir.Value], list[ir.Value]]:
    """All steps of one direction; returns the hidden state after each, in computing order, and the last state."""
    lstm = node.op_type == "LSTM"
    source = node.inputs[0]
    width = _GATES[node.op_type] * hidden
    batch = (static_shape(source) or (0, 1))[1]
    late = not lstm and bool(node.attributes.get_int("linear_before_reset", 0))
    bias = weights.input_bias + weights.recurrence_bias
    if late:
        bias[2 * hidden :] = weights.input_bias[2 * hidden :]
    inward = make("Add", [make("MatMul", [source, make.array(weights.input)]), make.array(bias)])
    recurrence = make.array(weights.recurrence if lstm else weights.recurrence[:, : 2 * hidden].copy())
    candidate = None if lstm else make.array(weights.recurrence[:, 2 * hidden :].copy())
    late_bias = make.array(weights.recurrence_bias[2 * hidden :].copy()) if late else None
    outputs: list[ir.Value] = []
    rows = _rows(make, inward, len(order), (batch, width))
    for gates in (rows[t] for t in order):
        if lstm:
            state = _lstm(make, gates, state, recurrence, hidden)
        else:
            state = [_gru(make, gates, state[0], (recurrence, candidate, late_bias), hidden)]
        outputs.append(state[0])
    return outputs, state


def _lstm(make: Make, gates: ir.Value, state: list[ir.Value], recurrence: ir.Value, hidden: int) -> list[ir.Value]:
    """Gates in ONNX's order: input, output, forget, cell."""
    before, cell = state
    gates = make("Add", [gates, make("MatMul", [before, recurrence])])
    parts = make.split(gates, 4, 1, hidden)
    i, o, f = (make("Sigmoid", [part]) for part in parts[:3])
    cell = make("Add", [make("Mul", [f, cell]), make("Mul", [i, make("Tanh", [parts[3]])])])
    return [make("Mul", [o, make("Tanh", [cell])]), cell]


def _gru(
    make: Make,
    gates: ir.Value,
    before: ir.Value,
    weights: tuple[ir.Value, ir.Value | None, ir.Value | None],
    hidden: int,
) -> ir.Value:
    """Gates in ONNX's order: update, reset, hidden; a late bias means linear_before_reset."""
    recurrence, candidate, late_bias = weights
    given = make.split(gates, 3, 1, hidden)
    past = make.split(make("MatMul", [before, recurrence]), 2, 1, hidden)
    z, r = (make("Sigmoid", [make("Add", [a, b])]) for a, b in zip(given[:2], past, strict=True))
    if late_bias is None:
        inner = make("MatMul", [make("Mul", [r, before]), candidate])
    else:
        inner = make("Mul", [r, make("Add", [make("MatMul", [before, candidate]), late_bias])])
    h = make("Tanh", [make("Add", [given[2], inner])])
    # (1 - z) * h + z * before
    return make("Add", [h, make("Mul", [z, make("Sub", [before, h])])])


def _stack(make: Make, values: list[ir.Value], shape: tuple[int, int]) -> ir.Value:
    """(D, N, H) from D times (N, H)."""
    rows = [make("Reshape", [value, make.ints((1, *shape))]) for value in values]
    return rows[0] if len(rows) == 1 else make("Concat", [*rows], axis=0)


def _stack_rows(make: Make, rows: list[list[ir.Value]], shape: tuple[int, int]) -> ir.Value:
    """(T, D, N, H) from D lists of T times (N, H)."""
    flat = [rows[d][t] for t in range(len(rows[0])) for d in range(len(rows))]
    stacked = _stack(make, flat, shape)
    return make("Reshape", [stacked, make.ints((len(rows[0]), len(rows), *shape))])
