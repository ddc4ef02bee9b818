"""Raise the operator set of a model: only as far as asked, in place, whatever the size of its weights."""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx import version_converter

from graphopt.errors import ModelError

__all__ = ["opset_version", "raise_opset"]

_LIFT_BYTES = 1024
_IR_WITH_HIDDEN_INITIALIZERS = 4  # before, the converter wants every weight among the inputs
_CONVERTER_ERRORS = (version_converter.ConvertError, RuntimeError, ValueError, TypeError, IndexError)  # as seen
_IR_VERSIONS = {7: 3, 9: 4, 10: 5, 11: 6, 12: 7, 15: 8, 19: 9, 21: 10, 23: 11, 24: 12, 25: 13}
"""First operator set that an IR version came with."""


def opset_version(model: ir.Model) -> int:
    """Version of the standard operator set that the model imports; 0 if it imports none."""
    return model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))


def raise_opset(model: ir.Model, version: int) -> bool:
    """Raise the standard operator set to `version`, keeping names, metadata and weights; in place.

    Where every operator has the same signature in both versions, only the number changes. Otherwise ONNX's version
    converter rewrites a copy without the weights, subgraphs included, and its graph replaces the model's. A widened
    signature can hide a changed meaning, so the caller compares the results.

    Returns:
        True if the model changed, False if it had this version or a newer one.

    Raises:
        ModelError: The model cannot be converted; it has not changed.
    """
    current = opset_version(model)
    if not 0 < current < version:
        return False
    different = _different_operators(model, current, version)
    if different:
        _replace_graph(model, _convert(model, version, different))
    for name in ("", "ai.onnx"):
        if name in model.opset_imports:
            model.opset_imports[name] = version
    needed = max(number for opset, number in _IR_VERSIONS.items() if opset <= version)
    model.ir_version = max(model.ir_version, needed)
    return True


def _different_operators(model: ir.Model, old: int, new: int) -> tuple[str, ...]:
    """Operators whose signature differs between the two versions, and what ONNX does not define."""
    kinds = {node.op_type for graph in model.graphs() for node in graph if node.domain in ("", "ai.onnx")}
    kinds |= {node.op_type for f in model.functions.values() for node in f if node.domain in ("", "ai.onnx")}
    return tuple(sorted(kind for kind in kinds if not _same_signature(kind, old, new)))


def _same_signature(kind: str, old: int, new: int) -> bool:
    try:
        before, after = (onnx.defs.get_schema(kind, version, "") for version in (old, new))
    except onnx.defs.SchemaError:
        return False
    if after.deprecated:
        return False
    if before.since_version == after.since_version:
        return True
    return _signature(before) == _signature(after) and _no_type_lost(before, after)


def _signature(schema: onnx.defs.OpSchema) -> tuple[object, ...]:
    attributes = tuple(
        (name, str(a.type), a.required, a.default_value.SerializeToString())
        for name, a in sorted(schema.attributes.items())
    )
    ports = tuple((p.name, str(p.option)) for p in (*schema.inputs, *schema.outputs))
    return attributes, ports, len(schema.inputs)


def _no_type_lost(before: onnx.defs.OpSchema, after: onnx.defs.OpSchema) -> bool:
    pairs = zip((*before.inputs, *before.outputs), (*after.inputs, *after.outputs), strict=True)
    return all(set(old.types) <= set(new.types) for old, new in pairs)


def _convert(model: ir.Model, version: int, different: tuple[str, ...]) -> ir.Model:
    """Convert a copy whose weights were lifted out, and put them back."""
    subject = model.graph.name or "model"
    if model.functions:
        fact = f"opset {version} is needed, and functions cannot be converted"
        raise ModelError(subject, fact, "inline them, or export the model with that opset")
    bare = model.clone()
    bare.ir_version = max(bare.ir_version or 0, _IR_WITH_HIDDEN_INITIALIZERS)
    inputs, weights = [value.name for value in bare.graph.inputs], _lift_weights(bare)
    try:
        converted = ir.from_proto(version_converter.convert_version(ir.to_proto(bare), version))
    except _CONVERTER_ERRORS as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:160]
        fact = f"cannot be raised to opset {version} ({', '.join(different)} changed): {reason}"
        raise ModelError(subject, fact, "export it with that opset, or leave the step out") from e
    graph = converted.graph
    for name, tensor in weights.items():
        value = next(v for v in graph.inputs if v.name == name)
        if name not in inputs:
            graph.inputs.remove(value)
        value.const_value = tensor
        graph.register_initializer(value)
    return converted


def _lift_weights(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """Turn all large initializers into inputs of the main graph; returns their tensors by name."""
    taken = {value.name for graph in model.graphs() for value in graph.initializers.values()}
    taken |= {output.name for graph in model.graphs() for node in graph for output in node.outputs}
    lifted: dict[str, ir.TensorProtocol] = {}
    for graph in list(model.graphs()):
        for name, value in list(graph.initializers.items()):
            tensor = value.const_value
            if tensor is None or tensor.nbytes <= _LIFT_BYTES:
                continue
            graph.initializers.pop(name)
            if graph is not model.graph:
                value.name = name = _fresh(name, taken)
                taken.add(name)
            value.shape, value.dtype, value.const_value = ir.Shape(tensor.shape.numpy()), tensor.dtype, None
            if not any(value is other for other in model.graph.inputs):
                model.graph.inputs.append(value)
            lifted[name] = tensor
    return lifted


def _fresh(name: str, taken: set[str | None]) -> str:
    candidate, number = f"{name}_lifted", 1
    while candidate in taken:
        candidate, number = f"{name}_lifted_{number}", number + 1
    return candidate


def _replace_graph(model: ir.Model, converted: ir.Model) -> None:
    """Put the converted graph into `model`, with what the converter dropped: documentation, metadata, imports."""
    old, new = model.graph, converted.graph
    old_nodes = {node.name: node for graph in model.graphs() for node in graph if node.name}
    old_values = {value.name: value for graph in model.graphs() for value in _values(graph) if value.name}
    for graph in converted.graphs():
        for node in graph:
            source = old_nodes.get(node.name or "")
            if source is not None and source.op_type == node.op_type:
                node.doc_string = source.doc_string
                node.metadata_props.update(source.metadata_props)
        for value in _values(graph):
            known = old_values.get(value.name or "")
            if known is not None:
                value.metadata_props.update(known.metadata_props)
                value.doc_string = known.doc_string
    # the converter writes inferred shapes into the interface; the interface stays as it was
    for before, after in zip((*old.inputs, *old.outputs), (*new.inputs, *new.outputs), strict=True):
        after.shape, after.type = before.shape, before.type
    new.name, new.doc_string = old.name, old.doc_string
    new.metadata_props.update(old.metadata_props)
    for domain, number in old.opset_imports.items():
        new.opset_imports.setdefault(domain, number)
    model.graph = new


def _values(graph: ir.Graph) -> list[ir.Value]:
    outputs = [output for node in graph for output in node.outputs]
    return [*graph.inputs, *graph.initializers.values(), *outputs]
