"""Operators that a few others express; each rule keeps the values.

operator                    becomes
ConvTranspose               Conv, and for strides a move of its channels in between the pixels
Einsum                      ReduceSum, Transpose, Reshape, MatMul
GroupNormalization          arithmetic on means
InstanceNormalization       arithmetic on means
LpNormalization             Div by ReduceL1, ReduceL2
LRN                         AveragePool over channels, arithmetic
MeanVarianceNormalization   arithmetic on means
OneHot                      Equal, Where
ReduceLogSumExp             arithmetic on ReduceMax, ReduceSum
Trilu                       Where with a constant
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt_backends._builder import Builder
from graphopt_backends._einsum import einsum
from graphopt_backends._fold import is_constant, static_shape
from graphopt_backends._transposed import transposed_convolution

__all__ = ["RULES"]


def _normalized(
    make: Builder, value: ir.Value | None, axes: Sequence[int], epsilon: float, dtype: np.dtype
) -> tuple[ir.Value, ir.Value]:
    """What remains of a value without its mean, and its standard deviation, along axes.

    The mean is taken away twice, so that each difference stands in the arithmetic that reads it.
    """
    mean = make.reduce("ReduceMean", value, axes)
    centred, again = make("Sub", [value, mean]), make("Sub", [value, mean])
    variance = make.reduce("ReduceMean", make("Mul", [centred, centred]), axes)
    return again, make("Sqrt", [make("Add", [variance, make.array(np.array(epsilon, dtype))])])


def _instance_norm(graph: ir.Graph, node: ir.Node) -> bool:
    shape, dtype = static_shape(node.inputs[0]), _float_type(node)
    if shape is None or dtype is None or len(shape) < 3:
        return False
    make, channels = Builder(graph, node), [1, shape[1], *(1 for _ in shape[2:])]
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    centred, deviation = _normalized(make, node.inputs[0], range(2, len(shape)), epsilon, dtype)
    scale, shift = (make("Reshape", [value, make.ints(channels)]) for value in node.inputs[1:3])
    make.finish("Add", [make("Mul", [centred, make("Div", [scale, deviation])]), shift], node.outputs[0])
    return True


def _group_norm(graph: ir.Graph, node: ir.Node) -> bool:
    shape, dtype, scales = static_shape(node.inputs[0]), _float_type(node), static_shape(node.inputs[1])
    groups = node.attributes.get_int("num_groups", 0)
    if shape is None or dtype is None or scales is None or len(shape) < 3:
        return False
    make, spatial = Builder(graph, node), shape[2:]
    split = [shape[0], groups, shape[1] // groups, *spatial]
    own = [1, groups, scales[0] // groups, *(1 for _ in spatial)]
    data = make("Reshape", [node.inputs[0], make.ints(split)])
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    centred, deviation = _normalized(make, data, range(2, len(split)), epsilon, dtype)
    scale, shift = (make("Reshape", [value, make.ints(own)]) for value in node.inputs[1:3])
    whole = make("Add", [make("Mul", [centred, make("Div", [scale, deviation])]), shift])
    make.finish("Reshape", [whole, make.ints(shape)], node.outputs[0])
    return True


def _mean_variance_norm(graph: ir.Graph, node: ir.Node) -> bool:
    dtype = _float_type(node)
    if dtype is None:
        return False
    make, axes = Builder(graph, node), node.attributes.get_ints("axes") or (0, 2, 3)
    centred, deviation = _normalized(make, node.inputs[0], axes, 0.0, dtype)
    make.finish("Div", [centred, make("Add", [deviation, make.array(np.array(1e-9, dtype))])], node.outputs[0])
    return True


def _lp_norm(graph: ir.Graph, node: ir.Node) -> bool:
    make, axis = Builder(graph, node), node.attributes.get_int("axis", -1)
    norm = make.reduce(f"ReduceL{node.attributes.get_int('p', 2)}", node.inputs[0], [axis])
    make.finish("Div", [node.inputs[0], norm], node.outputs[0])
    return True


def _local_response_norm(graph: ir.Graph, node: ir.Node) -> bool:
    """X / (bias + alpha / size * sum of squares of neighbouring channels) ^ beta."""
    shape, dtype, size = static_shape(node.inputs[0]), _float_type(node), node.attributes.get_int("size", 1)
    if shape is None or dtype is None:
        return False
    make, value = Builder(graph, node), node.inputs[0]

    def number(name: str, usual: float) -> ir.Value:
        return make.array(np.array(node.attributes.get_float(name, usual), dtype))

    flat = make.ints([shape[0], 1, shape[1], int(np.prod(shape[2:]))])
    squares = make("Reshape", [make("Mul", [value, value]), flat])
    before = (size - 1) // 2
    mean = make(
        "AveragePool", [squares], kernel_shape=[size, 1], pads=[before, 0, size - 1 - before, 0], count_include_pad=1
    )
    scaled = make("Mul", [make("Reshape", [mean, make.ints(shape)]), number("alpha", 1e-4)])
    grown = make("Pow", [make("Add", [scaled, number("bias", 1.0)]), number("beta", 0.75)])
    make.finish("Div", [value, grown], node.outputs[0])
    return True


def _one_hot(graph: ir.Graph, node: ir.Node) -> bool:
    shape, values = static_shape(node.outputs[0]), node.inputs[2]
    indices = node.inputs[0]
    if shape is None or values is None or indices is None or indices.dtype != ir.DataType.INT64:
        return False
    axis = node.attributes.get_int("axis", -1) % len(shape)
    depth = shape[axis]
    make = Builder(graph, node)
    off, on = make.split(values, 2, 0, 1)
    zero, wide = make.array(np.array(0, np.int64)), make.array(np.array(depth, np.int64))
    inside = make("Where", [make("Less", [indices, zero]), make("Add", [indices, wide]), indices])
    numbers = np.arange(depth).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    hits = make("Equal", [make("Unsqueeze", [inside, make.ints([axis])]), make.array(numbers.astype(np.int64))])
    make.finish("Where", [hits, on, off], node.outputs[0])
    return True


def _log_sum_exp(graph: ir.Graph, node: ir.Node) -> bool:
    """Of what is left without the greatest element, which is added again."""
    shape = static_shape(node.outputs[0])
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    source = static_shape(node.inputs[0])
    if shape is None or source is None or (axes is not None and not is_constant(axes)):
        return False
    given = list(node.attributes.get_ints("axes") or ())
    if axes is not None and axes.const_value is not None:
        given = [int(i) for i in axes.const_value.numpy().reshape(-1)]
    if not given:
        if node.attributes.get_int("noop_with_empty_axes", 0):
            return False
        given = list(range(len(source)))
    make = Builder(graph, node)
    most = make.reduce("ReduceMax", node.inputs[0], given)
    total = make.reduce("ReduceSum", make("Exp", [make("Sub", [node.inputs[0], most])]), given)
    whole = make("Add", [make("Log", [total]), most])
    make.finish("Reshape", [whole, make.ints(shape)], node.outputs[0])
    return True


def _triangle(graph: ir.Graph, node: ir.Node) -> bool:
    shape, dtype = static_shape(node.inputs[0]), node.outputs[0].dtype
    shift = node.inputs[1] if len(node.inputs) > 1 else None
    if shape is None or dtype is None or (shift is not None and not is_constant(shift)):
        return False
    by = int(shift.const_value.numpy().reshape(-1)[0]) if shift is not None and shift.const_value is not None else 0
    upper = bool(node.attributes.get_int("upper", 1))
    ones = np.ones(shape[-2:], bool)
    make = Builder(graph, node)
    mask = make.array(np.triu(ones, by) if upper else np.tril(ones, by))
    make.finish("Where", [mask, node.inputs[0], make.array(np.zeros((), dtype.numpy()))], node.outputs[0])
    return True


def _float_type(node: ir.Node) -> np.dtype | None:
    dtype = node.outputs[0].dtype
    return np.dtype(dtype.numpy()) if dtype is not None and dtype.is_floating_point() else None


RULES: Mapping[str, Callable[[ir.Graph, ir.Node], bool]] = {
    "ConvTranspose": transposed_convolution,
    "Einsum": einsum,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LRN": _local_response_norm,
    "LpNormalization": _lp_norm,
    "MeanVarianceNormalization": _mean_variance_norm,
    "OneHot": _one_hot,
    "ReduceLogSumExp": _log_sum_exp,
    "Trilu": _triangle,
}
"""Rules by operator; each replaces a node and says whether it did."""
