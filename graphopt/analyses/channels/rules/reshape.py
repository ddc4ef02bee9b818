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
from typing import Literal

import numpy as np
import onnx_ir as ir

from graphopt.analyses.channels.lookahead import follow
from graphopt.analyses.channels.node_view import NodeView
from graphopt.analyses.channels.partition import Indices
from graphopt.analyses.channels.shape_values import Entry

__all__ = ["flatten", "match_blocks", "reshape"]

Token = int | str | tuple[str, int] | None
"""Size of an axis: a number, a name that equal open sizes share, an open size times a number, None: not known."""
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
    source, output = view.input(0), view.node.outputs[0]
    rank = view.rank(source)
    if source is None or rank is None:
        return
    view.adopt_rank(output, 2)
    axis = view.node.attributes.get_int("axis", 1)
    axis = axis + rank if axis < 0 else axis
    before, behind = [_Part(source, i) for i in range(rank)], [_Part(output, 0), _Part(output, 1)]
    _tie_block(view, before[:axis], behind[:1])
    _tie_block(view, before[axis:], behind[1:])


def reshape(view: NodeView) -> None:
    """Match the blocks of both shapes; rewrite the requested shape where it states channels."""
    source, output = view.input(0), view.node.outputs[0]
    old = None if source is None else _parts(view, source)
    target = None if source is None or old is None else _target(view, source, old)
    if source is None or old is None or target is None:
        view.numbers(1)
        return
    new = _requested(view, target)
    linked: list[int] = []
    for parts, made in match_blocks([part.size(view) for part in old], [size for _, size in new]):
        linked += _tie_block(view, [old[i] for i in parts], [new[i][0] for i in made])
    _state_target(view, source, target, linked)
    for axis in set(range(view.rank(output) or 0)) - set(linked):
        view.maps.pin(view.atoms(output, axis), view.reason)


@dataclass(frozen=True, eq=False)
class _Part:
    """An axis, or half of an open one that repeats something: how often, and what.

    Attributes:
        value: The value.
        axis: Its axis.
        half: The open half comes first, what it repeats second.
    """

    value: ir.Value
    axis: int
    half: Literal["", "open", "repeated"] = ""

    def atoms(self, view: NodeView) -> Indices | None:
        """Atoms, None for an open size."""
        if self.half:
            return view.period(self.value, self.axis) if self.half == "repeated" else None
        return view.atoms(self.value, self.axis)

    def size(self, view: NodeView) -> int | str:
        """Length, or the name of an open one."""
        atoms = self.atoms(view)
        whole = view.maps.size(self.value, self.axis) if atoms is None else len(atoms)
        return f"{whole} open" if self.half == "open" else whole


def _parts(view: NodeView, value: ir.Value) -> list[_Part] | None:
    """The axes of a value; those that repeat something in two halves."""
    rank = view.rank(value)
    if rank is None:
        return None
    found: list[_Part] = []
    for axis in range(rank):
        whole = view.period(value, axis) is None
        found += [_Part(value, axis)] if whole else [_Part(value, axis, "open"), _Part(value, axis, "repeated")]
    return found


def _requested(view: NodeView, target: _Target) -> list[tuple[_Part, Token]]:
    """The axes of the output with their sizes; what the request says is taken where shape inference gave up."""
    output = view.node.outputs[0]
    view.adopt_rank(output, len(target.tokens))
    found: list[tuple[_Part, Token]] = []
    for axis, token in enumerate(target.tokens):
        if isinstance(token, tuple):
            name, repeated = token
            key = view.key(output), axis
            view.maps.periods.setdefault(key, view.maps.partition.new(repeated))
            found += [(_Part(output, axis, "open"), name), (_Part(output, axis, "repeated"), repeated)]
            view.maps.symbols[key] = name.removesuffix(" open") if name.endswith(" open") else f"{name} x {repeated}"
            continue
        if isinstance(token, int):
            view.adopt(output, axis, token)
        elif token is not None:
            view.maps.symbols[view.key(output), axis] = token
        found.append((_Part(output, axis), token))
    return found


def _target(view: NodeView, source: ir.Value, old: Sequence[_Part]) -> _Target | None:
    """Read the requested shape; sizes that nothing states come from shape inference."""
    content = view.content(1) if view.input(1) is not None else None
    if view.input(1) is None:  # before opset 5
        entries = tuple(Entry(number) for number in view.node.attributes.get_ints("shape", ()))
    elif content is None or content.ndim != 1:
        return None
    else:
        entries = tuple(content)
    output = view.node.outputs[0]
    inferred = view.sizes(output) if view.rank(output) == len(entries) else None
    literal_zero = bool(view.node.attributes.get_int("allowzero", 0))
    tokens: list[Token] = []
    for i, entry in enumerate(entries):
        token: Token = None if inferred is None else inferred[i]
        if entry.number == 0 and not literal_zero and i < (view.rank(source) or 0):
            token = view.maps.size(source, i)
        elif isinstance(entry.number, int) and entry.number > 0:
            token = entry.number
        elif entry.axis is not None:
            token = view.maps.axis_size(entry.axis)
        tokens.append(token)
    return _Target(entries, tuple(_resolve([part.size(view) for part in old], tokens)))


def _resolve(old: Sequence[int | str], new: list[Token]) -> list[Token]:
    """Work out the one size that is written -1 or computed, where open sizes cancel."""
    if new.count(None) != 1:
        return new
    rest, strange = list(old), list[int]()
    for i, token in enumerate(new):
        if token in rest and isinstance(token, str):
            rest.remove(token)
        elif isinstance(token, str):
            strange.append(i)
    others = [token for token in rest if isinstance(token, str)]
    pairs = list(zip(strange, others, strict=False))
    if len(strange) > len(others) or not all(_is_anonymous(name) or _is_anonymous(str(new[i])) for i, name in pairs):
        return new
    for i, name in pairs:  # one size, whose name shape inference has lost on the way
        new[i] = name
        rest.remove(name)
    total = math.prod(token for token in rest if isinstance(token, int))
    stated = math.prod(token for token in new if isinstance(token, int))
    names = [token for token in rest if isinstance(token, str)]
    if not stated or total % stated or len(names) > 1:
        return new
    left = total // stated
    found: Token = left if not names else names[0] if left == 1 else (names[0], left)
    return [found if token is None else token for token in new]


def _is_anonymous(name: str) -> bool:
    """Whether shape inference made the name up."""
    return name.startswith("unk__") or ":" in name


def _tie_block(view: NodeView, parts: Sequence[_Part], made: Sequence[_Part]) -> list[int]:
    """Tie the axes of a block index by index, or by the one digit that channels follow; gives the new axes tied."""
    wide, new = _wide(view, parts), _wide(view, made)
    if len(wide) == 1 and (len(new) == 1 or not new):
        to = new[0] if new else made[0] if made else None
        return [to.axis] if to is not None and _link(view, wide[0], to) else []
    sizes = [len(_some(part.atoms(view))) for part in wide]
    if len(new) == 1:  # the size of a merged axis follows from its parts
        view.adopt(new[0].value, new[0].axis, math.prod(sizes))
    after = [len(_some(part.atoms(view))) for part in new]
    digits = _digits(sizes, after)
    if digits is None or 0 in sizes:
        return []
    before = list(zip(wide, _runs(sizes, digits), strict=True))
    behind = list(zip(new, _runs(after, digits), strict=True))
    digit = _carrier(view, digits, before, behind)
    if digit is None:
        return []
    units = view.maps.partition.new(digits[digit])
    for part, run in (*before, *behind):
        if digit in run:
            own = [digits[i] for i in run]
            view.tie(_some(part.atoms(view)), units[_coordinate(own, digit - run[0])])
            view.settle(part.value, part.axis)
    return [part.axis for part, run in behind if digit in run]


def _link(view: NodeView, a: _Part, b: _Part) -> bool:
    if not a.half and not b.half:
        return view.link(a.value, a.axis, b.value, b.axis)
    left, right = a.atoms(view), b.atoms(view)
    if left is None and right is None:
        return False
    if right is None and not b.half and left is not None:
        right = view.adopt(b.value, b.axis, len(left))
    if left is None or right is None or len(left) != len(right):
        return False
    view.tie(left, right)
    view.settle(a.value, a.axis)
    view.settle(b.value, b.axis)
    return True


def _wide(view: NodeView, parts: Sequence[_Part]) -> list[_Part]:
    """Parts that are not of size 1."""
    return [part for part in parts if (atoms := part.atoms(view)) is None or len(atoms) != 1]


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
    view: NodeView,
    digits: Sequence[int],
    before: Sequence[tuple[_Part, range]],
    behind: Sequence[tuple[_Part, range]],
) -> int | None:
    """The digit that channels follow, None where there is none, or more than one."""
    found: set[int] = set()
    for side in (before, behind):
        for part, run in side:
            atoms = _some(part.atoms(view))
            if not view.maps.partition.marked(atoms).any():
                continue
            fits = _parts_of(view, atoms, [digits[i] for i in run])
            split = len(run) > 1 and side is before and not fits
            found.update([_chosen(view, digits, run, behind)] if split else [run[i] for i in fits])
        if found:
            break
    return found.pop() if len(found) == 1 else None


def _chosen(view: NodeView, digits: Sequence[int], run: range, behind: Sequence[tuple[_Part, range]]) -> int:
    """The digit of a split axis to follow: one that becomes a batch of products, else the largest that may change."""
    axes = [next(part.axis for part, other in behind if digit in other) for digit in run]
    batches, fixed = follow(view.maps, view.node.outputs[0], axes)
    batches |= {i for i, digit in enumerate(run) if any(p.half == "repeated" and digit in own for p, own in behind)}
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
    """See that the requested shape is written anew: what is tied follows, what was computed from channels stays."""
    output, shape = view.node.outputs[0], _as_numbers(view, source, target)
    others = [(entry, size) for entry, size in zip(target.entries, shape, strict=True) if size != 0]
    reads = {name for entry, size in others if size is not None for name in entry.reads}
    reads |= {(view.key(output), axis) for axis in linked if target.entries[axis].number is None and shape[axis] == -1}
    computed = tuple(sorted(reads))
    for entry, size in others:
        if size is None:
            view.maps.pin_axes(entry.reads, view.reason)
    for axis in linked:
        if shape[axis] is None:
            view.maps.pin(view.atoms(output, axis), view.reason)
    spans = [(axis, view.span(output, axis)) for axis in linked if (shape[axis] or 0) > 1]
    if view.refuse_mixed(shape, computed, linked):
        return
    slot: str | int = 1 if view.input(1) is not None else "shape"
    if spans or computed:
        view.state_sizes(slot, shape, spans, reads=computed)


def _as_numbers(view: NodeView, source: ir.Value, target: _Target) -> list[int | None]:
    """The request as numbers: 0 copies an axis of the input, one open size may be -1, others stay as computed."""
    literal_zero = bool(view.node.attributes.get_int("allowzero", 0))
    shape: list[int | None] = []
    for i, (entry, token) in enumerate(zip(target.entries, target.tokens, strict=True)):
        copies = entry.axis == (view.key(source), i) and not literal_zero
        number = token if entry.number is None and isinstance(token, int) else entry.number
        shape.append(0 if copies else None if number is None else int(number))
    if None in shape:
        known = [token if isinstance(token, int) else size for token, size in zip(target.tokens, shape, strict=True)]
        shape = [known[i] if size == -1 else size for i, size in enumerate(shape)]
    if shape.count(None) == 1 and -1 not in shape:
        shape[shape.index(None)] = -1
    return shape
