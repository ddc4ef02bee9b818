"""Quantized graphs: what is computed on integers, and what merely passes them on.

A DequantizeLinear in front of arithmetic is part of that arithmetic, and one in front of a convolution or product
makes it one of integers. Before that, those in front of operators that only move or compare elements change places
with them, so that integers are what moves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt_backends._fold import is_constant, static_shape
from graphopt_backends.kernels.expression import Expression, as_type, call, parameter

__all__ = ["Grid", "Integers", "dequantized", "grid_of", "integers_of", "is_weight", "pass_on", "real", "weight_of"]

_MOVES = frozenset(
    {
        "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Reshape", "Slice", "SpaceToDepth",
        "Squeeze", "Tile", "Transpose", "Unsqueeze",
    }
)  # fmt: skip
_BYTES = (ir.DataType.UINT8, ir.DataType.INT8)


@dataclass(frozen=True)
class Grid:
    """Real numbers that integers stand for: scale * (integer - zero_point)."""

    scale: float
    zero_point: int
    dtype: str


def grid_of(node: ir.Node) -> Grid | None:
    """The one grid of a QuantizeLinear or DequantizeLinear on 8-bit activations; None if it is anything else."""
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or node.domain not in ("", "ai.onnx"):
        return None
    scale, zero = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    if scale is None or not is_constant(scale) or (zero is not None and not is_constant(zero)):
        return None
    side = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
    if side is None or side.dtype is None or side.dtype not in _BYTES or scale.dtype != ir.DataType.FLOAT:
        return None
    scales, zeros = _numbers(scale), _numbers(zero) if zero is not None else np.zeros(1)
    if scales.size != 1 or zeros.size != 1:
        return None
    return Grid(float(scales[0]), int(zeros[0]), str(side.dtype.numpy()))


def _numbers(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy().reshape(-1)


def dequantized(value: ir.Value) -> tuple[ir.Value, Grid] | None:
    """What a value was before a DequantizeLinear with one grid."""
    node = value.producer()
    if node is None or node.op_type != "DequantizeLinear":
        return None
    grid, source = grid_of(node), node.inputs[0]
    return None if grid is None or source is None or is_constant(source) else (source, grid)


def real(integers: Expression, grid: Grid) -> Expression:
    """The real numbers that integers of a grid stand for."""
    value = as_type(as_type(integers, "int32"), "float32")
    if grid.zero_point:
        value = call("sub", value, parameter(grid.zero_point))
    return call("mul", value, parameter(grid.scale))


@dataclass(frozen=True)
class Integers:
    """A convolution or product on integers.

    Attributes:
        source: Integers that it reads.
        grid: Their grid.
        weight: Integers, with zero points of 0.
        scale: Of the sums: one for each output channel, or one for all.
        bias: Added to the sums, int32, if there is one.
    """

    source: ir.Value
    grid: Grid
    weight: np.ndarray
    scale: np.ndarray
    bias: np.ndarray | None


def integers_of(node: ir.Node, channel_axis: int) -> Integers | None:
    """The integer form of a convolution or product; None where its operands are no 8-bit integers.

    Args:
        node: A Conv, Gemm or MatMul.
        channel_axis: Axis of the weight with the output channels.
    """
    source, weight = node.inputs[0], node.inputs[1]
    read = dequantized(source) if source is not None else None
    stored = _stored(weight, channel_axis) if weight is not None else None
    if read is None or stored is None:
        return None
    values, scales = stored
    scale = np.float32(read[1].scale) * scales
    bias: np.ndarray | None = None
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = _bias(node.inputs[2], scale)
        if bias is None:
            return None
    return Integers(read[0], read[1], values, scale, bias)


def _stored(weight: ir.Value, channel_axis: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Integers and scales of a weight."""
    node = weight.producer()
    if node is None or node.op_type != "DequantizeLinear" or node.attributes.get_int("block_size", 0):
        return None
    values, scale = node.inputs[0], node.inputs[1]
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    constants = [value for value in (values, scale, zero) if value is not None]
    if values is None or scale is None or not all(is_constant(value) for value in constants):
        return None
    if values.dtype != ir.DataType.INT8 or values.const_value is None or (zero is not None and _numbers(zero).any()):
        return None
    scales, rank = _numbers(scale).astype(np.float32), len(values.const_value.shape)
    if scales.size > 1 and node.attributes.get_int("axis", 1) % rank != channel_axis % rank:
        return None
    return values.const_value.numpy(), scales


def is_weight(value: ir.Value) -> bool:
    """A constant, or what a DequantizeLinear makes of constants."""
    node = value.producer()
    if is_constant(value):
        return True
    return (
        node is not None and node.op_type == "DequantizeLinear" and not node.attributes.get_int("block_size", 0)
        and all(source is None or is_constant(source) for source in node.inputs)
    )  # fmt: skip


def weight_of(value: ir.Value) -> np.ndarray:
    """Values of a weight."""
    if is_constant(value):
        assert value.const_value is not None
        return value.const_value.numpy()
    node = value.producer()
    assert node is not None
    arrays = [source.const_value.numpy() for source in node.inputs if source is not None and source.const_value]
    integers, scale = arrays[0], arrays[1]
    zero = arrays[2] if len(arrays) > 2 else np.zeros_like(scale)
    if scale.size > 1:
        shape = [-1 if i == node.attributes.get_int("axis", 1) % integers.ndim else 1 for i in range(integers.ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    return ((integers.astype(np.float32) - zero.astype(np.float32)) * scale).astype(np.float32)


def _bias(value: ir.Value, scale: np.ndarray) -> np.ndarray | None:
    """The bias in steps of the sums: as it is stored, or a float one rounded to them."""
    node = value.producer()
    if node is not None and node.op_type == "DequantizeLinear" and node.inputs[0] is not None:
        stored, steps = node.inputs[0], node.inputs[1]
        if steps is None or not is_constant(stored) or not is_constant(steps) or stored.dtype != ir.DataType.INT32:
            return None
        same = np.allclose(_numbers(steps), scale, rtol=1e-5, atol=0)
        return _numbers(stored) if same else None
    if is_constant(value) and value.dtype == ir.DataType.FLOAT:
        steps = np.round(_numbers(value).astype(np.float64) / scale)
        return steps.astype(np.int32) if np.abs(steps).max(initial=0) < 2**30 else None
    return None


def pass_on(model: ir.Model) -> None:
    """Let moves of dequantized values move integers, in place; pairs that undo each other disappear."""
    changed = True
    while changed:
        changed = False
        for node in list(model.graph):
            if node.graph is None:
                continue
            rule = _RULES.get(node.op_type)
            changed = (rule is not None and rule(model.graph, node)) or changed


def _swap(graph: ir.Graph, node: ir.Node) -> bool:
    """move(dequantize(x)) -> dequantize(move(x))."""
    source = node.inputs[0]
    found = dequantized(source) if source is not None else None
    output = node.outputs[0]
    if found is None or output.is_graph_output() or any(o.name and o.uses() for o in node.outputs[1:]):
        return False
    maker = source.producer() if source is not None else None
    assert maker is not None
    moved = ir.Value(name=f"{output.name}_integers", type=found[0].type, shape=output.shape)
    attributes = list(node.attributes.values())
    twin = ir.Node(node.domain, node.op_type, [found[0], *node.inputs[1:]], attributes, outputs=[moved], name=node.name)
    real_again = ir.Value(name=f"{output.name}_real", type=output.type, shape=output.shape)
    back = ir.Node(
        maker.domain, maker.op_type, [moved, *maker.inputs[1:]], list(maker.attributes.values()), outputs=[real_again],
        name=f"{node.name}_dequantize",
    )  # fmt: skip
    graph.insert_after(node, [twin, back])
    output.replace_all_uses_with(real_again)
    graph.remove(node, safe=True)
    return True


def _cancel(graph: ir.Graph, node: ir.Node) -> bool:
    """quantize(dequantize(x)) on one grid -> x."""
    source, output = node.inputs[0], node.outputs[0]
    found = dequantized(source) if source is not None else None
    if found is None or output.is_graph_output() or grid_of(node) != found[1]:
        return False
    output.replace_all_uses_with(found[0])
    graph.remove(node, safe=True)
    return True


def _concatenate(graph: ir.Graph, node: ir.Node) -> bool:
    """quantize(concat(dequantize(a), ...)) -> concat(quantize(dequantize(a)), ...)."""
    output = node.outputs[0]
    users = [user for user, _ in output.uses()]
    if len(users) != 1 or output.is_graph_output():
        return False
    quantize = users[0]
    grid = grid_of(quantize)
    sources = [value for value in node.inputs if value is not None]
    if grid is None or quantize.op_type != "QuantizeLinear" or not all(dequantized(value) for value in sources):
        return False
    final = quantize.outputs[0]
    parts: list[ir.Value] = []
    for i, value in enumerate(sources):
        part = ir.Value(name=f"{output.name}_part{i}", type=final.type, shape=value.shape)
        attributes = list(quantize.attributes.values())
        rounded = ir.Node(
            quantize.domain, quantize.op_type, [value, *quantize.inputs[1:]], attributes, outputs=[part],
            name=f"{node.name}_quantize{i}",
        )  # fmt: skip
        graph.insert_before(node, rounded)
        parts.append(part)
    joined = ir.Value(name=f"{output.name}_integers", type=final.type, shape=output.shape)
    twin = ir.Node(node.domain, node.op_type, parts, list(node.attributes.values()), outputs=[joined], name=node.name)
    graph.insert_after(quantize, twin)
    final.replace_all_uses_with(joined, replace_graph_outputs=True)
    if static_shape(joined) is None:
        joined.shape = output.shape
    graph.remove([quantize, node], safe=True)
    return True


_RULES: Mapping[str, Callable[[ir.Graph, ir.Node], bool]] = {
    **dict.fromkeys(_MOVES, _swap),
    "Concat": _concatenate,
    "QuantizeLinear": _cancel,
}
