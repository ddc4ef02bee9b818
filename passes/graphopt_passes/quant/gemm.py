"""Gemms as integer kernels want them: `A B + c` with one number for each column, and nothing scaled.

    alpha   becomes part of the weight
    beta    becomes part of what is added
    C       of one number or one row: a vector; anything else, computed values too: an Add behind

Everything else is computed in float, its weight dequantized on every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt_passes.quant.builder import Builder
from graphopt_passes.quant.sites import Site, graph_of, keyed_nodes, tensor_of

__all__ = ["plain_gemms"]

Array = np.ndarray[Any, np.dtype[Any]]


def plain_gemms(model: ir.Model, sites: Sequence[Site]) -> None:
    """Rewrite the Gemms among the sites, in place; they compute the same."""
    builder, nodes = Builder(model), keyed_nodes(model)
    weights: dict[tuple[ir.Value, float], ir.Value] = {}
    for site in sites:
        if site.operator == "Gemm":
            node = nodes[site.key]
            _fold_alpha(builder, node, weights)
            _plain_bias(builder, node, site.weights[0].channels)


def _fold_alpha(builder: Builder, node: ir.Node, weights: dict[tuple[ir.Value, float], ir.Value]) -> None:
    alpha, value = _factor(node, "alpha"), node.inputs[1]
    tensor = tensor_of(value)
    if alpha == 1.0 or value is None or tensor is None:
        return
    if (value, alpha) not in weights:
        name, shape = builder.name(f"{value.name}_alpha"), tensor.shape

        def scaled() -> ir.TensorProtocol:
            return ir.tensor((tensor.numpy() * np.float32(alpha)).astype(np.float32))

        lazy = ir.LazyTensor(scaled, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape.numpy()), name=name)
        made = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape.numpy()))
        made.const_value = lazy
        builder.model.graph.register_initializer(made)
        weights[value, alpha] = made
    node.replace_input_with(1, weights[value, alpha])
    del node.attributes["alpha"]
    builder.discard(value)


def _plain_bias(builder: Builder, node: ir.Node, columns: int) -> None:
    beta, bias = _factor(node, "beta"), node.inputs[2] if len(node.inputs) > 2 else None
    node.attributes.pop("beta", None)
    if bias is None:
        return
    tensor = tensor_of(bias)
    if not beta:
        node.replace_input_with(2, None)
    elif tensor is None or tensor.dtype != ir.DataType.FLOAT or not _is_row(tensor):
        node.replace_input_with(2, None)
        _add_behind(builder, node, bias, beta)
    elif beta != 1.0 or tensor.shape.numpy() != (columns,):
        row = np.broadcast_to(tensor.numpy().reshape(-1), (columns,)) * np.float32(beta)
        node.replace_input_with(2, builder.constant(f"{bias.name}_row", row.astype(np.float32)))
    builder.discard(bias)


def _is_row(tensor: ir.TensorProtocol) -> bool:
    """One number for each column, or one for all."""
    shape = tensor.shape.numpy()
    return len(shape) < 2 or shape[0] == 1


def _add_behind(builder: Builder, node: ir.Node, bias: ir.Value, beta: float) -> None:
    """Add `beta` times a bias to the result; the sum takes over its name."""
    graph, old = graph_of(node), node.outputs[0]
    name = old.name or ""
    total = ir.Value(name=name, type=old.type, shape=old.shape, doc_string=old.doc_string)
    total.metadata_props.update(old.metadata_props)
    old.replace_all_uses_with(total, replace_graph_outputs=True)
    old.name = builder.name(f"{name}_product")
    nodes: list[ir.Node] = []
    if beta != 1.0:
        nodes.append(builder.node("Mul", [bias, builder.scalar("beta", np.array(beta, np.float32))], f"{name}_bias"))
        bias = nodes[0].outputs[0]
    nodes.append(ir.node("Add", [old, bias], outputs=[total], name=builder.name(f"{name}_sum")))
    graph.insert_after(node, nodes)


def _factor(node: ir.Node, name: str) -> float:
    return node.attributes.get_float(name, 1.0)
