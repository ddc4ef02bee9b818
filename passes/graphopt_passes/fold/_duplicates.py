"""Computations and shape constants that stand in the model twice."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from graphopt.pass_base import Change
from graphopt_passes.fold.rewiring import ANNOTATION, DETERMINISTIC_DOMAINS, RANDOM, constant, site, subgraphs

__all__ = ["merge_duplicates"]

_SMALL = 64
_KEPT_APART = RANDOM | {"Constant", "Dropout", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
# weights stay apart even where they are equal: the layers that hold them are pruned and quantized one by one
_SHAPE_TYPES = frozenset({ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL})


def merge_duplicates(model: ir.Model) -> list[Change]:
    """Compute once what is computed twice from the same values; hold equal shape constants once."""
    changes: list[Change] = []
    for graph in list(model.graphs()):
        _merge_shape_constants(graph)
        first: dict[Any, ir.Node] = {}
        for node in graph:
            key = _key(node)
            if key is None:
                continue
            twin = first.setdefault(key, node)
            if twin is not node:
                for mine, other in zip(node.outputs, twin.outputs, strict=True):
                    mine.replace_all_uses_with(other)
                graph.remove(node, safe=True)
                changes.append(Change(site(node), f"removed: {site(twin)!r} computes the same"))
    return changes


def _merge_shape_constants(graph: ir.Graph) -> None:
    first: dict[Any, ir.Value] = {}
    for value in list(graph.initializers.values()):
        tensor = constant(value)
        if tensor is None or tensor.dtype not in _SHAPE_TYPES or tensor.size > _SMALL or value.is_graph_output():
            continue
        twin = first.setdefault((tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes()), value)
        if twin is not value:
            value.replace_all_uses_with(twin)
            graph.initializers.pop(value.name or "")


def _key(node: ir.Node) -> Any:
    """What a node computes; None if it must stay."""
    if node.domain not in DETERMINISTIC_DOMAINS or node.op_type in _KEPT_APART or any(True for _ in subgraphs(node)):
        return None
    if any(value.is_graph_output() or ANNOTATION in value.meta for value in node.outputs):
        return None
    attributes: list[Any] = []
    for name, attribute in sorted(node.attributes.items()):
        if attribute.is_ref() or attribute.type == ir.AttributeType.SPARSE_TENSOR:
            return None
        if attribute.type == ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            if tensor.size > _SMALL or tensor.dtype.is_string():
                return None
            attributes.append((name, tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes()))
        else:
            attributes.append((name, attribute.type, str(attribute.value)))
    # an output that is left out ("") is not computed at all
    present = tuple(bool(value.name) for value in node.outputs)
    return node.op_type, tuple(node.inputs), present, tuple(attributes)
