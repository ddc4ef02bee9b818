"""Moves on the graph that keep it valid: names, graph outputs, values that subgraphs read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

__all__ = [
    "ANNOTATION",
    "DETERMINISTIC_DOMAINS",
    "LARGE",
    "RANDOM",
    "FreshNames",
    "Same",
    "bypass",
    "constant",
    "make_constant",
    "only_reader",
    "replace_node",
    "site",
    "snapshot",
    "subgraphs",
]

ANNOTATION = "quant_parameter_tensor_names"
DETERMINISTIC_DOMAINS = frozenset({"", "ai.onnx"})
LARGE = 1 << 24
"""Bytes above which a computed weight is not kept in memory but computed again whenever it is read."""
RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
"""Operators whose result differs from run to run."""


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer that no caller can replace, None for every other value."""
    if value is None or value.const_value is None or not value.is_initializer() or value.is_graph_input():
        return None
    return value.const_value


def site(node: ir.Node) -> str:
    """What the report calls a node: its name, or that of its first output."""
    return node.name or next((value.name for value in node.outputs if value.name), None) or node.op_type


def only_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads a value once; None if there are more, or if the model returns the value."""
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """Graphs held by a node's attributes."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


class FreshNames:
    """Names for new values that collide with none in the model, functions left out."""

    def __init__(self, model: ir.Model) -> None:
        self._taken: set[str] = set()
        for graph in model.graphs():
            self._taken.update(value.name or "" for value in (*graph.inputs, *graph.initializers.values()))
            for node in graph:
                self._taken.update(value.name or "" for value in node.outputs)

    def make(self, base: str) -> str:
        """Return `base`, or `base` with the first free number."""
        name, number = base, 1
        while name in self._taken:
            number += 1
            name = f"{base}_{number}"
        self._taken.add(name)
        return name


def bypass(node: ir.Node, source: ir.Value) -> str | None:
    """Let everyone who reads the first output of `node` read `source` instead, and remove the node.

    Args:
        node: A node of the same type and shape out as in.
        source: What its readers get.

    Returns:
        None, or why the node has to stay; then nothing has changed.
    """
    output, graph = node.outputs[0], node.graph
    if graph is None or any(other.uses() or other.is_graph_output() for other in node.outputs[1:]):
        return "another of its outputs is read"
    if ANNOTATION in output.meta and output.meta[ANNOTATION] != source.meta.get(ANNOTATION):
        return "its output carries a quantization annotation"
    if output.is_graph_output():
        if source.producer() is None or source.graph is not graph:
            return "it hands an input, a constant or an outer value straight to an output"
        if source.is_graph_output():
            return "it duplicates a value that is an output already"
        name, source.name = output.name, None
        output.name = f"{name}_bypassed"
        source.name, source.type, source.shape = name, output.type or source.type, output.shape or source.shape
        source.doc_string = output.doc_string or source.doc_string
        source.metadata_props.update(output.metadata_props)
    else:
        source.type, source.shape = source.type or output.type, source.shape or output.shape
        for key, text in output.metadata_props.items():
            source.metadata_props.setdefault(key, text)
    output.replace_all_uses_with(source, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    return None


def make_constant(value: ir.Value, tensor: ir.TensorProtocol, names: FreshNames) -> None:
    """Replace a computed value by an initializer of its name; its node, if then unused, is left to clean-up.

    What the model returns stays the output of a node, as some compilers demand: an Identity of the constant.
    """
    node = value.producer()
    assert node is not None and node.graph is not None
    name = value.name or names.make("constant")
    returned = value.is_graph_output()
    inner = names.make(f"{name}_constant") if returned else name
    value.name = names.make(f"{name}_folded")
    tensor.name = inner
    shape = ir.Shape(tensor.shape.numpy())
    held = ir.Value(name=inner, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    node.graph.register_initializer(held)
    if returned:
        outlet = ir.Value(name=name, shape=value.shape or shape, type=value.type or held.type)
        _describe(outlet, value)
        node.graph.insert_before(node, ir.Node("", "Identity", [held], outputs=[outlet], name=node.name))
        value.replace_all_uses_with(outlet, replace_graph_outputs=True)
    else:
        _describe(held, value)
        value.replace_all_uses_with(held)


def replace_node(node: ir.Node, operator: str, inputs: list[ir.Value], names: FreshNames) -> None:
    """Let another operator compute the first output of `node`, under the same names."""
    graph, output = node.graph, node.outputs[0]
    assert graph is not None
    name, output.name = output.name, names.make(f"{output.name}_before")
    outlet = ir.Value(name=name, type=output.type, shape=output.shape)
    _describe(outlet, output)
    twin = ir.Node("", operator, inputs, outputs=[outlet], name=node.name, doc_string=node.doc_string)
    twin.metadata_props.update(node.metadata_props)
    graph.insert_before(node, twin)
    output.replace_all_uses_with(outlet, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _describe(new: ir.Value, old: ir.Value) -> None:
    new.doc_string = old.doc_string
    new.metadata_props.update(old.metadata_props)
    new.meta.update(old.meta)


@dataclass(frozen=True, eq=False)
class Same:
    """Compares by identity, and keeps the object alive so that its identity stays its own."""

    thing: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.thing is other.thing

    def __hash__(self) -> int:
        return id(self.thing)


def snapshot(model: ir.Model) -> list[Any]:
    """Everything about a model that a rewrite can change; tensors by identity, so that no weight is read."""
    found: list[Any] = [dict(model.graph.opset_imports), tuple(model.functions), model.ir_version]
    graphs = [*model.graphs()]
    for function in model.functions.values():
        graphs.extend((function.graph, *function.subgraphs()))
        found.append(dict(function.opset_imports))
    for graph in graphs:
        found.append([_value(value) for value in (*graph.inputs, *graph.outputs)])
        found.append([(_value(value), Same(value.const_value)) for value in graph.initializers.values()])
        found.extend(_node(node) for node in graph)
    return found


def _value(value: ir.Value) -> tuple[Any, ...]:
    return value.name, str(value.type), str(value.shape), value.doc_string, dict(value.metadata_props)


def _node(node: ir.Node) -> tuple[Any, ...]:
    attributes = [(name, a.type, a.ref_attr_name, _attribute(a)) for name, a in node.attributes.items()]
    inputs = [None if value is None else value.name for value in node.inputs]
    return node.op_identifier(), node.name, inputs, [_value(v) for v in node.outputs], attributes, node.doc_string


def _attribute(attribute: ir.Attr) -> Any:
    held = (ir.AttributeType.TENSOR, ir.AttributeType.TENSORS, ir.AttributeType.SPARSE_TENSOR)
    if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return None  # the graphs themselves are part of the snapshot
    return Same(attribute.value) if attribute.type in held else str(attribute.value)
