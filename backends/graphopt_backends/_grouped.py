"""GroupQueryAttention of ONNX Runtime: heads that share keys, a cache, rotary embeddings, causal order, windows.

The cache holds as many rows as the longest sequence needs, or more. How many of them each entry of the batch has used
is known when the model runs: rows are put behind them then, and what lies behind its own end is hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from graphopt_backends._attention import (
    Heads,
    Mask,
    Scores,
    attend,
    by_heads,
    float_type,
    given,
    given_numbers,
    is_wanted,
    side_by_side,
)
from graphopt_backends._builder import Builder
from graphopt_backends._fold import is_constant, static_shape
from graphopt_backends._rotary import Turn, turn_of, turned

__all__ = ["grouped"]

_LENGTHS, _TOTAL, _COSINE, _POSITIONS, _ADDED, _SINK = 5, 6, 7, 9, 10, 11


@dataclass(frozen=True)
class _Cache:
    """Rows of keys and values.

    Attributes:
        before: Rows of the cache that comes in.
        total: Rows of the longest sequence, with the new ones.
        fresh: New rows.
        lengths: Rows of each entry of the batch with the new ones, [batch, 1, 1, 1]; None: all have `total`.
    """

    before: int
    total: int
    fresh: int
    lengths: ir.Value | None

    @property
    def is_prompt(self) -> bool:
        """There are new rows only."""
        return self.fresh == self.total

    @property
    def rows(self) -> int:
        """Rows of the cache that goes out."""
        return max(self.before, self.total)


def grouped(graph: ir.Graph, node: ir.Node) -> bool:
    """Replace a GroupQueryAttention; caches of small integers, sinks and caches of a window are none of ours."""
    dtype, size = float_type(node.inputs[0]), static_shape(node.inputs[0])
    if dtype is None or size is None or not _is_plain(node):
        return False
    make = Builder(graph, node)
    past = [given(node, 3), given(node, 4)]
    total = node.inputs[_TOTAL]
    assert total is not None
    assert total.const_value is not None
    rows = int(total.const_value.numpy().reshape(-1)[0])
    before = (static_shape(past[0]) or (0, 0, 0, 0))[2]
    cache = _Cache(before, rows, size[1], _lengths(make, node, rows, size[0]))
    query, key, value = _sides(make, node, size)
    turn = _turn(make, node, cache, size[0]) if node.attributes.get_int("do_rotary", 0) else None
    if turn is not None:
        query, key = turned(make, query, turn), turned(make, key, turn)
    key, value = _stored(make, (key, value), past, cache, dtype)
    attributes = node.attributes
    scale = attributes.get_float("scale", 0.0) or query.columns**-0.5
    masks = _masks(make, node, cache)
    scores = Scores(scale, attributes.get_float("softcap", 0.0), masks, may_be_empty=cache.lengths is not None)
    found = attend(make, query, _first(make, key, rows), _first(make, value, rows), scores, dtype)
    make.give([side_by_side(make, found.result), key.value, value.value])
    return True


def _is_plain(node: ir.Node) -> bool:
    attributes, total = node.attributes, given(node, _TOTAL)
    if not all(value is None or static_shape(value) is not None for value in node.inputs) or not is_constant(total):
        return False
    if any(value is not None for value in node.inputs[_SINK:]) or is_wanted(node, 3):
        return False
    if any(attributes.get_int(name, 0) for name in ("smooth_softmax", "sliding_window_cache", "qk_output")):
        return False
    assert total is not None
    assert total.const_value is not None
    (batch, fresh, _), rows = static_shape(node.inputs[0]) or (1, 1, 1), int(total.const_value.numpy().reshape(-1)[0])
    return attributes.get_int("causal", 1) == 1 and rows >= fresh and (rows == fresh or 1 in (batch, fresh))


def _lengths(make: Builder, node: ir.Node, total: int, batch: int) -> ir.Value | None:
    """Rows of each entry of the batch; None where all have the same."""
    last = node.inputs[_LENGTHS]
    assert last is not None
    if is_constant(last) and last.const_value is not None and (last.const_value.numpy() == total - 1).all():
        return None
    whole = make("Add", [make("Cast", [last], to=ir.DataType.INT64), make.ints([1])])
    return make("Reshape", [whole, make.ints([batch, 1, 1, 1])])


def _sides(make: Builder, node: ir.Node, size: tuple[int, ...]) -> tuple[Heads, Heads, Heads]:
    heads, groups = (node.attributes.get_int(name, 1) for name in ("num_heads", "kv_num_heads"))
    sides = [value for value in node.inputs[:3] if value is not None]
    if len(sides) == 1:
        width = size[2] // (heads + 2 * groups)
        sides = make.parts(sides[0], [heads * width, groups * width, groups * width], 2)
        sizes = [(*size[:2], count * width) for count in (heads, groups, groups)]
    else:
        sizes = [static_shape(side) or () for side in sides]
    query, key, value = (
        by_heads(make, side, own, count) for side, own, count in zip(sides, sizes, (heads, groups, groups), strict=True)
    )
    return query, key, value


def _turn(make: Builder, node: ir.Node, cache: _Cache, batch: int) -> Turn:
    """Factors of rotary embeddings at the positions of the new rows."""
    tables = [value for value in node.inputs[_COSINE : _COSINE + 2] if value is not None]
    numbers, positions = np.arange(cache.fresh), given(node, _POSITIONS)
    if positions is None and (cache.lengths is None or cache.is_prompt):
        positions, batch = make.ints(numbers[None] + (cache.total - cache.fresh)), 1
    elif positions is None:
        first = make("Sub", [make("Reshape", [cache.lengths, make.ints([batch, 1])]), make.ints([cache.fresh])])
        positions = make("Add", [first, make.ints(numbers[None])])
    found = [make("Gather", [table, positions], axis=0) for table in tables]
    pairs = (static_shape(tables[0]) or (0, 0))[1]
    neighbours = bool(node.attributes.get_int("rotary_interleaved", 0))
    return turn_of(make, found[0], found[1], (batch, cache.fresh, pairs), neighbours=neighbours)


def _stored(
    make: Builder, sides: tuple[Heads, Heads], pasts: Sequence[ir.Value | None], cache: _Cache, dtype: np.dtype
) -> list[Heads]:
    """Keys and values of the cache that goes out."""
    if cache.is_prompt or cache.lengths is None or None in pasts:
        return [_joined(make, side, past, cache, dtype) for side, past in zip(sides, pasts, strict=True)]
    used = make("Sub", [cache.lengths, make.ints([cache.fresh])])
    number = make.array(np.arange(cache.rows).reshape(1, 1, -1, 1))
    is_old, is_there = make("Less", [number, used]), make("Less", [number, cache.lengths])
    index: ir.Value | None = None
    if cache.fresh > 1:  # then there is one entry of the batch
        ahead = make("Sub", [make.ints(np.arange(cache.rows)), make("Reshape", [used, make.ints([1])])])
        index = make("Min", [make("Max", [ahead, make.ints([0])]), make.ints([cache.fresh - 1])])
    found: list[Heads] = []
    for side, past in zip(sides, pasts, strict=True):
        fresh = side.value if index is None else make("Gather", [side.value, index], axis=2)
        behind = make("Where", [is_there, fresh, make.array(np.zeros((), dtype))])
        old = make("Concat", [past, *_zeros(make, side, cache.rows - cache.before, dtype)], axis=2)
        found.append(replace(side, value=make("Where", [is_old, old, behind]), rows=cache.rows))
    return found


def _joined(make: Builder, side: Heads, past: ir.Value | None, cache: _Cache, dtype: np.dtype) -> Heads:
    """As many rows of a cache for each entry of the batch, new ones, and zeros."""
    used = cache.total - cache.fresh
    parts = [_first(make, replace(side, value=past, rows=cache.before), used).value] if past and used else []
    parts += [side.value, *_zeros(make, side, cache.rows - cache.total, dtype)]
    return replace(side, value=make("Concat", [*parts], axis=2) if len(parts) > 1 else side.value, rows=cache.rows)


def _zeros(make: Builder, side: Heads, rows: int, dtype: np.dtype) -> list[ir.Value]:
    return [make.array(np.zeros((side.batch, side.heads, rows, side.columns), dtype))] if rows else []


def _first(make: Builder, side: Heads, rows: int) -> Heads:
    if side.rows == rows:
        return side
    part = make("Slice", [side.value, make.ints([0]), make.ints([rows]), make.ints([2])])
    return replace(side, value=part, rows=rows)


def _masks(make: Builder, node: ir.Node, cache: _Cache) -> tuple[Mask, ...]:
    """Which keys a query sees: up to its own, of its own sequence, in a window; and numbers that are added."""
    window, added = node.attributes.get_int("local_window_size", -1), given(node, _ADDED)
    masks = [] if added is None else [given_numbers(added)]
    key, query = np.arange(cache.total), np.arange(cache.fresh)[:, None]
    if cache.lengths is None:
        ahead = key - query - (cache.total - cache.fresh)
        seen = (ahead <= 0) & ((ahead > -window) if window > 0 else True)
        return tuple(masks) if seen.all() else (*masks, Mask(make.array(seen), -np.inf))
    own = make.ints(query + 1)  # where the keys that a query sees end
    if not cache.is_prompt:
        own = make("Add", [make("Sub", [cache.lengths, make.ints([cache.fresh])]), own])
    masks.append(Mask(make("Less", [make.ints(key), cache.lengths]), -np.inf))
    masks.append(Mask(make("Less", [make.ints(key), own]), -np.inf))
    if window > 0:
        begin = make("Sub", [own, make.ints([window])])
        masks.append(Mask(make("GreaterOrEqual", [make.ints(key), begin]), -np.inf))
    return tuple(masks)
