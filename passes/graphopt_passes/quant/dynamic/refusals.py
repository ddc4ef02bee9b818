"""Which layers dynamic integers suit: what has an integer form, and is not slower in it.

    layer                               integer form                       against float, one thread of a VNNI Xeon
    MatMul, Gemm, weight on the right   MatMulInteger                      1.5 to 3x faster from 100 channels on
    MatMul, weight on the left          the same between two Transposes    1.3 to 4x faster from 96 channels on
    MatMul, one weight a batch entry    MatMulInteger                      up to 3x faster
    Conv                                ConvInteger                        0.2 to 1x as fast, so only on request
    ConvTranspose, LSTM, GRU, RNN       none in standard ONNX

Below `NARROW` channels in or out, rounding the input and scaling the result cost more than the product saves.
`benchmarks/dynamic_layers.py` measures the table.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphopt.analyses import Shapes
from graphopt_passes.quant.sites import Site, keyed_nodes
from graphopt_passes.quant.weight import saved_bytes

__all__ = ["NARROW", "NARROW_LEFT", "OPERATORS", "note_ranks", "why_not_dynamic"]

OPERATORS = frozenset({"Conv", "Gemm", "MatMul"})
NARROW = 16
NARROW_LEFT = 96


def why_not_dynamic(site: Site, node: ir.Node, *, per_channel: bool, convs: bool = False) -> str:
    """Reason why a site cannot be computed on dynamic integers, or should not; empty if it can.

    Args:
        site: The site.
        node: Its node.
        per_channel: One scale for each output channel.
        convs: Conv may become ConvInteger, which ONNX Runtime computes slower than floats.
    """
    weight = site.weights[0]
    if site.operator not in OPERATORS:
        return f"{site.operator} has no dynamic integer form"
    if site.operator == "Conv" and not convs:
        return "ConvInteger is slower than Conv"
    if saved_bytes(weight, per_channel=per_channel) <= 0:
        return f"{weight.size} weights, so few that scales would cost more than int8 saves"
    return "" if site.operator == "Conv" else _why_not_product(site, node)


def note_ranks(model: ir.Model, sites: Sequence[Site], shapes: Shapes) -> None:
    """Write the shape of what a weight on the left is multiplied with into the model, if it is not there yet."""
    nodes = keyed_nodes(model)
    for site in sites:
        if site.operator == "MatMul" and site.weights[0].index == 0:
            source = nodes[site.key].inputs[1]
            dims = shapes.of(source)
            if source is not None and source.shape is None and dims is not None:
                source.shape, source.type = ir.Shape(dims), ir.TensorType(ir.DataType.FLOAT)


def _why_not_product(site: Site, node: ir.Node) -> str:
    weight = site.weights[0]
    deep, wide = (weight.shape[i] for i in (-2, -1))
    if weight.index == 0:
        source = node.inputs[1]
        if len(weight.shape) > 2:
            return "its weights on the left are a batch"
        if source is None or source.shape is None:
            return "its weight is on the left, and nothing tells the rank of its input"
        if min(deep, wide) < NARROW_LEFT:
            return f"its weight on the left is {deep} x {wide}: transposing costs more than integers save"
    if min(deep, wide) < NARROW:
        return f"its weight is {deep} x {wide}: rounding the input on every run costs more than integers save"
    return ""
