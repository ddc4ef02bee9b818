"""The part of a mask that blocks of queries see, without ever making the whole mask.

The band of an elementwise function is the function of the bands. So the taking of the band moves upwards through the
graph, until it meets values that have one of the two axes only: what depends on the key is taken at the positions of
keys, what depends on the query at those of queries.

    value         [..., queries, keys, *trail]
    its band      [..., blocks, rows, columns, *trail]    of size 1 where the value does not depend on it

Where it meets a value with both axes that it cannot look behind, the band is taken from that value: memory then stays
quadratic in this value. Its name is noted in `dense`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt_passes.sparse_attention.frame import Frame
from graphopt_passes.sparse_attention.unit_axes import ELEMENTWISE, UnitAxes, axes_of, integers
from graphopt_passes.sparse_attention.writer import Writer

__all__ = ["Bands", "Heads"]

_Rule = Callable[[ir.Node, int, int], ir.Value | None]


@dataclass(frozen=True)
class Heads:
    """Some of the heads.

    Attributes:
        axis: Of the heads in the scores, counted from the back.
        numbers: Which of them.
    """

    axis: int
    numbers: tuple[int, ...]


class Bands:
    """Takes bands of values.

    Args:
        writer: Writes the nodes.
        frame: Which queries meet which keys.
        units: Knows shapes and constants.
        heads: Heads whose masks are asked for; None: all.
    """

    def __init__(self, writer: Writer, frame: Frame, units: UnitAxes, heads: Heads | None = None) -> None:
        self._writer = writer
        self._frame = frame
        self._units = units
        self._heads = heads
        self._known: dict[tuple[ir.Value, int], ir.Value] = {}
        self.dense: list[str] = []

    def at(self, frame: Frame) -> Bands:
        """The same for another frame."""
        return Bands(self._writer, frame, self._units, self._heads)

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """Element type of a value."""
        return self._units.shapes.dtype(value)

    def of_mask(self, value: ir.Value) -> ir.Value:
        """The band of a mask, of the heads that are asked for."""
        band, writer = self.of(value), self._writer
        axis = -1 if self._heads is None else self._rank(value) + self._heads.axis
        if self._heads is None or axis < 0 or self._units.one(value, axis):
            return band
        last = writer.op("Sub", writer.size(band, axis), writer.constant([1]))  # 0 where the band needs no heads
        return writer.op("Gather", band, writer.op("Min", writer.constant(self._heads.numbers), last), axis=axis)

    def of(self, value: ir.Value, trail: int = 0) -> ir.Value:
        """The band of a value of known rank.

        Args:
            value: Its last axes, `trail` of them left out, are those of queries and keys, of the length of the
                sequence or of size 1; it may lack them.
            trail: Axes behind that of the keys.
        """
        key = (value, trail)
        if key not in self._known:
            self._known[key] = self._of(value, trail)
        return self._known[key]

    def _of(self, value: ir.Value, trail: int) -> ir.Value:
        rank = self._rank(value)
        query, key = rank - 2 - trail, rank - 1 - trail
        no_query = query < 0 or self._units.one(value, query)
        no_key = key < 0 or self._units.one(value, key)
        if no_query and no_key:
            return value if query < 0 else self._writer.unsqueezed(value, query)
        if no_query:
            return self._along(value, query, key, self._frame.keys, columns=True)
        if no_key:
            return self._along(value, key, query, self._frame.queries, columns=False)
        return self._pushed(value, rank, trail) or self._taken(value, query, key)

    def _rank(self, value: ir.Value) -> int:
        rank = self._units.shapes.rank(value)
        if rank is None:
            raise TypeError(f"the rank of {value.name!r} is not known")
        return rank

    def _along(self, value: ir.Value, unit: int, axis: int, positions: ir.Value, *, columns: bool) -> ir.Value:
        """Take positions along the one axis that a value has; the other has size 1, or is missing (-1)."""
        writer = self._writer
        indices = self._within(value, axis, positions)
        if unit >= 0:
            value = writer.op("Squeeze", value, writer.constant([unit]))
        axis -= 0 <= unit < axis
        found = writer.op("Gather", value, indices, axis=axis)
        return writer.unsqueezed(found, axis + 1 if columns else axis + 2)

    def _within(self, value: ir.Value, axis: int, positions: ir.Value) -> ir.Value:
        """Positions that an axis has: it may be shorter than the sequence if it has size 1 after all."""
        dims, size = self._units.shapes.of(value), self._frame.length.size
        if dims is not None and size is not None and dims[axis] == size:
            return positions
        last = self._writer.op("Sub", self._writer.size(value, axis), self._writer.constant([1]))
        return self._writer.op("Min", positions, last)

    def _taken(self, value: ir.Value, query: int, key: int) -> ir.Value:
        """Take the band from a value that has both axes."""
        tensor, band = self._units.constants.of(value), self._frame.band
        if tensor is not None and band is not None and tensor.size:
            return self._constant(tensor.numpy(), query, key)
        if tensor is None and value.name is not None and value.name not in self.dense:
            self.dense.append(value.name)
        writer, rank = self._writer, self._rank(value)
        rows, columns = (self._within(value, axis, at) for axis, at in zip((query, key), self._places(), strict=True))
        if band is None:  # one block: its rows are few
            found = writer.op("Gather", writer.op("Gather", value, rows, axis=query), columns, axis=key + 1)
            return writer.op("Squeeze", found, writer.constant([query + 2]))
        width = writer.size(value, key)
        flat = writer.op("Add", writer.unsqueezed(writer.op("Mul", rows, width), 2), writer.unsqueezed(columns, 1))
        sizes = [0] * query
        rest = [writer.size(value, axis) for axis in range(key + 1, rank)]
        return writer.op("Gather", writer.reshaped(value, [*sizes, -1, *rest]), flat, axis=query)

    def _places(self) -> tuple[ir.Value, ir.Value]:
        return self._frame.queries, self._frame.keys

    def _constant(self, array: np.ndarray, query: int, key: int) -> ir.Value:
        """The band of a constant of any length, of which the first blocks are taken."""
        writer, band = self._writer, self._frame.band
        assert band is not None
        count = -(-array.shape[query] // band.rows)
        starts = band.rows * np.arange(count)[:, None]
        rows = np.minimum(starts + np.arange(band.rows), array.shape[query] - 1)
        leading = np.broadcast_to(np.arange(band.leading), (count, band.leading))
        columns = np.concatenate([leading, starts + band.offsets], axis=1).clip(0, array.shape[key] - 1)
        front = (slice(None),) * query
        held = writer.constant(array[(*front, rows[:, :, None], columns[:, None, :])])
        return writer.part(held, query, 0, self._frame.blocks)

    # ------------------------------------------------------------ upwards

    def _pushed(self, value: ir.Value, rank: int, trail: int) -> ir.Value | None:
        """The band, made of bands of what the value is computed from; None where that cannot be done."""
        node = value.producer()
        if node is None or node.domain not in ("", "ai.onnx") or node.outputs[0] is not value:
            return None
        if node.graph is not self._writer.graph or any(self._ranks_unknown(node)):
            return None
        if node.op_type in ELEMENTWISE:
            return self._elementwise(node, rank, trail)
        rules: Mapping[str, _Rule] = {
            "ConstantOfShape": self._filled,
            "Expand": self._expand,
            "Gather": self._gather,
            "Slice": self._slice,
            "Squeeze": self._squeeze,
            "Transpose": self._transpose,
            "Trilu": self._trilu,
            "Unsqueeze": self._unsqueeze,
        }
        rule = rules.get(node.op_type)
        return None if rule is None else rule(node, rank, trail)

    def _ranks_unknown(self, node: ir.Node) -> list[bool]:
        return [self._units.shapes.rank(value) is None for value in node.inputs if value is not None]

    def _elementwise(self, node: ir.Node, rank: int, trail: int) -> ir.Value | None:
        if node.op_type == "Clip":
            bounds = node.inputs[1:]
            source = node.inputs[0]
            assert source is not None
            return self._writer.again(node, [self.of(source, trail), *bounds])
        inputs = [None if value is None else self.of(value, trail) for value in node.inputs]
        return self._writer.again(node, inputs)

    def _expand(self, node: ir.Node, rank: int, trail: int) -> ir.Value | None:
        """Readers repeat the band as they would the whole; only the number of axes must be right."""
        source = node.inputs[0]
        assert source is not None
        found, inner = self.of(source, trail), self._rank(source)
        if inner == rank:
            return found
        axes = inner + 1
        if inner < trail + 2:  # a vector of keys gets three axes instead of one, what has none stays as it is
            axes = inner if inner <= trail or self._units.one(source, 0) else inner + 2
        return self._writer.unsqueezed(found, *range(rank + 1 - axes))

    def _unsqueeze(self, node: ir.Node, rank: int, trail: int) -> ir.Value | None:
        axes, source = axes_of(self._units.constants, node, rank), node.inputs[0]
        if axes is None or source is None:
            return None
        key = rank - 1 - trail
        behind = sum(axis > key for axis in axes)
        moved = [axis + 1 if axis > key else axis for axis in axes]
        return self._writer.unsqueezed(self.of(source, trail - behind), *sorted(moved))

    def _squeeze(self, node: ir.Node, rank: int, trail: int) -> ir.Value | None:
        source = node.inputs[0]
        if source is None:
            return None
        inner = self._rank(source)
        axes = axes_of(self._units.constants, node, inner)
        if axes is None:
            return None
        kept = [axis for axis in range(inner) if axis not in axes]
        query, key = kept[rank - 2 - trail], kept[rank - 1 - trail]
        if key != query + 1:
            return None
        gone = [axis + 1 if axis > key else axis for axis in sorted(axes)]
        return self._writer.op("Squeeze", self.of(source, inner - 1 - key), self._writer.constant(gone))

    def _transpose(self, node: ir.Node, rank: int, trail: int) -> ir.Value | None:
        order, source = node.attributes.get_ints("perm", list(reversed(range(rank)))), node.inputs[0]
        query, key = order[rank - 2 - trail], order[rank - 1 - trail]
        if key != query + 1 or source is None:
            return None
        moved: list[int] = []
        for axis in order:  # the axis of queries has become two
            moved += [query, query + 1] if axis == query else [axis + (axis > query)]
        return self._writer.transposed(self.of(source, rank - 1 - key), moved)

    def _gather(self, node: ir.Node, rank: int, trail: int) -> ir.Value | None:
        """A table, looked up at places that depend on query and key: the buckets of relative positions."""
        table, places = node.inputs
        assert table is not None and places is not None
        inner = self._rank(table)
        axis = node.attributes.get_int("axis", 0) % inner
        behind = inner - axis - 1
        if trail < behind or rank - 2 - trail < axis:
            return None
        return self._writer.again(node, [table, self.of(places, trail - behind)])

    def _trilu(self, node: ir.Node, rank: int, trail: int) -> ir.Value | None:
        source, dtype = node.inputs[0], self._units.shapes.dtype(node.outputs[0])
        shift = [0] if len(node.inputs) < 2 or node.inputs[1] is None else None
        if shift is None:
            shift = integers(self._units.constants, node.inputs[1])
        if trail or shift is None or source is None or dtype is None:
            return None
        writer, (queries, keys) = self._writer, self._places()
        distance = writer.op("Sub", writer.unsqueezed(keys, 1), writer.unsqueezed(queries, 2))
        upper = node.attributes.get_int("upper", 1)
        kept = writer.op("GreaterOrEqual" if upper else "LessOrEqual", distance, writer.constant([shift[0]]))
        return writer.op("Where", kept, self.of(source), writer.number(0, dtype))

    def _filled(self, node: ir.Node, rank: int, trail: int) -> ir.Value | None:
        tensor = node.attributes.get_tensor("value", None)
        number = np.zeros(1, np.float32) if tensor is None else tensor.numpy()
        return self._writer.constant(number.reshape([1] * (rank + 1)))

    def _slice(self, node: ir.Node, rank: int, trail: int) -> ir.Value | None:
        """The beginning of the axes of queries and keys: positions stay what they are."""
        source, starts = node.inputs[0], integers(self._units.constants, node.inputs[1])
        axes = integers(self._units.constants, node.inputs[3]) if len(node.inputs) > 3 else None
        steps = integers(self._units.constants, node.inputs[4]) if len(node.inputs) > 4 else [1]
        if source is None or starts is None or axes is None or steps is None or any(starts) or set(steps) != {1}:
            return None
        if not {axis % rank for axis in axes} <= {rank - 2 - trail, rank - 1 - trail}:
            return None
        return self.of(source, trail)
