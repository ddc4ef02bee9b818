"""Keys and values of blocks that are far away, each block as its mean."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.analyses.attention import AttentionBlock
from graphopt_passes.sparse_attention.bands import Bands
from graphopt_passes.sparse_attention.frame import Frame, block_queries
from graphopt_passes.sparse_attention.masks import least, masks_left, user_bias
from graphopt_passes.sparse_attention.writer import Writer

__all__ = ["Means", "far_bias", "pooled"]


@dataclass(frozen=True, eq=False)
class Means:
    """Blocks of keys as one key each.

    Attributes:
        keys: `[lead, 1, blocks, width]`, means of keys, those that a mask hides left out.
        values: The same of values.
        counts: `[..., 1, 1, blocks]`, logarithm of how many keys each stands for; added to scores, its weight is that
            of so many keys.
        count: `[1]`, number of blocks.
        kind: Element type of the scores.
    """

    keys: ir.Value
    values: ir.Value
    counts: ir.Value
    count: ir.Value
    kind: ir.DataType


def pooled(
    writer: Writer, block: AttentionBlock, key: ir.Value, value: ir.Value, bands: Bands, frame: Frame, axis: int
) -> Means | None:
    """Means of blocks; None where the band has none.

    Args:
        writer: Writes the nodes.
        block: The core; its masks depend on the key only.
        key: `[lead, length, width]`.
        value: As `key`.
        bands: Of the frame; knows the model's shapes.
        frame: Which queries meet which keys.
        axis: Of the length.
    """
    band, dtype = frame.band, block.score_type
    if band is None or not band.pooled:
        return None
    positions, inside = block_queries(writer, band.rows, frame.length)
    if band.leading:
        inside = writer.op("And", inside, writer.op("GreaterOrEqual", positions, writer.constant([band.leading])))
    last = writer.op("Sub", frame.length.value, writer.constant([1]))
    view = Frame(frame.length, None, frame.blocks, 1, band.rows, writer.unsqueezed(last, 1), positions, None)
    here = writer.op("Where", writer.unsqueezed(inside, 1), writer.number(1, dtype), writer.number(0, dtype))
    own = user_bias(writer, masks_left(block), bands.at(view), dtype)
    if own is not None:
        shown = writer.op("Exp", writer.op("Max", own, writer.number(least(dtype), dtype)))
        here = writer.op("Mul", here, shown)
    total = writer.op("ReduceSum", here, writer.constant([-1]), keepdims=1)  # [..., blocks, 1, 1]
    some = writer.op("Greater", total, writer.number(0, dtype))
    divisor = writer.op("Where", some, total, writer.number(1, dtype))
    shares = writer.op("Div", here, divisor)
    keys, values = (_mean(writer, each, shares, positions, axis) for each in (key, value))
    counts = writer.op("Where", some, writer.op("Log", divisor), writer.number(least(dtype), dtype))
    counts = writer.op("Squeeze", counts, writer.constant([-1, -2]))
    return Means(keys, values, writer.unsqueezed(counts, -2, -3), frame.blocks, dtype)


def far_bias(writer: Writer, far: Means, frame: Frame) -> ir.Value:
    """What the scores of means get: how many keys each stands for, and minus infinity where the block is near."""
    band = frame.band
    assert band is not None
    zero, one = (writer.constant(np.array(number, np.int64)) for number in (0, 1))
    number = writer.op("Range", zero, writer.op("Squeeze", far.count, writer.constant([0])), one)
    back = writer.op("Sub", writer.unsqueezed(number, 1, 2), number)  # [blocks, 1, blocks]: how far behind
    distance = back if band.causal else writer.op("Abs", back)
    is_far = writer.op("Greater", distance, writer.constant(np.array(1, np.int64)))
    outside = writer.op("Where", is_far, writer.number(0, far.kind), writer.number(-np.inf, far.kind))
    return writer.op("Add", far.counts, outside)


def _mean(writer: Writer, value: ir.Value, shares: ir.Value, positions: ir.Value, axis: int) -> ir.Value:
    """`[lead, 1, blocks, width]`."""
    rows = writer.op("Gather", value, positions, axis=axis)
    mean = writer.op("MatMul", shares, rows)
    return writer.unsqueezed(writer.op("Squeeze", mean, writer.constant([axis + 1])), axis)
