"""Let MatMul and Gemm read a constant matrix that stands behind a Transpose, as tied embeddings do."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from graphopt_passes.quant.builder import Builder
from graphopt_passes.quant.sites import tensor_of

__all__ = ["turn_constants"]


def turn_constants(builder: Builder, chosen: Callable[[ir.Node], bool]) -> None:
    """Put a transposed initializer in place of Transpose nodes over constant float matrices that only layers read.

    The initializer reads the original when asked, so that no copy stands in memory.

    Args:
        builder: Edits the model.
        chosen: Whether the weight of a layer is about to be replaced; a Transpose that another one reads stays.
    """
    for graph in builder.model.graphs():
        for node in graph:
            tensor, source = _matrix_behind(node, chosen), node.inputs[0] if node.inputs else None
            if tensor is None or source is None:
                continue
            name = builder.name(f"{node.outputs[0].name}_constant")
            turned = _turned(tensor, name)
            value = ir.Value(name=name, type=ir.TensorType(turned.dtype), shape=turned.shape, const_value=turned)
            graph.register_initializer(value)
            node.outputs[0].replace_all_uses_with(value)
            graph.remove(node, safe=True)
            builder.discard(source)


def _matrix_behind(node: ir.Node, chosen: Callable[[ir.Node], bool]) -> ir.TensorProtocol | None:
    if node.op_type != "Transpose" or node.domain not in ("", "ai.onnx") or node.outputs[0].is_graph_output():
        return None
    tensor = tensor_of(node.inputs[0])
    if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) != 2:
        return None
    readers = node.outputs[0].uses()
    layers = all(use.node.op_type in ("MatMul", "Gemm") and use.idx == 1 and chosen(use.node) for use in readers)
    return tensor if readers and layers and tuple(node.attributes.get_ints("perm", (1, 0))) == (1, 0) else None


def _turned(tensor: ir.TensorProtocol, name: str) -> ir.LazyTensor:
    rows, columns = (int(size) for size in tensor.shape.numpy())
    shape = ir.Shape((columns, rows))
    return ir.LazyTensor(lambda: ir.Tensor(tensor.numpy().T, name=name), ir.DataType.FLOAT, shape, name=name)
