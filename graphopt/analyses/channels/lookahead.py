"""Which part of a split axis the channels follow, told by what becomes of the parts.

An axis of 768 that is reshaped to [12, 64] can lose whole heads or the same places of every head, not both. Heads are
meant where the first part becomes a batch of matrix products, or is moved ahead of the tokens; a part that is sliced,
indexed, added over or normalized cannot be meant at all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from graphopt.analyses.channels.axis_maps import AxisMaps
from graphopt.analyses.channels.shape_values import numbers

__all__ = ["follow"]

_FARTHEST = 400
_ALONG = frozenset(
    {"Concat", "CumSum", "Gather", "GatherElements", "LpNormalization", "Pad", "Slice", "Softmax", "Split", "TopK"}
)
_BLIND = frozenset({"Compress", "Einsum", "Flatten", "If", "Loop", "NonZero", "Scan", "ScatterND", "Shape", "Size"})
_ATTENTIONS = frozenset({"Attention", "GroupQueryAttention", "MultiHeadAttention"})
Where = Mapping[int, int]
"""Part -> axis that it is on; a part that was merged with others is written as -1 - part, and can always change."""


def follow(maps: AxisMaps, output: ir.Value, axes: Sequence[int]) -> tuple[set[int], set[int]]:
    """Walk from a reshaped value on.

    Args:
        maps: The state; only shapes are read.
        output: What the reshape makes.
        axes: Axis of each part.

    Returns:
        Parts that become batches of matrix products, and parts that cannot lose anything.
    """
    batches, fixed = set[int](), set[int]()
    queue: deque[tuple[ir.Value, Where]] = deque([(output, dict(enumerate(axes)))])
    seen: set[tuple[int, tuple[tuple[int, int], ...]]] = set()
    while queue and len(seen) < _FARTHEST:
        value, where = queue.popleft()
        state = id(value), tuple(sorted(where.items()))
        if state in seen:
            continue
        seen.add(state)
        for use in value.uses():
            found = _step(maps, use.node, use.idx, where, batches, fixed)
            queue.extend((made, kept) for made, kept in found if kept)
    return {part if part >= 0 else -1 - part for part in batches}, {part for part in fixed if part >= 0}


def _step(
    maps: AxisMaps, node: ir.Node, index: int, where: Where, batches: set[int], fixed: set[int]
) -> Iterator[tuple[ir.Value, Where]]:
    """Note what a node does to the parts, and yield where they go."""
    kind, output = node.op_type, node.outputs[0]
    rank, made = len(maps.of(node.inputs[index]) or ()), len(maps.of(output) or ())  # type: ignore[arg-type]
    if rank > 3 and kind in _ATTENTIONS and index < 3:
        batches.update(part for part, axis in where.items() if axis == rank - 3)
    if not rank or kind in _ATTENTIONS or kind in _BLIND or node.domain not in ("", "ai.onnx"):
        return
    if kind in ("MatMul", "Gemm"):
        batches.update(part for part, axis in where.items() if axis < rank - 2)
    elif kind in ("InstanceNormalization", "GroupNormalization"):
        batches.update(part for part, axis in where.items() if axis == 1)
        fixed.update(part for part, axis in where.items() if axis > 1)
        yield output, where
    elif kind in ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"):
        first = node.attributes.get_int("axis", -1) % rank
        if index == 0:
            fixed.update(part for part, axis in where.items() if axis >= first)
            yield output, {part: axis for part, axis in where.items() if axis < first}
    elif kind == "Transpose":
        order = list(node.attributes.get_ints("perm", None) or reversed(range(rank)))
        batches.update(_moved_ahead(where, order))
        yield output, {part: order.index(axis) for part, axis in where.items()}
    elif kind in ("Squeeze", "Unsqueeze"):
        listed = (
            node.attributes.get_ints("axes", None) if len(node.inputs) < 2 else numbers(maps.content(node.inputs[1]))
        )
        if index == 0 and listed is not None:
            large = rank + len(listed) if kind == "Unsqueeze" else rank
            yield output, dict(_shifted(where, {axis % large for axis in listed}, large, kind))
    elif kind == "Reshape":
        if index == 0:
            yield output, dict(_reshaped(maps, node, where))
    elif kind.startswith("Reduce"):
        yield from _reduced(maps, node, where, rank, fixed)
    elif kind in _ALONG:
        yield from _along(maps, node, index, where, rank, fixed)
    elif made >= rank:
        yield output, {part: axis + made - rank for part, axis in where.items()}


def _moved_ahead(where: Where, order: Sequence[int]) -> set[int]:
    """Parts that trade places with an axis in front of all parts, while others do not: heads that leave their size."""
    front = [order.index(axis) for axis in range(min(where.values()))]
    moved = {part for part, axis in where.items() if any(order.index(axis) < place for place in front)}
    return moved if len(moved) < len(where) else set()


def _shifted(where: Where, dropped: set[int], rank: int, kind: str) -> Iterator[tuple[int, int]]:
    others = [axis for axis in range(rank) if axis not in dropped]
    for part, axis in where.items():
        if kind == "Unsqueeze":
            yield part, others[axis]
        elif axis in others:
            yield part, others.index(axis)


def _reshaped(maps: AxisMaps, node: ir.Node, where: Where) -> Iterator[tuple[int, int]]:
    """Parts that keep an axis, or are the first of a merged one."""
    old, new = maps.of(node.inputs[0]), maps.of(node.outputs[0])  # type: ignore[arg-type]
    if old is None or new is None:
        return
    sizes = [None if atoms is None else len(atoms) for atoms in old]
    made = [None if atoms is None else len(atoms) for atoms in new]
    for part, axis in where.items():
        to, size = _aligned(sizes, made, axis), sizes[axis]
        if to is not None and size is not None and (made[to] or 0) % size == 0:
            whole = size == made[to]
            yield part if whole or part < 0 else -1 - part, to


def _aligned(old: Sequence[int | None], new: Sequence[int | None], axis: int) -> int | None:
    """Where an axis begins in another shape; open sizes are taken to be equal."""
    i = j = 0
    while i < axis and j < len(new):
        left, right = old[i], new[j]
        i, j = i + 1, j + 1
        while left is not None and right is not None and left != right:
            if left < right and i < axis:
                left, i = left * (old[i] or 1), i + 1
            elif left > right and j < len(new):
                right, j = right * (new[j] or 1), j + 1
            else:
                return None
    while j < len(new) and new[j] == 1 != old[axis]:
        j += 1
    return j if i == axis and j < len(new) else None


def _reduced(
    maps: AxisMaps, node: ir.Node, where: Where, rank: int, fixed: set[int]
) -> Iterator[tuple[ir.Value, Where]]:
    listed = node.attributes.get_ints("axes", None) if len(node.inputs) < 2 else numbers(maps.content(node.inputs[1]))
    gone = set(range(rank)) if listed is None else {axis % rank for axis in listed}
    fixed.update(part for part, axis in where.items() if axis in gone)
    kept = {part: axis for part, axis in where.items() if axis not in gone}
    if not node.attributes.get_int("keepdims", 1):
        kept = {part: axis - sum(other < axis for other in gone) for part, axis in kept.items()}
    yield node.outputs[0], kept


def _along(
    maps: AxisMaps, node: ir.Node, index: int, where: Where, rank: int, fixed: set[int]
) -> Iterator[tuple[ir.Value, Where]]:
    """Operators that work along some axes and leave the others alone."""
    if index and node.op_type != "Concat":
        return
    touched = _touched(maps, node, rank)
    fixed.update(part for part, axis in where.items() if axis in touched)
    kept = {part: axis for part, axis in where.items() if axis not in touched}
    if node.op_type == "Gather":
        (axis,) = touched
        shift = len(maps.of(node.inputs[1]) or ()) - 1  # type: ignore[arg-type]
        kept = {part: own if own < axis else own + shift for part, own in kept.items()}
    for output in node.outputs:
        yield output, kept


def _touched(maps: AxisMaps, node: ir.Node, rank: int) -> set[int]:
    attributes = node.attributes
    if node.op_type == "Slice":
        axes = attributes.get_ints("axes", None)
        if len(node.inputs) > 3 and node.inputs[3] is not None:
            axes = numbers(maps.content(node.inputs[3]))
        return set(range(rank)) if axes is None else {axis % rank for axis in axes}
    if node.op_type == "Pad":
        content = numbers(maps.content(node.inputs[1])) if len(node.inputs) > 1 else attributes.get_ints("pads", None)
        if content is None or len(content) != 2 * rank:
            return set(range(rank))
        return {axis for axis in range(rank) if content[axis] or content[axis + rank]}
    defaults = {"Concat": 1, "Gather": 0, "GatherElements": 0, "Split": 0}
    return {attributes.get_int("axis", defaults.get(node.op_type, -1)) % rank}
