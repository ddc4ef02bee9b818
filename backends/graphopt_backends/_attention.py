"""Operators of attention as the products and the softmax that they mean, from which one kernel is made again.

operator                             beside Q, K and V
Attention (ONNX)                     masks, causal order, windows, limits of scores, a cache, lengths of a cache
MultiHeadAttention (ONNX Runtime)    biases, masks of keys, causal order, a cache
Attention, QAttention (its too)      the product that makes Q, K and V; all of the above
GroupQueryAttention (its too)        see `_grouped.py`

Every option is computed as ONNX Runtime does, or the node stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from graphopt_backends._builder import Builder
from graphopt_backends._fold import static_shape

__all__ = [
    "Heads", "Mask", "Scores", "attend", "attention", "by_heads", "divide", "float_type", "given", "given_numbers",
    "is_divisible", "is_wanted", "many_heads", "projected", "side_by_side",
]  # fmt: skip

LEAST = -3.4028234663852886e38
"""What ONNX Runtime's own operators put in place of scores that are hidden; ONNX's has minus infinity."""


@dataclass(frozen=True)
class Heads:
    """Rows of numbers for every head: a value [batch, heads, rows, columns]."""

    value: ir.Value
    batch: int
    heads: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Mask:
    """What is done to scores: a value that is repeated to [batch, heads, queries, keys].

    Attributes:
        value: Booleans, False where a score is hidden, or numbers that are added.
        hidden: What a hidden score becomes; None: numbers are added.
        by_head: It differs between heads.
    """

    value: ir.Value
    hidden: float | None = None
    by_head: bool = False


@dataclass(frozen=True)
class Scores:
    """From products of queries and keys to what the softmax is taken of.

    Attributes:
        scale: Factor of the products.
        cap: Scores are cap * tanh(score / cap) before they are masked; 0: as they are.
        masks: What happens then, in order.
        may_be_empty: A query may see no key, and has a result of zeros then.
    """

    scale: float
    cap: float = 0.0
    masks: tuple[Mask, ...] = ()
    may_be_empty: bool = False


@dataclass(frozen=True)
class Attended:
    """What attention makes on its way: products, then limited, masked, and what the softmax makes of them; results."""

    products: ir.Value
    limited: ir.Value
    masked: ir.Value
    weights: ir.Value
    result: Heads


def attend(make: Builder, query: Heads, key: Heads, value: Heads, scores: Scores, dtype: np.dtype) -> Attended:
    """Add the nodes of an attention; heads of keys and values are repeated for those of the queries."""

    def number(x: float) -> ir.Value:
        return make.array(np.array(x, dtype))

    asked = query
    if query.rows == 1 and query.heads > key.heads and not any(mask.by_head for mask in scores.masks):
        # heads that share keys are rows of one matrix
        rows = query.heads // key.heads
        apart = make("Reshape", [query.value, make.ints([query.batch, key.heads, rows, query.columns])])
        query = replace(query, value=apart, heads=key.heads, rows=rows)
    keys, values = (_repeated(make, side, query.heads // side.heads) for side in (key, value))
    products = make("MatMul", [query.value, make("Transpose", [keys], perm=[0, 1, 3, 2])])
    if scores.scale != 1.0:
        products = make("Mul", [products, number(scores.scale)])
    limited = products
    if scores.cap:
        limited = make("Mul", [make("Tanh", [make("Mul", [products, number(1 / scores.cap)])]), number(scores.cap)])
    masked = limited
    for mask in scores.masks:
        if mask.hidden is None:
            masked = make("Add", [masked, mask.value])
        else:
            masked = make("Where", [mask.value, masked, number(mask.hidden)])
    weights = make("Softmax", [masked], axis=-1)
    if scores.may_be_empty:
        weights = make("Where", [make("IsNaN", [weights]), number(0), weights])
    result = make("MatMul", [weights, values])
    if query is not asked:
        products, limited, masked, weights, result = (
            make("Reshape", [stage, make.ints([query.batch, asked.heads, 1, columns])])
            for stage, columns in ((products, key.rows), (limited, key.rows), (masked, key.rows), (weights, key.rows),
                                   (result, value.columns))
        )  # fmt: skip
    return Attended(products, limited, masked, weights, replace(asked, value=result, columns=value.columns))


def _repeated(make: Builder, side: Heads, times: int) -> ir.Value:
    if times == 1:
        return side.value
    apart = make("Reshape", [side.value, make.ints([side.batch, side.heads, 1, side.rows, side.columns])])
    wide = make("Expand", [apart, make.ints([side.batch, side.heads, times, side.rows, side.columns])])
    return make("Reshape", [wide, make.ints([side.batch, side.heads * times, side.rows, side.columns])])


def by_heads(make: Builder, value: ir.Value, shape: Sequence[int], heads: int) -> Heads:
    """Heads that are an axis of their own, or lie side by side in the columns of [batch, rows, columns]."""
    if len(shape) == 4:
        return Heads(value, *shape)
    batch, rows, columns = shape
    apart = make("Reshape", [value, make.ints([batch, rows, heads, columns // heads])])
    return Heads(make("Transpose", [apart], perm=[0, 2, 1, 3]), batch, heads, rows, columns // heads)


def side_by_side(make: Builder, side: Heads) -> ir.Value:
    """Heads in the columns of [batch, rows, columns]."""
    rows = make("Transpose", [side.value], perm=[0, 2, 1, 3])
    return make("Reshape", [rows, make.ints([side.batch, side.rows, side.heads * side.columns])])


def joined(make: Builder, past: ir.Value | None, side: Heads) -> Heads:
    """Rows of a cache, and new ones behind them."""
    return side if past is None else _behind(make, past, (static_shape(past) or (0, 0, 0, 0))[2], side)


def _behind(make: Builder, past: ir.Value, count: int, side: Heads) -> Heads:
    return replace(side, value=make("Concat", [past, side.value], axis=2), rows=count + side.rows)


def given(node: ir.Node, index: int) -> ir.Value | None:
    """An input of a node, if it is there."""
    return node.inputs[index] if len(node.inputs) > index else None


def is_wanted(node: ir.Node, index: int) -> bool:
    """An output of a node is there and read."""
    return len(node.outputs) > index and (bool(node.outputs[index].uses()) or node.outputs[index].is_graph_output())


def float_type(value: ir.Value | None) -> np.dtype | None:
    """NumPy's type of a value of floats."""
    dtype = None if value is None else value.dtype
    return np.dtype(dtype.numpy()) if dtype is not None and dtype.is_floating_point() else None


def _size(value: ir.Value | None) -> tuple[int, ...]:
    """The fixed shape of a value; none of one that is not there."""
    return static_shape(value) or ()


def _are_fixed(node: ir.Node) -> bool:
    return all(value is None or static_shape(value) is not None for value in node.inputs)


def attention(graph: ir.Graph, node: ir.Node) -> bool:
    """Attention of ONNX, operator sets 23 to 25."""
    dtype, attributes = float_type(node.inputs[0]), node.attributes
    precision = attributes.get_int("softmax_precision", 0)
    if dtype is None or not _are_fixed(node) or (precision and np.dtype(ir.DataType(precision).numpy()) != dtype):
        return False
    make = Builder(graph, node)
    names = ("q_num_heads", "kv_num_heads", "kv_num_heads")
    shapes = [_size(value) for value in node.inputs[:3]]
    query, key, value = (
        by_heads(make, side, shape, attributes.get_int(name, 1))
        for side, shape, name in zip(node.inputs[:3], shapes, names, strict=True)
        if side is not None
    )
    past = given(node, 4)
    offset = (static_shape(past) or (0, 0, 0, 0))[2]
    key, value = joined(make, past, key), joined(make, given(node, 5), value)
    masks = [*_given_mask(make, given(node, 3), key.rows, dtype), *_order(make, node, query.rows, key.rows, offset)]
    scale = attributes.get_float("scale", 0.0) or query.columns**-0.5
    scores = Scores(scale, attributes.get_float("softcap", 0.0), tuple(masks), may_be_empty=bool(masks))
    found = attend(make, query, key, value, scores, dtype)
    result = found.result.value if len(shapes[0]) == 4 else side_by_side(make, found.result)
    stages = (found.products, found.limited, found.masked, found.weights)
    make.give([result, key.value, value.value, stages[attributes.get_int("qk_matmul_output_mode", 0)]])
    return True


def _given_mask(make: Builder, mask: ir.Value | None, keys: int, dtype: np.dtype) -> list[Mask]:
    """A mask that ends before the keys do hides the others."""
    shape = static_shape(mask)
    if mask is None or shape is None:
        return []
    is_set = mask.dtype == ir.DataType.BOOL
    if shape[-1] not in (1, keys):
        rest = (*shape[:-1], keys - shape[-1])
        end = make.array(np.zeros(rest, bool) if is_set else np.full(rest, -np.inf, dtype))
        mask = make("Concat", [mask, end], axis=-1)
    return [Mask(mask, -np.inf if is_set else None, _is_by_head(shape))]


def _is_by_head(shape: Sequence[int]) -> bool:
    return len(shape) > 2 and shape[-3] > 1


def given_numbers(added: ir.Value) -> Mask:
    """Numbers that are added to scores."""
    return Mask(added, by_head=_is_by_head(_size(added)))


def _order(make: Builder, node: ir.Node, queries: int, keys: int, offset: int) -> list[Mask]:
    """Which keys a query sees, by their numbers, and how many keys of each entry of the batch there are."""
    attributes, lengths = node.attributes, given(node, 6)
    windows = [attributes.get_int(f"{side}_window_size", -1) for side in ("left", "right")]
    if attributes.get_int("is_causal", 0):
        windows[1] = 0 if windows[1] < 0 else min(windows[1], 0)
    key, query = np.arange(keys), np.arange(queries)[:, None]
    if lengths is None:
        seen = np.ones((queries, keys), bool)
        for sign, window in zip((-1, 1), windows, strict=True):
            seen &= (sign * (key - query - offset) <= window) if window >= 0 else True
        return [] if seen.all() else [Mask(make.array(seen), -np.inf)]
    counts = make("Reshape", [make("Cast", [lengths], to=ir.DataType.INT64), make.ints([-1, 1, 1, 1])])
    masks = [Mask(make("Less", [make.ints(key), counts]), -np.inf)]
    first = make("Sub", [counts, make.array(np.array(queries, np.int64))])
    ahead = make("Sub", [make.array((key - query).astype(np.int64)), first])
    for sign, window in zip((-1, 1), windows, strict=True):
        if window >= 0:
            distance = ahead if sign > 0 else make("Neg", [ahead])
            masks.append(Mask(make("LessOrEqual", [distance, make.array(np.array(window, np.int64))]), -np.inf))
    return masks


def many_heads(graph: ir.Graph, node: ir.Node) -> bool:
    """MultiHeadAttention; keys and values may come as a cache does, with heads as an axis."""
    dtype, heads = float_type(node.inputs[0]), node.attributes.get_int("num_heads", 1)
    shapes = [static_shape(value) for value in node.inputs]
    ranks = [len(shape) for shape in shapes[:3] if shape is not None]
    shared = any(given(node, i) is not None for i in (8, 9))
    if dtype is None or not _are_fixed(node) or ranks not in ([3, 3, 3], [3, 4, 4]) or shared:
        return False
    sizes, bias, past = [_size(value) for value in node.inputs[:3]], given(node, 3), _size(given(node, 6))
    keys = sizes[1][-2] + (past[2] if past else 0)
    if (bias is not None and ranks != [3, 3, 3]) or not _hides_keys(given(node, 4), keys):
        return False
    make = Builder(graph, node)
    sides = [value for value in node.inputs[:3] if value is not None]
    if bias is not None:
        parts = make.parts(bias, [size[2] for size in sizes], 0)
        sides = [make("Add", [side, part]) for side, part in zip(sides, parts, strict=True)]
    query, key, value = (by_heads(make, side, size, heads) for side, size in zip(sides, sizes, strict=True))
    key, value = joined(make, given(node, 6), key), joined(make, given(node, 7), value)
    found = _merged(make, node, (query, key, value), (given(node, 4), given(node, 5)), dtype)
    make.give([side_by_side(make, found.result), key.value, value.value, found.masked])
    return True


def _hides_keys(mask: ir.Value | None, keys: int) -> bool:
    """A mask is one of those that ONNX Runtime knows, and for so many keys; so is none at all."""
    shape = static_shape(mask)
    return mask is None or (shape is not None and (len(shape) == 1 or (len(shape) in (2, 3) and shape[-1] == keys)))


def _merged(
    make: Builder, node: ir.Node, sides: tuple[Heads, Heads, Heads], masks: tuple[ir.Value | None, ir.Value | None],
    dtype: np.dtype,
) -> Attended:  # fmt: skip
    """Attention as ONNX Runtime's operators have it: a mask of keys, numbers that are added, causal order."""
    (query, key, _), (padding, added) = sides, masks
    parts: list[Mask] = []
    if padding is not None:
        hidden = np.array(node.attributes.get_float("mask_filter_value", -10000.0), dtype)
        parts.append(Mask(_padding(make, padding, query.batch, key.rows, hidden)))
    if added is not None:
        parts.append(given_numbers(added))
    if node.attributes.get_int("unidirectional", 0) and query.rows > 1:
        seen = np.tri(query.rows, key.rows, key.rows - query.rows, dtype=bool)
        parts.append(Mask(make.array(seen), LEAST))
    scale = node.attributes.get_float("scale", 0.0) or query.columns**-0.5
    return attend(make, *sides, Scores(scale, masks=tuple(parts)), dtype)


def _padding(make: Builder, mask: ir.Value, batch: int, keys: int, hidden: np.ndarray) -> ir.Value:
    """Zeros and numbers to add, from a mask of keys, or from where keys end and begin."""
    shape = _size(mask)
    zero, numbers = make.array(np.array(0, np.int32)), make.array(np.arange(keys, dtype=np.int32))

    def column(value: ir.Value) -> ir.Value:
        return make("Reshape", [value, make.ints([batch, 1, 1, 1])])

    if len(shape) > 1:
        rows = shape[1] if len(shape) == 3 else 1
        seen = make("Greater", [make("Reshape", [mask, make.ints([shape[0], 1, rows, keys])]), zero])
    elif shape == (2 * batch,):
        ends, begins = make.parts(mask, [batch, batch], 0)
        inside = make("Less", [numbers, column(ends)])
        seen = make("And", [inside, make("Not", [make("Less", [numbers, column(begins)])])])
    else:
        ends = mask if shape == (batch,) else make.parts(mask, [batch, sum(shape) - batch], 0)[0]
        seen = make("Less", [numbers, column(ends)])
    return make("Where", [seen, make.array(np.zeros_like(hidden)), make.array(hidden)])


def projected(graph: ir.Graph, node: ir.Node) -> bool:
    """Attention of ONNX Runtime: one product makes queries, keys and values."""
    source, weight = node.inputs[0], node.inputs[1]
    size, columns, dtype = static_shape(source), static_shape(weight), float_type(source)
    if size is None or columns is None or dtype is None or given(node, 6) is not None or not is_divisible(node, size):
        return False
    make, bias = Builder(graph, node), given(node, 2)
    widths = list(node.attributes.get_ints("qkv_hidden_sizes") or [columns[1] // 3] * 3)
    whole = make("MatMul", [source, weight])
    if bias is not None:
        whole = make("Add", [whole, bias])
    divide(make, node, whole, size, widths, dtype)
    return True


_MASKS = {"Attention": (3, 4, 5), "QAttention": (5, 8, 9)}
"""Inputs of the mask of keys, the cache, and numbers that are added."""


def is_divisible(node: ir.Node, size: Sequence[int]) -> bool:
    """Options of an attention whose queries, keys and values lie side by side are among those that are computed.

    Args:
        node: The attention.
        size: Of its first input.
    """
    mask, past, _ = _MASKS[node.op_type]
    cached = (static_shape(given(node, past)) or (0, 0, 0, 0, 0))[3]
    others = any(node.attributes.get_int(name, 0) for name in ("do_rotary", "past_present_share_buffer"))
    return not others and _are_fixed(node) and _hides_keys(given(node, mask), cached + size[1])


def divide(
    make: Builder, node: ir.Node, whole: ir.Value, size: Sequence[int], widths: Sequence[int], dtype: np.dtype
) -> None:
    """Put attention on queries, keys and values that lie side by side in the place of a node."""
    heads, (mask, past, added) = node.attributes.get_int("num_heads", 1), _MASKS[node.op_type]
    query, key, value = (
        by_heads(make, part, (*size[:2], width), heads)
        for part, width in zip(make.parts(whole, widths, 2), widths, strict=True)
    )
    cache = given(node, past)
    if cache is not None:
        count = (static_shape(cache) or (0, 0, 0, 0, 0))[3]
        old = [make("Gather", [cache, make.array(np.array(i, np.int64))], axis=0) for i in (0, 1)]
        key, value = _behind(make, old[0], count, key), _behind(make, old[1], count, value)
    found = _merged(make, node, (query, key, value), (given(node, mask), given(node, added)), dtype)
    both: ir.Value | None = None
    if is_wanted(node, 1):
        both = make("Concat", [make("Unsqueeze", [side.value, make.ints([0])]) for side in (key, value)], axis=0)
    make.give([side_by_side(make, found.result), both])
