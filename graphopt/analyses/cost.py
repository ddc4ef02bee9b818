"""What every node costs: multiply-accumulates, parameters, bytes moved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.analyses.constants import CONSTANTS, Constants
from graphopt.analyses.names import Names
from graphopt.analyses.shapes import CONCRETE_SHAPES, Shapes
from graphopt.pass_base import Analysis, Context

__all__ = ["COST", "Cost", "CostAnalysis", "NodeCost"]

_RECURRENT_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


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
    """

    node: str
    operator: str
    macs: int | None
    params: int
    weight_bytes: int
    moved_bytes: int


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
    macs = _macs(node, shapes)
    return NodeCost(name, node.op_type, macs, sum(t.size for t in weights), sum(t.nbytes for t in weights), moved)


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


def _macs(node: ir.Node, shapes: Shapes) -> int | None:
    """MACs of a linear operator; 0 for all others."""
    kind = node.op_type
    if kind in ("Conv", "ConvInteger", "QLinearConv"):
        weight = shapes.static(node.inputs[3 if kind == "QLinearConv" else 1])
        output = shapes.static(node.outputs[0])
        return None if weight is None or output is None else math.prod(output) * math.prod(weight[1:])
    if kind == "ConvTranspose":
        weight, source = shapes.static(node.inputs[1]), shapes.static(node.inputs[0])
        return None if weight is None or source is None else math.prod(source) * math.prod(weight[1:])
    if kind in ("Gemm", "MatMul", "MatMulInteger", "QLinearMatMul"):
        left, output = shapes.static(node.inputs[0]), shapes.static(node.outputs[0])
        if left is None or output is None:
            return None
        transposed = kind == "Gemm" and node.attributes.get_int("transA", 0)
        return math.prod(output) * (left[0] if transposed else left[-1] if left else 1)
    if kind in _RECURRENT_GATES:
        source, weight, hidden = (shapes.static(node.inputs[i]) for i in range(3))
        if source is None or weight is None or hidden is None:
            return None
        return source[0] * source[1] * (math.prod(weight) + math.prod(hidden))
    return 0


COST = CostAnalysis()
