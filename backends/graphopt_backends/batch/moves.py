"""How samples lie in the outputs of operators that move entries, by how they lie in the inputs.

A rule is correct if the operator computes sample b of its outputs from sample b of its inputs, for every size of the
batch; where that is not so, or is not certain, it raises `MixedError`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from graphopt_backends.batch.site import MixedError, Rule, Site, Size, Times

__all__ = ["MOVES"]

_END = 10**9  # exporters write this, or more, where they mean the end


def _transpose(site: Site) -> Sequence[int]:
    order = site.node.attributes.get_ints("perm", range(site.rank(0))[::-1])
    return [axis for axis, source in enumerate(order) if source == site.axis(0)]


def _reshape(site: Site) -> Sequence[int]:
    target = list(site.numbers(1) or ())
    sizes = site.sizes(0)
    if site.integer("allowzero", 0) and any(size == 0 for size in target):
        raise MixedError("makes an empty value")
    target = [sizes[i] if isinstance(size, int) and size == 0 else size for i, size in enumerate(target)]
    if not any(isinstance(size, int) and size == -1 for size in target):
        return _as(site, target)
    left, right = _product(sizes), _product(size for size in target if isinstance(size, Times) or size != -1)
    try:
        rest = left / right if isinstance(left, Times) else left // right
    except (TypeError, ZeroDivisionError):
        raise MixedError("does not keep whole samples together") from None
    return _as(site, [size if isinstance(size, Times) or size != -1 else rest for size in target])


def _product(sizes: Iterable[Size]) -> Size:
    total: Size = 1
    for size in sizes:
        if isinstance(total, Times) and isinstance(size, Times):
            raise MixedError("multiplies the size of the batch by itself")
        total = size * total
    return total


def _as(site: Site, target: Sequence[Size]) -> Sequence[int]:
    """The same entries in another shape: samples begin at the same places if as many entries lie before them."""
    own = site.axis(0)
    found = [i for i, size in enumerate(target) if isinstance(size, Times)]
    if own is None or len(found) != 1:
        raise MixedError("fixes the size of the batch")
    sizes = site.sizes(0)
    if 0 in site.shape(0) or _product(sizes).factor != _product(target).factor:
        raise MixedError("does not keep whole samples together")
    if math.prod(sizes[:own]) != math.prod(target[: found[0]]):
        raise MixedError("does not keep whole samples together")
    return found


def _flatten(site: Site) -> Sequence[int]:
    sizes, axis = site.sizes(0), site.integer("axis", 1)
    cut = axis + len(sizes) if axis < 0 else axis
    return _as(site, [_product(sizes[:cut]), _product(sizes[cut:])])


def _squeeze(site: Site) -> Sequence[int]:
    own, axes = site.axis(0), site.axes(1, site.rank(0))
    if own is None or axes is None or own in axes:
        raise MixedError("may drop the axis of the batch")
    return [own - sum(axis < own for axis in axes)]


def _unsqueeze(site: Site) -> Sequence[int]:
    axes = site.axes(1, site.rank(0) + len(site.numbers(1) or ()))
    kept = [axis for axis in range(site.rank(0) + len(axes or ())) if axis not in (axes or ())]
    return [kept[site.axis(0) or 0]]


def _expand(site: Site) -> Sequence[int]:
    target, sizes = list(site.numbers(1) or ()), site.sizes(0)
    rank = max(len(target), len(sizes))
    found: set[tuple[int, int]] = set()
    pairs = zip([1] * (rank - len(sizes)) + list(sizes), [1] * (rank - len(target)) + target, strict=True)
    for axis, (size, wanted) in enumerate(pairs):
        if isinstance(size, Times) or isinstance(wanted, Times):
            symbols = [one for one in (size, wanted) if isinstance(one, Times)]
            numbers = [one for one in (size, wanted) if not isinstance(one, Times)]
            if any(number != 1 for number in numbers) or symbols[0] != symbols[-1]:
                raise MixedError("fixes the size of the batch")
            found.add((axis, symbols[0].factor))
    if len(found) != 1:
        raise MixedError("lays samples out along several axes")
    return [found.pop()[0]]


def _filled(site: Site) -> Sequence[int]:
    found = [axis for axis, size in enumerate(site.numbers(0) or ()) if isinstance(size, Times)]
    if len(found) != 1:
        raise MixedError("lays samples out along several axes")
    return found


def _range(site: Site) -> Sequence[int]:
    start, stop, step = (site.numbers(i) or () for i in range(3))
    if start != (0,) or step != (1,) or stop != (Times(1),):
        raise MixedError("computes with the size of the batch")
    return [0]


def _tile(site: Site) -> Sequence[int]:
    counts = site.numbers(1) or ()
    found = [axis for axis, count in enumerate(counts) if isinstance(count, Times)]
    own = site.axis(0)
    if own is None and len(found) == 1:
        return found
    if own is None or found or counts[own] != 1:
        raise MixedError("repeats samples")
    return [own]


def _concat(first: int, step: int) -> Rule:
    """Joins every `step`-th input from the first one on."""

    def rule(site: Site) -> Sequence[int]:
        data = range(first, len(site.inputs), step)
        site.only(*data)
        lays = {(site.axis(i), site.share(i)) for i in data}
        if len(lays) != 1:
            raise MixedError("joins values with samples to others")
        return [site.beside(site.integer("axis", 0), first)]

    return rule


def _split(site: Site) -> Sequence[int]:
    site.only(0)
    return [site.beside(site.integer("axis", 0))] * len(site.node.outputs)


def _slice(site: Site) -> Sequence[int]:
    site.only(0)
    starts, ends, steps = (site.inputs[i].content if site.given(i) else None for i in (1, 2, 4))
    own, count = site.axis(0), site.shape(1)[0]
    axes = site.axes(3, site.rank(0)) or list(range(count))
    for i, axis in enumerate(axes):
        if axis != own:
            continue
        start, end = (None if content is None else content.reshape(-1)[i].number for content in (starts, ends))
        step = 1 if not site.given(4) else None if steps is None else steps.reshape(-1)[i].number
        whole = end is not None and (end == Times(site.share(0)) if isinstance(end, Times) else end >= _END)
        if isinstance(start, Times) or start != 0 or step != 1 or not whole:
            raise MixedError("takes some of the samples")
    return [own or 0]


def _gather(site: Site) -> Sequence[int]:
    axis = site.integer("axis", 0) % site.rank(0)
    data, index = site.axis(0), site.axis(1)
    if data is not None and index is not None:
        raise MixedError("takes entries of samples by indices from samples")
    if index is not None:
        return [axis + index]
    own = site.beside(axis)
    return [own if own < axis else own + site.rank(1) - 1]


def _pointwise_index(*indices: int) -> Rule:
    """GatherElements and ScatterElements: all values have samples along one axis, and indices go along another."""

    def rule(site: Site) -> Sequence[int]:
        site.only(*indices)
        if len({(site.axis(i), site.share(i)) for i in indices}) != 1:
            raise MixedError("takes entries of samples by indices that lie otherwise")
        return [site.beside(site.integer("axis", 0))]

    return rule


def _gather_nd(site: Site) -> Sequence[int | None]:
    data, index, own = site.axis(0), site.axis(1), site.integer("batch_dims", 0)
    if index is None or index == site.rank(1) - 1:
        raise MixedError("takes entries of samples by indices that are the same for all")
    if data is None and not site.inputs[1].lay.numbers:
        if index < own:
            raise MixedError("takes its samples along an axis that has none")
        return [index]
    plain = not site.inputs[1].lay.numbers
    matched = plain and index == data == 0 and own > 0 and site.share(0) == site.share(1)
    if not matched and not (_numbered(site) and own == 0):
        raise MixedError("takes entries of samples by indices from samples")
    return [index]


def _numbered(site: Site) -> bool:
    """True if indices begin with the number of their sample, and data has one row for each sample."""
    return site.inputs[1].lay.numbers == "first" and site.axis(0) == 0 and site.share(0) == 1


def _scatter_nd(site: Site) -> Sequence[int]:
    index = site.axis(1)
    if not _numbered(site) or index == site.rank(1) - 1 or site.axis(2) != index or site.share(1) != site.share(2):
        raise MixedError("writes into samples by indices")
    return [0]


def _one_hot(site: Site) -> Sequence[int]:
    site.only(0)
    own, axis = site.axis(0) or 0, site.integer("axis", -1) % (site.rank(0) + 1)
    return [own + (axis <= own)]


def _pad(site: Site) -> Sequence[int]:
    site.only(0)
    pads, own = site.numbers(1) or (), site.axis(0)
    axes = site.axes(3, site.rank(0)) or list(range(site.rank(0)))
    if any(axis == own and (pads[i] != 0 or pads[i + len(axes)] != 0) for i, axis in enumerate(axes)):
        raise MixedError("pads the batch")
    return [own or 0]


def _resize(site: Site) -> Sequence[int]:
    site.only(0)
    own = site.axis(0) or 0
    axes = list(site.node.attributes.get_ints("axes", range(site.rank(0))))
    axes = [axis % site.rank(0) for axis in axes]
    given = site.given(3) and site.shape(3) != (0,)
    factor = (site.numbers(3) if given else site.numbers(2)) or ()
    wanted = Times(site.share(0)) if given else 1
    cropped = site.node.attributes.get_string("coordinate_transformation_mode", "") == "tf_crop_and_resize"
    kept = site.node.attributes.get_string("keep_aspect_ratio_policy", "stretch") != "stretch"
    if own in axes:
        found = factor[axes.index(own)]
        if cropped or kept or isinstance(found, Times) != given or found != wanted:
            raise MixedError("resizes the batch")
    return [own]


MOVES: Mapping[str, Rule] = {
    "Concat": _concat(0, 1),
    "ConstantOfShape": _filled,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _pointwise_index(0, 1),
    "GatherND": _gather_nd,
    "OneHot": _one_hot,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "Resize": _resize,
    "ScatterElements": _pointwise_index(0, 1, 2),
    "ScatterND": _scatter_nd,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "com.microsoft.QLinearConcat": _concat(2, 3),
}
"""Rules by operator."""
