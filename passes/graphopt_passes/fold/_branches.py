"""If nodes whose condition is constant."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.pass_base import Change
from graphopt_passes.fold.rewiring import FreshNames, constant, site

__all__ = ["inline_branches"]


def inline_branches(model: ir.Model, names: FreshNames) -> list[Change]:
    """Put the branch that is always taken in place of its If."""
    changes: list[Change] = []
    for graph in list(model.graphs()):
        for node in graph:
            condition = constant(node.inputs[0]) if node.op_type == "If" and node.domain == "" else None
            if condition is None or condition.size != 1:
                continue
            taken = "then_branch" if bool(condition.numpy().reshape(-1)[0]) else "else_branch"
            branch = node.attributes[taken].as_graph()
            _inline(graph, node, branch, names)
            changes.append(Change(site(node), f"replaced by its {taken}, which is always taken"))
    return changes


def _inline(graph: ir.Graph, node: ir.Node, branch: ir.Graph, names: FreshNames) -> None:
    place, results = site(node), list(branch.outputs)
    branch.outputs.clear()
    for held in list(branch.initializers.values()):
        branch.initializers.pop(held.name or "")
        held.name = names.make(f"{place}_{held.name}")
        graph.register_initializer(held)
    for inner in list(branch):
        branch.remove(inner)
        inner.name = f"{place}_{inner.name}"
        for value in inner.outputs:
            if value.name:  # left-out outputs stay left out
                value.name = names.make(f"{place}_{value.name}")
        graph.insert_before(node, inner)
    for i, (output, result) in enumerate(zip(node.outputs, results, strict=True)):
        name, output.name = output.name, names.make(f"{output.name}_before")
        outlet = ir.Value(name=name, type=output.type, shape=output.shape, doc_string=output.doc_string)
        outlet.metadata_props.update(output.metadata_props)
        outlet.meta.update(output.meta)
        graph.insert_before(node, ir.Node("", "Identity", [result], outputs=[outlet], name=f"{place}_result{i}"))
        output.replace_all_uses_with(outlet, replace_graph_outputs=True)
    graph.remove(node, safe=True)
