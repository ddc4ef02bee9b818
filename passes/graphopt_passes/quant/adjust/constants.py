"""Constants of a graph given new numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt_passes.fold.rewiring import LARGE, FreshNames
from graphopt_passes.quant.sites import graph_of, tensor_of

__all__ = ["replace_constant", "scale_constant"]

Array = np.ndarray[Any, np.dtype[Any]]


def scale_constant(node: ir.Node, index: int, factors: Array, names: FreshNames) -> None:
    """Multiply a constant input by factors, which may have more elements than it; a large product stays unread."""
    tensor = tensor_of(node.inputs[index])
    if tensor is None:
        raise TypeError(f"{node.name!r} has lost a constant")

    def compute() -> Array:
        return (tensor.numpy() * factors).astype(np.float32)

    replace_constant(node, index, np.broadcast_shapes(tuple(tensor.shape.numpy()), factors.shape), compute, names)


def replace_constant(
    node: ir.Node, index: int, shape: tuple[int, ...], compute: Callable[[], Array], names: FreshNames
) -> None:
    """Give a node another float32 constant; one that others read, or an output of a node, keeps its value for them.

    Args:
        node: The node.
        index: The input, which may lie beyond the last.
        shape: Shape of the new constant.
        compute: Makes it; called again whenever it is read if it is large.
        names: Names taken.
    """
    old = node.inputs[index] if index < len(node.inputs) else None
    graph = graph_of(node)
    own = old is not None and old.is_initializer() and len(tuple(old.uses())) == 1 and not old.is_graph_output()
    if own and old is not None:
        old.const_value, old.shape = _tensor(shape, compute, old.name or ""), ir.Shape(shape)
        return
    name = names.make(f"{old.name if old is not None else node.name}_adjusted")
    held = ir.Value(
        name=name,
        shape=ir.Shape(shape),
        type=ir.TensorType(ir.DataType.FLOAT),
        const_value=_tensor(shape, compute, name),
    )
    graph.register_initializer(held)
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, held)
    producer = old.producer() if old is not None else None
    if old is not None and producer is not None and not old.uses() and not old.is_graph_output():
        producer.graph.remove(producer, safe=True)  # type: ignore[union-attr]


def _tensor(shape: tuple[int, ...], compute: Callable[[], Array], name: str) -> ir.TensorProtocol:
    if 4 * int(np.prod(shape)) <= LARGE:
        return ir.Tensor(compute(), name=name)
    return ir.LazyTensor(
        lambda: ir.Tensor(compute(), name=name), dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), name=name
    )
