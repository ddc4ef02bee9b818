"""onnx-graphsurgeon, kept where it is good and away from what it would damage.

graphsurgeon computes constants with ONNX Runtime (`evaluate`) and has the handiest interface for a hand-written
rewrite (`operate`). It also drops metadata, doc strings and quantization annotations without a word, cannot write
INT4 or 8-bit floats, and folds `Shape` with a `start` attribute and integer arithmetic between casts wrongly. So the
model itself goes through it only in `operate`, which refuses what would suffer and puts back what would be lost.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from graphopt.errors import ModelError, nearest
from graphopt.model_io import to_proto

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

__all__ = ["COMPUTABLE", "damage", "evaluate", "extract", "operate"]

_T = TypeVar("_T")
Array = np.ndarray[Any, np.dtype[Any]]

COMPUTABLE = frozenset(
    {
        ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BOOL,
        ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64,
        ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64,
    }
)  # fmt: skip
"""Element types that graphsurgeon and numpy both hold exactly."""

_KEPT_OUTSIDE = 1 << 24
"""Bytes above which a constant never enters graphsurgeon: it sees name, type and shape only."""

_PLACEHOLDER = "graphopt:"
_ANNOTATION = "quant_parameter_tensor_names"
_PLAIN_ATTRIBUTES = frozenset(
    {
        ir.AttributeType.FLOAT, ir.AttributeType.INT, ir.AttributeType.STRING, ir.AttributeType.TENSOR,
        ir.AttributeType.GRAPH, ir.AttributeType.FLOATS, ir.AttributeType.INTS, ir.AttributeType.STRINGS,
    }
)  # fmt: skip


def evaluate(model: ir.Model) -> dict[str, Array]:
    """Compute the outputs of a model without inputs, every node on ONNX Runtime's CPU kernels.

    Args:
        model: A small model whose outputs follow from its initializers; all types in `COMPUTABLE`.

    Returns:
        Output name -> value; an output that ONNX Runtime cannot compute is missing.
    """
    import onnx_graphsurgeon as gs

    proto = to_proto(model)
    found: dict[str, Array] = {}
    # one session for all first; only if a node has no kernel is the graph cut around it, which is slow
    for partitioning in (None, "recursive"):
        with _silence():
            graph = gs.import_onnx(proto)
            wanted = {tensor.name: tensor for tensor in graph.outputs}
            graph.fold_constants(fold_shapes=False, flatten_subgraphs=False, partitioning=partitioning)
        constants = {name: t for name, t in wanted.items() if isinstance(t, gs.Constant)}
        found = {name: np.asarray(tensor.values) for name, tensor in constants.items()}
        if len(found) == len(wanted):
            break
    return found


def damage(model: ir.Model) -> str | None:
    """Say what graphsurgeon would damage in a model, None if it is safe there."""
    if model.functions:
        return "has functions, which graphsurgeon reorders"
    for graph in model.graphs():
        for value in _values(graph):
            if _ANNOTATION in value.meta:
                return f"has a quantization annotation on {value.name!r}, which graphsurgeon drops"
            if value.dtype is not None and value.dtype not in COMPUTABLE and value.dtype != ir.DataType.STRING:
                return f"holds {value.dtype.name} in {value.name!r}, which graphsurgeon cannot write"
            if value.type is not None and not isinstance(value.type, ir.TensorType):
                return f"holds a sequence or an optional in {value.name!r}, which graphsurgeon cannot describe"
        for node in graph:
            if node.overload:
                return f"has an overloaded function call in {node.name!r}, which graphsurgeon drops"
            for attribute in node.attributes.values():
                if attribute.type not in _PLAIN_ATTRIBUTES:
                    return f"has the attribute {attribute.name!r} on {node.name!r}, which graphsurgeon drops"
                if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype not in COMPUTABLE:
                    return f"holds {attribute.as_tensor().dtype.name} in {node.name!r}, which graphsurgeon cannot write"
    return None


def operate(model: ir.Model, rewrite: Callable[[gs.Graph], _T], changed: Callable[[_T], bool]) -> _T:
    """Rewrite a model in place with graphsurgeon, keeping what graphsurgeon would lose.

    Metadata and doc strings go back to the nodes and values that kept their names. Constants above 16 MiB take part
    with name, type and shape only: they may be moved and renamed, not read.

    Args:
        model: The model; if nothing changed it is left exactly as it was.
        rewrite: Edits the graph; removing dead nodes and sorting are left to `operate`.
        changed: Tells from what `rewrite` returned whether the graph changed.

    Returns:
        What `rewrite` returned.

    Raises:
        ModelError: graphsurgeon would damage this model, or cannot handle the edited graph.
    """
    import onnx_graphsurgeon as gs

    subject = model.graph.name or "model"
    if reason := damage(model):
        raise ModelError(subject, reason, "write the pass on onnx_ir, with graphopt.pass_base.Pass")
    outside, proto = _lean_proto(model)
    with _silence():
        graph = gs.import_onnx(proto)
    result = rewrite(graph)
    if not changed(result):
        return result
    try:
        with _silence():
            edited = ir.from_proto(gs.export_onnx(graph.cleanup().toposort()))
    except RecursionError as e:
        raise ModelError(subject, "is too deep for graphsurgeon, which sorts by recursion") from e
    _restore_tensors(edited, outside)
    _restore_descriptions(edited.graph, model.graph)
    model.graph = edited.graph
    return result


def extract(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> ir.Model:
    """Cut out the part of a model between some values, as a model of its own.

    Weights are shared with the original, not copied. Needs no graphsurgeon: onnx_ir cuts without losing anything.

    Args:
        model: The model to cut from; it does not change.
        inputs: Names of the values that the part takes; empty: the inputs of the model that it needs.
        outputs: Names of the values that the part returns; empty: the outputs of the model.

    Raises:
        ModelError: A name is unknown, the part needs a value that is not among `inputs`, or the type of an input or
            output cannot be inferred.
    """
    known = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)
    for name in (*inputs, *outputs):
        if name not in known:
            raise ModelError(f"value {name!r}", "no such value in the main graph", nearest(name, known))
    if any(known[name].type is None or known[name].shape is None for name in (*inputs, *outputs)):
        model = model.clone()
        ShapeInferencePass()(model)
        known = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)
    graph = model.graph
    ends = list(outputs) or [value.name or "" for value in graph.outputs]
    starts = list(inputs) or [value.name or "" for value in _needed_inputs(graph, [known[name] for name in ends])]
    _refuse_loose_ends(known, starts, ends)
    try:
        part = ir.convenience.extract(graph, starts, ends)
    except ValueError as e:
        fact = str(e).rpartition("not provided: ")[2] or str(e)
        raise ModelError("extract", f"the part also needs {fact}", "name it among the inputs") from e
    position = {name: i for i, name in enumerate(graph.initializers)}
    weights = sorted(part.initializers.values(), key=lambda value: position.get(value.name or "", -1))
    part.initializers.clear()
    for value in weights:
        part.register_initializer(value)
    for value in part.inputs:
        if value.const_value is not None and value.name not in part.initializers:
            value.const_value = None
    functions = [function.clone() for function in model.functions.values()]
    return ir.Model(
        part,
        ir_version=model.ir_version,
        producer_name=model.producer_name,
        producer_version=model.producer_version,
        functions=functions,
        metadata_props=dict(model.metadata_props),
    )


def _refuse_loose_ends(known: Mapping[str, ir.Value], starts: Sequence[str], ends: Sequence[str]) -> None:
    for name in (*starts, *ends):
        if known[name].type is None:
            raise ModelError(f"value {name!r}", "its type cannot be inferred", "choose a value beside it")
    for kind, names in (("input", starts), ("output", ends)):
        twice = [name for i, name in enumerate(names) if name in names[:i]]
        if twice:
            raise ModelError(f"{kind} {twice[0]!r}", "named twice", "name it once")
    for name in ends:
        value = known[name]
        if name in starts or value.producer() is None:
            raise ModelError(f"output {name!r}", "is not computed by the part", "name the output of a node")


def _needed_inputs(graph: ir.Graph, ends: Sequence[ir.Value]) -> list[ir.Value]:
    """Inputs of the graph that some values depend on, in the graph's order; subgraphs count as their node's inputs."""
    seen: set[ir.Node] = set()
    found: set[ir.Value] = set()
    stack = list(ends)
    while stack:
        value = stack.pop()
        node = value.producer()
        if node is None:
            found.add(value)
        elif node not in seen:
            seen.add(node)
            inner = [v for sub in _subgraphs(node) for n in ir.traversal.RecursiveGraphIterator(sub) for v in n.inputs]
            stack.extend(v for v in (*node.inputs, *inner) if v is not None)
    return [value for value in graph.inputs if value in found and value.name not in graph.initializers]


def _subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _lean_proto(model: ir.Model) -> tuple[dict[str, ir.TensorProtocol], onnx.ModelProto]:
    """Serialise a model with its small weights inside and a mere placeholder for every large one."""
    outside: dict[str, ir.TensorProtocol] = {}
    replaced: list[tuple[ir.Value, ir.TensorProtocol]] = []
    try:
        for graph in model.graphs():
            for value in graph.initializers.values():
                tensor = value.const_value
                if tensor is None:
                    continue
                if tensor.nbytes > _KEPT_OUTSIDE:
                    key = f"{_PLACEHOLDER}{len(outside)}"
                    outside[key] = tensor
                    value.const_value = _placeholder(key, tensor, value.name or "")
                elif isinstance(tensor, ir.ExternalTensor):
                    value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name)
                replaced.append((value, tensor))
        return outside, ir.to_proto(model)
    finally:
        for value, tensor in replaced:
            value.const_value = tensor


def _placeholder(key: str, tensor: ir.TensorProtocol, name: str) -> ir.ExternalTensor:
    return ir.ExternalTensor(key, 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name)


def _restore_tensors(edited: ir.Model, outside: Mapping[str, ir.TensorProtocol]) -> None:
    for graph in edited.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and (original := outside.get(tensor.path)) is not None:
                value.const_value = original


def _restore_descriptions(edited: ir.Graph, original: ir.Graph) -> None:
    """Put metadata and doc strings back, by name, graph by graph."""
    edited.doc_string = original.doc_string
    edited.metadata_props.update(original.metadata_props)
    old_nodes = {node.name: node for node in ir.traversal.RecursiveGraphIterator(original) if node.name}
    old_values: dict[str | None, ir.Value] = {}
    for graph in (original, *original.subgraphs()):
        old_values.update((value.name, value) for value in _values(graph) if value.name)
    for graph in (edited, *edited.subgraphs()):
        for node in graph:
            if (old := old_nodes.get(node.name or "")) is not None:
                node.doc_string = old.doc_string
                node.metadata_props.update(old.metadata_props)
        for value in _values(graph):
            if (before := old_values.get(value.name)) is not None:
                value.doc_string = before.doc_string
                value.metadata_props.update(before.metadata_props)


@contextmanager
def _silence() -> Generator[None]:
    """Stop graphsurgeon from printing to stdout, and ONNX Runtime from logging what graphsurgeon tries out."""
    import onnxruntime as ort
    from onnx_graphsurgeon.logger import G_LOGGER

    default_severity, silent = 2, 4
    ort.set_default_logger_severity(silent)
    try:
        with G_LOGGER.suppress():
            yield
    finally:
        ort.set_default_logger_severity(default_severity)
