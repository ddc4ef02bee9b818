"""What every node costs: multiply-accumulates, parameters, bytes moved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.analyses._mac_terms import MacTerm, mac_terms
from graphopt.analyses.constants import CONSTANTS, Constants
from graphopt.analyses.names import Names
from graphopt.analyses.shapes import CONCRETE_SHAPES, Shapes
from graphopt.pass_base import Analysis, Context

__all__ = ["COST", "Cost", "CostAnalysis", "MacTerm", "NodeCost"]


@dataclass(frozen=True)
class NodeCost:
    """Cost of one node for one run.

    Attributes:
        node: Name of the node.
        operator: Operator type.
        macs: Multiply-accumulates; 0 for everything but linear operators, None where a shape is unknown.
        params: Elements of its constant inputs; a weight behind DequantizeLinear counts for the node that uses it.
        weight_bytes: Bytes of its constant inputs as stored.
        moved_bytes: Bytes of activations read and written, where shapes are known.
        terms: The multiply-accumulates by what they are proportional to.
    """

    node: str
    operator: str
    macs: int | None
    params: int
    weight_bytes: int
    moved_bytes: int
    terms: tuple[MacTerm, ...] = ()


@dataclass(frozen=True)
class Cost:
    """Costs of all nodes, subgraphs included, each once; a tensor used twice is counted once in the totals."""

    nodes: Mapping[str, NodeCost]
    params: int
    weight_bytes: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one run, as far as shapes are known."""
        return sum(cost.macs or 0 for cost in self.nodes.values())

    @property
    def unknown(self) -> tuple[str, ...]:
        """Linear nodes whose MACs are unknown because a shape is."""
        return tuple(cost.node for cost in self.nodes.values() if cost.macs is None)


@dataclass(frozen=True)
class CostAnalysis(Analysis[Cost]):
    """Count with the sizes the user fixed; dimensions left open count as 1."""

    name: ClassVar[str] = "cost"

    def compute(self, model: ir.Model, ctx: Context) -> Cost:
        """Compute the cost of every node."""
        shapes, constants = ctx.fact(CONCRETE_SHAPES), ctx.fact(CONSTANTS)
        labels = Names(model).labels.items()
        nodes = {name: _node_cost(name, node, shapes, constants) for node, name in labels if node.op_type != "Constant"}
        tensors = constants.tensors.values()
        return Cost(nodes, sum(t.size for t in tensors), sum(t.nbytes for t in tensors))


def _node_cost(name: str, node: ir.Node, shapes: Shapes, constants: Constants) -> NodeCost:
    weights = [] if node.op_type == "DequantizeLinear" else [t for v in node.inputs for t in _stored(v, constants)]
    activations = [v for v in (*node.inputs, *node.outputs) if v is not None and constants.of(v) is None]
    moved = sum(_bytes(v, shapes) for v in activations)
    terms = mac_terms(node, shapes)
    macs = None if terms is None else sum(term.amount for term in terms)
    elements, stored = sum(t.size for t in weights), sum(t.nbytes for t in weights)
    return NodeCost(name, node.op_type, macs, elements, stored, moved, terms or ())


def _stored(value: ir.Value | None, constants: Constants) -> list[ir.TensorProtocol]:
    """The constant behind an input; of a quantized weight what is stored: integers, scales, zero points."""
    tensor = constants.of(value)
    if tensor is not None:
        return [tensor]
    producer = value.producer() if value is not None else None
    if producer is None or producer.op_type != "DequantizeLinear" or constants.of(producer.inputs[0]) is None:
        return []
    return [t for v in producer.inputs if (t := constants.of(v)) is not None]


def _bytes(value: ir.Value, shapes: Shapes) -> int:
    shape, dtype = shapes.static(value), shapes.dtype(value)
    return 0 if shape is None or dtype is None else math.ceil(math.prod(shape) * dtype.itemsize)


COST = CostAnalysis()
