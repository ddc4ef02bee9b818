"""The blocks of a band one after another, in a Loop: scores of one block at a time are all that memory holds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from graphopt_passes.sparse_attention.frame import Frame
from graphopt_passes.sparse_attention.writer import Writer

__all__ = ["one_by_one"]


def one_by_one(
    writer: Writer, frame: Frame, step: Callable[[Writer, ir.Value, ir.Value], ir.Value], kind: ir.DataType, rank: int
) -> ir.Value:
    """`[..., blocks, rows, width]`, block by block.

    Args:
        writer: Writes the nodes.
        frame: Which queries meet which keys.
        step: Writes into the body what one block computes, `[..., rows, width]`, from positions of its queries and of
            its keys; the writer it is given knows the number of the block.
        kind: Element type of the result.
        rank: Of the result of one block.
    """
    number = ir.Value(name=writer.name("sparse_block"), type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
    going = ir.Value(name=writer.name("sparse_going"), type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    body = ir.Graph([number, going], [], nodes=[], name=writer.name("sparse_body"))
    inner = writer.inside(body, number)
    queries = inner.op("Gather", frame.queries, number, axis=0)
    keys = inner.op("Gather", frame.keys, number, axis=0)
    goes_on, found = inner.op("Identity", going), step(inner, queries, keys)
    goes_on.type, goes_on.shape = going.type, ir.Shape([])
    found.type, found.shape = ir.TensorType(kind), ir.Shape([None] * rank)
    body.outputs.extend([goes_on, found])
    count = writer.op("Squeeze", frame.blocks, writer.constant([0]))
    stacked = writer.op("Loop", count, writer.constant(np.array(True)), body=body)
    return writer.transposed(stacked, [*range(1, rank - 1), 0, rank - 1, rank])
