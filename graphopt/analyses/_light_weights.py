"""Take the large matrices out of a model that is run for the shapes of its values only."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.opset import opset_version

__all__ = ["elements", "shrink_matrices"]

_SMALL = 1 << 18  # elements
_EXPAND_SINCE = 8


def elements(model: ir.Model) -> int:
    """Elements of all initializers: what they take as floats, a quarter of the bytes, if integers are dequantized."""
    tensors = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
    return sum(tensor.size for tensor in tensors if tensor is not None)


def shrink_matrices(model: ir.Model) -> None:
    """Let MatMul, Gemm and Gather read one column of zeros, and expand what they make to the width that it had.

    Shapes and types of all values stay, their elements do not. A matrix may stand behind DequantizeLinear. What other
    operators read as well stays.
    """
    if opset_version(model) < _EXPAND_SINCE:
        return
    for graph in model.graphs():
        for node in list(graph):
            port = _port(node)
            if port is not None:
                _shrink(graph, node, *port)
    _drop_unread(model)


def _port(node: ir.Node) -> tuple[int, int] | None:
    """Which input is the matrix, and its axis that becomes the last of the result."""
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "MatMul":
        return 1, 1
    if node.op_type == "Gemm":
        return 1, 0 if node.attributes.get_int("transB", 0) else 1
    return (0, 1) if node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0 else None


def _shrink(graph: ir.Graph, node: ir.Node, index: int, axis: int) -> None:
    source = node.inputs[index]
    producer = source.producer() if source is not None else None
    dequantized = producer is not None and producer.op_type == "DequantizeLinear"
    stored = producer.inputs[0] if producer is not None and dequantized else source
    tensor = stored.const_value if stored is not None and not stored.is_graph_input() else None
    if tensor is None or source is None or len(tensor.shape) != 2 or tensor.size <= _SMALL:
        return
    shape = [int(size) for size in tensor.shape.numpy()]
    width, shape[axis] = shape[axis], 1
    dtype = ir.DataType.FLOAT if dequantized else tensor.dtype
    name, result = node.outputs[0].name, node.outputs[0]
    column = _constant(graph, f"{name} column", np.zeros(shape, dtype.numpy()))
    inputs = [column if i == index else value for i, value in enumerate(node.inputs)]
    if node.op_type == "Gemm":
        inputs = inputs[:2]  # the bias has the old width
    narrow = ir.node(node.op_type, inputs, dict(node.attributes), name=f"{name} narrow")
    narrow.outputs[0].name = f"{name} narrow"
    widths = _constant(graph, f"{name} width", np.array([width], np.int64))
    wide = ir.node("Expand", [narrow.outputs[0], widths], name=f"{name} wide")
    wide.outputs[0].type = result.type
    graph.insert_before(node, [narrow, wide])
    result.replace_all_uses_with(wide.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)
    result.name, wide.outputs[0].name = f"{name} before", name


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def _drop_unread(model: ir.Model) -> None:
    for graph in model.graphs():
        for node in list(graph):
            output = node.outputs[0]
            if node.op_type == "DequantizeLinear" and not output.uses() and not output.is_graph_output():
                graph.remove(node, safe=True)
    for graph in model.graphs():
        for name, value in list(graph.initializers.items()):
            if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                graph.initializers.pop(name)
