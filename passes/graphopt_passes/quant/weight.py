"""Weight-only INT8: the integers stand in the file, arithmetic stays in float."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from graphopt.analyses import Constants
from graphopt.pass_base import Change

from graphopt_passes.quant._maths import decibel
from graphopt_passes.quant.builder import Builder
from graphopt_passes.quant.sites import Site, Weight

__all__ = ["NODE_BYTES", "saved_bytes", "quantize_weights", "weight_sqnr"]

NODE_BYTES = 40
"""What a node costs in the file besides its names."""


def saved_bytes(weight: Weight, *, per_channel: bool, bias: int = 0) -> int:
    """Bytes of the file that int8 saves for a weight, and a bias of that many elements, after scales and nodes.

    A DequantizeLinear names its output, itself, its integers and its scales, and these name their tensors again.
    """
    scales = weight.channels if per_channel else 1
    names = 2 * NODE_BYTES + 6 * (len(weight.value) + 6)
    saved = 4 * weight.size - weight.size - 4 * scales - names
    return saved - (4 * (bias if per_channel else 1) + names if bias else 0)


def quantize_weights(
    builder: Builder, sites: Sequence[tuple[Site, str]], constants: Constants, *, per_channel: bool
) -> list[Change]:
    """Replace the weights of sites by int8 behind DequantizeLinear.

    Args:
        builder: Edits the model.
        sites: Sites, each with the reason why it is not computed on integers, empty if none was asked for.
        constants: Constants of the model.
        per_channel: One scale for each output channel.
    """
    nodes = {}
    for graph in builder.model.graphs():
        for node in graph:
            nodes[next((o.name for o in node.outputs if o.name), "")] = node
    changes: list[Change] = []
    for site, why in sites:
        changes.append(_quantize_site(builder, nodes[site.key], site, why, constants, per_channel=per_channel))
    return changes


def _quantize_site(
    builder: Builder, node: ir.Node, site: Site, why: str, constants: Constants, *, per_channel: bool
) -> Change:
    done = 0
    worst = np.inf
    for weight in site.weights:
        value = node.inputs[weight.index]
        tensor = constants.tensors[weight.value]
        if value is None or saved_bytes(weight, per_channel=per_channel) <= 0:
            continue
        axis = weight.axis if per_channel else None
        if site.operator == "Gather":
            _look_up(builder, node, value, tensor, axis)
        else:
            node.replace_input_with(weight.index, builder.dequantized(value, tensor, axis, node))
        worst = min(worst, weight_sqnr(builder, value, tensor, axis))
        builder.discard(value)
        done += weight.size
    if not done:
        return Change.skipped(site.name, f"{_also(why)}{site.weights[0].size} weights: scales would cost more than int8 saves")
    details = {
        "bits": builder.bits, "weights": done, "scales": "channel" if per_channel else "tensor",
        "sqnr_db": round(float(worst), 1),
    }  # fmt: skip
    return Change(site.name, f"weights in int8, arithmetic in float{': ' if why else ''}{why}", details=details)


def _also(why: str) -> str:
    return f"{why}; " if why else ""


def _look_up(builder: Builder, node: ir.Node, value: ir.Value, tensor: ir.TensorProtocol, axis: int | None) -> None:
    """Look integers up and make floats of the rows found only, instead of the whole table on every run."""
    graph = node.graph
    if graph is None:
        raise TypeError(f"node {node.name!r} is in no graph")
    integers, scale = builder.integers(value, tensor, axis, graph)
    node.replace_input_with(0, integers)
    found = node.outputs[0]
    name = found.name or ""
    # the result keeps its name, so that it may be an output of the model
    rows = builder.name(f"{name}_q")
    attributes = {} if axis is None else {"axis": -1}
    output = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=found.shape, doc_string=found.doc_string)
    output.metadata_props.update(found.metadata_props)
    up = ir.node("DequantizeLinear", [found, scale], attributes, outputs=[output], name=builder.name(f"{name}_dq"))
    found.replace_all_uses_with(output, replace_graph_outputs=True)
    up.replace_input_with(0, found)
    found.name, found.type = rows, ir.TensorType(ir.DataType.INT8)
    graph.insert_after(node, up)


def weight_sqnr(builder: Builder, value: ir.Value, tensor: ir.TensorProtocol, axis: int | None) -> float:
    """Signal to noise of a weight that the builder has made integers of, in dB."""
    integers, scale = builder.made(value, axis)
    weight = tensor.numpy()
    shape = [1] * weight.ndim
    if axis is not None:
        shape[axis] = -1
    error = weight - integers.astype(np.float32) * scale.reshape(shape)
    return decibel(float(np.vdot(weight, weight)), float(np.vdot(error, error)))
