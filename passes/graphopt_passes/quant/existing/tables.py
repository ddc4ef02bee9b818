"""Tables of numbers in few bits, looked up row by row and made real afterwards, as tables of floats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.reference import Reference
from graphopt_passes.quant.existing.floats import Floats
from graphopt_passes.quant.sites import graph_of, tensor_of

__all__ = ["look_up_floats"]

Array = np.ndarray[Any, np.dtype[Any]]
_BY_ROWS = frozenset({"BitShift", "BitwiseAnd", "Cast", "Concat", "DequantizeLinear", "Gather", "Mul", "Split", "Sub"})
_ROWS_AT_ONCE = 4096


def look_up_floats(floats: Floats, node: ir.Node) -> bool:
    """Replace what makes real numbers of looked-up rows by a Gather from a table of floats.

    Everything between the tables and the node must work on each row by itself, along its last axis; then the float
    table is what the nodes make of the rows 0, 1, 2, ...

    Args:
        floats: Edits the model.
        node: The DequantizeLinear whose result is the rows.

    Returns:
        Whether the node was such a place.
    """
    chain = _chain(node)
    if chain is None:
        return False
    nodes, index, rows = chain
    make = _table(nodes, index, node.outputs[0])
    width = make(np.zeros(1, np.int64)).shape[-1]

    def table() -> Array:
        starts = range(0, rows, _ROWS_AT_ONCE)
        return np.concatenate([make(np.arange(i, min(i + _ROWS_AT_ONCE, rows))) for i in starts])

    name = next(look.inputs[0].name for look in nodes if look.op_type == "Gather" and look.inputs[0] is not None)
    weight = floats.weight((name or "table").removesuffix("_rows"), table, (rows, width), graph_of(node))
    (found,) = floats.emit(node, "Gather", [weight, index], name=node.name or "")
    floats.replace(node, node.outputs[0], found)
    return True


def _chain(last: ir.Node) -> tuple[list[ir.Node], ir.Value, int] | None:
    """The nodes behind a result in order, the index that they look up, and the number of rows; None if others join."""
    found: dict[ir.Node, None] = {}
    indices: dict[ir.Value, None] = {}
    sizes: set[int] = set()
    todo = [last]
    while todo:
        node = todo.pop()
        if node.op_type not in _BY_ROWS or node.graph is not last.graph:
            return None
        found[node] = None
        if node.op_type == "Gather":
            table, index = tensor_of(node.inputs[0]), node.inputs[1]
            if table is None or index is None or node.attributes.get_int("axis", 0) or len(table.shape) != 2:
                return None
            indices[index] = None
            sizes.add(int(table.shape.numpy()[0]))
            continue
        if node.attributes.get_int("axis", -1) != -1:
            return None
        for value in node.inputs:
            if value is None or tensor_of(value) is not None:
                continue
            maker = value.producer()
            if maker is None:
                return None
            todo.append(maker)
    if len(indices) != 1 or len(sizes) != 1 or not isinstance(last.graph, ir.Graph):
        return None
    return [node for node in last.graph if node in found], next(iter(indices)), sizes.pop()


def _table(nodes: list[ir.Node], index: ir.Value, result: ir.Value) -> Callable[[Array], Array]:
    """What the nodes make of some rows."""
    rows = ir.Value(name="rows", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["n"]))
    values: dict[ir.Value, ir.Value] = {index: rows}
    copies: list[ir.Node] = []
    constants: list[ir.Value] = []
    for node in nodes:
        for value in node.inputs:
            tensor = tensor_of(value)
            if value is not None and tensor is not None and value not in values:
                values[value] = ir.Value(name=value.name, const_value=tensor)
                constants.append(values[value])
        outputs = [ir.Value(name=output.name) for output in node.outputs]
        values |= dict(zip(node.outputs, outputs, strict=True))
        inputs = [None if value is None else values[value] for value in node.inputs]
        copies.append(ir.node(node.op_type, inputs, node.attributes, outputs=outputs))
    values[result].type = ir.TensorType(ir.DataType.FLOAT)
    graph = nodes[-1].graph
    imports = dict(graph.opset_imports) if isinstance(graph, ir.Graph) else {}
    inner = ir.Graph([rows], [values[result]], nodes=copies, initializers=constants, opset_imports=imports, name="rows")
    model = ir.Model(inner, ir_version=10)

    def make(chosen: Array) -> Array:
        return Reference(model).run({"rows": chosen})[result.name or ""]

    return make
