"""How channels pass through attention and experts: tables `ATTENTION_RULES` and `ATTENTION_CONTRIB_RULES`.

operator                      what is tied                                                  what is pinned
Attention                     a head of keys and values with its query heads: all their     places within a head
  MultiHeadAttention,           places in q, k, v, bias, caches, head axis of the mask
  GroupQueryAttention
  with axes [N, H, S, D]      the head axes; places within a head of v ~ out, of q ~ k if   other places in a head
                                the scale is stated
Attention, QAttention         the same, by rows of the packed weight; in ~ weight in        places within a head
  of com.microsoft
RotaryEmbedding               all places of a head                                          places within a head
MoE, QMoE                     expert: its weights ~ its router column; inner neuron: row    packed axes (QMoE)
                                of fc1 and fc3 ~ column of fc2; in ~ out

Heads lie one after the other, and query heads that share a head of keys and values are neighbours; so each axis that
heads are on is cut into as many equal parts as there are heads of keys and values, and part i of one goes with part i
of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from graphopt.analyses.channels.node_view import NodeView
from graphopt.analyses.channels.partition import Indices
from graphopt.analyses.channels.rules.computing import Rule

__all__ = ["ATTENTION_CONTRIB_RULES", "ATTENTION_RULES"]


@dataclass(frozen=True)
class _Part:
    """Positions of an axis that heads lie on, all of them unless bounds are given."""

    value: ir.Value | None
    axis: int
    start: int = 0
    stop: int | None = None


def _tie_heads(view: NodeView, heads: int, parts: Sequence[_Part]) -> bool:
    """Tie the i-th of `heads` equal pieces of every part; False, and nothing said, where they do not fit."""
    found: list[tuple[_Part, Indices]] = []
    for part in parts:
        if part.value is None or not part.value.name:
            continue
        atoms = view.atoms(part.value, part.axis)
        if atoms is None or heads < 1 or len(atoms[part.start : part.stop]) % heads:
            return False
        found.append((part, atoms[part.start : part.stop].reshape(heads, -1)))
    first = found[0][1][:, 0]
    for part, table in found:
        view.tie(np.repeat(first, table.shape[1]), table.reshape(-1))
        if part.value is not None:
            view.settle(part.value, part.axis)
    view.call(first, "heads")
    return True


def _fitting(view: NodeView, value: ir.Value | None, axis: int, heads: int) -> list[_Part]:
    """The head axis of a mask or bias, unless it is 1 or missing."""
    atoms = view.atoms(value, axis)
    return [_Part(value, axis)] if atoms is not None and len(atoms) > 1 and len(atoms) % heads == 0 else []


def _state_heads(view: NodeView, name: str, heads: int, value: ir.Value, axis: int, stop: int | None = None) -> None:
    """Let an attribute follow the heads that are left on an axis."""
    atoms = view.atoms(value, axis)
    if atoms is not None:
        length = len(atoms[:stop])
        span = view.span(value, axis, 0, length, length // heads)
        view.state_sizes(name, (heads,), [(0, span)], scalar=True)


def _follow(view: NodeView, source: ir.Value | None, axis: int, values: Sequence[ir.Value | None]) -> None:
    for value in values:
        view.link(source, axis, value, axis)


def _output(view: NodeView, index: int) -> ir.Value | None:
    outputs = view.node.outputs
    return outputs[index] if index < len(outputs) and outputs[index].name else None


def _attention(view: NodeView) -> None:
    """Attention of the standard: heads side by side on the last axis, or on an axis of their own."""
    query, key, value, mask = (view.input(i) for i in range(4))
    made, caches = view.node.outputs[0], (view.input(4), view.input(5), _output(view, 1), _output(view, 2))
    rank, attributes = view.rank(query), view.node.attributes
    if query is None or key is None or value is None:
        return
    split = rank == 4
    axis = 1 if split else 2
    sizes = [view.atoms(v, axis) for v in (query, key)]
    heads = attributes.get_int("q_num_heads", 0) if not split else 0 if sizes[0] is None else len(sizes[0])
    shared = attributes.get_int("kv_num_heads", 0) if not split else 0 if sizes[1] is None else len(sizes[1])
    parts = [_Part(v, axis) for v in (query, key, value, made)]
    parts += [_Part(v, 1) for v in (*caches, _output(view, 3))]
    if not heads or not shared or not _tie_heads(view, shared, parts + _fitting(view, mask, -3, heads)):
        return
    _follow(view, query, 0, (key, value, made))
    if split:
        _within_heads(view, query, key, value)
        _follow(view, query, 2, (made,))
        _follow(view, key, 2, (value,))
    else:
        _state_heads(view, "q_num_heads", heads, query, 2)
        _state_heads(view, "kv_num_heads", shared, key, 2)
        _follow(view, query, 1, (made,))
        _follow(view, key, 1, (value,))


def _within_heads(view: NodeView, query: ir.Value, key: ir.Value, value: ir.Value) -> None:
    """Places within a head, where they have an axis of their own and no cache holds them."""
    if any(view.input(i) is not None for i in (4, 5)) or _output(view, 1) is not None or _output(view, 2) is not None:
        return
    view.link(value, 3, view.node.outputs[0], 3)
    if "scale" in view.node.attributes and (view.is_zero(query) or view.is_zero(key)):
        view.link(query, 3, key, 3)


def _multi_head(view: NodeView) -> None:
    """MultiHeadAttention: q, k and v apart or packed, with one bias for all three."""
    query, key, value, bias = (view.input(i) for i in range(4))
    heads, made = view.node.attributes.get_int("num_heads", 0), view.node.outputs[0]
    if query is None or not heads:
        return
    parts = [_Part(query, 2), _Part(made, 2), *(_Part(v, 1 if view.rank(v) == 4 else 2) for v in (key, value))]
    parts += [_Part(v, 1) for v in (view.input(6), view.input(7), *(_output(view, i) for i in (1, 2, 3)))]
    lengths = [_length(view, v) for v in (query, query if key is None else key, made)]
    if bias is not None:
        if view.rank(query) != 3 or None in lengths:
            return
        ends = np.cumsum([0, *(length or 0 for length in lengths)]).tolist()
        parts += [_Part(bias, 0, start, stop) for start, stop in pairwise(ends)]
    if _tie_heads(view, heads, parts + _fitting(view, view.input(5), 1, heads)):
        _state_heads(view, "num_heads", heads, query, 2)
        _follow(view, query, 0, (key, value, made))
        _follow(view, query, 1, (made,))


def _length(view: NodeView, value: ir.Value | None) -> int | None:
    """Length of all heads together: of axis 2, or of heads and places within them."""
    axis = 1 if view.rank(value) == 4 else 2
    atoms, last = view.atoms(value, axis), view.atoms(value, -1)
    if atoms is None or last is None:
        return None
    return len(atoms) if view.rank(value) == 3 else len(atoms) * len(last)


def _group_query(view: NodeView) -> None:
    """GroupQueryAttention: q, k and v apart, or side by side on the last axis of the first input."""
    query, key, value = (view.input(i) for i in range(3))
    attributes, made = view.node.attributes, view.node.outputs[0]
    heads, shared = attributes.get_int("num_heads", 0), attributes.get_int("kv_num_heads", 0)
    atoms = view.atoms(query, 2)
    if query is None or atoms is None or not heads or not shared:
        return
    if key is None:
        size = len(atoms) // (heads + 2 * shared)
        ends = (0, heads * size, (heads + shared) * size, len(atoms))
        parts = [_Part(query, 2, start, stop) for start, stop in pairwise(ends)]
        keys = _Part(query, 2, ends[1], ends[2])
    else:
        parts, keys = [_Part(v, 2) for v in (query, key, value)], _Part(key, 2)
    parts += [_Part(made, 2), _Part(view.input(11), 0)]
    parts += [_Part(v, 1) for v in (view.input(3), view.input(4), *(_output(view, i) for i in (1, 2, 3)))]
    if not _tie_heads(view, shared, parts + _fitting(view, view.input(10), 1, heads)) or keys.value is None:
        return
    _state_heads(view, "num_heads", heads, query, 2, parts[0].stop)
    whole = view.span(keys.value, 2, keys.start, keys.stop)
    span = replace(whole, unit=(whole.stop - whole.start) // shared)
    view.state_sizes("kv_num_heads", (shared,), [(0, span)], scalar=True)
    _follow(view, query, 0, (key, value, made))
    _follow(view, query, 1, (made,))


def _packed_weight(past: int, bias: int, scores: int, scales: tuple[int, ...]) -> Rule:
    """Rule of an attention that projects its input itself, with the weights of q, k and v side by side.

    Args:
        past: Input with the cache `[2, N, heads, time, places]`.
        bias: Input with the bias of the projections.
        scores: Input added to the scores, -1 for none.
        scales: Inputs with scale and zero point of the weight.
    """

    def rule(view: NodeView) -> None:
        source, weight, made = view.input(0), view.input(1), view.node.outputs[0]
        heads, atoms = view.node.attributes.get_int("num_heads", 0), view.atoms(weight, 1)
        if source is None or weight is None or atoms is None or not heads:
            return
        sizes = list(view.node.attributes.get_ints("qkv_hidden_sizes", ())) or [len(atoms) // 3] * 3
        ends = np.cumsum([0, *sizes]).tolist()
        pieces = list(pairwise(ends))
        parts = [_Part(weight, 1, *piece) for piece in pieces]
        for value in (view.input(bias), *(view.input(i) for i in scales)):
            if (_size(view, value) or 0) > 1:
                parts += [_Part(value, 0, *piece) for piece in pieces]
        parts += [_Part(made, 2), _Part(view.input(past), 2), _Part(_output(view, 1), 2)]
        parts += _fitting(view, view.input(scores), 1, heads) if scores >= 0 else []
        if ends[-1] != len(atoms) or not _tie_heads(view, heads, parts):
            return
        view.role(weight, 1, "output")
        view.role(weight, 0, "input")
        view.link(source, 2, weight, 0)
        _follow(view, source, 0, (made,))
        _follow(view, source, 1, (made,))
        _state_heads(view, "num_heads", heads, weight, 1, ends[1])
        if "qkv_hidden_sizes" in view.node.attributes:
            spans = [(i, view.span(weight, 1, *piece)) for i, piece in enumerate(pieces)]
            view.state_sizes("qkv_hidden_sizes", sizes, spans)

    return rule


def _size(view: NodeView, value: ir.Value | None) -> int | None:
    """Length of a vector."""
    atoms = view.atoms(value, 0) if view.rank(value) == 1 else None
    return None if atoms is None else len(atoms)


def _rotary(view: NodeView) -> None:
    """RotaryEmbedding: pairs within a head are turned, so that heads go as a whole."""
    source, made = view.input(0), view.node.outputs[0]
    contrib = view.node.domain == "com.microsoft"
    heads, rank = view.node.attributes.get_int("num_heads", 0), view.rank(source)
    atoms = view.atoms(source, -1)
    if source is None or rank not in (3, 4):
        return
    _follow(view, source, 0, (made,))
    _follow(view, source, 1, (made,))
    if rank == 4:
        _follow(view, source, 2, (made,))
        return
    half = view.atoms(view.input(2 if contrib else 1), -1)
    stated = heads > 0
    if not stated and atoms is not None and half is not None and len(half):
        heads = len(atoms) // (2 * len(half))
    if _tie_heads(view, heads, [_Part(source, 2), _Part(made, 2)]) and stated:
        _state_heads(view, "num_heads", heads, source, 2)


def _experts(view: NodeView) -> None:
    """MoE: an expert has a slice of every weight and a column of the router."""
    packed = view.node.op_type == "QMoE"
    source, router, made = view.input(0), view.input(1), view.node.outputs[0]
    first, second, third = (view.input(i) for i in ((2, 5, 8) if packed else (2, 4, 6)))
    if source is None or first is None or second is None:
        return
    biases = [view.input(i) for i in ((4, 7, 10) if packed else (3, 5, 7))]
    others = [view.input(i) for i in (3, 6, 9, 11, 12, 13)] if packed else []
    experts = view.atoms(first, 0)
    for axis in range((view.rank(source) or 1) - 1):
        view.link(source, axis, made, axis)
    every = [value for value in (second, third, *biases, *others) if value is not None]
    if experts is None or any((own := view.atoms(v, 0)) is None or len(own) != len(experts) for v in every):
        return
    if view.link(first, 0, router, -1):
        view.role(first, 0, "output")
        view.call(experts, "experts")
        for value in every:
            view.link(value, 0, first, 0)
        view.maps.floors.append((experts, view.node.attributes.get_int("k", 1)))
    if not packed:
        _neurons(view, first, second, third)


def _neurons(view: NodeView, first: ir.Value, second: ir.Value, third: ir.Value | None) -> None:
    """Inner neurons of all experts alike; a gate beside them is interleaved (fusion 1) or follows them (2)."""
    inner, rows, fusion = view.atoms(second, 2), view.atoms(first, 1), view.node.attributes.get_int("swiglu_fusion", 0)
    view.role(first, 2, "input")
    view.role(second, 1, "output")
    view.link(view.input(0), -1, first, 2)
    view.link(second, 1, view.node.outputs[0], -1)
    view.link(view.input(0), -1, view.node.outputs[0], -1)  # ONNX Runtime takes one width for both
    view.link(view.input(5), 1, second, 1)
    if third is not None:
        view.role(third, 2, "input")
        view.link(first, 2, third, 2)
    if inner is None or rows is None or len(rows) != len(inner) * (2 if fusion else 1):
        return
    view.role(first, 1, "output")
    view.role(second, 2, "input")
    view.tie(np.repeat(inner, 2) if fusion == 1 else np.tile(inner, len(rows) // len(inner)), rows)
    view.settle(first, 1)
    view.settle(second, 2)
    view.call(inner, "neurons")
    view.link(view.input(3), 1, first, 1)
    if third is not None:
        view.role(third, 1, "output")
        view.link(third, 1, second, 2)
        view.link(view.input(7), 1, second, 2)


ATTENTION_RULES: dict[str, Rule] = {"Attention": _attention, "RotaryEmbedding": _rotary}
ATTENTION_CONTRIB_RULES: dict[tuple[str, str], Rule] = {
    ("com.microsoft", "MultiHeadAttention"): _multi_head,
    ("com.microsoft", "GroupQueryAttention"): _group_query,
    ("com.microsoft", "Attention"): _packed_weight(past=4, bias=2, scores=5, scales=()),
    ("com.microsoft", "QAttention"): _packed_weight(past=8, bias=2, scores=-1, scales=(4, 7)),
    ("com.microsoft", "RotaryEmbedding"): _rotary,
    ("com.microsoft", "MoE"): _experts,
    ("com.microsoft", "QMoE"): _experts,
}
