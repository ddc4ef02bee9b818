"""Operators of ONNX Runtime's transformer optimizer as those of ONNX; each rule keeps the values.

operator                             becomes
Attention, MultiHeadAttention, ...   see `_attention.py`, `_grouped.py`
BiasGelu, FastGelu, QuickGelu        arithmetic
EmbedLayerNormalization              Gather, Add, LayerNormalization
FusedMatMul                          Transpose, MatMul, Mul
MatMulIntegerToFloat                 MatMulInteger, Cast, Mul, Add
QAttention                           the product of integers, then Attention
RotaryEmbedding                      see `_rotary.py`
SimplifiedLayerNormalization         arithmetic, which is one kernel again
SkipLayerNormalization, ...          Add, then the normalization
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from graphopt_backends._attention import (
    divide,
    float_type,
    given,
    is_divisible,
    is_wanted,
    many_heads,
    projected,
)
from graphopt_backends._builder import Builder
from graphopt_backends._fold import static_shape
from graphopt_backends._grouped import grouped
from graphopt_backends._rotary import contributed_rotary

__all__ = ["CONTRIBUTED", "root_mean_square"]


def _quick_gelu(graph: ir.Graph, node: ir.Node) -> bool:
    dtype, source = float_type(node.inputs[0]), node.inputs[0]
    if dtype is None:
        return False
    make = Builder(graph, node)
    alpha = make.array(np.array(node.attributes.get_float("alpha", 1.702), dtype))
    make.finish("Mul", [source, make("Sigmoid", [make("Mul", [source, alpha])])], node.outputs[0])
    return True


def _normal(make: Builder, node: ir.Node, value: ir.Value, gain: ir.Value | None, shift: ir.Value | None) -> ir.Value:
    """The layer normalization of a value, or where the operator says so, without means."""
    epsilon = node.attributes.get_float("epsilon", 1e-12)
    if "Simplified" not in node.op_type:
        return make("LayerNormalization", [value, gain, shift] if shift else [value, gain], axis=-1, epsilon=epsilon)
    dtype = float_type(value) or float_type(node.inputs[0])
    return _over_root(make, value, gain, [-1], np.array(node.attributes.get_float("epsilon", 1e-5), dtype))


def _over_root(make: Builder, value: ir.Value, gain: ir.Value | None, axes: list[int], epsilon: np.ndarray) -> ir.Value:
    mean = make.reduce("ReduceMean", make("Mul", [value, value]), axes)
    root = make("Sqrt", [make("Add", [mean, make.array(epsilon)])])
    return make("Mul", [make("Div", [value, root]), gain])


def root_mean_square(graph: ir.Graph, node: ir.Node) -> bool:
    """SimplifiedLayerNormalization: a value over the root of the mean of its squares."""
    source, shape, dtype = node.inputs[0], static_shape(node.inputs[0]), float_type(node.inputs[0])
    if source is None or shape is None or dtype is None or is_wanted(node, 1):
        return False
    make, first = Builder(graph, node), node.attributes.get_int("axis", -1) % len(shape)
    epsilon = np.array(node.attributes.get_float("epsilon", 1e-5), dtype)
    make.give([_over_root(make, source, node.inputs[1], list(range(first, len(shape))), epsilon)])
    return True


def _skip(graph: ir.Graph, node: ir.Node) -> bool:
    """The sum of two values and perhaps a bias, normalized; the sum may be read too."""
    simplified = "Simplified" in node.op_type
    if is_wanted(node, 1) or is_wanted(node, 2) or float_type(node.inputs[0]) is None:
        return False
    make, bias = Builder(graph, node), given(node, 3 if simplified else 4)
    total = make("Add", [node.inputs[0], node.inputs[1]])
    if bias is not None:
        total = make("Add", [total, bias])
    normal = _normal(make, node, total, node.inputs[2], None if simplified else given(node, 3))
    make.give([normal, None, None, total])
    return True


def _embed(graph: ir.Graph, node: ir.Node) -> bool:
    """Sums of rows of tables for words, positions and segments, normalized; how many words the mask lets count."""
    words, size, mask = node.inputs[0], static_shape(node.inputs[0]), given(node, 7)
    if words is None or size is None or float_type(node.inputs[2]) is None:
        return False
    make, positions = Builder(graph, node), given(node, 8)
    found = make("Gather", [node.inputs[2], words], axis=0)
    numbers = positions if positions is not None else make.ints(np.arange(size[1])[None])
    found = make("Add", [found, make("Gather", [node.inputs[3], numbers], axis=0)])
    segments, table = given(node, 1), given(node, 4)
    if segments is not None and table is not None:
        found = make("Add", [found, make("Gather", [table, segments], axis=0)])
    counts: ir.Value | None = None
    if is_wanted(node, 1) and mask is None:
        counts = make.array(np.zeros(size[0], np.int32))
    elif is_wanted(node, 1):
        ones = make("Cast", [make("Equal", [mask, make.array(np.array(1, np.int32))])], to=ir.DataType.INT32)
        counts = make("ReduceSum", [ones, make.ints([1])], keepdims=0)
    make.give([_normal(make, node, found, node.inputs[5], given(node, 6)), counts, found])
    return True


def _fused_product(graph: ir.Graph, node: ir.Node) -> bool:
    left, right, attributes = node.inputs[0], node.inputs[1], node.attributes
    ranks, dtype = [len(static_shape(side) or ()) for side in (left, right)], float_type(left)
    if min(ranks) < 2 or dtype is None or any(attributes.get_int(f"transBatch{side}", 0) for side in "AB"):
        return False
    make, sides = Builder(graph, node), list[ir.Value | None]()
    for side, rank, name in zip((left, right), ranks, "AB", strict=True):
        order = [*range(rank - 2), rank - 1, rank - 2]
        sides.append(make("Transpose", [side], perm=order) if attributes.get_int(f"trans{name}", 0) else side)
    alpha = attributes.get_float("alpha", 1.0)
    product = make("MatMul", sides)
    make.give([product if alpha == 1.0 else make("Mul", [product, make.array(np.array(alpha, dtype))])])
    return True


def _real_product(graph: ir.Graph, node: ir.Node) -> bool:
    """MatMulIntegerToFloat."""
    if not _is_uniform(node, 2, 4):
        return False
    make, bias = Builder(graph, node), given(node, 6)
    product = _integer_product(make, node, (2, 4), (3, 5))
    make.give([product if bias is None else make("Add", [product, bias])])
    return True


def _integer_attention(graph: ir.Graph, node: ir.Node) -> bool:
    """QAttention: the product that makes queries, keys and values is one of integers."""
    size, weight = static_shape(node.inputs[0]), static_shape(node.inputs[1])
    if size is None or weight is None or not is_divisible(node, size) or not _is_uniform(node, 3, 6):
        return False
    make = Builder(graph, node)
    whole = make("Add", [_integer_product(make, node, (3, 6), (4, 7)), node.inputs[2]])
    divide(make, node, whole, size, [weight[1] // 3] * 3, np.dtype(np.float32))
    return True


def _is_uniform(node: ir.Node, scale: int, zero: int) -> bool:
    """The first matrix has one scale and one zero point."""
    return all(value is None or static_shape(value) in ((), (1,)) for value in (given(node, scale), given(node, zero)))


def _integer_product(make: Builder, node: ir.Node, left: tuple[int, int], right: tuple[int, int]) -> ir.Value:
    """The product of the first two inputs, whose scales and zero points are those with such numbers."""
    zeros = [given(node, side[1]) for side in (left, right)]
    total = make("MatMulInteger", [*node.inputs[:2], *zeros])
    steps = make("Mul", [given(node, left[0]), given(node, right[0])])
    return make("Mul", [make("Cast", [total], to=ir.DataType.FLOAT), steps])


CONTRIBUTED: Mapping[str, Callable[[ir.Graph, ir.Node], bool]] = {
    "Attention": projected,
    "EmbedLayerNormalization": _embed,
    "FusedMatMul": _fused_product,
    "GroupQueryAttention": grouped,
    "MatMulIntegerToFloat": _real_product,
    "MultiHeadAttention": many_heads,
    "QAttention": _integer_attention,
    "QuickGelu": _quick_gelu,
    "RotaryEmbedding": contributed_rotary,
    "SimplifiedLayerNormalization": root_mean_square,
    "SkipLayerNormalization": _skip,
    "SkipSimplifiedLayerNormalization": _skip,
}
"""Rules by operator; each replaces a node and says whether it did."""
