"""Attention on a band, in standard operators: time and memory grow with the length, not with its square.

Queries are cut into blocks, and the keys that a block meets are gathered beside it, in runs of neighbours where it can
be (Longformer, Beltagy et al. 2020, keeps them in overlapping blocks). Then two products of small matrices, with a
softmax between, do all blocks:

    [..., blocks, rows, width] x [..., blocks, width, columns] -> softmax -> x [..., blocks, columns, width]
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.analyses.attention import AttentionBlock, Axes, Axis
from graphopt.analyses.shapes import Shapes
from graphopt_passes.sparse_attention.axes import Sizes, arranged, atoms
from graphopt_passes.sparse_attention.bands import Bands
from graphopt_passes.sparse_attention.frame import Frame
from graphopt_passes.sparse_attention.looped import one_by_one
from graphopt_passes.sparse_attention.masks import Bias, band_bias
from graphopt_passes.sparse_attention.pooled import Means, far_bias, pooled
from graphopt_passes.sparse_attention.writer import Writer

__all__ = ["Core", "Operands", "operands", "to_output"]

_WIDER = (ir.DataType.FLOAT, ir.DataType.DOUBLE)


@dataclass(frozen=True, eq=False)
class Operands:
    """Queries, keys and values with their last axes length and width.

    Attributes:
        query: Not yet scaled.
        key: Its heads repeat along an axis of size 1 where there are fewer of them.
        value: As `key`.
        lead: What lies along the axes of `query` before those two.
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    lead: Axes


def operands(writer: Writer, block: AttentionBlock, length: ir.Value, shapes: Shapes) -> Operands:
    """Bring what enters a core into the order in which it is worked on."""
    score_lead = block.score_axes[:-2]
    grouped = block.kv_heads < block.heads
    heads: tuple[Axis, ...] = ("kv_head", "group") if grouped else ("head",)
    lead: Axes = tuple(atoms(score_lead, groups=heads)) if grouped else score_lead
    kv_lead: Axes = tuple("one" if axis == "group" else axis for axis in lead)
    kv_groups: tuple[Axis, ...] = ("kv_head",) if grouped else ("head",)
    sizes = Sizes(block.heads, block.kv_heads, length, block.width)
    kv_sizes = Sizes(block.kv_heads, block.kv_heads, length, block.width)
    value_sizes = Sizes(block.kv_heads, block.kv_heads, length, block.value_width)
    last: Axes = ("length", "width")
    query = arranged(writer, block.query, block.query_axes, (*lead, *last), sizes, heads)
    key = arranged(writer, block.key, block.key_axes, (*kv_lead, *last), kv_sizes, kv_groups)
    value = arranged(writer, block.value, block.value_axes, (*kv_lead, *last), value_sizes, kv_groups)
    if shapes.dtype(block.query) != block.score_type and block.score_type in _WIDER:
        query, key = (writer.op("Cast", each, to=int(block.score_type)) for each in (query, key))
    return Operands(query, key, value, lead)


def to_output(writer: Writer, block: AttentionBlock, value: ir.Value, lead: Axes, length: ir.Value) -> ir.Value:
    """Bring `[lead, length, width]` into the order of a core's output."""
    sizes = Sizes(block.heads, block.kv_heads, length, block.value_width)
    grouped = "group" in lead or "group" in block.output_axes
    groups: tuple[Axis, ...] = ("kv_head", "group") if grouped else ("head",)
    return arranged(writer, value, (*lead, "length", "width"), block.output_axes, sizes, groups)


class Core:
    """Writes one core on one band.

    Args:
        writer: Writes the nodes.
        block: The core.
        shapes: Of the model.
        loop: One block after another.
    """

    def __init__(self, writer: Writer, block: AttentionBlock, shapes: Shapes, *, loop: bool = False) -> None:
        self._writer = writer
        self._block = block
        self._shapes = shapes
        self._loop = loop

    def attend(self, given: Operands, frame: Frame, bands: Bands) -> ir.Value:
        """`[lead, rows of all blocks, width]`, cut to the length of the sequence.

        Args:
            given: Queries, keys and values.
            frame: Which queries meet which keys.
            bands: Takes bands of masks for this frame.
        """
        if self._loop and frame.band is not None and not frame.band.pooled:
            return self._in_turns(given, frame, bands)
        writer, axis = self._writer, len(given.lead)
        query = self._scaled(writer.op("Gather", given.query, frame.queries, axis=axis))
        key = self._met(given.key, frame, axis, self._block.width)
        value = self._met(given.value, frame, axis, self._block.value_width)
        bias = band_bias(writer, self._block, bands, frame)
        rank = axis + 3
        scores = self._added(self._masked_form(self._product(query, key, rank), frame, frame.columns), bias.value)
        far = pooled(writer, self._block, given.key, given.value, bands, frame, axis)
        if far is not None:
            far_scores = self._masked_form(self._product(query, far.keys, rank), frame, far.count)
            scores = writer.op("Concat", scores, self._added(far_scores, far_bias(writer, far, frame)), axis=-1)
        weights = writer.op("Softmax", scores, axis=-1)
        result = self._weighted(weights, value, far, frame, given.lead)
        result = self._zeroed(result, bias, frame, given.lead)
        return self._joined(result, frame, given.lead)

    def _in_turns(self, given: Operands, frame: Frame, bands: Bands) -> ir.Value:
        """The same, one block after another."""
        axis, bias = len(given.lead), band_bias(self._writer, self._block, bands, frame)
        kind = self._shapes.dtype(self._block.value) or self._block.score_type

        def step(writer: Writer, queries: ir.Value, keys: ir.Value) -> ir.Value:
            inner = Core(writer, self._block, self._shapes)
            query = inner._scaled(writer.op("Gather", given.query, queries, axis=axis))
            key, value = (writer.op("Gather", each, keys, axis=axis) for each in (given.key, given.value))
            scores = inner._masked_form(inner._product(query, key, axis + 2), frame, frame.columns)
            if bias.value is not None:
                scores = writer.op("Add", scores, writer.op("Gather", bias.value, writer.turn, axis=-3))
            weights = writer.op("Softmax", scores, axis=-1)
            return inner._weighted(weights, value, None, frame, given.lead)

        result = one_by_one(self._writer, frame, step, kind, axis + 2)
        return self._joined(self._zeroed(result, bias, frame, given.lead), frame, given.lead)

    def _scaled(self, query: ir.Value) -> ir.Value:
        """Right before the product, into which runtimes take a constant factor."""
        writer, block, shapes = self._writer, self._block, self._shapes
        dtype = block.score_type if block.score_type in _WIDER else shapes.dtype(block.query) or block.score_type
        if isinstance(block.scale, ir.Value):
            scale = block.scale
            return writer.op(
                "Mul", query, scale if shapes.dtype(scale) == dtype else writer.op("Cast", scale, to=int(dtype))
            )
        return query if block.scale == 1 else writer.op("Mul", query, writer.number(block.scale, dtype))

    def _met(self, value: ir.Value, frame: Frame, axis: int, width: int) -> ir.Value:
        """`[..., blocks, columns, width]`: what blocks of queries meet."""
        writer, runs = self._writer, frame.runs
        if frame.band is None:
            return writer.unsqueezed(value, axis)
        if runs is None:
            return writer.op("Gather", value, frame.keys, axis=axis)
        lead = [0] * axis
        whole = writer.reshaped(writer.op("Gather", value, runs.places, axis=axis), [*lead, -1, runs.size * width])
        met = writer.op("Gather", whole, runs.numbers, axis=axis)
        return writer.reshaped(met, [*lead, -1, frame.band.columns, width])

    def _product(self, query: ir.Value, key: ir.Value, rank: int) -> ir.Value:
        """`[lead, blocks, rows, columns]`, in the type of the softmax, bounded where the model bounds them."""
        writer, block = self._writer, self._block
        turned = writer.transposed(key, [*range(rank - 2), rank - 1, rank - 2])
        scores = writer.op("MatMul", query, turned)
        if self._shapes.dtype(block.query) != block.score_type and block.score_type not in _WIDER:
            scores = writer.op("Cast", scores, to=int(block.score_type))
        if block.softcap:
            cap = writer.number(block.softcap, block.score_type)
            scores = writer.op("Mul", writer.op("Tanh", writer.op("Div", scores, cap)), cap)
        return scores

    def _masked_form(self, scores: ir.Value, frame: Frame, columns: int | ir.Value) -> ir.Value:
        """Scores with the axes that masks broadcast to."""
        return self._lead(scores, self._block.score_axes[:-2], frame, columns)

    def _lead(self, value: ir.Value, lead: Axes, frame: Frame, columns: int | ir.Value) -> ir.Value:
        """The same numbers with heads as one axis or as two."""
        if not self._split:
            return value
        block = self._block
        sizes = Sizes(block.heads, block.kv_heads, frame.length.value, block.width)
        blocks = () if self._writer.turn is not None else (frame.blocks,)
        return self._writer.reshaped(value, [*(sizes.of(axis) for axis in lead), *blocks, frame.rows, columns])

    @property
    def _split(self) -> bool:
        """Whether products see the heads as two axes, masks as one."""
        return self._block.kv_heads < self._block.heads and "group" not in self._block.score_axes

    def _added(self, scores: ir.Value, bias: ir.Value | None) -> ir.Value:
        return scores if bias is None else self._writer.op("Add", scores, bias)

    def _weighted(self, weights: ir.Value, value: ir.Value, far: Means | None, frame: Frame, lead: Axes) -> ir.Value:
        """`[lead, blocks, rows, width]`: sums of values."""
        writer, kind = self._writer, self._shapes.dtype(self._block.value)
        if kind is not None and kind != self._block.score_type:
            weights = writer.op("Cast", weights, to=int(kind))
        if far is None:
            return writer.op("MatMul", self._lead(weights, lead, frame, frame.columns), value)
        axis, last = len(self._block.score_axes), writer.constant([np.iinfo(np.int64).max])
        near = writer.part(weights, axis, 0, int(frame.columns) if isinstance(frame.columns, int) else frame.columns)
        rest = writer.part(weights, axis, frame.columns, last)
        near, rest = (self._lead(w, lead, frame, n) for w, n in ((near, frame.columns), (rest, far.count)))
        return writer.op("Add", writer.op("MatMul", near, value), writer.op("MatMul", rest, far.values))

    def _zeroed(self, result: ir.Value, bias: Bias, frame: Frame, lead: Axes) -> ir.Value:
        """Nothing where a query sees nothing, if the model says so."""
        if bias.live is None:
            return result
        writer, block = self._writer, self._block
        kind = self._shapes.dtype(block.value) or block.score_type
        whole = self._lead(result, block.score_axes[:-2], frame, block.value_width)
        kept = writer.op("Where", bias.live, whole, writer.number(0, kind))
        return self._lead(kept, lead, frame, block.value_width)

    def _joined(self, result: ir.Value, frame: Frame, lead: Axes) -> ir.Value:
        """Blocks one behind the other, without what lies behind the end of the sequence."""
        writer, block = self._writer, self._block
        each = writer.constant([frame.rows]) if isinstance(frame.rows, int) else frame.rows
        rows = writer.op("Mul", frame.blocks, each)
        sizes = Sizes(block.heads, block.kv_heads, rows, block.value_width)
        whole = writer.reshaped(result, [*(sizes.of(axis) for axis in lead), rows, block.value_width])
        return writer.part(whole, len(lead), 0, frame.length.value)
