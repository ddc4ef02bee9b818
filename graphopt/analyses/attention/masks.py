"""Masks taken apart: into biases, and conditions as small as the graph has them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir

from graphopt.analyses.attention.block import Condition, Mask
from graphopt.analyses.attention.order import Bounds, always, hides_later, order_of_mask, order_of_test
from graphopt.analyses.attention.sizes import Pair, Sizes
from graphopt.analyses.attention.uniform import is_small, uniform

__all__ = ["Masks", "added_mask", "causality", "kept_mask"]

_HIDES = -1e30
"""Below this a number swallows every score that is added to it in float32."""
_FOR_SURE = -1e3
_DEPTH = 24
_MERGED, _SEPARATE = 3, 4  # ranks of masks with samples and heads on one axis, and on two


@dataclass
class Masks:
    """What scores meet, and what it was taken from.

    Attributes:
        past: Length of the caches that join the keys.
        masks: In the order of application.
        nodes: Operators between their values and the scores.
        orders: How far ahead a query sees, for each mask or condition that is an order.
    """

    past: Pair = (0, 0)
    masks: list[Mask] = field(default_factory=list[Mask])
    nodes: list[ir.Node] = field(default_factory=list[ir.Node])
    orders: list[Pair] = field(default_factory=list[Pair])

    def is_causal(self, bounds: Bounds | None) -> bool:
        """Whether an order hides all later keys and no other."""
        if bounds is None:
            return False
        self.orders.append(bounds.last)
        return bounds.last == self.past and bounds.fill <= _FOR_SURE


def added_mask(value: ir.Value, masks: Masks, sizes: Sizes) -> None:
    """Take apart what is added to the scores."""
    value = _ahead_of_copies(value, masks, sizes)
    node = value.producer()
    if uniform(value, sizes) == 0:
        return
    if node is not None and node.op_type == "Add" and _both_vary(node, sizes):
        masks.nodes.append(node)
        for part in node.inputs:
            if part is not None:
                added_mask(part, masks, sizes)
        return
    if node is not None and node.op_type == "Where" and _chosen(node, masks, sizes):
        return
    if node is not None and node.op_type == "Reshape" and _told_apart(node, masks, sizes):
        return
    bounds = order_of_mask(value, sizes)
    causal = masks.is_causal(bounds)
    fill = bounds.fill if bounds is not None and causal else -np.inf
    masks.masks.append(Mask(kind="add", value=value, causal=causal, fill=fill))


def _both_vary(node: ir.Node, sizes: Sizes) -> bool:
    return all(uniform(value, sizes) is None for value in node.inputs)


def _told_apart(node: ir.Node, masks: Masks, sizes: Sizes) -> bool:
    """`Reshape(a + b)` from samples and heads on one axis to an axis for each, where a and b were there before."""
    source, made = node.inputs[0], node.outputs[0]
    if source is None or (sizes.rank(source), sizes.rank(made)) != (_MERGED, _SEPARATE):
        return False
    if any(sizes.size(source, axis) is None or sizes.size(source, axis) != sizes.size(made, axis) for axis in (-1, -2)):
        return False
    adding = source.producer()
    nodes = [node] if adding is None or adding.op_type != "Add" else [node, adding]
    parts = [_before_merging(value, made, sizes) for value in (nodes[-1].inputs if len(nodes) > 1 else (source,))]
    if None in parts:
        return False
    masks.nodes.extend(nodes)
    for part in parts:
        if part is not None:
            added_mask(part, masks, sizes)
    return True


def _before_merging(value: ir.Value | None, made: ir.Value, sizes: Sizes) -> ir.Value | None:
    """What broadcasts to `[batch, heads, queries, keys]` as `[batch * heads, queries, keys]` would behind a Reshape."""
    rank, node = sizes.rank(value), None if value is None else value.producer()
    if rank is None or rank < _MERGED or sizes.size(value, 0) == (1, 1):
        return value if rank is not None and rank <= _MERGED else None
    source = node.inputs[0] if node is not None and node.op_type == "Reshape" else None
    if source is None or sizes.rank(source) != _SEPARATE:
        return None
    wanted = [sizes.size(made, 0), sizes.size(made, 1), sizes.size(value, -2), sizes.size(value, -1)]
    return source if None not in wanted and wanted == [sizes.size(source, axis) for axis in range(_SEPARATE)] else None


def _chosen(node: ir.Node, masks: Masks, sizes: Sizes) -> bool:
    """`Where(condition, 0 or a bias, fill)`, either way round."""
    condition, yes, no = node.inputs
    for kept, hidden, negated in ((yes, no, False), (no, yes, True)):
        fill = uniform(hidden, sizes)
        plain = uniform(kept, sizes) == 0
        if condition is None or kept is None or fill is None or fill >= 0 or not (plain or fill <= _HIDES):
            continue
        masks.nodes.append(node)
        if not plain:
            added_mask(kept, masks, sizes)
        kept_mask(condition, masks, sizes, negated=negated, fill=fill, added=True)
        return True
    return False


def kept_mask(value: ir.Value, masks: Masks, sizes: Sizes, *, negated: bool, fill: float, added: bool) -> None:
    """Take apart a condition under which scores are seen."""
    found = list(_conditions(value, masks, sizes, negated, _DEPTH))
    if found:
        causal = all(condition.causal for condition in found)
        masks.masks.append(Mask(kind="keep", conditions=tuple(found), fill=fill, added=added, causal=causal))


def _conditions(value: ir.Value, masks: Masks, sizes: Sizes, negated: bool, depth: int) -> Iterable[Condition]:
    known = always(value, sizes)
    if known is not None and known != negated:
        return
    node = value.producer()
    bounds = order_of_test(value, sizes, negated=negated)
    if bounds is not None or node is None or depth == 0:
        yield Condition(value, negated, masks.is_causal(bounds))
    elif node.op_type == ("Or" if negated else "And"):
        masks.nodes.append(node)
        for part in node.inputs:
            if part is not None:
                yield from _conditions(part, masks, sizes, negated, depth - 1)
    elif node.op_type == "Not" and node.inputs[0] is not None:
        masks.nodes.append(node)
        yield from _conditions(node.inputs[0], masks, sizes, not negated, depth - 1)
    elif _is_copy(node, sizes) and node.inputs[0] is not None:
        masks.nodes.append(node)
        yield from _conditions(node.inputs[0], masks, sizes, negated, depth - 1)
    else:
        yield Condition(value, negated)


def _ahead_of_copies(value: ir.Value, masks: Masks, sizes: Sizes) -> ir.Value:
    """A mask before it is repeated, which broadcasting does as well."""
    while (node := value.producer()) is not None and _is_copy(node, sizes) and node.inputs[0] is not None:
        masks.nodes.append(node)
        value = node.inputs[0]
    return value


def _is_copy(node: ir.Node, sizes: Sizes) -> bool:
    """Whether what a node reads broadcasts to whatever its output does."""
    if node.domain not in ("", "ai.onnx") or not node.inputs:
        return False
    source, made = node.inputs[0], node.outputs[0]
    if node.op_type in ("Expand", "Identity"):
        return True
    if node.op_type == "Cast":
        types = [shapes.dtype(v) for shapes in sizes.shapes[:1] for v in (source, made)]
        return types[0] is not None and types[0] == types[1]
    if node.op_type not in ("Reshape", "Squeeze", "Unsqueeze"):
        return False
    ranks = sizes.rank(source), sizes.rank(made)
    if ranks[0] is None or ranks[1] is None or ranks[0] > ranks[1]:
        return False
    kept = [(sizes.size(source, -axis), sizes.size(made, -axis)) for axis in range(1, ranks[0] + 1)]
    ones = all(sizes.fixed(made, axis) == 1 for axis in range(ranks[1] - ranks[0]))
    return ones and all(before is not None and before == behind for before, behind in kept)


def causality(masks: Masks, sizes: Sizes, *, operator: bool = False) -> Literal["no", "yes", "unknown"]:
    """What the masks say about later keys.

    Args:
        masks: All masks.
        sizes: Sizes.
        operator: Whether the operator itself is causal.
    """
    conditions = [condition for mask in masks.masks for condition in mask.conditions]
    orders = (condition.causal for mask in masks.masks if mask.fill <= _FOR_SURE for condition in mask.conditions)
    if operator or any(mask.causal for mask in masks.masks) or any(orders):
        return "yes"
    if any(last[0] <= masks.past[0] and last[1] <= masks.past[1] for last in masks.orders):
        return "yes"  # an order that hides the nearest keys as well
    if masks.past == (0, 0) and any(_hides_later(mask, sizes) for mask in masks.masks):
        return "yes"
    values = [mask.value for mask in masks.masks if mask.value is not None]
    values += [condition.value for condition in conditions]
    return "unknown" if any(not _same_for_queries(value, sizes) for value in values) else "no"


def _hides_later(mask: Mask, sizes: Sizes) -> bool:
    if mask.kind == "add":
        return hides_later(mask.value, sizes, negated=False, boolean=False)
    tests = ((condition.value, condition.negated) for condition in mask.conditions if mask.fill <= _FOR_SURE)
    return any(hides_later(value, sizes, negated=negated, boolean=True) for value, negated in tests)


def _same_for_queries(value: ir.Value, sizes: Sizes) -> bool:
    rank = sizes.rank(value)
    if rank is None:
        return False
    return rank < 2 or sizes.fixed(value, -2) == 1 or sizes.fixed(value, -1) == 1 or is_small(value, sizes)
