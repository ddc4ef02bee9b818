"""Reshape and Flatten: matching the axes of two shapes that hold the same elements in the same order.

Both shapes are cut into the finest blocks of equal product, from the left and, where a size is open, from the right:

    [N, 64, 7, 7] -> [N, 3136]     N | 64, 7, 7 merged: the channel is whichever of the three carries channels
    [N, 64, 1, 1] -> [N, 64]       N | 64
    [N, 64] -> [N, 8, 8]           N | 64 split: channels follow the part that later makes a batch of products (heads),
                                   else the larger one (channel shuffle)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from graphopt.analyses._axis_maps import NodeView
from graphopt.analyses._channel_lookahead import follow
from graphopt.analyses._partition import Indices
from graphopt.analyses._shape_values import AxisName, Entry

__all__ = ["flatten", "match_blocks", "reshape"]

Token = int | str | None
"""Size of an axis: a number, a name that equal open sizes share, or None where nothing is known (written -1)."""
Block = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class _Target:
    """The requested shape, position by position: what is asked for, and the size that comes out."""

    entries: tuple[Entry, ...]
    tokens: tuple[Token, ...]


def match_blocks(old: Sequence[Token], new: Sequence[Token]) -> list[Block]:
    """Cut two shapes of the same elements into the finest blocks that surely correspond.

    Returns:
        Pairs of axes (of the old, of the new shape); axes in no block could not be matched.
    """
    left, i, j = _walk(old, new)
    back, k, m = _walk(old[i:][::-1], new[j:][::-1])
    ends = [(tuple(len(old) - 1 - a for a in x)[::-1], tuple(len(new) - 1 - b for b in y)[::-1]) for x, y in back]
    rest: Block = (tuple(range(i, len(old) - k)), tuple(range(j, len(new) - m)))
    return [*left, *([rest] if len(rest[0]) == len(rest[1]) == 1 else []), *reversed(ends)]


def _walk(old: Sequence[Token], new: Sequence[Token]) -> tuple[list[Block], int, int]:
    """Match from the front as far as sizes are certain; returns the blocks and where it stopped on either side."""
    blocks: list[Block] = []
    i = j = 0
    while i < len(old) or j < len(new):
        a, b = i, j
        if i < len(old) and j < len(new) and old[i] == new[j] and old[i] is not None:
            i, j = i + 1, j + 1
        elif (end := _product_block(old, new, i, j)) is not None:
            i, j = end
        else:
            break
        blocks.append((tuple(range(a, i)), tuple(range(b, j))))
    return blocks, i, j


def _product_block(old: Sequence[Token], new: Sequence[Token], i: int, j: int) -> tuple[int, int] | None:
    """Extend the side with the smaller product until both are equal; None where an open size is in the way."""
    left = right = 1
    while True:
        grow_left = left <= right if i < len(old) and j < len(new) else i < len(old)
        side, at = (old, i) if grow_left else (new, j)
        if at >= len(side) or not isinstance(size := side[at], int):
            return None
        if grow_left:
            left, i = left * size, i + 1
        else:
            right, j = right * size, j + 1
        if left == right:
            return i, j


def flatten(view: NodeView) -> None:
    """Merge the axes on either side of one."""
    rank = view.rank(view.input(0))
    if rank is None:
        return
    axis = view.node.attributes.get_int("axis", 1)
    axis = axis + rank if axis < 0 else axis
    for parts, to in ((range(axis), 0), (range(axis, rank), 1)):
        _tie_block(view, tuple(parts), (to,))


def reshape(view: NodeView) -> None:
    """Match the blocks of both shapes; rewrite the requested shape where it states channels."""
    source, output = view.input(0), view.node.outputs[0]
    old = _tokens(view, source)
    target = None if old is None else _target(view, source, old)
    if source is None or old is None or target is None:
        view.numbers(1)
        return
    for axis, token in enumerate(target.tokens):
        if isinstance(token, int):  # shape inference gives up on sizes that the graph computes
            view.adopt(output, axis, token)
    linked: list[int] = []
    for parts, made in match_blocks(old, target.tokens):
        linked += _tie_block(view, parts, made)
    _state_target(view, source, target, linked)
    for axis in set(range(view.rank(output) or 0)) - set(linked):
        view.maps.pin(view.atoms(output, axis), view.reason)


def _tokens(view: NodeView, value: ir.Value | None) -> list[Token] | None:
    sizes, dims = view.sizes(value), view.maps.shapes.of(value)
    if sizes is None:
        return None
    return [
        size if size is not None else dims[i] if dims is not None and i < len(dims) else None
        for i, size in enumerate(sizes)
    ]


def _target(view: NodeView, source: ir.Value | None, old: list[Token]) -> _Target | None:
    """Read the requested shape; sizes that nothing states come from shape inference."""
    content = view.content(1) if view.input(1) is not None else None
    if view.input(1) is None:  # before opset 5
        entries = tuple(Entry(number) for number in view.node.attributes.get_ints("shape", ()))
    elif content is None or content.ndim != 1:
        return None
    else:
        entries = tuple(content)
    inferred = _tokens(view, view.node.outputs[0])
    literal_zero = bool(view.node.attributes.get_int("allowzero", 0))
    tokens: list[Token] = []
    for i, entry in enumerate(entries):
        token: Token = inferred[i] if inferred is not None and len(inferred) == len(entries) else None
        if entry.number == 0 and not literal_zero and i < len(old):
            token = old[i]
        elif isinstance(entry.number, int) and entry.number > 0:
            token = entry.number
        elif entry.axis is not None and source is not None and entry.axis[0] == source.name:
            token = old[entry.axis[1]]
        tokens.append(None if entry.number == -1 and not isinstance(token, int) else token)
    resolved = _resolve(old, tokens)
    if inferred is not None and len(inferred) == len(resolved):
        resolved = [inferred[i] if token is None else token for i, token in enumerate(resolved)]
    return _Target(entries, tuple(resolved))


def _resolve(old: Sequence[Token], new: list[Token]) -> list[Token]:
    """Work out the one size that is written -1, where open sizes cancel."""
    if new.count(None) != 1:
        return new
    rest = list(old)
    for token in new:
        if isinstance(token, str):
            if token not in rest:
                return new
            rest.remove(token)
    if not all(isinstance(token, int) for token in rest):
        return new
    total = math.prod(token for token in rest if isinstance(token, int))
    stated = math.prod(token for token in new if isinstance(token, int))
    return [total // stated if token is None and stated else token for token in new]


def _tie_block(view: NodeView, parts: tuple[int, ...], made: tuple[int, ...]) -> list[int]:
    """Tie the axes of a block index by index, or by the one digit that channels follow; gives the new axes tied."""
    source, output = view.node.inputs[0], view.node.outputs[0]
    if source is None:
        return []
    wide, new = _wide(view, source, parts), _wide(view, output, made)
    if len(wide) == 1 and (len(new) == 1 or not new):
        to = new[0] if new else made[0] if made else None
        return [to] if to is not None and view.link(source, wide[0], output, to) else []
    sizes = [len(_some(view.atoms(source, axis))) for axis in wide]
    if len(new) == 1:  # the size of a merged axis follows from its parts
        view.adopt(output, new[0], math.prod(sizes))
    after = [len(_some(view.atoms(output, axis))) for axis in new]
    digits = _digits(sizes, after)
    if digits is None or 0 in sizes:
        return []
    before = list(zip(wide, _runs(sizes, digits), strict=True))
    behind = list(zip(new, _runs(after, digits), strict=True))
    digit = _carrier(view, digits, before, behind)
    if digit is None:
        return []
    units = view.maps.partition.new(digits[digit])
    for value, axes in ((source, before), (output, behind)):
        for axis, run in axes:
            if digit in run:
                own = [digits[i] for i in run]
                view.tie(_some(view.atoms(value, axis)), units[_coordinate(own, digit - run[0])])
                view.settle(value, axis)
    return [axis for axis, run in behind if digit in run]


def _wide(view: NodeView, value: ir.Value, axes: Sequence[int]) -> list[int]:
    """Axes that are not of size 1."""
    return [axis for axis in axes if (atoms := view.atoms(value, axis)) is None or len(atoms) != 1]


def _digits(old: Sequence[int], new: Sequence[int]) -> list[int] | None:
    """Sizes of the finest parts that both shapes are made of, None where their borders do not nest."""
    if not old or not new or 0 in (*old, *new) or math.prod(old) != math.prod(new):
        return None
    borders = sorted({math.prod(shape[i:]) for shape in (old, new) for i in range(len(shape) + 1)}, reverse=True)
    if any(big % small for big, small in pairwise(borders)):
        return None
    return [big // small for big, small in pairwise(borders)]


def _runs(sizes: Sequence[int], digits: Sequence[int]) -> list[range]:
    """The digits that each axis is made of."""
    runs: list[range] = []
    at = 0
    for size in sizes:
        first, product = at, 1
        while product < size:
            product, at = product * digits[at], at + 1
        runs.append(range(first, at))
    return runs


def _carrier(
    view: NodeView, digits: Sequence[int], before: Sequence[tuple[int, range]], behind: Sequence[tuple[int, range]]
) -> int | None:
    """The digit that channels follow, None where there is none, or more than one."""
    source, output = view.node.inputs[0], view.node.outputs[0]
    assert source is not None
    found: set[int] = set()
    for value, axes in ((source, before), (output, behind)):
        for axis, run in axes:
            atoms = _some(view.atoms(value, axis))
            if not view.maps.partition.marked(atoms).any():
                continue
            fits = _parts_of(view, atoms, [digits[i] for i in run])
            split = len(run) > 1 and value is source and not fits
            found.update([_chosen(view, digits, run, behind)] if split else [run[i] for i in fits])
        if found:
            break
    return found.pop() if len(found) == 1 else None


def _chosen(view: NodeView, digits: Sequence[int], run: range, behind: Sequence[tuple[int, range]]) -> int:
    """The digit of a split axis to follow: one that becomes a batch of products, else the largest that may change."""
    axes = [next(axis for axis, other in behind if digit in other) for digit in run]
    batches, fixed = follow(view.maps, view.node.outputs[0], axes)
    able = [i for i in range(len(run)) if i not in fixed] or list(range(len(run)))
    best = max(able, key=lambda i: (i in batches, digits[run[i]]))
    return run[best]


def _coordinate(sizes: Sequence[int], part: int) -> np.ndarray:
    """Index along one part for every position of the merged axis."""
    return np.unravel_index(np.arange(math.prod(sizes)), sizes)[part]


def _parts_of(view: NodeView, merged: Indices, sizes: Sequence[int]) -> list[int]:
    """The parts by which an axis is tied together already: all of one part's places are one set, and no others."""
    if len(sizes) == 1:
        return [0]
    roots = view.maps.partition.find(merged)
    count = len(np.unique(roots))
    fits = (len(np.unique(np.stack([roots, _coordinate(sizes, i)]), axis=1)[0]) for i in range(len(sizes)))
    return [i for i, pairs in enumerate(fits) if 1 < sizes[i] == count == pairs]


def _some(atoms: Indices | None) -> Indices:
    return np.empty(0, dtype=np.int64) if atoms is None else atoms


def _state_target(view: NodeView, source: ir.Value, target: _Target, linked: list[int]) -> None:
    """See that the requested shape keeps up: it is written anew, or its sizes are tied to those they are read from."""
    output, shape = view.node.outputs[0], _as_numbers(view, source, target)
    others = [entry for axis, entry in enumerate(target.entries) if entry.axis != (view.key(source), axis)]
    if shape is not None:
        computed = tuple(sorted({name for entry in others for name in entry.reads}))
        spans = [(axis, view.span(output, axis)) for axis in linked if shape[axis] > 1]
        slot: str | int = 1 if view.input(1) is not None else "shape"
        if spans or computed:
            view.state_sizes(slot, shape, spans, reads=computed)
        return
    for axis, entry in enumerate(target.entries):
        if entry.axis is not None and axis in linked and _same_size(view, entry.axis, output, axis):
            continue
        view.maps.pin_axes(entry.reads, view.reason)
        if entry.number != -1 and entry.number != 0:
            view.maps.pin(view.atoms(output, axis), view.reason)


def _same_size(view: NodeView, name: tuple[str, int], output: ir.Value, axis: int) -> bool:
    """Tie an axis to the one whose size is requested for it."""
    read, made = view.maps.axes[name[0]][name[1]], view.atoms(output, axis)
    if read is None or made is None:
        return read is None and made is None
    if len(read) != len(made):
        return False
    view.tie(read, made)
    return True


def _as_numbers(view: NodeView, source: ir.Value, target: _Target) -> list[int] | None:
    """The request as constants: 0 copies an axis of the input, and one open size may be -1."""
    if view.node.attributes.get_int("allowzero", 0):
        entries_zero = any(entry.number == 0 or entry.axis is not None for entry in target.entries)
        if entries_zero:
            return None
    shape: list[int] = []
    for i, entry in enumerate(target.entries):
        copies = entry.axis == (view.key(source), i)
        shape.append(0 if copies else -1 if entry.number is None else int(entry.number))
    return shape if shape.count(-1) <= 1 else None
