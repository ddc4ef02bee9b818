"""Weight-only INT8: the integers stand in the file, arithmetic stays in float."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from graphopt.pass_base import Change
from graphopt_passes.quant.builder import NAME_LENGTH, Builder
from graphopt_passes.quant.sites import Site, Weight, graph_of, keyed_nodes, tensor_of

__all__ = ["quantize_weights", "saved_bytes", "why_not_weight"]

_NODE_BYTES = 40  # what a node costs in the file besides its names


def saved_bytes(weight: Weight, *, per_channel: bool, bias: int = 0) -> int:
    """Bytes of the file that int8 saves for a weight, and a bias of that many elements, after scales and nodes.

    A DequantizeLinear names its output, itself, its integers and its scales, and these name their tensors again.
    """
    scales = weight.channels if per_channel else 1
    names = 2 * _NODE_BYTES + 6 * min(NAME_LENGTH, len(weight.value) + 6)
    saved = 4 * weight.size - weight.size - 4 * scales - names
    return saved - (4 * (bias if per_channel else 1) + names if bias else 0)


def why_not_weight(site: Site, *, per_channel: bool) -> str:
    """Reason why the weights of a site stay float; empty if one of them is worth storing in int8."""
    if any(saved_bytes(weight, per_channel=per_channel) > 0 for weight in site.weights):
        return ""
    size = sum(weight.size for weight in site.weights)
    return f"{size} weights, so few that scales would cost more than int8 saves"


def quantize_weights(
    builder: Builder, sites: Sequence[tuple[Site, str]], *, per_channel: bool, at_load: bool = False
) -> list[Change]:
    """Replace the weights of sites by int8 behind DequantizeLinear.

    Args:
        builder: Edits the model.
        sites: Sites, each with the reason why it is not computed on integers, empty if none was asked for.
        per_channel: One scale for each output channel.
        at_load: Write Cast and Mul where the runtime has no integer form, which it computes once, when it loads the
            model; a DequantizeLinear makes a Conv or LSTM of ONNX Runtime up to five times slower than in float.
    """
    nodes = keyed_nodes(builder.model)
    changes = [_quantize_site(builder, nodes[site.key], site, why, per_channel, at_load) for site, why in sites]
    builder.discard_spare()
    return changes


def _quantize_site(builder: Builder, node: ir.Node, site: Site, why: str, per_channel: bool, at_load: bool) -> Change:
    done, worst = 0, math.inf
    for weight in site.weights:
        value = node.inputs[weight.index]
        tensor = tensor_of(value)
        if value is None or tensor is None or saved_bytes(weight, per_channel=per_channel) <= 0:
            continue
        axis = weight.axis if per_channel else None
        if site.operator == "Gather" and all(user.op_type == "Gather" for user in value.consumers()):
            worst = min(worst, _look_up(builder, node, value, tensor, axis))
        else:
            make = builder.multiplied if at_load and _in_float(site, weight) else builder.dequantized
            dequantized, sqnr = make(value, tensor, axis, paired=False)
            node.replace_input_with(weight.index, dequantized)
            worst = min(worst, sqnr)
        builder.discard(value)
        done += weight.size
    details = {"bits": 8, "weights": done, "scales": "channel" if per_channel else "tensor"}
    action = "weights in int8, arithmetic in float" + (f": {why}" if why else "")
    return Change(site.name, action, details={**details, "weight_sqnr_db": round(worst, 1)})


def _in_float(site: Site, weight: Weight) -> bool:
    """Whether runtimes have no kernel that reads the integers of a layer, as they do for a matrix on the right."""
    matrix = site.operator in ("Gather", "Gemm", "MatMul") and weight.index < 2 and len(weight.shape) == 2
    return not matrix or (site.operator == "MatMul" and weight.index == 0)


def _look_up(builder: Builder, node: ir.Node, value: ir.Value, tensor: ir.TensorProtocol, axis: int | None) -> float:
    """Look integers up and make floats of the rows found only, instead of the whole table on every run."""
    graph, found = graph_of(node), node.outputs[0]
    integers = builder.integers(value, tensor, axis, paired=False)
    node.replace_input_with(0, integers.value)
    name = found.name or ""
    # the result keeps its name, so that it may be an output of the model
    output = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=found.shape, doc_string=found.doc_string)
    output.metadata_props.update(found.metadata_props)
    found.replace_all_uses_with(output, replace_graph_outputs=True)
    found.name, found.type = builder.name(f"{name}_q"), ir.TensorType(ir.DataType.INT8)
    attributes = {} if axis is None else {"axis": -1}
    inputs = [found, integers.scale]
    graph.insert_after(
        node, ir.node("DequantizeLinear", inputs, attributes, outputs=[output], name=builder.name(f"{name}_dq"))
    )
    return integers.sqnr_db
