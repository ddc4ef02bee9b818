"""Nodes whose inputs are all constant, computed once and for all by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.analyses import Shapes
from graphopt.pass_base import Change
from graphopt.surgeon import COMPUTABLE, evaluate
from graphopt_passes.fold.rewiring import (
    DETERMINISTIC_DOMAINS,
    RANDOM,
    FreshNames,
    constant,
    make_constant,
    site,
    subgraphs,
)

__all__ = ["fold_constants"]

_AT_ONCE = 1 << 28
_AT_MOST = 1 << 30
_QUANTIZATION = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
_NARROW = frozenset({ir.DataType.INT8, ir.DataType.UINT8})
_WEIGHT_SIZE = 64
_LEFT = RANDOM | {"Constant", "Identity", "If", "Loop", "Scan"}
_SIZE_MAKERS = frozenset({"ConstantOfShape", "Expand", "OneHot", "Pad", "Range", "Resize", "Tile", "Upsample"})


@dataclass(frozen=True)
class _Part:
    """Foldable nodes of one graph, in order, and the values among theirs that others read."""

    nodes: tuple[ir.Node, ...]
    results: tuple[ir.Value, ...]

    def weights(self) -> list[ir.Value]:
        """Initializers that the nodes read, each once."""
        seen = {value: None for node in self.nodes for value in node.inputs if constant(value) is not None}
        return [value for value in seen if value is not None]


def fold_constants(
    model: ir.Model, shapes: Shapes, names: FreshNames, limit: int, refused: dict[str, str]
) -> list[Change]:
    """Compute what depends on constants alone.

    Args:
        model: The model, changed in place.
        shapes: Its types and shapes.
        names: Where names of new values come from.
        limit: Bytes by which one new constant may exceed the weights that it makes superfluous.
        refused: Value name -> why it was not folded in an earlier round; added to.
    """
    changes: list[Change] = []
    for graph in list(model.graphs()):
        found = _foldable(graph, shapes, limit, refused)
        changes += [Change.skipped(site(node), reason) for node, reason in found.skipped]
        for part in _portions(found.part):
            changes += _fold(model, part, names, limit, refused)
    return changes


@dataclass(frozen=True)
class _Found:
    part: _Part
    skipped: tuple[tuple[ir.Node, str], ...]


def _foldable(graph: ir.Graph, shapes: Shapes, limit: int, refused: dict[str, str]) -> _Found:
    computed: set[ir.Value] = set()
    nodes: list[ir.Node] = []
    skipped: list[tuple[ir.Node, str]] = []
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        if not inputs or node.op_type in _LEFT or any(True for _ in subgraphs(node)):
            continue
        if not all(value in computed or constant(value) is not None for value in inputs):
            continue
        reason = _reason(node, shapes, limit) or next(
            (refused[o.name] for o in node.outputs if o.name in refused), None
        )
        if reason:
            skipped.append((node, reason))
        else:
            nodes.append(node)
            computed.update(node.outputs)
    inside = set(nodes)
    outside = (
        v for n in nodes for v in n.outputs if v.is_graph_output() or any(u.node not in inside for u in v.uses())
    )
    return _Found(_Part(tuple(nodes), tuple(outside)), tuple(skipped))


def _reason(node: ir.Node, shapes: Shapes, limit: int) -> str | None:
    """Why a node with constant inputs is left alone."""
    if node.op_type in _QUANTIZATION:
        return "it is quantization, which runtimes fuse"
    if node.op_type == "Cast" and _is_stored_weight(node.inputs[0]):
        return "it is a weight kept in 8 bits, which runtimes compute when they load the model"
    if node.domain not in DETERMINISTIC_DOMAINS:
        return f"its domain {node.domain!r} may not repeat its results"
    if node.op_type == "Dropout" and len(node.inputs) > 2:
        return "it may be in training mode"
    for value in (*node.inputs, *node.outputs):
        kind = _kind(value, shapes)
        if kind is not None and kind not in COMPUTABLE:
            return f"it handles {kind.name}, which is not computed ahead"
        if value is not None and value.type is not None and not isinstance(value.type, ir.TensorType):
            return "it handles a sequence or an optional"
    sizes = [_bytes(value, shapes) for value in node.outputs if value.name]
    if node.op_type in _SIZE_MAKERS and None in sizes:
        return "the size of its result is unknown"
    grown = sum(size or 0 for size in sizes) - sum(_bytes(value, shapes) or 0 for value in node.inputs if value)
    return f"its result is {grown} bytes larger than its inputs; limit={limit}" if grown > limit else None


def _is_stored_weight(value: ir.Value | None) -> bool:
    """A matrix, or more, of 8-bit integers."""
    tensor = constant(value) if value is not None else None
    return tensor is not None and tensor.dtype in _NARROW and len(tensor.shape) > 1 and tensor.size >= _WEIGHT_SIZE


def _kind(value: ir.Value | None, shapes: Shapes) -> ir.DataType | None:
    if value is None:
        return None
    tensor = constant(value)
    return tensor.dtype if tensor is not None else shapes.dtype(value) or value.dtype


def _bytes(value: ir.Value, shapes: Shapes) -> int | None:
    if (tensor := constant(value)) is not None:
        return tensor.nbytes
    shape, kind = shapes.static(value), shapes.dtype(value)
    return None if shape is None or kind is None else int(np.prod(shape, dtype=np.int64) * kind.itemsize)


def _portions(part: _Part) -> list[_Part]:
    """All at once if the weights are small, else result by result, so that few weights are in memory together."""
    if not part.results:
        return []
    if sum(v.const_value.nbytes for v in part.weights() if v.const_value is not None) <= _AT_ONCE:
        return [part]
    return [_Part(_needed(part.nodes, [result]), (result,)) for result in part.results]


def _needed(nodes: Sequence[ir.Node], results: Iterable[ir.Value]) -> tuple[ir.Node, ...]:
    wanted, kept = set(results), set[ir.Node]()
    for node in reversed(nodes):
        if wanted.intersection(node.outputs):
            kept.add(node)
            wanted.update(value for value in node.inputs if value is not None)
    return tuple(node for node in nodes if node in kept)


def _fold(model: ir.Model, part: _Part, names: FreshNames, limit: int, refused: dict[str, str]) -> list[Change]:
    weights = part.weights()
    needed = sum(value.const_value.nbytes for value in weights if value.const_value is not None)
    if needed > _AT_MOST:
        reason = f"computing it needs {needed >> 20} MiB of weights at once"
        return [_refuse(value, reason, refused) for value in part.results]
    computed = evaluate(_model(model, part, weights))
    inside = set(part.nodes)
    freed = sum(
        value.const_value.nbytes
        for value in weights
        if value.const_value is not None and all(use.node in inside for use in value.uses())
    )
    changes: list[Change] = []
    for i, value in enumerate(part.results):
        array = computed.get(f"result{i}")
        if array is None:
            changes.append(_refuse(value, "ONNX Runtime cannot compute it ahead", refused))
        elif array.nbytes > limit + freed:
            changes.append(_refuse(value, f"the constant would have {array.nbytes} bytes; limit={limit}", refused))
        else:
            node = value.producer()
            place = value.name if node is None else site(node)
            freed -= min(freed, array.nbytes)
            make_constant(value, ir.Tensor(np.ascontiguousarray(array).reshape(array.shape)), names)
            changes.append(Change(place or "", f"folded: a constant of shape {list(array.shape)}"))
    return changes


def _refuse(value: ir.Value, reason: str, refused: dict[str, str]) -> Change:
    refused[value.name or ""] = reason
    node = value.producer()
    return Change.skipped(site(node) if node is not None else value.name or "", reason)


def _model(model: ir.Model, part: _Part, weights: Sequence[ir.Value]) -> ir.Model:
    """The nodes as a model of their own, under names that cannot clash."""
    mapped: dict[ir.Value, ir.Value] = {}
    for i, value in enumerate(weights):
        assert value.const_value is not None
        held = value.const_value
        tensor = ir.Tensor(held.numpy(), dtype=held.dtype, name=f"weight{i}")
        mapped[value] = ir.Value(
            name=f"weight{i}", type=ir.TensorType(held.dtype), shape=ir.Shape(held.shape.numpy()), const_value=tensor
        )
    nodes: list[ir.Node] = []
    for i, node in enumerate(part.nodes):
        inputs = [None if value is None else mapped[value] for value in node.inputs]
        outputs = [ir.Value(name=f"value{i}_{j}" if value.name else "") for j, value in enumerate(node.outputs)]
        mapped.update(zip(node.outputs, outputs, strict=True))
        nodes.append(
            ir.Node(node.domain, node.op_type, inputs, node.attributes.values(), outputs=outputs, name=f"node{i}")
        )
    for i, value in enumerate(part.results):
        mapped[value].name = f"result{i}"
    graph = ir.Graph(
        [],
        [mapped[value] for value in part.results],
        nodes=nodes,
        initializers=[mapped[value] for value in weights],
        opset_imports={"": model.opset_imports.get("", 1)},
        name="constants",
    )
    return ir.Model(graph, ir_version=model.ir_version)
