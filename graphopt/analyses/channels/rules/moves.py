"""How channels pass through operators that rearrange: one rule per operator, in the table `MOVE_RULES`.

operator             what is tied                                             what is pinned
Transpose, Squeeze,  every axis to where it goes                              -
  Unsqueeze
Expand               axes that stay; one that grows makes channels of its own sizes read elsewhere
Reshape, Flatten     axes kept whole; a merged axis to the one axis           splits; the other axes of a merge
                     among its parts that carries channels
Concat, Split,       positions; along the axis with their offset; in a slice  backward and partial slices with a
  Slice                with a step, those between two that are taken            step
Pad                  positions; constant padding makes channels of its own    reflected and negative padding
Resize, Upsample     axes that keep their size                                axes that change it
Gather               axes beside the one that is indexed; constant positions  the indexed axis otherwise; a single
                     ~ what they point at                                     position
Shape, Size,         nothing: sizes are followed through what reads them      -
  Constant
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analyses.channels.node_view import NodeView
from graphopt.analyses.channels.partition import Indices
from graphopt.analyses.channels.rules.computing import Rule
from graphopt.analyses.channels.rules.reshape import flatten, reshape
from graphopt.analyses.channels.shape_values import Entry, reads

__all__ = ["MOVE_RULES"]


def _transpose(view: NodeView) -> None:
    rank = view.rank(view.input(0))
    if rank is None:
        return
    view.adopt_rank(view.node.outputs[0], rank)
    order = view.node.attributes.get_ints("perm", None) or tuple(reversed(range(rank)))
    for axis, source in enumerate(order):
        view.link(view.input(0), source, view.node.outputs[0], axis)


def _dropped_axes(view: NodeView, rank: int) -> set[int] | None:
    """The axes that Squeeze removes or Unsqueeze adds, counted in the larger of the two tensors."""
    listed: Sequence[int] | None = view.node.attributes.get_ints("axes", None)
    if view.input(1) is not None:
        listed = view.numbers(1)
    elif listed is None:
        sizes = view.sizes(view.input(0))
        listed = None if sizes is None or None in sizes else [i for i, size in enumerate(sizes) if size == 1]
    return None if listed is None else {axis % rank for axis in listed}


def _squeeze(view: NodeView) -> None:
    source, output = view.input(0), view.node.outputs[0]
    unsqueeze = view.node.op_type == "Unsqueeze"
    large, small = (output, source) if unsqueeze else (source, output)
    added = view.content(1) if view.input(1) is not None else None
    count = len(view.node.attributes.get_ints("axes", ())) if added is None else added.size
    if count and (inside := view.rank(source)) is not None:
        view.adopt_rank(output, inside + count if unsqueeze else inside - count)
    rank = view.rank(large)
    dropped = None if not rank else _dropped_axes(view, rank)
    if rank is None or dropped is None:
        return
    kept = [axis for axis in range(rank) if axis not in dropped]
    for to, axis in enumerate(kept):
        view.link(large, axis, small, to)
    if not count and source is not None and dropped:  # axes of size 1 go, and channels may come down to one
        reads = tuple((view.key(source), axis) for axis in kept)
        view.state_sizes("axes" if view.opset < 13 else 1, sorted(dropped), (), reads=reads)


def _concat(view: NodeView) -> None:
    output = view.node.outputs[0]
    rank = view.rank(output)
    if not rank:
        return
    axis = view.node.attributes.get_int("axis", 1) % rank
    parts = [view.atoms(value, axis) for value in view.inputs]
    if all(part is not None for part in parts):
        joined = np.concatenate([part for part in parts if part is not None])
        made = view.adopt(output, axis, len(joined))
        if made is not None and len(joined) == len(made):
            view.tie(joined, made)
            for value in (*view.inputs, output):
                if value is not None:
                    view.settle(value, axis)
    for value in view.inputs:
        for other in range(rank):
            if other != axis:
                view.link(value, other, output, other)


def _split(view: NodeView) -> None:
    source, outputs = view.input(0), view.node.outputs
    rank = view.rank(source)
    if source is None or not rank:
        return
    axis = view.node.attributes.get_int("axis", 0) % rank
    whole, parts = view.atoms(source, axis), [view.atoms(value, axis) for value in outputs]
    lengths = [len(part) for part in parts if part is not None]
    stated = view.numbers(1) is not None if view.input(1) is not None else True
    if whole is not None and stated and len(lengths) == len(outputs) and sum(lengths) == len(whole):
        view.tie(whole, np.concatenate([part for part in parts if part is not None]))
        for value in (source, *outputs):
            view.settle(value, axis)
        spans = [(i, view.span(value, axis)) for i, value in enumerate(outputs)]
        view.state_sizes("split" if view.opset < 13 else 1, lengths, spans, drops=("num_outputs",))
    for value in outputs:
        for other in range(rank):
            if other != axis:
                view.link(source, other, value, other)


def _slice(view: NodeView) -> None:
    source, output = view.input(0), view.node.outputs[0]
    rank = view.rank(source)
    if source is None or not rank:
        return
    view.adopt_rank(output, rank)
    inputs = view.input(1) is not None
    names = ("starts", "ends", "axes")
    starts, ends, axes = (
        view.numbers(i) if inputs else view.node.attributes.get_ints(name, None) for i, name in enumerate(names, 1)
    )
    axes = range(rank) if axes is None and view.input(3) is None else axes
    steps = view.numbers(4) if view.input(4) is not None else None
    steps_known = view.input(4) is None or steps is not None
    if axes is not None:
        touched = {axis % rank for axis in axes[: len(starts) if starts is not None else None]}
        for axis in set(range(rank)) - touched:
            view.link(source, axis, output, axis)
    if starts is None or ends is None or axes is None or not steps_known:
        return
    slots: tuple[str | int, str | int] = (1, 2) if inputs else ("starts", "ends")
    for i, (start, end, axis) in enumerate(zip(starts, ends, axes, strict=False)):
        whole = view.atoms(source, axis)
        if whole is None:
            continue
        if steps is not None and steps[i] != 1:
            _strided_axis(view, axis, whole, slice(start, end, steps[i]), (slots[1], ends, i))
            continue
        first, last, _ = slice(start, end).indices(len(whole))
        made = view.adopt(output, axis, max(0, last - first))
        if made is not None and last - first == len(made):
            view.tie(whole[first:last], made)
            view.settle(source, axis)
            view.settle(output, axis)
            for slot, numbers, bound in ((slots[0], starts, first), (slots[1], ends, last)):
                view.state_sizes(slot, numbers, [(i, view.span(source, axis, 0, bound))])


def _strided_axis(
    view: NodeView, axis: int, whole: Indices, taken: slice, stated: tuple[str | int, Sequence[int], int]
) -> None:
    """Every n-th position: the n between two of them go together, so that the step stays right."""
    source, output = view.node.inputs[0], view.node.outputs[0]
    first, last, step = taken.indices(len(whole))
    if source is None or step < 1 or first >= step or len(whole) % step or last + step <= len(whole) + first:
        return
    made = view.adopt(output, axis, len(whole) // step)
    if made is None or len(made) * step != len(whole):
        return
    view.tie(np.repeat(made, step), whole)
    view.settle(source, axis)
    view.settle(output, axis)
    slot, ends, i = stated
    view.state_sizes(slot, ends, [(i, view.span(source, axis, 0, last))])


def _pad(view: NodeView) -> None:
    source, output = view.input(0), view.node.outputs[0]
    rank = view.rank(source)
    listed = view.numbers(1) if view.input(1) is not None else None
    pads = listed if listed is not None else view.node.attributes.get_ints("pads", None)
    if source is None or rank is None or pads is None:
        return
    named = view.numbers(3) if view.input(3) is not None else tuple(range(rank))
    if named is None or len(pads) != 2 * len(named):
        return
    constant = view.node.attributes.get_string("mode", "constant") == "constant"
    padded = {axis % rank: (i, pads[i], pads[i + len(named)]) for i, axis in enumerate(named)}
    slot: str | int = "pads" if view.input(1) is None else 1
    for axis in range(rank):
        position, before, after = padded.get(axis, (0, 0, 0))
        if before == after == 0:
            view.link(source, axis, output, axis)
        elif constant and before >= 0 and after >= 0:
            _padded_axis(view, axis, (before, after), (slot, pads, position, position + len(named)))


def _padded_axis(
    view: NodeView, axis: int, widths: tuple[int, int], stated: tuple[str | int, Sequence[int], int, int]
) -> None:
    """Padding along an axis: positions that come from the padding are channels that can go as well."""
    source, output = view.node.inputs[0], view.node.outputs[0]
    inside = view.atoms(source, axis)
    before, after = widths
    if source is None or inside is None:
        return
    made = view.adopt(output, axis, before + len(inside) + after)
    if made is None or len(made) != before + len(inside) + after:
        return
    view.tie(inside, made[before : before + len(inside)])
    view.settle(source, axis)
    view.settle(output, axis)
    slot, pads, front, back = stated
    head, tail = view.span(output, axis, 0, before), view.span(output, axis, before + len(inside), len(made))
    view.state_sizes(slot, pads, [(front, head), (back, tail)])


def _resize(view: NodeView) -> None:
    """Axes that keep their size; a list of sizes that names them follows."""
    source, output = view.input(0), view.node.outputs[0]
    old, new = view.sizes(source), view.sizes(output)
    if source is None or old is None or new is None or len(old) != len(new):
        return
    named = view.node.attributes.get_ints("axes", None)
    order = [axis % len(old) for axis in named] if named else list(range(len(old)))
    if view.node.op_type == "Resize" and view.input(3) is not None:
        _resize_to_sizes(view, source, order)
        return
    scales: Sequence[float] | None = view.node.attributes.get_floats("scales", None)
    if scales is None:
        scales = view.numbers(2 if view.node.op_type == "Resize" and view.opset >= 11 else 1)
    if scales is not None and len(scales) == len(order):
        for axis in range(len(old)):
            if old[axis] == new[axis] and (axis not in order or scales[order.index(axis)] == 1):
                view.link(source, axis, output, axis)


def _resize_to_sizes(view: NodeView, source: ir.Value, order: Sequence[int]) -> None:
    output, content = view.node.outputs[0], view.content(3)
    if content is None:
        return
    entries = list(content.reshape(-1))
    literal = all(entry.number is not None and not entry.reads for entry in entries)
    for axis in range(view.rank(source) or 0):
        entry = entries[order.index(axis)] if axis in order else None
        if entry is not None and entry.axis != (view.key(source), axis):
            view.maps.pin_axes(entry.reads, view.reason)
            if not literal:
                continue
        if view.link(source, axis, output, axis) and entry is not None and literal:
            position = order.index(axis)
            view.state_sizes(3, [int(e.number) for e in entries], [(position, view.span(output, axis))])


def _expand(view: NodeView) -> None:
    """Axes that stay are tied, and axes that grow make channels of their own; the requested shape is written anew."""
    source, output, content = view.input(0), view.node.outputs[0], view.content(1)
    rank = view.rank(source)
    if source is None or content is None or rank is None:
        view.numbers(1)
        return
    entries = list(content.reshape(-1))
    out_rank = max(rank, len(entries))
    view.adopt_rank(output, out_rank)
    shape: list[int | None] = [_requested(view, source, entry, len(entries) - i) for i, entry in enumerate(entries)]
    made = [len(entries) - back for back in range(1, out_rank + 1) if _expanded_axis(view, source, back)]
    spans = [(i, view.span(output, i - len(entries))) for i in made if i >= 0 and (shape[i] or 1) > 1]
    if view.refuse_mixed(shape, reads(content), range(out_rank)):
        return
    for entry, number in zip(entries, shape, strict=True):
        if number is None:
            view.maps.pin_axes(entry.reads, view.reason)
    view.state_sizes(1, shape, spans, reads=reads(content))


def _requested(view: NodeView, source: ir.Value, entry: Entry, back: int) -> int | None:
    """What is asked of an axis, counted from the right: a number, 1 to leave it as it is, None as it is computed."""
    output, rank = view.node.outputs[0], view.rank(source) or 0
    own = 1 if back > rank else view.maps.size(source, -back)
    if entry.number is not None:
        if isinstance(own, int):  # shape inference gives up on sizes that the graph computes
            view.adopt(output, -back, max(int(entry.number), own))
        return int(entry.number)
    asked = None if entry.axis is None else view.maps.axis_size(entry.axis)
    if isinstance(asked, str) and own in (1, asked):
        view.maps.symbols[view.key(output), (view.rank(output) or 0) - back] = asked
    return 1 if asked == own else None


def _expanded_axis(view: NodeView, source: ir.Value, back: int) -> bool:
    """Answer for an axis of the output, counted from the right: that of the input, or one that it is repeated along."""
    output = view.node.outputs[0]
    inside, made = view.atoms(source, -back), view.atoms(output, -back)
    grows = back > (view.rank(source) or 0) or (inside is not None and len(inside) == 1)
    if made is None or (not grows and not view.link(source, -back, output, -back)):
        return False
    view.settle(output, -back)
    if inside is not None:
        view.settle(source, -back)
    return True


def _gather(view: NodeView) -> None:
    source, index, output = view.input(0), view.input(1), view.node.outputs[0]
    rank, index_rank = view.rank(source), view.rank(index)
    if not rank or index_rank is None:
        return
    view.adopt_rank(output, rank + index_rank - 1)
    axis = view.node.attributes.get_int("axis", 0) % rank
    for other in range(rank):
        if other != axis:
            view.link(source, other, output, other if other < axis else other + index_rank - 1)
    places = view.maps.constants.of(index)
    if source is not None and index is not None and index_rank < 2 and places is not None:
        _gather_constant(view, source, axis, places.numpy().astype(np.int64))
        return
    for other in range(index_rank):
        view.link(index, other, output, axis + other)


def _gather_constant(view: NodeView, source: ir.Value, axis: int, places: Indices) -> None:
    """Constant positions: each goes with what it points at, and the list is renumbered; a single one stays."""
    output, inside = view.node.outputs[0], view.atoms(source, axis)
    if inside is None or not places.size or places.min() < -len(inside) or places.max() >= len(inside):
        return
    places = places % len(inside)
    if places.ndim:
        made = view.adopt(output, axis, len(places))
        if made is None or len(made) != len(places):
            return
        view.tie(inside[places], made)
        view.settle(output, axis)
    else:
        view.maps.pin(inside[places.reshape(1)], view.reason)
    view.settle(source, axis)
    view.state_indices(1, places, source, axis)


def _shape(view: NodeView) -> None:
    """Reading sizes touches nothing; whoever uses them does."""
    source = view.input(0)
    if source is None:
        return
    axes = view.maps.of(source)
    for axis in range(len(axes or ())):
        view.settle(source, axis)


def _constant(view: NodeView) -> None:
    output = view.node.outputs[0]
    for axis in range(view.rank(output) or 0):
        view.settle(output, axis)


MOVE_RULES: dict[str, Rule] = {
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _squeeze,
    "Reshape": reshape,
    "Flatten": flatten,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Pad": _pad,
    "Resize": _resize,
    "Upsample": _resize,
    "Expand": _expand,
    "Gather": _gather,
    "Shape": _shape,
    "Size": _shape,
    "Constant": _constant,
}
