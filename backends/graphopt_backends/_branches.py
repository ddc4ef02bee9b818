"""An If whose condition is computed, as a choice: both branches in its place, and a Where behind them.

Whoever compiles the choice may skip what the other side alone needs; nothing in a branch has effects of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from graphopt_backends._fold import fold, inlined, is_constant, static_shape

__all__ = ["choose_branches"]


def choose_branches(model: ir.Model) -> bool:
    """Replace every If of the main graph whose branches give tensors of the same types and fixed shapes."""
    changed = False
    for node in [node for node in model.graph if node.op_type == "If" and node.domain in ("", "ai.onnx")]:
        changed = _replaced(model, node) or changed
    return changed


def _replaced(model: ir.Model, node: ir.Node) -> bool:
    graph, condition = model.graph, node.inputs[0]
    branches = [node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
    kinds = [_kinds(model, branch) for branch in branches]
    if kinds[0] is None or kinds[0] != kinds[1]:
        return False
    prefixes = [f"{node.name}/then/", f"{node.name}/else/"]
    sides = [inlined(graph, node, branch, prefix) for branch, prefix in zip(branches, prefixes, strict=True)]
    for output, taken, other in zip(node.outputs, *sides, strict=True):
        chosen = ir.Node("", "Where", [condition, taken, other], name=f"{node.name}/{output.name}")
        graph.insert_before(node, chosen)
        value = chosen.outputs[0]
        value.type, value.shape = output.type, output.shape
        name, output.name = output.name, f"{output.name}/replaced"
        ir.convenience.replace_all_uses_with(output, value, replace_graph_outputs=True)
        value.name = name
    graph.remove(node, safe=True)
    return True


def _kinds(model: ir.Model, branch: ir.Graph) -> list[tuple[ir.DataType, tuple[int, ...]]] | None:
    """Types and shapes of what a branch gives; None if one of them is open."""
    made = {value for node in branch for value in node.outputs} | set(branch.initializers.values())
    reads = [value for value in _reads(branch) if value not in made]
    inputs = [value for value in reads if not is_constant(value)]
    if any(static_shape(value) is None or value.dtype is None for value in inputs):
        return None
    constants = [value for value in reads if is_constant(value)]
    view = ir.GraphView(
        inputs, list(branch.outputs), nodes=list(branch), initializers=(*constants, *branch.initializers.values()),
        opset_imports=model.graph.opset_imports, name="branch",
    )  # fmt: skip
    alone = ir.Model(view.clone(), ir_version=model.ir_version)
    fold(alone)
    found: list[tuple[ir.DataType, tuple[int, ...]]] = []
    for value in alone.graph.outputs:
        shape = static_shape(value)
        if shape is None or value.dtype is None:
            return None
        found.append((value.dtype, shape))
    return found


def _reads(branch: ir.Graph) -> dict[ir.Value, None]:
    """Values that the nodes of a branch read, those of their own branches included, and what it passes through."""
    found = dict.fromkeys(value for value in branch.outputs if value.producer() is None)
    for node in branch:
        found |= dict.fromkeys(value for value in node.inputs if value is not None)
        for graph in _graphs(node):
            inside = {value for inner in graph for value in inner.outputs} | set(graph.initializers.values())
            found |= {value: None for value in _reads(graph) if value not in inside}
    return found


def _graphs(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
