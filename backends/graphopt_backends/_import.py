"""From ONNX to Relax through TVM's public importer, and which operators it cannot take."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir

from graphopt.backend_base import Unsupported
from graphopt.errors import BackendError
from graphopt.model_io import to_proto
from graphopt_backends._fold import is_constant

__all__ = ["alone", "import_model", "unsupported_nodes"]

_MICROSOFT = frozenset({"BiasGelu", "FastGelu", "Gelu", "SkipLayerNormalization"})
"""Operators of com.microsoft that the importer implements as ONNX Runtime does; it looks at the name alone."""

_ONNX_HOMONYMS = frozenset({"Attention"})
"""Operators of ai.onnx whose name the importer takes for the one of com.microsoft."""

_ALWAYS_TAKEN = frozenset({"Constant", "If"})


def import_model(model: ir.Model) -> Any:
    """Import a lowered model into an IRModule whose `main` takes the graph's inputs in order.

    Raises:
        BackendError: The importer fails; `unsupported_nodes` says where.
    """
    try:
        return _convert(to_proto(model))
    except Exception as e:  # the importer raises whatever its converters raise
        name = model.graph.name or "model"
        raise BackendError(name, f"TVM cannot import it: {_reason(e)}", "try --fallback ort") from e


def unsupported_nodes(model: ir.Model) -> dict[str, Unsupported]:
    """Name the nodes of a lowered model that TVM cannot take, by node name.

    Nodes are first looked up in the importer's table; where the import of the whole model fails nevertheless, every
    node is imported by itself to find out which it is.
    """
    found = _not_in_table(model)
    if not found:
        try:
            _convert(to_proto(model))
        except Exception as e:  # the importer raises whatever its converters raise
            found = _probe(model) or _blame_all(model, e)
    return found


def _not_in_table(model: ir.Model) -> dict[str, Unsupported]:
    names = _importer_names()
    found: dict[str, Unsupported] = {}
    for node in model.graph:
        for inner in _with_subgraphs(node):
            reason = _table_reason(inner, names)
            if reason:
                operator = inner.op_type if inner.domain in ("", "ai.onnx") else f"{inner.domain}.{inner.op_type}"
                found.setdefault(node.name or "", Unsupported(inner.name or "", operator, reason))
    return found


def _table_reason(node: ir.Node, names: frozenset[str]) -> str | None:
    if node.domain in ("", "ai.onnx"):
        if node.op_type in _ONNX_HOMONYMS:
            return "TVM implements an operator of com.microsoft under this name"
        if node.op_type not in names and node.op_type not in _ALWAYS_TAKEN:
            return "TVM has no importer for it"
        return None
    if node.domain == "com.microsoft" and node.op_type in _MICROSOFT and node.op_type in names:
        return None
    return f"TVM has no importer for the domain {node.domain}"


def _importer_names() -> frozenset[str]:
    """Names in the importer's table; it has no public accessor."""
    from tvm.relax.frontend.onnx import onnx_frontend

    return frozenset(onnx_frontend._get_convert_map())  # noqa: SLF001


def _with_subgraphs(node: ir.Node) -> Iterator[ir.Node]:
    yield node
    for attribute in node.attributes.values():
        graphs = ()
        if attribute.type == ir.AttributeType.GRAPH:
            graphs = (attribute.as_graph(),)
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs = tuple(attribute.as_graphs())
        for graph in graphs:
            for inner in graph:
                yield from _with_subgraphs(inner)


def _probe(model: ir.Model) -> dict[str, Unsupported]:
    found: dict[str, Unsupported] = {}
    for node in model.graph:
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            continue
        try:
            _convert(to_proto(alone(model, node)))
        except Exception as e:  # the importer raises whatever its converters raise
            found[node.name or ""] = Unsupported(node.name or "", node.op_type, f"TVM cannot import it: {_reason(e)}")
    return found


def _blame_all(model: ir.Model, e: Exception) -> dict[str, Unsupported]:
    """The import fails on a combination: nodes with subgraphs are the suspects, else the whole model."""
    suspects = [node for node in model.graph if len(list(_with_subgraphs(node))) > 1] or list(model.graph)
    return {
        str(n.name): Unsupported(str(n.name), n.op_type, f"TVM cannot import the graph it stands in: {_reason(e)}")
        for n in suspects
    }


def alone(model: ir.Model, node: ir.Node) -> ir.Model:
    """A model of one node; constants stay constants, all other inputs are fed."""
    inputs: list[ir.Value] = []
    initializers: list[ir.Value] = []
    renamed: dict[ir.Value, ir.Value] = {}
    for value in node.inputs:
        if value is None or value in renamed:
            continue
        new = ir.Value(name=value.name, type=value.type, shape=value.shape)
        renamed[value] = new
        if is_constant(value):
            new.const_value = value.const_value
            initializers.append(new)
        else:
            inputs.append(new)
    copied = [renamed[v] if v is not None else None for v in node.inputs]
    copy = ir.Node(
        node.domain, node.op_type, copied, list(node.attributes.values()), num_outputs=len(node.outputs), name=node.name
    )
    for new, old in zip(copy.outputs, node.outputs, strict=True):
        new.name, new.type, new.shape = old.name, old.type, old.shape
    outputs = [o for o in copy.outputs if o.name]
    graph = ir.Graph(inputs, outputs, nodes=[copy], initializers=initializers, name="probe")
    graph.opset_imports.update(model.graph.opset_imports)
    return ir.Model(graph, ir_version=model.ir_version)


def _convert(proto: Any) -> Any:
    """Run the importer without what it prints and warns about."""
    from tvm.relax.frontend.onnx import from_onnx

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return from_onnx(proto)


def _reason(e: Exception) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return f"{type(e).__name__}: {lines[-1][:160]}" if lines else type(e).__name__
