"""Masks that operators of ONNX Runtime take, spelled out."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.analyses.shapes import Shapes
from graphopt_passes.sparse_attention.writer import Writer

__all__ = ["hidden", "later", "mask_of", "why_no_mask"]

_EMBEDDINGS = ("EmbedLayerNormalization", "QEmbedLayerNormalization")
_MASKS = {"Attention": 3, "MultiHeadAttention": 4, "QAttention": 5}
_LENGTHS, _KEYS, _QUERIES_AND_KEYS = 1, 2, 3  # ranks


def mask_of(node: ir.Node) -> ir.Value | None:
    """The mask of samples and keys that an operator of ONNX Runtime reads."""
    index = _MASKS.get(node.op_type) if node.domain else None
    return None if index is None or index >= len(node.inputs) else node.inputs[index]


def why_no_mask(node: ir.Node, shapes: Shapes) -> str:
    """Why it cannot be said what the mask of an operator of ONNX Runtime hides; empty if it can."""
    mask = mask_of(node)
    if mask is None:
        return ""
    rank = _rank(mask, shapes)
    if rank not in (_LENGTHS, _KEYS, _QUERIES_AND_KEYS):
        return f"the rank of its mask {mask.name!r} is {rank or 'not known'}"
    if rank == _LENGTHS and not _numbers_a_sample(node, mask, shapes):
        return f"nothing shows how many numbers of its mask {mask.name!r} belong to a sample"
    return ""


def _rank(mask: ir.Value, shapes: Shapes) -> int | None:
    return _LENGTHS if _is_embedded(mask) else shapes.rank(mask)


def _is_embedded(mask: ir.Value) -> bool:
    """Whether an embedding of ONNX Runtime made a mask of its own: of each sample where its keys end."""
    node = mask.producer()
    return node is not None and node.op_type in _EMBEDDINGS and mask is node.outputs[1]


def _numbers_a_sample(node: ir.Node, mask: ir.Value, shapes: Shapes) -> int:
    """1: where its keys end. 2: where those of all end, then where they begin. 3: first where they end. 0: unknown."""
    if _is_embedded(mask):
        return 1
    size, samples = (shapes.of(mask) or (None,))[0], (shapes.of(node.inputs[0]) or (None,))[0]
    if size is None or samples is None:
        return 0
    if size == samples:
        return 1
    if isinstance(size, int) and isinstance(samples, int):
        return {2 * samples: 2, 3 * samples + 2: 3}.get(size, 0)
    return 0


def hidden(
    writer: Writer, node: ir.Node, key: ir.Value, shapes: Shapes, fill: float, kind: ir.DataType
) -> ir.Value | None:
    """What is added to scores: 0 where the mask shows a key, else `fill`; None without a mask.

    Args:
        writer: Writes the nodes.
        node: The operator; its mask is of samples, of samples and keys, or of samples, queries and keys.
        key: `[batch, heads, keys, width]`.
        shapes: Of the model.
        fill: What hides a key.
        kind: Element type of the scores.
    """
    mask = mask_of(node)
    if mask is None:
        return None
    rank, integer = _rank(mask, shapes), shapes.dtype(mask) or ir.DataType.INT32
    if rank == _LENGTHS:
        numbers = _numbers_a_sample(node, mask, shapes)
        if shapes.rank(mask) is None:  # a type and a rank for whoever infers them
            mask = writer.reshaped(writer.op("Cast", mask, to=int(integer)), [-1])
        shown = _within(writer, mask, numbers, key, integer)
    else:
        shown = writer.op("Greater", mask, writer.number(0, integer))
    shown = writer.unsqueezed(shown, 1) if rank == _QUERIES_AND_KEYS else writer.unsqueezed(shown, 1, 2)
    return writer.op("Where", shown, writer.number(0, kind), writer.number(fill, kind))


def later(writer: Writer, key: ir.Value, kind: ir.DataType) -> ir.Value:
    """`[1, 1, length, length]`, minus infinity where a key comes after a query.

    Args:
        writer: Writes the nodes.
        key: `[batch, heads, length, width]`.
        kind: Element type of the scores.
    """
    places = _places(writer, key)
    order = writer.op("LessOrEqual", writer.unsqueezed(places, 0, 1, 2), writer.unsqueezed(places, 0, 1, 3))
    return writer.op("Where", order, writer.number(0, kind), writer.number(-np.inf, kind))


def _within(writer: Writer, mask: ir.Value, numbers: int, key: ir.Value, integer: ir.DataType) -> ir.Value:
    """`[batch, keys]`: whether keys lie ahead of the end, and not ahead of the beginning where the mask has one."""
    places, batch = writer.op("Cast", _places(writer, key), to=int(integer)), writer.size(key, 0)
    shown = writer.op("Less", places, writer.unsqueezed(writer.part(mask, 0, 0, batch), 1))
    if numbers != 2:
        return shown
    starts = writer.part(mask, 0, batch, writer.op("Mul", batch, writer.constant([2])))
    return writer.op("And", shown, writer.op("GreaterOrEqual", places, writer.unsqueezed(starts, 1)))


def _places(writer: Writer, key: ir.Value) -> ir.Value:
    """`[length]`, positions."""
    zero, one = (writer.constant(np.array(number, np.int64)) for number in (0, 1))
    return writer.op("Range", zero, writer.op("Squeeze", writer.size(key, 2), writer.constant([0])), one)
