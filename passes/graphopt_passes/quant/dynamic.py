"""Dynamic INT8: activations rounded to a grid found on every run, products on integers (opset 11)."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.pass_base import Change
from graphopt_passes.quant.builder import Builder
from graphopt_passes.quant.sites import Site, tensor_of
from graphopt_passes.quant.weight import saved_bytes

__all__ = ["OPERATORS", "quantize_dynamic", "why_not_dynamic"]

OPERATORS = frozenset({"Gemm", "MatMul"})


def why_not_dynamic(site: Site, node: ir.Node, *, per_channel: bool) -> str:
    """Reason why a site cannot be computed on dynamic integers; empty if it can."""
    weight = site.weights[0]
    if site.operator not in OPERATORS:
        return f"{site.operator} has no dynamic integer form"
    if not site.main:
        return "inside a subgraph"
    if weight.index == 0 or len(weight.shape) != 2:
        return "its weight is no matrix on the right"
    if saved_bytes(weight, per_channel=per_channel) <= 0:
        return f"{weight.size} weights, so few that scales would cost more than int8 saves"
    if site.operator == "Gemm":
        if node.attributes.get_int("transA", 0):
            return "its input is transposed"
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None and node.attributes.get_float("beta", 1.0) != 1.0:
            return "its bias is scaled"
    return ""


def quantize_dynamic(
    builder: Builder,
    node: ir.Node,
    site: Site,
    ranges: dict[str, tuple[ir.Value, ...]],
    *,
    per_channel: bool,
    why: str = "",
) -> Change:
    """Replace a MatMul or Gemm by integer arithmetic.

    y = cast(MatMulInteger(x_q, w_q, x_zero)) * (x_scale * w_scale) [+ bias]

    Args:
        builder: Edits the model.
        node: The node.
        site: Its site.
        ranges: What DynamicQuantizeLinear made of each activation so far; layers that read the same share it.
        per_channel: One scale for each output channel.
        why: Why static ranges were not used.
    """
    graph, weight = builder.model.graph, site.weights[0]
    source, value, output = node.inputs[0], node.inputs[1], node.outputs[0]
    tensor = tensor_of(value)
    if source is None or value is None or tensor is None:
        raise TypeError(f"{site.name!r} has lost an input")
    transposed = site.operator == "Gemm" and weight.axis == 0
    factor = node.attributes.get_float("alpha", 1.0) if site.operator == "Gemm" else 1.0
    axis = weight.axis if per_channel else None
    integers = builder.integers(value, tensor, axis, transposed=transposed, factor=factor)
    rounded, scale, zero = _rounded(builder, source, ranges)
    name = output.name or ""
    product = builder.node("MatMulInteger", [rounded, integers.value, zero], f"{name}_int32")
    cast = builder.node("Cast", [product.outputs[0]], f"{name}_cast", {"to": int(ir.DataType.FLOAT)})
    scales = builder.node("Mul", [scale, integers.scale], f"{name}_scale")
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    graph.insert_before(node, [product, cast, scales])
    inputs = [cast.outputs[0], scales.outputs[0]]
    if bias is not None:
        scaled = builder.node("Mul", inputs, f"{name}_scaled")
        graph.insert_before(node, scaled)
        inputs = [scaled.outputs[0], bias]
    last = ir.node("Mul" if bias is None else "Add", inputs, outputs=[_take_over(output)], name=node.name)
    last.metadata_props.update(node.metadata_props)
    last.doc_string = node.doc_string
    graph.insert_before(node, last)
    output.replace_all_uses_with(last.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)
    last.outputs[0].name = name
    builder.discard(value)
    details = {"bits": builder.bits, "weights": weight.size, "scales": "channel" if per_channel else "tensor"}
    action = "int8, input ranges found on every run" + (f": {why}" if why else "")
    return Change(site.name, action, details={**details, "weight_sqnr_db": round(integers.sqnr_db, 1)})


def _rounded(builder: Builder, source: ir.Value, ranges: dict[str, tuple[ir.Value, ...]]) -> tuple[ir.Value, ...]:
    name = source.name or ""
    if name not in ranges:
        outputs = [ir.Value(name=builder.name(f"{name}_{word}")) for word in ("u8", "u8_scale", "u8_zero")]
        node = ir.node("DynamicQuantizeLinear", [source], outputs=outputs, name=outputs[0].name)
        builder.insert_behind(source, [node])
        ranges[name] = tuple(outputs)
    return ranges[name]


def _take_over(output: ir.Value) -> ir.Value:
    taken = ir.Value(name=output.name, type=output.type, shape=output.shape, doc_string=output.doc_string)
    taken.metadata_props.update(output.metadata_props)
    return taken
