"""Shapes and types that hold on every run, whatever the file says about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir

from graphopt.analyses import SHAPES, Shapes
from graphopt.pass_base import Context
from graphopt_passes.fold.rewiring import subgraphs

__all__ = ["sure_shapes"]

_LOOPS = frozenset({"Loop", "Scan", "SequenceMap"})


def sure_shapes(model: ir.Model, ctx: Context) -> Shapes:
    """Infer shapes from the inputs and operators alone.

    Shapes written down for intermediate values are not believed: many files had their batch made dynamic by hand and
    kept the old sizes there. Facts go by name, so a name that two branches use says nothing about either; inside a
    loop a shape may change from turn to turn. All of these are left out.
    """
    copy = model.clone()
    for graph in copy.graphs():
        for node in graph:
            for value in node.outputs:
                value.shape = None
    shapes = SHAPES.compute(copy, ctx)
    seen: set[str] = set()
    unsure: set[str] = set()
    for graph in model.graphs():
        names = _names(graph)
        unsure |= seen & names
        seen |= names
    nodes = ir.traversal.RecursiveGraphIterator(model.graph)
    bodies = [body for node in nodes if node.op_type in _LOOPS for body in subgraphs(node)]
    looped = {name for body in bodies for graph in (body, *body.subgraphs()) for name in _names(graph)}
    return replace(shapes, shapes=_without(shapes.shapes, unsure | looped), types=_without(shapes.types, unsure))


def _names(graph: ir.Graph) -> set[str]:
    outputs = (value for node in graph for value in node.outputs)
    return {value.name for value in (*graph.inputs, *graph.initializers.values(), *outputs) if value.name}


def _without(facts: Mapping[str, object], names: set[str]) -> dict[str, object]:
    return {name: fact for name, fact in facts.items() if name not in names}
