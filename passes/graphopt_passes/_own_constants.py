"""Constants of a graph: reading them, and giving a node one of its own."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

__all__ = ["constant_tensor", "new_constant", "own_constant", "put_tensor", "taken_names", "unused_name"]


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor behind an initializer that callers cannot replace, or behind a Constant node."""
    if value is None:
        return None
    producer = value.producer()
    if producer is None:
        return value.const_value if value.is_initializer() and not value.is_graph_input() else None
    if producer.op_type != "Constant" or producer.domain not in ("", "ai.onnx") or len(producer.attributes) != 1:
        return None
    (attribute,) = producer.attributes.values()
    if attribute.name == "value":
        return attribute.as_tensor()
    kinds = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    kind = kinds.get(attribute.name)
    return None if kind is None else ir.tensor(np.array(attribute.value, kind))


def put_tensor(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    """Put another tensor behind an initializer or a Constant node."""
    producer = value.producer()
    if producer is not None:
        producer.attributes.clear()
        producer.attributes["value"] = ir.AttrTensor("value", tensor)
    if producer is None or value.const_value is not None:
        value.const_value = tensor


def taken_names(graph: ir.Graph) -> set[str]:
    """Names that values and nodes of a graph, and of those inside, bear."""
    taken: set[str | None] = {""}
    for inner in (graph, *graph.subgraphs()):
        taken.update(value.name for value in (*inner.inputs, *inner.initializers.values()))
        for node in inner:
            taken.add(node.name)
            taken.update(output.name for output in node.outputs)
    return {name for name in taken if name is not None}


def unused_name(graph: ir.Graph, stem: str, taken: set[str] | None = None) -> str:
    """A name that nothing in a graph bears: the stem, or the stem with a number.

    Args:
        graph: The graph.
        stem: What the name begins with.
        taken: Its `taken_names`, where many names are needed; the new one is added.
    """
    names = taken_names(graph) if taken is None else taken
    name = next(name for i in range(len(names) + 1) if (name := f"{stem}_{i}" if i else stem) not in names)
    names.add(name)
    return name


def new_constant(
    graph: ir.Graph,
    stem: str,
    array: np.ndarray,
    *,
    beside: ir.Node | None = None,
    taken: set[str] | None = None,
) -> ir.Value:
    """Add an initializer whose name begins with a stem.

    Args:
        graph: The main graph.
        stem: What the name begins with.
        array: The numbers.
        beside: A node that will read it; the initializer goes into the graph that this node is in.
        taken: As for `unused_name`.
    """
    name = unused_name(graph, stem, taken)
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(list(array.shape)), const_value=tensor)
    owner = None if beside is None else beside.graph
    (owner if isinstance(owner, ir.Graph) else graph).register_initializer(value)
    return value


def own_constant(graph: ir.Graph, node: ir.Node, index: int, array: np.ndarray) -> None:
    """Put other numbers into a constant input of a node, in a constant of its own where others read the old one."""
    value = node.inputs[index]
    assert value is not None
    alone = len(value.uses()) == 1 and not value.is_graph_output()
    if alone and value.producer() is None and value.const_value is not None:
        old = value.const_value
        value.const_value = ir.Tensor(
            array, name=old.name, doc_string=old.doc_string, metadata_props=dict(old.metadata_props)
        )
        value.shape = ir.Shape(list(array.shape))
        return
    node.replace_input_with(index, new_constant(graph, f"{value.name}_own", array, beside=node))
    producer = value.producer()
    if alone and producer is not None and isinstance(producer.graph, ir.Graph):
        producer.graph.remove(producer, safe=True)
