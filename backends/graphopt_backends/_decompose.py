"""Operators that a few others express; each rule keeps the values.

operator                    becomes
Attention                   products, masks, Softmax
ConvTranspose               Conv, and for strides a move of its channels in between the pixels
DepthToSpace, SpaceToDepth  Reshape, Transpose, Reshape
Einsum                      ReduceSum, Transpose, Reshape, MatMul
Gemm of computed matrices   Transpose, MatMul, Mul, Add
GroupNormalization          arithmetic on means
InstanceNormalization       arithmetic on means
LpNormalization             Div by ReduceL1, ReduceL2
LpPool                      AveragePool of powers
LRN                         AveragePool over channels, arithmetic
MatMul of a vector          MatMul, Reshape
MeanVarianceNormalization   arithmetic on means
OneHot                      Equal, Where
ReduceLogSumExp             arithmetic on ReduceMax, ReduceSum
RotaryEmbedding             arithmetic on halves of columns
Trilu                       Where with a constant
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt_backends._attention import attention
from graphopt_backends._builder import Builder
from graphopt_backends._contributed import root_mean_square
from graphopt_backends._einsum import einsum
from graphopt_backends._fold import is_constant, static_shape
from graphopt_backends._rotary import rotary
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


def _spread(graph: ir.Graph, node: ir.Node) -> bool:
    """Channels become blocks of pixels (DepthToSpace), or blocks channels."""
    source, result = static_shape(node.inputs[0]), static_shape(node.outputs[0])
    if source is None or result is None:
        return False
    block, make = node.attributes.get_int("blocksize", 1), Builder(graph, node)
    if node.op_type == "SpaceToDepth":
        batch, channels, height, width = source
        apart, perm = [batch, channels, height // block, block, width // block, block], [0, 3, 5, 1, 2, 4]
    else:
        batch, channels, height, width = result
        first = node.attributes.get_string("mode", "DCR") == "CRD"  # the channels that stay, before the blocks
        blocks = [channels, block, block] if first else [block, block, channels]
        apart = [batch, *blocks, source[2], source[3]]
        perm = [0, 1, 4, 2, 5, 3] if first else [0, 3, 4, 1, 5, 2]
    moved = make("Transpose", [make("Reshape", [node.inputs[0], make.ints(apart)])], perm=perm)
    make.finish("Reshape", [moved, make.ints(result)], node.outputs[0])
    return True


def _product_of_a_vector(graph: ir.Graph, node: ir.Node) -> bool:
    """A vector is a matrix of one row on the left, of one column on the right."""
    shapes, result = [static_shape(value) for value in node.inputs], static_shape(node.outputs[0])
    left, right = shapes
    if left is None or right is None or result is None or min(len(left), len(right)) > 1:
        return False
    make, (a, b) = Builder(graph, node), node.inputs
    if len(left) == 1:
        a = make("Reshape", [a, make.ints([1, *left])])
    if len(right) == 1:
        b = make("Reshape", [b, make.ints([*right, 1])])
    make.finish("Reshape", [make("MatMul", [a, b]), make.ints(result)], node.outputs[0])
    return True


def _product_and_sum(graph: ir.Graph, node: ir.Node) -> bool:
    """A Gemm whose second matrix is computed, or whose third operand is no constant row."""
    from graphopt_backends.network.integers import is_weight

    bias = node.inputs[2] if len(node.inputs) > 2 else None
    sizes, result, dtype = static_shape(bias), static_shape(node.outputs[0]), _float_type(node)
    row = bias is None or (is_weight(bias) and sizes is not None and math.prod(sizes) in (1, (result or (0, 0))[1]))
    row = row and (sizes is None or len(sizes) < 2 or sizes[0] == 1)
    weight = node.inputs[1]
    if weight is None or dtype is None or result is None or (row and _is_stored(weight)):
        return False
    make, attributes = Builder(graph, node), node.attributes

    def turned(value: ir.Value | None, name: str) -> ir.Value | None:
        return make("Transpose", [value], perm=[1, 0]) if attributes.get_int(name, 0) else value

    def scaled(value: ir.Value | None, name: str) -> ir.Value | None:
        factor = attributes.get_float(name, 1.0)
        return value if factor == 1.0 else make("Mul", [value, make.array(np.array(factor, dtype))])

    whole = scaled(make("MatMul", [turned(node.inputs[0], "transA"), turned(weight, "transB")]), "alpha")
    if bias is None or attributes.get_float("beta", 1.0) == 0:
        make.finish("Identity", [whole], node.outputs[0])
    else:
        make.finish("Add", [whole, scaled(bias, "beta")], node.outputs[0])
    return True


def _is_stored(value: ir.Value) -> bool:
    """A constant, or what is made of constant integers, in blocks too."""
    maker = value.producer()
    stored = maker is not None and maker.op_type == "DequantizeLinear" and is_constant(maker.inputs[0])
    return stored or is_constant(value)


def _power_pool(graph: ir.Graph, node: ir.Node) -> bool:
    """The root of a sum of powers, which is a mean times the taps; a border adds nothing."""
    kernel, dtype = node.attributes.get_ints("kernel_shape") or (), _float_type(node)
    dilated = any(step != 1 for step in node.attributes.get_ints("dilations") or ())
    if dtype is None or dilated or node.attributes.get_int("ceil_mode", 0):
        return False
    power, make = node.attributes.get_int("p", 2), Builder(graph, node)
    window = {name: node.attributes[name].value for name in ("kernel_shape", "pads", "strides", "auto_pad")
              if name in node.attributes}  # fmt: skip
    size = make("Abs", [node.inputs[0]])
    mean = make("AveragePool", [make("Pow", [size, make.array(np.array(power, dtype))])], count_include_pad=1, **window)
    total = make("Mul", [mean, make.array(np.array(math.prod(kernel), dtype))])
    make.finish("Pow", [total, make.array(np.array(1 / power, dtype))], node.outputs[0])
    return True


def _float_type(node: ir.Node) -> np.dtype | None:
    dtype = node.outputs[0].dtype
    return np.dtype(dtype.numpy()) if dtype is not None and dtype.is_floating_point() else None


RULES: Mapping[str, Callable[[ir.Graph, ir.Node], bool]] = {
    "Attention": attention,
    "ConvTranspose": transposed_convolution,
    "DepthToSpace": _spread,
    "Einsum": einsum,
    "Gemm": _product_and_sum,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LRN": _local_response_norm,
    "LpNormalization": _lp_norm,
    "LpPool": _power_pool,
    "MatMul": _product_of_a_vector,
    "MeanVarianceNormalization": _mean_variance_norm,
    "OneHot": _one_hot,
    "ReduceLogSumExp": _log_sum_exp,
    "SpaceToDepth": _spread,
    "RotaryEmbedding": rotary,
    "SimplifiedLayerNormalization": root_mean_square,
    "Trilu": _triangle,
}
"""Rules by operator; each replaces a node and says whether it did."""
