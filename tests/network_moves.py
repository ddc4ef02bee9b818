"""Operators that move, look up, order or choose elements, for random networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from network_case import FEEDS, Branch, Drawing, Step, Tensor

__all__ = ["MOVES"]


def _any(g: Drawing, least: int = 0, most: int = 5) -> Tensor:
    """Mostly floats, but whatever it is, it can be moved."""
    found = g.find(lambda t: least <= t.rank <= most, 0.25)
    return found or g.floats(least, most)


def _axis(g: Drawing, rank: int) -> int:
    return g.number(-rank, rank - 1)


def _transpose(g: Drawing) -> Tensor:
    x = _any(g, 1)
    return g.add("Transpose", x, perm=[int(i) for i in g.rng.permutation(x.rank)])


def _reshape(g: Drawing) -> Tensor:
    """Sizes whose product is the same, one of them left to be found, some as they are."""
    x = _any(g)
    if g.maybe(0.2):
        return g.add("Flatten", x, axis=g.number(-x.rank, x.rank))
    sizes, rest = list[int](), x.size
    for _ in range(g.number(0, 4) if x.size else 0):
        divisors = [n for n in range(1, rest + 1) if rest % n == 0]
        sizes.append(g.one(divisors))
        rest //= sizes[-1]
    wanted = [*sizes, rest] if rest != 1 or not sizes or g.maybe() else sizes
    if not x.size:
        wanted = list(x.shape[::-1])
        return g.add("Reshape", x, g.ints(*wanted), allowzero=1)
    g.rng.shuffle(wanted)
    for i, size in enumerate(wanted):
        if i < x.rank and x.shape[i] == size and g.maybe(0.3):
            wanted[i] = 0
    if wanted and g.maybe(0.4):
        wanted[g.number(0, len(wanted) - 1)] = -1
    return g.add("Reshape", x, g.ints(*wanted))


def _merge(g: Drawing) -> Tensor:
    """Neighbouring axes become one, or one becomes two: reshapes that a view may do."""
    x = _any(g, 1, 4)
    axis, shape = g.number(0, x.rank - 1), list(x.shape)
    if axis + 1 < x.rank and g.maybe():
        shape[axis : axis + 2] = [shape[axis] * shape[axis + 1]]
    else:
        part = g.one([n for n in range(1, max(2, shape[axis] + 1)) if shape[axis] % n == 0])
        shape[axis : axis + 1] = [shape[axis] // part, part]
    return g.add("Reshape", x, g.ints(*shape))


def _by_its_shape(g: Drawing) -> Tensor:
    """A reshape as exporters write it: sizes of another tensor, gathered and joined."""
    x = _any(g, 2, 4)
    sizes = g.add("Shape", x)
    first = g.add("Unsqueeze", g.add("Gather", sizes, g.constant(np.int64(0))), g.ints(0))
    return g.add("Reshape", x, g.add("Concat", first, g.ints(-1), axis=0))


def _ones(g: Drawing) -> Tensor:
    x = _any(g, 0, 4)
    ones = [i for i, size in enumerate(x.shape) if size == 1]
    if ones and g.maybe():
        return g.add("Squeeze", x, g.ints(*([i for i in ones if g.maybe(0.7)] or ones)))
    count = g.number(1, min(2, 5 - x.rank))
    axes = sorted(int(i) for i in g.rng.choice(x.rank + count, count, replace=False))
    return g.add("Unsqueeze", x, g.ints(*axes))


def _expand(g: Drawing) -> Tensor:
    x = _any(g, 0, 4)
    shape = [g.number(1, 4) if size == 1 and g.maybe(0.7) else size for size in x.shape]
    shape = [*(g.number(1, 3) for _ in range(g.number(0, 1))), *shape]
    if g.maybe(0.7):
        return g.add("Expand", x, g.ints(*shape))
    return g.add("Tile", x, g.ints(*(g.number(1, 3) for _ in x.shape)))


def _slice(g: Drawing) -> Tensor:
    x = _any(g, 1)
    axes = sorted(int(i) for i in g.rng.choice(x.rank, g.number(1, min(2, x.rank)), replace=False))
    starts, ends, steps = list[int](), list[int](), list[int]()
    for axis in axes:
        size, step = x.shape[axis], g.one([1, 1, 1, 2, 3, -1, -2])
        low, high = sorted((g.number(0, size), g.number(0, size)))
        high = min(size, high + 1)
        start, end = (low, high) if step > 0 else (high - 1, low - 1)
        if step < 0 and low == 0:
            end = g.one([-(2**63), -size - 1])
        elif step > 0 and high == size:
            end = g.one([2**63 - 1, size, 2**31 - 1, 1000])
        if step > 0 and 0 < low < size and g.maybe(0.3):
            start = low - size
        starts, ends, steps = [*starts, start], [*ends, end], [*steps, step]
    axes = [axis - x.rank if g.maybe(0.3) else axis for axis in axes]
    if set(steps) == {1} and g.maybe():
        return g.add("Slice", x, g.ints(*starts), g.ints(*ends), g.ints(*axes))
    return g.add("Slice", x, g.ints(*starts), g.ints(*ends), g.ints(*axes), g.ints(*steps))


def _concat(g: Drawing) -> Tensor:
    x = _any(g, 1)
    axis, parts = _axis(g, x.rank), [x]
    for _ in range(g.number(0, 3)):
        others = lambda t: t.dtype == x.dtype and _but(t.shape, axis) == _but(x.shape, axis)  # noqa: E731
        found = g.find(others, 0.6)
        if found is None and x.dtype == "float32":
            shape = list(x.shape)
            shape[axis] = g.number(1, 4)
            found = g.input(g.normal(shape)) if g.maybe() else g.weight(*shape)
        parts.append(found or x)
    g.rng.shuffle(parts)
    return g.add("Concat", *parts, axis=axis)


def _but(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    axis %= len(shape) or 1
    return (len(shape), *shape[:axis], *shape[axis + 1 :])


def _split(g: Drawing) -> None:
    x = _any(g, 1)
    axis = _axis(g, x.rank)
    size = x.shape[axis]
    cuts = sorted({0, size, *(g.number(0, size) for _ in range(g.number(1, 2)))})
    sizes = [b - a for a, b in pairwise(cuts)] or [size]
    g.add_all("Split", x, g.ints(*sizes), count=len(sizes), axis=axis)


def _pad(g: Drawing) -> Tensor:
    x = g.floats(1) if g.maybe(0.8) else _any(g, 1)
    mode = g.one(["constant", "constant", "edge", "reflect", "wrap"] if g.opset >= 19 else ["constant", "edge"])
    least = -1 if mode == "constant" else 0  # ONNX Runtime takes negative ones in other modes for something else
    pads = [g.number(least, 2) if g.maybe(0.6) else 0 for _ in range(2 * x.rank)]
    if mode in ("reflect", "wrap"):
        pads = [min(pad, max(0, x.shape[i % x.rank] - 1)) for i, pad in enumerate(pads)]
    if any(size + pads[i] + pads[i + x.rank] < 1 for i, size in enumerate(x.shape)):
        pads = [max(0, pad) for pad in pads]
    if mode != "constant" or g.maybe():
        return g.add("Pad", x, g.ints(*pads), mode=mode)
    return g.add("Pad", x, g.ints(*pads), g.constant(np.array(g.one([0, 1, 3]), x.dtype)), mode=mode)


def _numbers(g: Drawing, shape: Sequence[int], below: int) -> Tensor:
    """Places along an axis, some from its end."""
    kind = g.one(["int64", "int64", "int32"])
    arrays = [g.rng.integers(-below, below, shape).astype(kind) for _ in range(FEEDS)] if below else []
    if not below:
        arrays = [np.zeros((*shape[:-1], 0), kind)] * FEEDS
    return g.constant(arrays[0]) if g.maybe(0.6) else g.input(arrays)


def _gather(g: Drawing) -> Tensor:
    x = _any(g, 1, 4)
    axis = _axis(g, x.rank)
    if x.shape[axis] and g.maybe(0.2):
        start = g.number(0, x.shape[axis] - 1)
        return g.add("Gather", x, g.ints(*range(start, x.shape[axis])[: g.number(1, 4)]), axis=axis)
    return g.add("Gather", x, _numbers(g, g.shape(0, 2), x.shape[axis]), axis=axis)


def _gather_elements(g: Drawing) -> Tensor:
    x = _any(g, 1, 4)
    axis = _axis(g, x.rank)
    shape = [g.number(1, size) if size else 0 for size in x.shape]
    shape[axis] = g.number(1, 5)
    return g.add("GatherElements", x, _numbers(g, shape, x.shape[axis]), axis=axis)


def _gather_nd(g: Drawing) -> Tensor:
    x = _any(g, 1, 4)
    batch = g.number(0, 1) if x.rank > 1 else 0
    depth = g.number(1, x.rank - batch)
    numbers = _coordinates(g, (*x.shape[:batch], g.number(1, 5)), x.shape[batch : batch + depth])
    return g.add("GatherND", x, numbers, batch_dims=batch)


def _coordinates(g: Drawing, shape: Sequence[int], sizes: Sequence[int]) -> Tensor:
    parts = [g.rng.integers(-size, max(1, size), (FEEDS, *shape)) for size in sizes]
    arrays = list(np.stack(parts, -1).astype(np.int64))
    return g.constant(arrays[0]) if g.maybe(0.6) else g.input(arrays)


def _scatter(g: Drawing) -> Tensor:
    """Places that are written twice in no order are not defined: they are all different, or added up."""
    x = g.floats(1, 4, lambda t: t.size > 0)
    reduction = g.one(["none", "none", "add", "max", "mul", "min"] if g.opset >= 18 else ["none"])
    if g.maybe():
        axis = g.number(0, x.rank - 1)
        rows = [g.rng.permuted(np.broadcast_to(_along(x.shape, axis), x.shape), axis=axis) for _ in range(FEEDS)]
        count = g.number(1, x.shape[axis])
        rows = [row.take(range(count), axis) for row in rows]
        places = g.constant(rows[0]) if g.maybe() else g.input(rows)
        return g.add("ScatterElements", x, places, g.input(g.normal(places.shape)), axis=axis, reduction=reduction)
    depth = g.number(1, x.rank)
    count = g.number(1, min(5, int(np.prod(x.shape[:depth]))))
    chosen = [g.rng.choice(int(np.prod(x.shape[:depth])), count, replace=False) for _ in range(FEEDS)]
    rows = [np.stack(np.unravel_index(row, x.shape[:depth]), -1) for row in chosen]
    places = g.constant(rows[0]) if g.maybe() else g.input(rows)
    return g.add("ScatterND", x, places, g.input(g.normal((count, *x.shape[depth:]))), reduction=reduction)


def _along(shape: Sequence[int], axis: int) -> np.ndarray:
    return np.arange(shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))])


def _depth(g: Drawing) -> Tensor:
    block = g.number(2, 3)
    if g.maybe():
        x = g.floats(4, 4, lambda t: t.shape[1] % block**2 == 0)
        return g.add("DepthToSpace", x, blocksize=block, mode=g.one(["DCR", "CRD"]))
    return g.add("SpaceToDepth", g.floats(4, 4), blocksize=block)


def _triangle(g: Drawing) -> Tensor:
    x = g.floats(2)
    return g.add("Trilu", x, g.constant(np.int64(g.number(-2, 2))), upper=g.number(0, 1))


def _one_hot(g: Drawing) -> Tensor:
    depth = g.number(1, 6)
    x = _numbers(g, g.shape(0, 3), depth)
    off_on = g.constant(np.float32([g.one([0, -1]), 1]))
    return g.add("OneHot", x, g.constant(np.int64(depth)), off_on, axis=g.number(-1, x.rank))


def _order(g: Drawing) -> None:
    x = g.floats(1) if g.maybe(0.7) else _any(g, 1)
    axis = _axis(g, x.rank)
    op = g.one(["ArgMax", "ArgMin", "CumSum", "TopK"])
    if op == "CumSum":
        g.add(op, x, g.constant(np.int64(axis)), exclusive=g.number(0, 1), reverse=g.number(0, 1))
    elif op == "TopK":
        count = g.ints(g.number(1, max(1, x.shape[axis])))
        g.add_all(op, x, count, count=2, axis=axis, largest=g.number(0, 1))
    else:
        g.add(op, x, axis=axis, keepdims=g.number(0, 1), select_last_index=g.number(0, 1))


def _branches(g: Drawing) -> Tensor:
    """An If on an input or on something computed; its branches read values from outside."""
    condition = g.find(lambda t: t.dtype == "bool" and t.size == 1 and t.rank <= 1, 0.7)
    condition = condition or g.input([np.array(bool(g.number(0, 1))) for _ in range(FEEDS)])
    x = g.floats()
    y = g.find(lambda t: t.dtype == "float32" and t.shape == x.shape) or g.input(g.normal(x.shape))
    stem, scale = f"b{len(g.tensors)}", g.constant(np.float32(g.one([0.5, 2.0])))
    graphs: list[Branch] = []
    for side in ("then", "else"):
        inner = [f"{stem}_{side}{i}" for i in range(2)]
        steps = [
            Step(g.one(["Tanh", "Relu", "Neg"]), (g.one([x, y]).name,), (inner[0],)),
            Step(g.one(["Mul", "Add"]), (inner[0], g.one([x, y, scale]).name), (inner[1],)),
        ]
        graphs.append(Branch(tuple(steps), (inner[1],)))
    return g.add("If", condition, then_branch=graphs[0], else_branch=graphs[1])


MOVES: Sequence[tuple[Callable[[Drawing], Any], int]] = (
    (_transpose, 5), (_reshape, 3), (_merge, 4), (_by_its_shape, 1), (_ones, 2), (_expand, 2), (_slice, 5),
    (_concat, 3), (_split, 2), (_pad, 2), (_gather, 2), (_gather_elements, 1), (_gather_nd, 1), (_scatter, 1),
    (_depth, 1), (_triangle, 1), (_one_hot, 1), (_order, 2), (_branches, 1),
)  # fmt: skip
"""Functions that add such operators, and how likely each is."""
