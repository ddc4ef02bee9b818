"""Values inside subgraphs, handed out to the main graph, where they can be looked at.

    owner    what a value becomes outside
    If       an output of the If; where the other branch is taken it is empty, `float[0]`
    Loop     a scan output: its turns stacked on a new first axis; it must have the same shape in all of them
    Scan     the same

A loop may stand inside branches, but nothing inside a loop may hold another subgraph around the value: what such a
value has to show differs from turn to turn.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analyses.names import Names, subgraphs
from graphopt.analyses.shapes import Shapes

__all__ = ["lift", "steady_dimensions", "why_hidden"]

_LOOPS = frozenset({"Loop", "Scan"})


def why_hidden(value: ir.Value, shapes: Shapes, steady: Collection[str]) -> str:
    """Reason why a value cannot be handed out of the subgraph that it is in; empty if it can, or is in none.

    Args:
        value: The value, one of the model that the shapes are of.
        shapes: Types of the model's values.
        steady: Names of dimensions that do not change while the model runs, see `steady_dimensions`.
    """
    owners = _owners(value, shapes.names)
    for depth, owner in enumerate(owners):
        if owner.domain not in ("", "ai.onnx") or owner.op_type not in {"If", *_LOOPS}:
            return f"inside a {owner.op_type}, whose values cannot be seen"
        if owner.op_type in _LOOPS and depth:
            return f"inside another subgraph in a {owner.op_type}, whose values cannot be seen"
    if owners and owners[0].op_type in _LOOPS:
        dims = shapes.of(value)
        if dims is None or any(not isinstance(dim, int) and dim not in steady for dim in dims):
            return f"inside a {owners[0].op_type}, where the shapes of its values may differ from turn to turn"
    return ""


def steady_dimensions(model: ir.Model) -> frozenset[str]:
    """Names of the dimensions of a model's inputs, which stay what they are while it runs."""
    dims = (dim for value in model.graph.inputs if value.shape is not None for dim in value.shape)
    return frozenset(dim.value for dim in dims if isinstance(dim, ir.SymbolicDim) and dim.value)


def lift(model: ir.Model, values: Sequence[ir.Value]) -> list[ir.Value]:
    """Hand float values out of subgraphs, in place.

    Args:
        model: The model.
        values: Results of nodes in subgraphs, or inputs of subgraphs, that are not hidden (see `why_hidden`); those of
            the main graph are returned as they are.

    Returns:
        For each a value of the main graph.
    """
    names = Names(model)
    taken = {value.name for value in names.values()} | {node.name for node in names.labels}
    lifted: list[ir.Value] = []
    for value in values:
        seen = value
        for owner in _owners(value, names):
            seen = _hand_out(seen, owner, taken)
        lifted.append(seen)
    return lifted


def _owners(value: ir.Value, names: Names) -> list[ir.Node]:
    """Nodes around a value, from the innermost outwards."""
    found: list[ir.Node] = []
    graph = value.graph
    while isinstance(graph, ir.Graph) and (owner := names.owner(graph)) is not None:
        found.append(owner)
        graph = owner.graph
    return found


def _hand_out(value: ir.Value, owner: ir.Node, taken: set[str | None]) -> ir.Value:
    """Make a value of a subgraph an output of the node that owns the subgraph."""
    for _, graph in subgraphs(owner):
        graph.outputs.append(_copied(value, graph, taken) if graph is value.graph else _nothing(graph, taken))
    owner.resize_outputs(len(owner.outputs) + 1)
    made = owner.outputs[-1]
    made.name, made.type = _name(f"{value.name}_seen", taken), ir.TensorType(ir.DataType.FLOAT)
    for attribute, usual in (("scan_output_axes", 0), ("scan_output_directions", 0)):
        if owner.op_type == "Scan" and attribute in owner.attributes:
            known = owner.attributes[attribute].as_ints()
            owner.attributes[attribute] = ir.AttrInt64s(attribute, [*known, usual])
    return made


def _copied(value: ir.Value, graph: ir.Graph, taken: set[str | None]) -> ir.Value:
    """The value under another name: it may be an input or an output of the subgraph already."""
    node = ir.node("Identity", [value], outputs=[_float(_name(f"{value.name}_copy", taken))])
    graph.append(node)
    return node.outputs[0]


def _nothing(graph: ir.Graph, taken: set[str | None]) -> ir.Value:
    """No numbers, in a branch that does not make the value."""
    empty = ir.tensor(np.zeros(0, np.float32))
    node = ir.node("Constant", [], {"value": empty}, outputs=[_float(_name("nothing", taken))])
    graph.append(node)
    return node.outputs[0]


def _float(name: str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT))


def _name(wish: str, taken: set[str | None]) -> str:
    name, number = wish, 1
    while name in taken:
        name, number = f"{wish}_{number}", number + 1
    taken.add(name)
    return name
