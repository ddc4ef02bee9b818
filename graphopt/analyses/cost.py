"""What every node costs: multiply-accumulates, parameters, bytes moved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import onnx_ir as ir

from graphopt.analyses._mac_terms import MacTerm, mac_terms
from graphopt.analyses.constants import CONSTANTS, Constants
from graphopt.analyses.names import Names, subgraphs
from graphopt.analyses.shapes import CONCRETE_SHAPES, Shapes
from graphopt.pass_base import Analysis, Context

__all__ = ["COST", "Cost", "CostAnalysis", "MacTerm", "NodeCost"]

_DRAWN = frozenset({"Bernoulli", "Multinomial", "RandomNormalLike", "RandomUniformLike"})


@dataclass(frozen=True)
class NodeCost:
    """Cost of one node for one run.

    Attributes:
        node: Name of the node.
        operator: Operator type.
        macs: Multiply-accumulates; 0 for everything but linear operators, None where a shape is unknown.
        params: Elements of its constant inputs; what a weight is computed from counts for the node that uses it.
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
        stored = _Stored(constants)
        nodes = {name: _node_cost(name, node, shapes, stored) for node, name in labels if node.op_type != "Constant"}
        tensors = constants.tensors.values()
        return Cost(nodes, sum(t.size for t in tensors), sum(t.nbytes for t in tensors))


@dataclass(frozen=True)
class _Stored:
    """What is computed from constants alone, as by DequantizeLinear and lookups in codebooks, and from which.

    Attributes:
        constants: The constants.
        behind: For each such value, what it is computed from.
    """

    constants: Constants
    behind: dict[ir.Value, tuple[ir.Value, ...]] = field(default_factory=dict[ir.Value, tuple[ir.Value, ...]])

    def read_by(self, node: ir.Node) -> list[ir.TensorProtocol]:
        """Constants that a node reads or that its inputs are computed from; none where its own result is so computed.

        Nodes come in the order of the graph.
        """
        found: dict[ir.Value, ir.TensorProtocol] = {}
        fixed = bool(node.inputs) and node.op_type not in _DRAWN and not any(subgraphs(node))
        for value in filter(None, node.inputs):
            sources = self.behind.get(value, (value,))
            tensors = {source: tensor for source in sources if (tensor := self.constants.of(source)) is not None}
            found |= tensors
            fixed = fixed and bool(tensors)
        if fixed:
            self.behind.update(dict.fromkeys(node.outputs, tuple(found)))
        return [] if fixed else list(found.values())


def _node_cost(name: str, node: ir.Node, shapes: Shapes, stored: _Stored) -> NodeCost:
    weights = stored.read_by(node)
    values = [v for v in (*node.inputs, *node.outputs) if v is not None]
    moved = sum(_bytes(v, shapes) for v in values if stored.constants.of(v) is None and v not in stored.behind)
    terms = mac_terms(node, shapes)
    macs = None if terms is None else sum(term.amount for term in terms)
    return NodeCost(
        name, node.op_type, macs, sum(t.size for t in weights), sum(t.nbytes for t in weights), moved, terms or ()
    )


def _bytes(value: ir.Value, shapes: Shapes) -> int:
    shape, dtype = shapes.static(value), shapes.dtype(value)
    return 0 if shape is None or dtype is None else math.ceil(math.prod(shape) * dtype.itemsize)


COST = CostAnalysis()
