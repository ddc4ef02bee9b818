"""Shapes of what operators make that ONNX's own shape inference knows nothing of: those of ONNX Runtime, mostly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

__all__ = ["is_known", "put_shapes"]

Shape = tuple[int, ...]
Shapes = Sequence[Shape | None]
Rule = Callable[[ir.Node, Sequence[Shape | None]], Shapes | None]


def is_known(node: ir.Node) -> bool:
    """True for operators of ONNX Runtime, and of newer operator sets than a graph's, that this module knows."""
    return node.op_type in (_KNOWN if node.domain == "com.microsoft" else _PLAIN)


def put_shapes(node: ir.Node, shapes: Sequence[Shape | None]) -> bool:
    """Give the outputs of a node the types and shapes that follow from its inputs; returns whether there were new ones.

    Args:
        node: Of an operator that `is_known`.
        shapes: Of its inputs, None where they are not fixed.
    """
    there = node.outputs[0].shape
    if not shapes or shapes[0] is None or (there is not None and there.is_static()):
        return False
    found = _KNOWN[node.op_type](node, shapes)
    if found is None:
        return False
    for output, shape in zip(node.outputs, found, strict=False):
        if shape is not None:
            output.shape = ir.Shape(shape)
            output.type = output.type or _TYPES.get(node.op_type, _same_type)(node, output)
    return True


def _same_type(node: ir.Node, _: ir.Value) -> ir.TypeProtocol | None:
    first = node.inputs[0]
    return None if first is None else first.type


def _embedded_type(node: ir.Node, output: ir.Value) -> ir.TypeProtocol | None:
    table = node.inputs[2]
    return ir.TensorType(ir.DataType.INT32) if output is node.outputs[1] or table is None else table.type


def _floats(_: ir.Node, __: ir.Value) -> ir.TypeProtocol:
    return ir.TensorType(ir.DataType.FLOAT)


_TYPES: Mapping[str, Callable[[ir.Node, ir.Value], ir.TypeProtocol | None]] = {
    "EmbedLayerNormalization": _embedded_type,
    "MatMulIntegerToFloat": _floats,
    "QAttention": _floats,
}


def _same(_: ir.Node, shapes: Sequence[Shape | None]) -> Shapes:
    return [shapes[0]]


def _with_sum(_: ir.Node, shapes: Sequence[Shape | None]) -> Shapes:
    return [shapes[0], None, None, shapes[0]]


def _embedded(_: ir.Node, shapes: Sequence[Shape | None]) -> Shapes | None:
    ids, table = shapes[0], shapes[2]
    if ids is None or table is None:
        return None
    return [(*ids, table[1]), ids[:1], (*ids, table[1])]


def _product(node: ir.Node, shapes: Sequence[Shape | None]) -> Shapes | None:
    left, right = shapes[:2]
    if left is None or right is None or min(len(left), len(right)) < 2 or node.attributes.get_int("transBatchA", 0):
        return None
    if node.attributes.get_int("transBatchB", 0):
        return None
    rows = left[-1 if node.attributes.get_int("transA", 0) else -2]
    columns = right[-2 if node.attributes.get_int("transB", 0) else -1]
    return [(*np.broadcast_shapes(left[:-2], right[:-2]), rows, columns)]


def _projected(node: ir.Node, shapes: Sequence[Shape | None]) -> Shapes | None:
    """Attention with the products that make queries, keys and values."""
    (batch, rows, _), weights = shapes[0] or (0, 0, 0), shapes[1]
    past = shapes[_PASTS[node.op_type]] if len(shapes) > _PASTS[node.op_type] else None
    if weights is None:
        return None
    heads = node.attributes.get_int("num_heads", 1)
    widths = node.attributes.get_ints("qkv_hidden_sizes") or [weights[1] // 3] * 3
    before = past[3] if past is not None else 0
    return [(batch, rows, widths[2]), (2, batch, heads, before + rows, widths[1] // heads)]


_PASTS: Mapping[str, int] = {"Attention": 4, "QAttention": 8}


def _many_heads(node: ir.Node, shapes: Sequence[Shape | None]) -> Shapes | None:
    query, key, value = (*shapes, None, None)[:3]
    if query is None or len(query) != 3 or key is None or value is None:
        return None
    heads = node.attributes.get_int("num_heads", 1)
    past = shapes[6] if len(shapes) > 6 else None
    keys, width = (key[1], value[-1] // heads) if len(key) == 3 else (key[2], value[-1])
    keys += past[2] if past is not None else 0
    batch, rows, size = query
    return [
        (batch, rows, width * heads), (batch, heads, keys, size // heads), (batch, heads, keys, width),
        (batch, heads, rows, keys),
    ]  # fmt: skip


def _grouped(node: ir.Node, shapes: Sequence[Shape | None]) -> Shapes | None:
    query, key = shapes[0], shapes[1]
    past = shapes[3]
    total = node.inputs[6].const_value if node.inputs[6] is not None else None
    if query is None or len(query) != 3 or total is None or (key is None and node.inputs[1] is not None):
        return None
    heads, groups = node.attributes.get_int("num_heads", 1), node.attributes.get_int("kv_num_heads", 1)
    width = query[2] // (heads if key is not None else heads + 2 * groups)
    rows = max(int(total.numpy().reshape(-1)[0]), past[2] if past is not None else 0)
    present = (query[0], groups, rows, width)
    return [(*query[:2], heads * width), present, present]


_PLAIN = frozenset({"Gelu", "GroupNormalization", "LayerNormalization", "SimplifiedLayerNormalization"})

_KNOWN: Mapping[str, Rule] = {
    **dict.fromkeys(
        (
            "BiasGelu", "FastGelu", "Gelu", "GroupNormalization", "LayerNormalization", "QuickGelu", "RotaryEmbedding",
            "SimplifiedLayerNormalization",
        ), _same,
    ),
    "Attention": _projected,
    "EmbedLayerNormalization": _embedded,
    "FusedMatMul": _product,
    "GroupQueryAttention": _grouped,
    "MatMulIntegerToFloat": _product,
    "MultiHeadAttention": _many_heads,
    "QAttention": _projected,
    "SkipLayerNormalization": _with_sum,
    "SkipSimplifiedLayerNormalization": _with_sum,
}  # fmt: skip
"""Rules by operator: shapes of the outputs of a node from those of its inputs."""
