"""Positions of queries and of the keys that they meet, computed by the graph from the length of the sequence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt_passes.sparse_attention._patterns import Band
from graphopt_passes.sparse_attention._runs import in_runs
from graphopt_passes.sparse_attention.writer import Writer

__all__ = ["Frame", "Length", "Runs", "band_frame", "block_queries", "dense_frame", "leading_frame"]


@dataclass(frozen=True)
class Length:
    """How long the sequence is.

    Attributes:
        value: `[1]`, where the graph says it.
        size: The number, or the name of the dimension; None where neither is known.
    """

    value: ir.Value
    size: int | str | None


@dataclass(frozen=True, eq=False)
class Runs:
    """Keys of blocks as runs of neighbours.

    Attributes:
        size: Keys in a run.
        places: `[runs * size]`, positions of the keys of all runs, clipped as `Frame.keys` are.
        numbers: `[blocks, columns / size]`, the runs that a block meets.
    """

    size: int
    places: ir.Value
    numbers: ir.Value


@dataclass(frozen=True, eq=False)
class Frame:
    """`blocks` blocks of `rows` queries, each of which meets `columns` keys.

    Attributes:
        length: Of the sequence.
        band: What the blocks are made by; None: one block of queries, which meets all keys.
        blocks: `[1]`, number of blocks.
        rows: Queries in a block: a number, or `[1]`.
        columns: Keys that a block meets: a number, or `[1]`.
        queries: `[blocks, rows]`, positions; behind the end of the sequence the last one is repeated.
        keys: `[blocks, columns]`, positions; before the start and behind the end the first and last are repeated.
        seen: Boolean, broadcasts to `[blocks, rows, columns]`; None: all.
        runs: The same keys as runs; None: they are met one by one.
    """

    length: Length
    band: Band | None
    blocks: ir.Value
    rows: int | ir.Value
    columns: int | ir.Value
    queries: ir.Value
    keys: ir.Value
    seen: ir.Value | None
    runs: Runs | None = None


def band_frame(writer: Writer, band: Band, length: Length) -> Frame:
    """The blocks of a band, which gets whole runs of keys where that costs little."""
    band, size = in_runs(band)
    n, rows = length.value, band.rows
    last = writer.op("Sub", n, writer.constant([1]))
    blocks, starts = _starts(writer, n, rows)
    query = _offset(writer, starts, np.arange(rows))
    key = _offset(writer, starts, band.offsets)
    inside = writer.op("And", _at_least(writer, key, band.leading), _below(writer, key, n))
    seen = band.seen
    if band.leading:
        table = writer.constant(np.arange(band.leading)[None])
        shape = writer.op("Concat", blocks, writer.constant([band.leading]), axis=0)
        first = writer.op("Expand", table, shape)
        key = writer.op("Concat", first, key, axis=1)
        inside = writer.op("Concat", _below(writer, first, n), inside, axis=1)
        seen = np.concatenate([np.ones((rows, band.leading), bool), seen], axis=1)
    allowed = writer.op("And", writer.unsqueezed(inside, 1), writer.constant(seen))
    if band.leading and band.causal:
        earlier = writer.op("GreaterOrEqual", writer.unsqueezed(query, 2), writer.unsqueezed(key, 1))
        allowed = writer.op("And", allowed, earlier)
    runs = None if size == 1 else _runs(writer, band, size, blocks, last)
    query, key = writer.op("Min", query, last), _clipped(writer, key, last)
    return Frame(length, band, blocks, rows, band.columns, query, key, allowed, runs)


def _runs(writer: Writer, band: Band, size: int, blocks: ir.Value, last: ir.Value) -> Runs:
    step, each = band.rows // size, band.columns // size
    count = writer.op("Add", writer.op("Mul", blocks, writer.constant([step])), writer.constant([each - step]))
    key = writer.op(
        "Add", _range(writer, writer.op("Mul", count, writer.constant([size]))), writer.constant([int(band.offsets[0])])
    )
    starts = writer.unsqueezed(writer.op("Mul", _range(writer, blocks), writer.constant([step])), 1)
    return Runs(size, _clipped(writer, key, last), _offset(writer, starts, np.arange(each)))


def _clipped(writer: Writer, key: ir.Value, last: ir.Value) -> ir.Value:
    return writer.op("Min", writer.op("Max", key, writer.constant([0])), last)


def leading_frame(writer: Writer, leading: int, length: Length) -> Frame:
    """The leading queries, which meet all keys."""
    n = length.value
    keys = writer.unsqueezed(_range(writer, n), 0)
    last = writer.op("Sub", n, writer.constant([1]))
    queries = writer.op("Min", writer.constant(np.arange(leading)[None]), last)
    return Frame(length, None, writer.constant([1]), leading, n, queries, keys, None)


def dense_frame(writer: Writer, length: Length, *, causal: bool) -> Frame:
    """One block of all queries, which meets all keys."""
    n = length.value
    places = writer.unsqueezed(_range(writer, n), 0)
    seen = None
    if causal:
        seen = writer.op("GreaterOrEqual", writer.unsqueezed(places, 2), writer.unsqueezed(places, 1))
    return Frame(length, None, writer.constant([1]), n, n, places, places, seen)


def block_queries(writer: Writer, rows: int, length: Length) -> tuple[ir.Value, ir.Value]:
    """Positions in blocks, the last one repeated behind the end, and whether they lie within the sequence."""
    position = _offset(writer, _starts(writer, length.value, rows)[1], np.arange(rows))
    last = writer.op("Sub", length.value, writer.constant([1]))
    return writer.op("Min", position, last), _below(writer, position, length.value)


def _starts(writer: Writer, n: ir.Value, rows: int) -> tuple[ir.Value, ir.Value]:
    """`[1]`, number of blocks; `[blocks, 1]`, where each begins."""
    size = writer.constant([rows])
    blocks = writer.op("Div", writer.op("Add", n, writer.constant([rows - 1])), size)
    return blocks, writer.unsqueezed(writer.op("Mul", _range(writer, blocks), size), 1)


def _offset(writer: Writer, starts: ir.Value, offsets: np.ndarray) -> ir.Value:
    """`[blocks, offsets]`. With offsets as a vector, onnx' propagation of data takes `starts` for one too and fails."""
    return writer.op("Add", starts, writer.constant(offsets.astype(np.int64)[None]))


def _range(writer: Writer, count: ir.Value) -> ir.Value:
    zero, one = (writer.constant(np.array(number, np.int64)) for number in (0, 1))
    return writer.op("Range", zero, writer.op("Squeeze", count, writer.constant([0])), one)


def _at_least(writer: Writer, value: ir.Value, bound: int) -> ir.Value:
    return writer.op("GreaterOrEqual", value, writer.constant([bound]))


def _below(writer: Writer, value: ir.Value, bound: ir.Value) -> ir.Value:
    return writer.op("Less", value, bound)
