"""What there is to round: what a model computes from its inputs, not from their sizes, and not on integers yet."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from graphopt.analyses.names import subgraphs
from graphopt_passes.quant.sites import tensor_of

__all__ = ["SIZES", "computed_from_data", "on_integers"]

SIZES = frozenset({"Shape", "Size"})
"""Operators that tell how large a value is, whatever it holds."""


def computed_from_data(model: ir.Model) -> set[ir.Value]:
    """Values that depend on what the model is given; its shape arithmetic is left out."""
    found: set[ir.Value] = {value for graph in model.graphs() for value in graph.inputs if value.const_value is None}
    for node in model.graph.all_nodes():
        inside = (_reads(graph, found) for _, graph in subgraphs(node))
        if node.op_type not in SIZES and (_any(node.inputs, found) or any(inside)):
            found |= set(node.outputs)
    return found


def on_integers(model: ir.Model) -> set[ir.Node]:
    """Nodes that stand between DequantizeLinear and QuantizeLinear already, alone or with others."""
    behind, before = set[ir.Node](), set[ir.Node]()
    nodes = list(model.graph.all_nodes())
    for node in nodes:
        makers = [value.producer() for value in node.inputs if value is not None and tensor_of(value) is None]
        if makers and all(m is not None and (m.op_type == "DequantizeLinear" or m in behind) for m in makers):
            behind.add(node)
    for node in reversed(nodes):
        users = [user for value in node.outputs for user, _ in value.uses()]
        handed_out = any(value.is_graph_output() for value in node.outputs)
        if users and not handed_out and all(u.op_type == "QuantizeLinear" or u in before for u in users):
            before.add(node)
    return behind & before


def _reads(graph: ir.Graph, found: set[ir.Value]) -> bool:
    return any(_any(node.inputs, found) for node in graph.all_nodes())


def _any(values: Iterable[ir.Value | None], found: set[ir.Value]) -> bool:
    return any(value in found for value in values if value is not None)
