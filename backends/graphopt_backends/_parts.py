"""Cut a graph into parts, each of which one engine runs.

Every node gets a level: that of its inputs, one more where the engine changes. Levels never fall along an edge, and
rise along one between engines, so the nodes of one level and engine form one part, and parts run in the order of their
levels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from graphopt_backends._fold import is_constant, static_shape
from graphopt_backends._plan import Engine

__all__ = ["GraphPart", "cut", "data_dependent"]


@dataclass(frozen=True)
class GraphPart:
    """A part of a graph as a model of its own.

    Attributes:
        model: Its inputs and outputs carry the names that they have in the whole graph.
        engine: What runs it.
    """

    model: ir.Model
    engine: Engine

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of its inputs."""
        return tuple(str(v.name) for v in self.model.graph.inputs)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of its outputs."""
        return tuple(str(v.name) for v in self.model.graph.outputs)


def cut(model: ir.Model, engines: Mapping[str, Engine]) -> list[GraphPart]:
    """Cut a lowered model into parts.

    Args:
        model: A lowered model, its nodes in topological order.
        engines: What runs the nodes with these names; kernels run all others.
    """
    levels: dict[ir.Node, int] = {}
    for node in model.graph:
        engine, level = engines.get(node.name or "", "kernels"), 0
        for value in _read_values(node):
            producer = value.producer()
            if producer in levels:
                changes = engines.get(producer.name or "", "kernels") != engine
                level = max(level, levels[producer] + changes)
        levels[node] = level
    _sink(model, engines, levels)
    parts: dict[tuple[int, Engine], list[ir.Node]] = {}
    for node in model.graph:
        parts.setdefault((levels[node], engines.get(node.name or "", "kernels")), []).append(node)
    return [GraphPart(_extract(model, parts[key]), key[1]) for key in sorted(parts)]


def _sink(model: ir.Model, engines: Mapping[str, Engine], levels: dict[ir.Node, int]) -> None:
    """Give nodes that read constants alone, or dequantize, the level of their first reader on the same engine.

    Parts then hand integers to each other, not the floats that are made of them.
    """
    users = _users(model)
    for node in reversed(list(model.graph)):
        readers = [user for output in node.outputs for user in users.get(output, ())]
        engine = engines.get(node.name or "", "kernels")
        free = node.op_type == "DequantizeLinear" or all(is_constant(value) for value in _read_values(node))
        if readers and free and not any(output.is_graph_output() for output in node.outputs):
            first = min(readers, key=levels.__getitem__)
            if engines.get(first.name or "", "kernels") == engine:
                levels[node] = levels[first]


def data_dependent(model: ir.Model) -> dict[str, ir.Node]:
    """Nodes that read or make a value whose shape is only known while the model runs, by name."""
    found: dict[str, ir.Node] = {}
    for node in model.graph:
        values = [v for v in (*node.inputs, *node.outputs) if v is not None and v.name]
        if any(static_shape(v) is None for v in values):
            found[node.name or ""] = node
    return found


def _read_values(node: ir.Node) -> list[ir.Value]:
    """Values that a node reads, those that its subgraphs capture included."""
    found = [value for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        graphs: Iterable[ir.Graph] = ()
        if attribute.type == ir.AttributeType.GRAPH:
            graphs = (attribute.as_graph(),)
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs = attribute.as_graphs()
        for graph in graphs:
            for inner in graph:
                found.extend(_read_values(inner))
            found.extend(graph.outputs)
    return found


def _extract(model: ir.Model, nodes: list[ir.Node]) -> ir.Model:
    inside = set(nodes)
    reads = list(dict.fromkeys(v for node in nodes for v in _read_values(node)))
    main = {*model.graph.inputs, *model.graph.initializers.values()}
    main.update(o for node in model.graph for o in node.outputs)
    inputs = [v for v in reads if v in main and not is_constant(v) and v.producer() not in inside]
    constants = tuple(v for v in reads if v in main and is_constant(v))
    users = _users(model)
    outputs = [
        o
        for node in nodes
        for o in node.outputs
        if o.name and (o.is_graph_output() or any(user not in inside for user in users.get(o, ())))
    ]
    view = ir.GraphView(
        inputs,
        outputs,
        nodes=nodes,
        initializers=constants,
        opset_imports=model.graph.opset_imports,
        name=model.graph.name,
    )
    return ir.Model(view.clone(), ir_version=model.ir_version)


def _users(model: ir.Model) -> dict[ir.Value, list[ir.Node]]:
    """Nodes of the main graph that read a value, themselves or in a subgraph."""
    users: dict[ir.Value, list[ir.Node]] = {}
    for node in model.graph:
        for value in _read_values(node):
            users.setdefault(value, []).append(node)
    return users
