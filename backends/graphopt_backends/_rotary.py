"""Rotary embeddings (Su et al. 2021) as arithmetic: pairs of columns are turned by angles that grow with the position.

A row x becomes x * cos + y * sin, where y has the columns of each pair exchanged, and sin is negative for the first.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from graphopt_backends._attention import Heads, by_heads, given, side_by_side
from graphopt_backends._builder import Builder
from graphopt_backends._fold import static_shape

__all__ = ["Turn", "contributed_rotary", "rotary", "turn_of", "turned"]


class Turn:
    """Factors of rows and of their exchanged columns, [batch or 1, 1, rows, columns]; whether pairs are neighbours."""

    def __init__(self, straight: ir.Value, across: ir.Value, columns: int, *, neighbours: bool) -> None:
        self.straight, self.across, self.columns, self.neighbours = straight, across, columns, neighbours


def turn_of(make: Builder, cosine: ir.Value, sine: ir.Value, shape: tuple[int, int, int], *, neighbours: bool) -> Turn:
    """Factors from cosines and sines [batch or 1, rows, pairs]."""
    batch, rows, pairs = shape
    size = [batch, 1, rows, 2 * pairs]

    def both(first: ir.Value, second: ir.Value) -> ir.Value:
        if not neighbours:
            return make("Reshape", [make("Concat", [first, second], axis=2), make.ints(size)])
        columns = [make("Unsqueeze", [value, make.ints([3])]) for value in (first, second)]
        return make("Reshape", [make("Concat", [*columns], axis=3), make.ints(size)])

    return Turn(both(cosine, cosine), both(make("Neg", [sine]), sine), 2 * pairs, neighbours=neighbours)


def turned(make: Builder, side: Heads, turn: Turn) -> Heads:
    """Turn the first columns of every row."""
    rest: list[ir.Value] = []
    value, shape = side.value, [side.batch, side.heads, side.rows, turn.columns]
    if turn.columns < side.columns:
        value, *rest = make.parts(value, [turn.columns, side.columns - turn.columns], 3)
    if turn.neighbours:
        pairs = make("Reshape", [value, make.ints([*shape[:3], turn.columns // 2, 2])])
        swapped = make("Gather", [pairs, make.ints([1, 0])], axis=4)
        other = make("Reshape", [swapped, make.ints(shape)])
    else:
        first, second = make.parts(value, [turn.columns // 2] * 2, 3)
        other = make("Concat", [second, first], axis=3)
    value = make("Add", [make("Mul", [value, turn.straight]), make("Mul", [other, turn.across])])
    return replace(side, value=make("Concat", [value, *rest], axis=3) if rest else value)


def rotary(graph: ir.Graph, node: ir.Node) -> bool:
    """RotaryEmbedding of ONNX: caches have a row for each position, or for each row of the input."""
    source, positions = node.inputs[0], given(node, 3)
    size, cache = static_shape(source), static_shape(node.inputs[1])
    if source is None or size is None or cache is None or len(cache) != (3 if positions is None else 2):
        return False
    make, rows = Builder(graph, node), size[-2]
    tables = [value for value in node.inputs[1:3] if value is not None]
    if positions is not None:
        tables = [make("Gather", [table, positions], axis=0) for table in tables]
    shape = (size[0], rows, cache[-1])
    _turn(make, node, by_heads(make, source, size, node.attributes.get_int("num_heads", 1)), tables, shape)
    return True


def contributed_rotary(graph: ir.Graph, node: ir.Node) -> bool:
    """RotaryEmbedding of ONNX Runtime: positions of all rows, or that of the first."""
    source, positions, attributes = node.inputs[0], node.inputs[1], node.attributes
    size, cache, given_positions = (static_shape(node.inputs[i]) for i in (0, 2, 1))
    if source is None or size is None or cache is None or given_positions is None or positions is None:
        return False
    if attributes.get_float("scale", 1.0) != 1.0 or attributes.get_int("is_packed_batching", 0):
        return False
    make = Builder(graph, node)
    heads = attributes.get_int("num_heads", 0) or size[-1] // (2 * cache[1])
    side = by_heads(make, source, size, heads)
    if len(given_positions) == 1:
        positions = make("Add", [make("Reshape", [positions, make.ints([1, 1])]), make.ints(np.arange(side.rows))])
    tables = [make("Gather", [value, positions], axis=0) for value in node.inputs[2:4]]
    shape = (1 if len(given_positions) == 1 else side.batch, side.rows, cache[1])
    _turn(make, node, side, tables, shape)
    return True


def _turn(make: Builder, node: ir.Node, side: Heads, tables: list[ir.Value], shape: tuple[int, int, int]) -> None:
    neighbours = bool(node.attributes.get_int("interleaved", 0))
    found = turned(make, side, turn_of(make, tables[0], tables[1], shape, neighbours=neighbours))
    make.give([found.value if len(static_shape(node.inputs[0]) or ()) == 4 else side_by_side(make, found)])
