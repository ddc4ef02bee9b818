"""Structural facts about a model: its fingerprint, its interface, and whether it is well formed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import CheckerPass

from graphopt.errors import ModelError

__all__ = ["fingerprint", "interface", "verify"]

Interface = tuple[tuple[str, str, str, int | None], ...]


def fingerprint(model: ir.Model) -> str:
    """Digest of everything that is written to disk: nodes, attributes, types, shapes, metadata, weights.

    Tensors in files are known by their place in the file, all others by their bytes; one tensor is read at a time.
    """
    digest = hashlib.sha256()

    def add(*parts: Any) -> None:
        digest.update(repr(parts).encode())

    add(model.ir_version, model.doc_string, sorted(model.opset_imports.items()), sorted(model.metadata_props.items()))
    _add_graph(add, digest, model.graph)
    for key, function in sorted(model.functions.items()):
        add("function", key, sorted(function.opset_imports.items()))
        _add_graph(add, digest, function.graph)
    return digest.hexdigest()


def interface(model: ir.Model) -> Interface:
    """What callers see: kind, name, element type and rank of every input and output."""
    return tuple(
        (kind, value.name or "", str(value.dtype), None if value.shape is None else len(value.shape))
        for kind, values in (("input", model.graph.inputs), ("output", model.graph.outputs))
        for value in values
    )


def verify(model: ir.Model, expected: Interface) -> None:
    """Check that a model is valid ONNX and still has the interface `expected`.

    Raises:
        ModelError: It is not.
    """
    if (found := interface(model)) != expected:
        lost = [entry for entry in expected if entry not in found] or list(expected)
        raise ModelError("model", f"the interface changed: {_entry(lost[0])} is not what it was")
    domains = {node.domain for node in _nodes(model.graph)}
    for domain in sorted(domains - set(model.opset_imports)):
        raise ModelError("model", f"the operator set of domain {domain or 'ai.onnx'!r} is not imported")
    try:
        CheckerPass()(model)
    except Exception as e:  # the C++ checker's types are not exported
        cause = e.__cause__ or e
        line = next((text for text in str(cause).splitlines() if text.strip()), type(cause).__name__)
        raise ModelError("model", f"is no longer valid ONNX: {line.strip()[:300]}") from e


def _entry(entry: tuple[str, str, str, int | None]) -> str:
    kind, name, dtype, rank = entry
    return f"{kind} {name!r} ({dtype}, rank {rank})"


def _nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    return iter(graph.all_nodes())


def _add_graph(add: Any, digest: Any, graph: ir.Graph) -> None:
    add(graph.name, graph.doc_string, sorted(graph.metadata_props.items()))
    for kind, values in (("in", graph.inputs), ("out", graph.outputs)):
        for value in values:
            add(kind, *_value(value))
    for name in sorted(graph.initializers):
        add("initializer", name)
        _add_tensor(add, digest, graph.initializers[name].const_value)
    for node in graph:
        add(node.op_type, node.domain, node.overload, node.name, node.doc_string, sorted(node.metadata_props.items()))
        add([v.name if v else "" for v in node.inputs])
        for output in node.outputs:
            add(*_value(output))
        for attribute in sorted(node.attributes.values(), key=lambda a: a.name):
            add(attribute.name, str(attribute.type), attribute.ref_attr_name)
            _add_attribute(add, digest, attribute)


def _value(value: ir.Value) -> tuple[Any, ...]:
    return value.name, str(value.type), str(value.shape), sorted(value.metadata_props.items())


def _add_attribute(add: Any, digest: Any, attribute: ir.Attr) -> None:
    if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
        _add_graph(add, digest, attribute.as_graph())
    elif attribute.type == ir.AttributeType.GRAPHS and not attribute.is_ref():
        for graph in attribute.as_graphs():
            _add_graph(add, digest, graph)
    elif attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
        _add_tensor(add, digest, attribute.as_tensor())
    else:
        add(attribute.value)


def _add_tensor(add: Any, digest: Any, tensor: ir.TensorProtocol | None) -> None:
    if tensor is None:
        add(None)
        return
    add(str(tensor.dtype), tuple(map(str, tensor.shape)))
    if isinstance(tensor, ir.ExternalTensor):
        add(str(tensor.path), tensor.offset, tensor.length)
    else:
        digest.update(tensor.tobytes())
