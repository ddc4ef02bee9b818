"""Integers with the sign that a CPU multiplies: a grid of int8 is one of uint8 whose zero point is 128 higher.

Where quantizers make integers and dequantizers read them, with nothing but moves between, nobody sees which it is.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from graphopt.targets import Isa
from graphopt_backends._fold import add_constant
from graphopt_backends.kernels.multiply import Multiply
from graphopt_backends.network.integers import grid_of
from graphopt_backends.network.passing import MOVES

__all__ = ["choose_signs"]

_HIGHEST = 128


def choose_signs(model: ir.Model, isa: Isa) -> None:
    """Change the sign of activations that multiplications would have to change again and again, in place."""
    for unwanted, wanted in ((ir.DataType.INT8, ir.DataType.UINT8), (ir.DataType.UINT8, ir.DataType.INT8)):
        if not Multiply(isa, "s8s8" if unwanted == ir.DataType.INT8 else "u8s8").shift:
            continue
        seen: set[ir.Value] = set()
        for node in list(model.graph):
            value = node.outputs[0]
            if node.op_type == "QuantizeLinear" and value.dtype == unwanted and value not in seen:
                group = _connected(value)
                seen |= group
                if _is_free(group):
                    _change(model.graph, group, wanted)


def _neighbours(node: ir.Node) -> Iterable[ir.Value]:
    """Integers that a node only moves, or the one end of those that it makes or reads."""
    if node.op_type == "QuantizeLinear":
        return node.outputs[:1]
    if node.op_type in MOVES or node.op_type == "DequantizeLinear":
        return (value for value in (*node.inputs[:1], *node.outputs[:1]) if value is not None and _is_byte(value))
    if node.op_type == "Concat":
        return (value for value in (*node.inputs, *node.outputs) if value is not None)
    return ()


def _is_byte(value: ir.Value) -> bool:
    return value.dtype in (ir.DataType.INT8, ir.DataType.UINT8)


def _connected(value: ir.Value) -> set[ir.Value]:
    """All integers that have the type of this one if it changes."""
    found, open_values = {value}, [value]
    while open_values:
        current = open_values.pop()
        maker = current.producer()
        nodes = [*([maker] if maker is not None else []), *(user for user, _ in current.uses())]
        for other in {other for node in nodes for other in _neighbours(node)} - found:
            found.add(other)
            open_values.append(other)
    return found


def _is_free(group: set[ir.Value]) -> bool:
    """Quantizers make all of them, dequantizers read them, and nothing but moves is between."""
    for value in group:
        maker = value.producer()
        if maker is None or value.is_graph_output():
            return False
        for node in (maker, *(user for user, _ in value.uses())):
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                if grid_of(node) is None:
                    return False
            elif node.op_type not in MOVES and node.op_type != "Concat":
                return False
    return True


def _change(graph: ir.Graph, group: set[ir.Value], wanted: ir.DataType) -> None:
    step = _HIGHEST if wanted == ir.DataType.UINT8 else -_HIGHEST
    ends = {node for value in group for node in (value.producer(), *(user for user, _ in value.uses()))}
    for node in [node for node in graph if node in ends and node.op_type in ("QuantizeLinear", "DequantizeLinear")]:
        grid = grid_of(node)
        assert grid is not None
        zero = np.array(grid.zero_point + step, wanted.numpy())
        node.resize_inputs(3)
        node.replace_input_with(2, add_constant(graph, f"{node.name}/{wanted.name.lower()}_zero", zero))
        node.attributes.pop("output_dtype", None)
    for value in group:
        value.type = ir.TensorType(wanted)
