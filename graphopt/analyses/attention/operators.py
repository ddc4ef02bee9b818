"""Operators that are an attention by themselves.

operator                     query, key, value                       not said by a block: `besides`, or `dropped` (!)
Attention                    [N, H, L, W] or [N, L, H*W]             caches!, lengths of keys!, windows!, scores out!
MultiHeadAttention           [N, L, H*W], keys [N, H, L, W] too      bias, masks of keys, packed inputs, keys as output,
                                                                     caches!, scores out!
GroupQueryAttention          [N, L, H*W]                             lengths of keys, packed inputs, keys as output,
                                                                     caches!, rotation!, windows!, sinks!
Attention of ONNX Runtime    all three one input, projected inside   the projection, caches!, rotation!
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import onnx_ir as ir

from graphopt.analyses.attention.block import AttentionBlock, Axes
from graphopt.analyses.attention.labels import Parts, as_axes
from graphopt.analyses.attention.masks import Masks, added_mask, causality, kept_mask
from graphopt.analyses.attention.past import cache_length
from graphopt.analyses.attention.sizes import Pair, Sizes
from graphopt.analyses.attention.strand import Strand, follow_back, preferred

__all__ = ["OPERATORS", "read_operator"]

OPERATORS = frozenset({"Attention", "GroupQueryAttention", "MultiHeadAttention", "QAttention"})
"""Names of operators that `read_operator` looks at."""

_SPLIT: Axes = ("batch", "head", "length", "width")
_FLAT: Axes = ("batch", "length", "head*width")
_ALL_FLAT = (_FLAT, _FLAT, _FLAT)
_WHOLE: Axes = ("batch", "length", "width")


@dataclass(frozen=True)
class _Operator:
    """A node with shorter ways to what it has."""

    node: ir.Node
    sizes: Sizes

    def input(self, index: int) -> ir.Value | None:
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def int(self, name: str, default: int = 0) -> int:
        return self.node.attributes.get_int(name, default)

    def float(self, name: str, default: float = 0.0) -> float:
        return self.node.attributes.get_float(name, default)

    def reads(self, *indices: int) -> bool:
        """Whether one of these inputs is given."""
        return any(self.input(index) is not None for index in indices)

    def used(self, *indices: int) -> bool:
        """Whether anybody reads one of these outputs."""
        outputs = [self.node.outputs[i] for i in indices if i < len(self.node.outputs)]
        return any(value.is_graph_output() or value.uses() for value in outputs)

    def size(self, value: ir.Value | None, axis: int) -> int | None:
        return self.sizes.fixed(value, axis)

    def axes(self, value: ir.Value | None) -> Axes:
        return _SPLIT if self.sizes.rank(value) == len(_SPLIT) else _FLAT

    def width(self, value: ir.Value | None, heads: int) -> int | None:
        """Width of one head."""
        size = self.size(value, -1)
        return size if size is None or self.axes(value) == _SPLIT else size // max(heads, 1)


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What an operator says of itself."""

    heads: int
    kv_heads: int
    inputs: tuple[ir.Value, ir.Value, ir.Value]
    widths: tuple[int | None, int | None]
    masks: Masks
    causal: bool
    past: bool = False
    softcap: float = 0.0
    zero_rows: bool = False
    axes: tuple[Axes, Axes, Axes] | None = None
    reasons: tuple[str, ...] = ()
    besides: tuple[str, ...] = ()
    factor: float = 1.0
    nodes: tuple[ir.Node, ...] = ()


def read_operator(node: ir.Node, name: str, sizes: Sizes) -> AttentionBlock | None:
    """Describe an operator; None if the numbers of heads or their width are not known."""
    reader = _READERS.get((node.domain, node.op_type))
    operator = _Operator(node, sizes)
    found = None if reader is None else reader(operator)
    if found is None or found.widths[0] is None or found.widths[1] is None or not found.heads or not found.kv_heads:
        return None
    query, key, value = found.inputs
    axes = found.axes or (operator.axes(query), operator.axes(key), operator.axes(value))
    lengths = [_length_of(value, x, sizes) for value, x in ((query, axes[0]), (key, axes[1]))]
    return AttentionBlock(
        name=name,
        form="operator",
        nodes=tuple(dict.fromkeys((*found.nodes, *found.masks.nodes, node))),
        query=query,
        key=key,
        value=value,
        output=node.outputs[0],
        query_axes=axes[0],
        key_axes=axes[1],
        value_axes=axes[2],
        output_axes=operator.axes(node.outputs[0]),
        score_axes=("batch", "head", "length", "length"),
        heads=found.heads,
        kv_heads=found.kv_heads,
        width=found.widths[0],
        value_width=found.widths[1],
        queries=_fixed(lengths[0]),
        keys=None if found.past else _fixed(lengths[1]),
        same_length=not found.past and None is not lengths[0] == lengths[1],
        scale=found.factor * (operator.float("scale") or 1 / math.sqrt(found.widths[0])),
        masks=tuple(found.masks.masks),
        causal=causality(found.masks, sizes, operator=found.causal),
        softcap=found.softcap,
        zero_rows=found.zero_rows,
        score_type=_score_type(query, sizes),
        past=found.past,
        besides=next(iter(found.besides), ""),
        dropped=next(iter(found.reasons), ""),
    )


def _score_type(query: ir.Value, sizes: Sizes) -> ir.DataType:
    known = sizes.shapes[0].dtype(query)
    return ir.DataType.FLOAT if known is None or known.is_integer() else known  # quantized inputs: scales are floats


def _standard(operator: _Operator) -> _Found | None:
    query, key, value, mask = (operator.input(i) for i in range(4))
    if query is None or key is None or value is None:
        return None
    split = operator.axes(query) == _SPLIT
    heads = (operator.size(query, 1) if split else operator.int("q_num_heads")) or 0
    kv_heads = (operator.size(key, 1) if split else operator.int("kv_num_heads")) or 0
    widths = operator.width(query, heads), operator.width(value, kv_heads)
    places = _follow(operator, (query, key, value), kv_heads == heads) if split else None
    past = None if places is None else cache_length(places[1].places, operator.sizes)
    masks, causal = Masks(past or (0, 0)), bool(operator.int("is_causal"))
    _read_mask(mask, masks, operator)
    found = _Found(
        heads=heads,
        kv_heads=kv_heads,
        inputs=(query, key, value),
        widths=widths,
        masks=masks,
        causal=causal,
        past=operator.reads(4, 5) or past is not None,
        softcap=operator.float("softcap"),
        zero_rows=True,
        reasons=(
            *_reasons(("its order counts from the first key of a cache", causal and past is not None)),
            *_standard_reasons(operator, mask, key),
        ),
    )
    return found if places is None else _further_back(found, places)


def _standard_reasons(operator: _Operator, mask: ir.Value | None, key: ir.Value) -> tuple[str, ...]:
    windows = operator.int("left_window_size", -1) >= 0 or operator.int("right_window_size", -1) >= 0
    columns = operator.sizes.size(mask, -1), _length(operator, key)
    return _reasons(
        ("its window is local already", windows),
        ("a cache joins its keys", operator.reads(4, 5)),
        ("it hides keys behind a length for each sample", operator.reads(6)),
        ("its keys or scores are outputs", operator.used(1, 2, 3)),
        ("its mask is shorter than the keys", None not in columns and columns[0] not in ((1, 1), columns[1])),
    )


@dataclass(frozen=True)
class _Trace:
    """Where an input of an operator comes from."""

    places: list[Strand]
    parts: Parts


def _follow(operator: _Operator, inputs: tuple[ir.Value, ...], repeats: bool) -> tuple[_Trace, ...]:
    """Follow inputs back, those of keys and values through a repetition of heads unless the operator repeats them."""
    found: list[_Trace] = []
    for i, value in enumerate(inputs):
        head = "head" if i == 0 or repeats else "kv_head"
        labels = (("batch",), (head,), ("length",), ("width",))
        sizes = {label[0]: operator.sizes.size(value, axis) for axis, label in enumerate(labels)}
        parts = Parts({name: size for name, size in sizes.items() if size is not None})
        found.append(_Trace(follow_back(Strand(value, labels), parts, operator.sizes), parts))
    return tuple(found)


def _further_back(found: _Found, traces: tuple[_Trace, ...]) -> _Found:
    """The same with inputs ahead of scales, transposes and repeated heads."""
    groups = [trace.parts.sizes.get("kv_head") for trace in traces[1:]]
    grouped = found.kv_heads < found.heads or None is not groups[0] == groups[1]
    chosen = [preferred(t.places, t.parts, repeats=grouped or i == 0) for i, t in enumerate(traces)]
    query, key, value = chosen
    axes = [as_axes(place.labels) for place in chosen]
    if axes[0] is None or axes[1] is None or axes[2] is None or value.factor != 1:
        return found
    kv_heads = int(groups[0][0]) if grouped and groups[0] is not None else found.kv_heads
    return replace(
        found,
        inputs=(query.value, key.value, value.value),
        axes=(axes[0], axes[1], axes[2]),
        kv_heads=kv_heads,
        factor=query.factor * key.factor,
        nodes=tuple(dict.fromkeys(node for place in chosen for node in place.nodes)),
    )


def _length(operator: _Operator, value: ir.Value) -> Pair | None:
    return _length_of(value, operator.axes(value), operator.sizes)


def _length_of(value: ir.Value, axes: Axes, sizes: Sizes) -> Pair | None:
    return sizes.size(value, axes.index("length"))


def _fixed(size: Pair | None) -> int | None:
    return int(size[0]) if size is not None and size[0] == size[1] else None


def _read_mask(mask: ir.Value | None, masks: Masks, operator: _Operator) -> None:
    if mask is None:
        return
    if operator.sizes.shapes[0].dtype(mask) == ir.DataType.BOOL:
        kept_mask(mask, masks, operator.sizes, negated=False, fill=-math.inf, added=True)
    else:
        added_mask(mask, masks, operator.sizes)


def _reasons(*cases: tuple[str, bool]) -> tuple[str, ...]:
    return tuple(reason for reason, holds in cases if holds)


def _multi_head(operator: _Operator) -> _Found | None:
    query, key, value, bias = (operator.input(i) for i in range(4))
    heads, masks = operator.int("num_heads"), Masks()
    if query is None or not heads:
        return None
    packed = key is None or value is None
    axes: tuple[Axes, Axes, Axes] | None = None
    width = operator.width(query, heads)
    if packed:
        width = operator.size(query, -1) if key is None else width
        axes = _ALL_FLAT
    _read_mask(operator.input(5), masks, operator)
    return _Found(
        heads=heads,
        kv_heads=heads,
        inputs=(query, key or query, value or key or query),
        widths=(width, width if packed else operator.width(value, heads)),
        masks=masks,
        causal=bool(operator.int("unidirectional")),
        past=operator.reads(6, 7),
        axes=axes,
        reasons=_reasons(
            ("a cache joins its keys", operator.reads(6, 7)),
            ("its scores are an output", operator.used(3)),
        ),
        besides=_reasons(
            ("query, key and value come packed", packed),
            ("its keys are outputs", operator.used(1, 2)),
            ("it hides keys by a mask of samples and keys", operator.reads(4)),
            ("it adds a bias to query, key and value itself", bias is not None),
        ),
    )


def _group_query(operator: _Operator) -> _Found | None:
    query, key, value = (operator.input(i) for i in range(3))
    heads, kv_heads, masks = operator.int("num_heads"), operator.int("kv_num_heads"), Masks()
    if query is None or not heads or not kv_heads:
        return None
    packed = key is None or value is None
    width = operator.width(query, heads + 2 * kv_heads if packed else heads)
    _read_mask(operator.input(10), masks, operator)
    window = operator.int("local_window_size", -1)
    return _Found(
        heads=heads,
        kv_heads=kv_heads,
        inputs=(query, key or query, value or query),
        widths=(width, width if packed else operator.width(value, kv_heads)),
        masks=masks,
        causal=bool(operator.int("causal", 1)),
        past=operator.reads(3, 4),
        softcap=operator.float("softcap"),
        axes=_ALL_FLAT,
        reasons=_reasons(
            (f"its window of {window} is local already", window > 0),
            ("a cache joins its keys", operator.reads(3, 4)),
            ("it turns query and key itself", bool(operator.int("do_rotary"))),
            ("it weighs a sink as well", operator.reads(11) or bool(operator.int("smooth_softmax"))),
            ("its scores are an output", operator.used(3)),
        ),
        besides=_reasons(
            ("query, key and value come packed", packed),
            ("it hides keys behind a length for each sample", True),
        ),
    )


def _projecting(operator: _Operator) -> _Found | None:
    source, weight = operator.input(0), operator.input(1)
    heads, total = operator.int("num_heads"), operator.size(weight, -1)
    if source is None or not heads or total is None:
        return None
    parts = operator.node.attributes.get_ints("qkv_hidden_sizes", ()) or (total // 3,) * 3
    past = operator.reads(8 if operator.node.op_type == "QAttention" else 4)
    return _Found(
        heads=heads,
        kv_heads=heads,
        inputs=(source, source, source),
        widths=(parts[0] // heads, parts[2] // heads),
        masks=Masks(),
        causal=bool(operator.int("unidirectional")),
        past=past,
        axes=(_WHOLE, _WHOLE, _WHOLE),
        reasons=_reasons(
            ("a cache joins its keys", past),
            ("it turns query and key itself", bool(operator.int("do_rotary"))),
        ),
        besides=("it projects its input itself",),
    )


_READERS: dict[tuple[str, str], Callable[[_Operator], _Found | None]] = {
    ("", "Attention"): _standard,
    ("com.microsoft", "Attention"): _projecting,
    ("com.microsoft", "GroupQueryAttention"): _group_query,
    ("com.microsoft", "MultiHeadAttention"): _multi_head,
    ("com.microsoft", "QAttention"): _projecting,
}
