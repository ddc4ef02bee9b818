"""LSTM, GRU and RNN: the product with the inputs of all steps, then a kernel that goes through the steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from graphopt_backends._fold import is_constant, static_shape
from graphopt_backends.kernels.epilogue import Epilogue
from graphopt_backends.kernels.gemm import Gemm
from graphopt_backends.kernels.recurrent import ACTIVATIONS, Cell, Recurrent
from graphopt_backends.network.integers import is_weight, weight_of
from graphopt_backends.network.network import Network, constant_of
from graphopt_backends.network.regions import Region
from graphopt_backends.network.views import View

__all__ = ["CHECKS", "CONVERTERS"]

_CELLS: Mapping[str, Cell] = {"GRU": "gru", "LSTM": "lstm", "RNN": "rnn"}
_USUAL = {"GRU": ("sigmoid", "tanh"), "LSTM": ("sigmoid", "tanh", "tanh"), "RNN": ("tanh",)}
_LENGTHS, _HIDDEN, _CELL, _PEEPHOLES = 4, 5, 6, 7


def _given(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if len(node.inputs) > index else None


def _directions(node: ir.Node) -> tuple[bool, ...]:
    """For each direction, whether it runs from the end."""
    mode = node.attributes.get_string("direction", "forward")
    return {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}[mode]


def _activations(node: ir.Node) -> tuple[str, ...]:
    """Of one direction; those of both are the same."""
    found = [name.lower() for name in node.attributes.get_strings("activations") or ()]
    return tuple(found[: len(_USUAL[node.op_type])]) or _USUAL[node.op_type]


def _check(node: ir.Node) -> bool:
    shape, hidden = static_shape(node.inputs[0]), _given(node, 2)
    if shape is None or hidden is None or 0 in shape or node.outputs[0].dtype != ir.DataType.FLOAT:
        return False
    weights = [value for value in node.inputs[1:4] if value is not None]
    known = tuple(name.lower() for name in node.attributes.get_strings("activations") or ())
    count, attributes = len(_directions(node)), node.attributes
    steps = shape[1 if attributes.get_int("layout", 0) else 0]
    lengths = _given(node, _LENGTHS)
    return (
        all(is_weight(value) for value in weights)
        and not attributes.get_float("clip", 0.0)
        and not attributes.get_int("input_forget", 0)
        and (node.op_type != "LSTM" or _given(node, _PEEPHOLES) is None)
        and (not known or known == known[: len(known) // count] * count)
        and all(name in ACTIVATIONS for name in known)
        and (lengths is None or (is_constant(lengths) and bool((constant_of(lengths) == steps).all())))
    )


def _convert(network: Network, node: ir.Node, _: Region | None) -> None:
    """X [steps, batch, inputs] (or the batch first) to Y [steps, directions, batch, hidden] and the last states."""
    batch_first = bool(node.attributes.get_int("layout", 0))
    source = network.input(node)
    if batch_first:
        source = source.permuted((1, 0, 2))
    steps, batch, _inputs = source.shape
    recurrence = weight_of(_weight(node, 2))
    reverse, hidden = _directions(node), recurrence.shape[2]
    late = node.op_type == "GRU" and bool(node.attributes.get_int("linear_before_reset", 0))
    bias, late_bias = _biases(node, recurrence.shape[1], hidden, late)
    firsts = [_given(node, i) for i in (_HIDDEN, _CELL)]
    if node.op_type != "LSTM":
        firsts[1] = None
    kernel = Recurrent(
        network.isa, _CELLS[node.op_type], steps, batch, hidden, reverse, _activations(node), late,
        (firsts[0] is not None, firsts[1] is not None),
    )  # fmt: skip
    views = [_gates(network, node, source, bias), network.constant(kernel.pack(recurrence))]
    if late:
        views.append(network.constant(kernel.pack_column(late_bias)))
    for value in firsts:
        if value is not None:
            first = network.view(value)
            views.append(network.contiguous(first.permuted((1, 0, 2)) if batch_first else first, node))
    sequence = network.temporary((steps, batch, len(reverse), hidden), "float32")
    lasts = [network.temporary((len(reverse), batch, hidden), "float32") for _ in range(1 + (node.op_type == "LSTM"))]
    network.call(kernel, [*views, sequence, *lasts], node)
    results = [sequence.permuted((1, 0, 2, 3) if batch_first else (0, 2, 1, 3))]
    results += [last.permuted((1, 0, 2)) if batch_first else last for last in lasts]
    network.views.update(zip(node.outputs, results, strict=False))


def _weight(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _biases(node: ir.Node, columns: int, hidden: int, late: bool) -> tuple[np.ndarray, np.ndarray]:
    """What the input's product begins with [directions, gates * hidden], and that of a product that is reset."""
    value, count = _given(node, 3), len(_directions(node))
    both = np.zeros((count, 2 * columns), np.float32) if value is None else weight_of(value)
    inward, recurrent = both[:, :columns].copy(), both[:, columns:].copy()
    last = recurrent[:, -hidden:].copy()
    if late:
        recurrent[:, -hidden:] = 0
    return inward + recurrent, last


def _gates(network: Network, node: ir.Node, source: View, bias: np.ndarray) -> View:
    """What all gates of all steps get from the input: [steps, batch, directions, gates, hidden]."""
    weight = weight_of(_weight(node, 1))
    matrix = weight.reshape(-1, weight.shape[2]).T
    flat = network.contiguous(source, node)
    rows = flat.shape[0] * flat.shape[1]
    kernel = Gemm(network.isa, "f32", rows, matrix.shape[1], matrix.shape[0], Epilogue(bias=True))
    result = network.temporary((rows, matrix.shape[1]), "float32")
    constants = [network.constant(kernel.pack(matrix)), network.constant(kernel.pack_column(bias.reshape(-1)))]
    network.call(kernel, [flat, *constants, result], node)
    return result


CONVERTERS: Mapping[str, Callable[[Network, ir.Node, Region | None], None]] = dict.fromkeys(_CELLS, _convert)

CHECKS: Mapping[str, Callable[[ir.Node], bool]] = dict.fromkeys(_CELLS, _check)
