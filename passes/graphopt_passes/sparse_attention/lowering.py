"""Putting attention on bands in the place of attention in a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from graphopt.analyses.attention import AttentionBlock, Axes
from graphopt.analyses.constants import Constants
from graphopt.analyses.shapes import Shapes
from graphopt_passes.sparse_attention._patterns import Band
from graphopt_passes.sparse_attention.bands import Bands, Heads
from graphopt_passes.sparse_attention.core import Core, Operands, operands, to_output
from graphopt_passes.sparse_attention.frame import Frame, Length, band_frame, dense_frame, leading_frame
from graphopt_passes.sparse_attention.masks import mask_values
from graphopt_passes.sparse_attention.unit_axes import UnitAxes
from graphopt_passes.sparse_attention.writer import Writer, sweep

__all__ = ["Lowering", "Part"]

_FEED_FORWARD = 4
"""Sizes of the hidden layers of feed-forward networks, in those of all heads together."""


@dataclass(frozen=True, eq=False)
class Part:
    """What some heads see.

    Attributes:
        heads: Numbers of heads of keys and values.
        band: Their band; None: everything.
    """

    heads: tuple[int, ...]
    band: Band | None


class Lowering:
    """Rewrites cores of one model, in the order in which their outputs stand in the graph.

    Args:
        model: The model; it is changed.
        shapes: Its shapes.
        constants: Its constants.
        loop: Blocks are computed one after another.
    """

    def __init__(self, model: ir.Model, shapes: Shapes, constants: Constants, *, loop: bool = False) -> None:
        self._loop = loop
        self._model = model
        self._shapes = shapes
        self.units = UnitAxes(shapes, constants)
        self.labels = constants.names.labels  # looked up on first use: later, nodes are gone
        self._instead: dict[ir.Value, ir.Value] = {}
        self._writers: dict[ir.Graph, Writer] = {}
        self._lengths: dict[tuple[ir.Graph, str | ir.Value], Length] = {}

    def replace(self, block: AttentionBlock, parts: Sequence[Part]) -> tuple[str, ...]:
        """Compute a core on bands.

        Args:
            block: The core.
            parts: Which heads see what; together all heads of keys and values.

        Returns:
            Names of masks that are still made whole.
        """
        writer, length = self._prepared(block)
        given = operands(writer, block, length.value, self._shapes)
        if not self._loop:
            parts = [piece for part in parts for piece in _pieces(block, part, given.lead)]
        if len(parts) == 1:
            result, dense = self._attended(writer, block, given, parts[0], length, None)
        else:
            result, dense = self._by_parts(writer, block, given, parts, length)
        self._take_over(block, to_output(writer, block, result, given.lead, length.value))
        return dense

    def _by_parts(
        self, writer: Writer, block: AttentionBlock, given: Operands, parts: Sequence[Part], length: Length
    ) -> tuple[ir.Value, tuple[str, ...]]:
        """Take heads apart, let each group see what it sees, and put them together again."""
        axis = next(i for i, name in enumerate(given.lead) if name in ("head", "kv_head"))
        each, results, dense = block.heads // block.kv_heads, list[ir.Value](), list[str]()
        for part in parts:
            numbers = writer.constant(part.heads)
            some = [writer.op("Gather", v, numbers, axis=axis) for v in (given.query, given.key, given.value)]
            inner = replace(block, heads=each * len(part.heads), kv_heads=len(part.heads))
            own = Operands(some[0], some[1], some[2], given.lead)
            result, whole = self._attended(writer, inner, own, part, length, _heads(block, part.heads))
            results.append(result)
            dense += [name for name in whole if name not in dense]
        order = np.argsort(np.concatenate([part.heads for part in parts]))
        joined = writer.op("Concat", *results, axis=axis)
        if (np.diff(order) < 0).any():
            joined = writer.op("Gather", joined, writer.constant(order.astype(np.int64)), axis=axis)
        return joined, tuple(dense)

    def _prepared(self, block: AttentionBlock) -> tuple[Writer, Length]:
        last = block.output.producer()
        assert last is not None and isinstance(last.graph, ir.Graph)
        if last.graph not in self._writers:
            self._writers[last.graph] = Writer(self._model, last.graph, self._instead)
        writer = self._writers[last.graph]
        writer.before = last
        return writer, self._length(writer, block)

    def _length(self, writer: Writer, block: AttentionBlock) -> Length:
        """Length of the sequence; one that several cores share is computed once.

        Cores share a length if they read one mask along it, or if it bears one name: inference often loses names.
        """
        axis, dims = block.query_axes.index("length"), self._shapes.of(block.query)
        size = None if dims is None else dims[axis]
        if isinstance(size, int):
            return Length(writer.constant([size]), size)
        same = self._shared_mask(block) or size
        if same is None:
            return Length(writer.size(block.query, axis), size)
        key = (writer.graph, same)
        if key not in self._lengths:
            self._lengths[key] = Length(writer.size(block.query, axis), size)
        return self._lengths[key]

    def _shared_mask(self, block: AttentionBlock) -> ir.Value | None:
        """A mask with an axis of keys."""
        for value in (value for mask in block.masks for value in mask_values(mask)):
            rank = self._shapes.rank(value)
            if rank and not self.units.one(value, rank - 1):
                return value
        return None

    def _attended(
        self,
        writer: Writer,
        block: AttentionBlock,
        given: Operands,
        part: Part,
        length: Length,
        heads: Heads | None,
    ) -> tuple[ir.Value, tuple[str, ...]]:
        """`[lead, length, width]`, and what masks are still made whole."""
        core, dense = Core(writer, block, self._shapes, loop=self._loop), list[str]()

        def on(frame: Frame) -> ir.Value:
            bands = Bands(writer, frame, self.units, heads)
            found = core.attend(given, frame, bands)
            dense.extend(name for name in bands.dense if name not in dense)
            return found

        band = part.band
        if band is None:
            return on(dense_frame(writer, length, causal=block.causal == "yes")), tuple(dense)
        result = on(band_frame(writer, band, length))
        if band.leading and not band.causal:
            axis = len(given.lead)
            first = on(leading_frame(writer, band.leading, length))
            rest = writer.part(result, axis, band.leading, length.value)
            result = writer.op("Concat", first, rest, axis=axis)
        return result, tuple(dense)

    def _take_over(self, block: AttentionBlock, new: ir.Value) -> None:
        """Let a value be what the core made, under the same name."""
        old = block.output
        name, old.name = old.name, f"{old.name}_dense"
        new.name, new.type, new.shape, new.doc_string = name, old.type, old.shape, old.doc_string
        new.metadata_props.update(old.metadata_props)
        new.meta.update(old.meta)
        self._instead[old] = new
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        sweep(list(reversed(block.nodes)))


def _pieces(block: AttentionBlock, part: Part, lead: Axes) -> list[Part]:
    """The same heads, as many at once as make their scores no larger than the hidden layer of a feed-forward network.

    What is computed one after another shares its memory, and what is smaller stays in caches.
    """
    if part.band is None or not {"head", "kv_head"} & set(lead):
        return [part]
    at_once = max(1, _FEED_FORWARD * block.kv_heads * block.value_width // part.band.columns)
    count = -(-len(part.heads) // at_once)
    return [Part(tuple(map(int, heads)), part.band) for heads in np.array_split(part.heads, count)]


def _heads(block: AttentionBlock, numbers: Sequence[int]) -> Heads:
    """Where masks have these heads."""
    lead, each = block.score_axes[:-2], block.heads // block.kv_heads
    if "kv_head" in lead:
        return Heads(lead.index("kv_head") - len(block.score_axes), tuple(numbers))
    of_queries = tuple(number * each + i for number in numbers for i in range(each))
    return Heads(lead.index("head") - len(block.score_axes), of_queries)
