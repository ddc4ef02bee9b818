"""The analysis: every attention core of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.analyses.attention.block import AttentionBlock
from graphopt.analyses.attention.finder import Core, describe, find_core
from graphopt.analyses.attention.operators import OPERATORS, read_operator
from graphopt.analyses.attention.sizes import Sizes, measure
from graphopt.analyses.attention.softmax import read_softmax
from graphopt.analyses.constants import CONSTANTS, Constants
from graphopt.analyses.names import Names
from graphopt.pass_base import Analysis, Context

__all__ = ["ATTENTION", "AttentionAnalysis"]

_PRODUCTS = frozenset({"Einsum", "FusedMatMul", "Gemm", "MatMul"})
_MAY_END = frozenset({"Softmax", "Div", "Mul"})


@dataclass(frozen=True)
class AttentionAnalysis(Analysis[tuple[AttentionBlock, ...]]):
    """Find attention in all graphs of a model, by what is computed."""

    name: ClassVar[str] = "attention"

    def compute(self, model: ir.Model, ctx: Context) -> tuple[AttentionBlock, ...]:
        """Look at every softmax, and at every operator that is an attention by itself."""
        names = ctx.fact(CONSTANTS).names
        nodes = [node for scope in names.scopes for node in scope.graph]
        if not _may_attend(nodes, ctx.fact(CONSTANTS)):
            return ()
        return tuple(_blocks(model, names, measure(model, ctx)))


def _may_attend(nodes: Sequence[ir.Node], constants: Constants) -> bool:
    """Whether it is worth the time to look at sizes: only where two activations meet, and something is normalized."""
    names = {node.op_type for node in nodes}
    products = (node for node in nodes if node.op_type in _PRODUCTS)
    meets = (all(constants.of(value) is None for value in node.inputs[:2]) for node in products)
    return bool(names & OPERATORS) or bool(names & {"Exp", "Softmax"} and any(meets))


def _blocks(model: ir.Model, names: Names, sizes: Sizes) -> list[AttentionBlock]:
    nodes = {label: node for node, label in names.labels.items()}
    order = {nodes[label]: place for place, label in enumerate(names.order())}
    found: list[AttentionBlock] = []
    for node in order:
        block = _block(node, names.label(node), order, sizes, model.graph.opset_imports.get("", 1))
        if block is not None:
            found.append(block)
    return found


def _block(node: ir.Node, name: str, order: dict[ir.Node, int], sizes: Sizes, opset: int) -> AttentionBlock | None:
    if node.op_type in OPERATORS:
        return read_operator(node, name, sizes)
    softmax = read_softmax(node, sizes, opset) if node.op_type in _MAY_END else None
    core: Core | None = None if softmax is None else find_core(softmax, sizes)
    return None if core is None else describe(core, name, order, sizes)


ATTENTION = AttentionAnalysis()
