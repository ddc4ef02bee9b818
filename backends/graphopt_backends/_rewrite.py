"""Operators in a form that the compiler's importer takes; each rule keeps the values.

rule                from                                    to
explicit_pads       auto_pad SAME_*, VALID                  pads
widen_small_ints    int4 and uint4 constants                int8 and uint8 constants
plain_norm          BatchNormalization, constant statistics Mul, Add
flatten_blocks      DequantizeLinear with block_size        Cast, Sub, Reshape, Mul on blocks
_contributed        Attention, SkipLayerNormalization   see there
unfuse              QLinearConv, QLinearAdd, QGemm, ...     DequantizeLinear, operator, QuantizeLinear
_decompose          operators that others express           see there
_branches           If, computed condition                  both branches, Where
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from graphopt_backends._branches import choose_branches
from graphopt_backends._builder import Builder
from graphopt_backends._contributed import CONTRIBUTED
from graphopt_backends._decompose import RULES
from graphopt_backends._fold import is_constant, static_shape
from graphopt_backends._unfused import UNFUSED, unfuse

__all__ = ["Keeps", "rewrite"]

Rule = Callable[[ir.Graph, ir.Node], bool]
Keeps = Callable[[ir.Node], bool]

_SMALL = {ir.DataType.INT4: (np.int8, ir.DataType.INT8), ir.DataType.UINT4: (np.uint8, ir.DataType.UINT8)}


def rewrite(model: ir.Model, keeps: Keeps = lambda _: False) -> bool:
    """Apply every rule to every node once; returns whether anything changed. Shapes must be inferred.

    Args:
        model: The model.
        keeps: True for nodes that make weights of small integers, and whose form is wanted as it is.
    """
    changed = _widen_small_ints(model, keeps)
    changed = choose_branches(model) or changed
    for graph in model.graphs():
        for node in list(graph):
            rule = _RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else _CONTRIBUTED.get(node.op_type)
            if rule is not None and not keeps(node) and rule(graph, node):
                changed = True
    return changed


def _widen_small_ints(model: ir.Model, keeps: Keeps) -> bool:
    changed = False
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.dtype in _SMALL and not all(keeps(user) for user, _ in value.uses()):
                numpy_type, dtype = _SMALL[tensor.dtype]
                value.const_value = ir.Tensor(tensor.numpy().astype(numpy_type), dtype=dtype, name=value.name)
                value.type = ir.TensorType(dtype)
                changed = True
    return changed


def _explicit_pads(graph: ir.Graph, node: ir.Node) -> bool:  # noqa: ARG001
    mode = node.attributes.get_string("auto_pad", "NOTSET")
    source = static_shape(node.inputs[0])
    if mode == "NOTSET" or source is None:
        return False
    spatial = source[2:]
    if "kernel_shape" in node.attributes:
        kernel = tuple(node.attributes.get_ints("kernel_shape") or ())
    else:
        kernel = (static_shape(node.inputs[1]) or ())[2:]
    strides = node.attributes.get_ints("strides") or (1,) * len(spatial)
    dilations = node.attributes.get_ints("dilations") or (1,) * len(spatial)
    before: list[int] = []
    after: list[int] = []
    for size, extent, stride, dilation in zip(spatial, kernel, strides, dilations, strict=True):
        total = 0
        if mode != "VALID":
            total = max((-(-size // stride) - 1) * stride + (extent - 1) * dilation + 1 - size, 0)
        small = total // 2
        before.append(total - small if mode == "SAME_LOWER" else small)
        after.append(small if mode == "SAME_LOWER" else total - small)
    node.attributes.pop("auto_pad")
    node.attributes["pads"] = ir.AttrInt64s("pads", [*before, *after])
    return True


def _flatten_blocks(graph: ir.Graph, node: ir.Node) -> bool:
    """Blocked DequantizeLinear: (x - zero point) * scale with one scale for each block along the axis."""
    block = node.attributes.get_int("block_size", 0)
    shape, scales = static_shape(node.inputs[0]), static_shape(node.inputs[1])
    if not block or shape is None or scales is None or node.inputs[1] is None:
        return False
    axis = node.attributes.get_int("axis", 1) % len(shape)
    if scales[axis] * block != shape[axis]:
        return False
    split = [*shape[:axis], scales[axis], block, *shape[axis + 1 :]]
    dtype = node.inputs[1].dtype or ir.DataType.FLOAT
    out = node.outputs[0]
    make = Builder(graph, node)
    data = make("Reshape", [make("Cast", [node.inputs[0]], to=dtype), make.ints(split)])
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        zero = make("Unsqueeze", [make("Cast", [node.inputs[2]], to=dtype), make.ints([axis + 1])])
        data = make("Sub", [data, zero])
    data = make("Mul", [data, make("Unsqueeze", [node.inputs[1], make.ints([axis + 1])])])
    make.finish("Reshape", [data, make.ints(shape)], out)
    return True


def _plain_norm(graph: ir.Graph, node: ir.Node) -> bool:
    """BatchNormalization with constant statistics: x * a + b, for each channel."""
    if not all(is_constant(v) for v in node.inputs[1:5]) or any(o.uses() for o in node.outputs[1:]):
        return False
    rank = node.inputs[0].shape.rank() if node.inputs[0] is not None and node.inputs[0].shape is not None else 0
    dtype = node.inputs[1].dtype if node.inputs[1] is not None else None
    if rank < 2 or dtype is None or node.attributes.get_int("training_mode", 0):
        return False
    gain, shift, mean, variance = (v.const_value.numpy().astype(np.float64) for v in node.inputs[1:5])  # type: ignore[union-attr]
    a = gain / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    channels = (1, -1) + (1,) * (rank - 2)
    make = Builder(graph, node)
    scaled = make("Mul", [node.inputs[0], make.array(a.reshape(channels).astype(dtype.numpy()))])
    make.finish(
        "Add", [scaled, make.array((shift - mean * a).reshape(channels).astype(dtype.numpy()))], node.outputs[0]
    )
    return True


_RULES: dict[str, Rule] = {
    **RULES,
    **dict.fromkeys(UNFUSED, unfuse),
    "AveragePool": _explicit_pads,
    "BatchNormalization": _plain_norm,
    "Conv": _explicit_pads,
    "ConvInteger": _explicit_pads,
    "DequantizeLinear": _flatten_blocks,
    "MaxPool": _explicit_pads,
}

_CONTRIBUTED: dict[str, Rule] = {**dict.fromkeys(UNFUSED, unfuse), **CONTRIBUTED}
"""Rules for operators of other domains: ONNX Runtime's."""
