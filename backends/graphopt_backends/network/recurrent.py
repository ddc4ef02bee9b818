"""LSTM, GRU and RNN: the product with the inputs of all steps, then a kernel that goes through the steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from graphopt_backends._fold import is_constant, static_shape
from graphopt_backends.kernels.epilogue import Epilogue
from graphopt_backends.kernels.expression import Expression, call, clip, number, operand, substituted
from graphopt_backends.kernels.gemm import Gemm
from graphopt_backends.kernels.multiply import stored_as
from graphopt_backends.kernels.recurrent import Recurrent
from graphopt_backends.kernels.sequences import Cell
from graphopt_backends.network.elementwise import expression_of
from graphopt_backends.network.half import narrowed
from graphopt_backends.network.integers import is_weight, weight_of
from graphopt_backends.network.network import Network, constant_of
from graphopt_backends.network.regions import Region
from graphopt_backends.network.views import View

__all__ = ["CHECKS", "CONVERTERS"]

_CELLS: Mapping[str, Cell] = {"GRU": "gru", "LSTM": "lstm", "RNN": "rnn"}
_USUAL = {"GRU": ("Sigmoid", "Tanh"), "LSTM": ("Sigmoid", "Tanh", "Tanh"), "RNN": ("Tanh",)}
_LENGTHS, _HIDDEN, _CELL, _PEEPHOLES = 4, 5, 6, 7


def _given(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if len(node.inputs) > index else None


def _directions(node: ir.Node) -> tuple[bool, ...]:
    """For each direction, whether it runs from the end."""
    mode = node.attributes.get_string("direction", "forward")
    return {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}[mode]


_PLAIN = frozenset({"Relu", "Sigmoid", "Softplus", "Softsign", "Tanh"})
_SCALED = {"Affine": (1.0, 0.0), "HardSigmoid": (0.2, 0.5), "ScaledTanh": (1.0, 1.0)}
_SLOPED = {"Elu": 1.0, "LeakyRelu": 0.01, "ThresholdedRelu": 1.0}
_WITHOUT_LIMIT = 2
"""The function of an LSTM's cell, which is no gate."""


def _activations(node: ir.Node) -> tuple[Expression, ...] | None:
    """Functions of the gates, which are those of both directions; None where they differ or are none we know.

    Numbers that belong to them come in the order of the functions that take some.
    """
    attributes, usual = node.attributes, _USUAL[node.op_type]
    names = [str(name).capitalize() for name in attributes.get_strings("activations") or ()]
    names = [_NAMES.get(name, name) for name in names] or [*usual] * len(_directions(node))
    alphas, betas = (list(attributes.get_floats(f"activation_{name}") or ()) for name in ("alpha", "beta"))
    found: list[Expression] = []
    for name in names:
        if name in _PLAIN:
            function = expression_of(ir.Node("", name, []), [operand(0)])
        elif name in _SLOPED:
            alpha = alphas.pop(0) if alphas else _SLOPED[name]
            function = expression_of(ir.Node("", name, [], [ir.AttrFloat32("alpha", alpha)]), [operand(0)])
        elif name in _SCALED:
            alpha, beta = (given.pop(0) if given else usual for given, usual in zip((alphas, betas), _SCALED[name],
                                                                                    strict=True))  # fmt: skip
            function = _scaled(name, alpha, beta)
        else:
            return None
        if function is None:
            return None
        found.append(function)
    own = tuple(found[: len(usual)])
    return _limited(node, own) if tuple(found) == own * len(_directions(node)) else None


_NAMES = {name.capitalize(): name for name in (*_PLAIN, *_SCALED, *_SLOPED)}


def _scaled(name: str, alpha: float, beta: float) -> Expression:
    if name == "ScaledTanh":
        return call("mul", call("tanh", call("mul", operand(0), number(beta))), number(alpha))
    line = call("add", call("mul", operand(0), number(alpha)), number(beta))
    return clip(line, 0, 1) if name == "HardSigmoid" else line


def _limited(node: ir.Node, functions: tuple[Expression, ...]) -> tuple[Expression, ...]:
    """Functions of what was brought between two limits before."""
    limit = node.attributes.get_float("clip", 0.0)
    if not limit:
        return functions
    inside = clip(operand(0), -limit, limit)
    return tuple(
        substituted(function, {operand(0): inside}) if i != _WITHOUT_LIMIT else function
        for i, function in enumerate(functions)
    )


def _check(node: ir.Node) -> bool:
    shape, hidden = static_shape(node.inputs[0]), _given(node, 2)
    if shape is None or hidden is None or 0 in shape or node.outputs[0].dtype != ir.DataType.FLOAT:
        return False
    weights = [*node.inputs[1:4], *([_given(node, _PEEPHOLES)] if node.op_type == "LSTM" else [])]
    return all(value is None or is_weight(value) for value in weights) and _activations(node) is not None


def _lengths(node: ir.Node, steps: int) -> ir.Value | None:
    """Lengths of the sequences, if they are not all that of the batch."""
    value = _given(node, _LENGTHS)
    return None if value is not None and is_constant(value) and (constant_of(value) == steps).all() else value


def _convert(network: Network, node: ir.Node, _: Region | None) -> None:
    """X [steps, batch, inputs] (or the batch first) to Y [steps, directions, batch, hidden] and the last states."""
    batch_first = bool(node.attributes.get_int("layout", 0))
    source = network.input(node)
    if batch_first:
        source = source.permuted((1, 0, 2))
    steps, batch, _inputs = source.shape
    recurrence = narrowed(weight_of(_weight(node, 2)))
    reverse, hidden = _directions(node), recurrence.shape[2]
    late = node.op_type == "GRU" and bool(node.attributes.get_int("linear_before_reset", 0))
    bias, late_bias = _biases(node, recurrence.shape[1], hidden, late)
    firsts = [_given(node, i) for i in (_HIDDEN, _CELL)]
    if node.op_type != "LSTM":
        firsts[1] = None
    peepholes = _given(node, _PEEPHOLES) if node.op_type == "LSTM" else None
    lengths, activations = _lengths(node, steps), _activations(node)
    assert activations is not None
    kernel = Recurrent(
        network.isa, _CELLS[node.op_type], steps, batch, hidden, reverse, activations, late,
        (firsts[0] is not None, firsts[1] is not None), lengths is not None, peepholes is not None,
        bool(node.attributes.get_int("input_forget", 0)) and node.op_type == "LSTM", stored_as(recurrence),
    )  # fmt: skip
    views = [_gates(network, node, source, bias), network.constant(kernel.pack(recurrence))]
    if late:
        views.append(network.constant(kernel.pack_column(late_bias)))
    if peepholes is not None:
        views.append(network.constant(kernel.pack_column(weight_of(peepholes))))
    if lengths is not None:
        views.append(network.contiguous(network.view(lengths), node))
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
    matrix = narrowed(weight.reshape(-1, weight.shape[2]).T)
    flat = network.contiguous(source, node)
    rows = flat.shape[0] * flat.shape[1]
    kernel = Gemm(network.isa, "f32", rows, matrix.shape[1], matrix.shape[0], Epilogue(bias=True),
                  stored=stored_as(matrix))  # fmt: skip
    result = network.temporary((rows, matrix.shape[1]), "float32")
    constants = [network.constant(kernel.pack(matrix)), network.constant(kernel.pack_column(bias.reshape(-1)))]
    network.call(kernel, [flat, *constants, result], node)
    return result


CONVERTERS: Mapping[str, Callable[[Network, ir.Node, Region | None], None]] = dict.fromkeys(_CELLS, _convert)

CHECKS: Mapping[str, Callable[[ir.Node], bool]] = dict.fromkeys(_CELLS, _check)
