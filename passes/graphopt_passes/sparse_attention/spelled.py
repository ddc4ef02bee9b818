"""Operators that are an attention by themselves, spelled out in standard ones as exporters write them.

What they do besides, projections, biases and masks, stands in front of two products with a softmax between them. From
there on they are treated as any attention is; one that keeps all its scores gets its operator back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.analyses.attention import AttentionBlock
from graphopt.analyses.shapes import Shapes
from graphopt_passes.sparse_attention.spelled_masks import hidden, later, why_no_mask
from graphopt_passes.sparse_attention.writer import Writer, sweep

__all__ = ["Spelled", "spell_out", "why_not_spelled"]

_FILTER = -10000.0
_MICROSOFT = "com.microsoft"
_SPLIT = 4  # rank of queries, keys and values that have an axis of heads


@dataclass(frozen=True, eq=False)
class Spelled:
    """An operator that was taken out of its graph.

    Attributes:
        name: What its attention is called, before as after.
        node: The operator.
        inputs: What it read.
        made: Its outputs, and what makes the same now.
    """

    name: str
    node: ir.Node
    inputs: tuple[ir.Value | None, ...]
    made: tuple[tuple[ir.Value, ir.Value], ...]

    def back(self) -> None:
        """Put the operator where it was; of several, the last comes first."""
        last = self.made[0][1].producer()
        assert last is not None and isinstance(last.graph, ir.Graph)
        last.graph.insert_after(last, self.node)
        for index, value in enumerate(self.inputs):
            self.node.replace_input_with(index, value)
        spare = [new.producer() for _, new in self.made]
        for old, new in self.made:
            new.name = f"{new.name}_spelled"
            new.replace_all_uses_with(old, replace_graph_outputs=True)
        sweep([node for node in spare if node is not None])


@dataclass(frozen=True, kw_only=True, eq=False)
class _Parts:
    """What an operator computes attention of.

    Attributes:
        query: `[batch, heads, queries, width]`.
        key: `[batch, heads of keys, keys, width]`.
        value: As `key`.
        hidden: Added to scores, in this order.
        further: Makes further outputs, by their number.
        guarded: Whether a query that sees nothing gets zeros.
        repeated: How many heads of queries read one of keys.
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    hidden: tuple[ir.Value, ...] = ()
    further: dict[int, ir.Value]
    guarded: bool = False
    repeated: int = 1


def why_not_spelled(block: AttentionBlock, shapes: Shapes) -> str:
    """Why an operator cannot be spelled out; empty if it can."""
    node = block.nodes[-1]
    if block.dropped:
        return block.dropped
    if (node.domain, node.op_type) not in _READERS:
        return "its operator cannot be taken apart"
    if not (block.output.uses() or block.output.is_graph_output()):
        return "nothing reads it"
    if _by_head(node, shapes) and any(node.inputs[3:4]):
        return "nothing says whether its bias is meant for keys that come by head"
    return why_no_mask(node, shapes)


def _by_head(node: ir.Node, shapes: Shapes) -> bool:
    """Whether keys of MultiHeadAttention come by head."""
    keys = next(iter(node.inputs[1:2]), None)
    return node.op_type == "MultiHeadAttention" and shapes.rank(keys) == _SPLIT


def spell_out(model: ir.Model, blocks: Sequence[AttentionBlock], shapes: Shapes) -> list[Spelled]:
    """Replace operators; the first of the list was replaced first.

    Args:
        model: The model; it changes.
        blocks: Cores in graph order, each of which can be spelled out.
        shapes: Of the model.
    """
    writers, claimed = dict[ir.Graph, Writer](), set[ir.Value]()
    found: list[Spelled] = []
    for block in blocks:
        node = block.nodes[-1]
        assert isinstance(node.graph, ir.Graph)
        writer = writers.setdefault(node.graph, Writer(model, node.graph, {}))
        writer.before = node
        found.append(_replaced(writer, block, node, shapes, claimed))
    return found


def _replaced(writer: Writer, block: AttentionBlock, node: ir.Node, shapes: Shapes, claimed: set[ir.Value]) -> Spelled:
    parts = _READERS[node.domain, node.op_type](_Operator(writer, block, node, shapes))
    outputs = {0: _attended(writer, block, node, parts)} | parts.further
    made, inputs, graph = list[tuple[ir.Value, ir.Value]](), tuple(node.inputs), node.graph
    assert isinstance(graph, ir.Graph)
    for index, old in enumerate(node.outputs):
        if index not in outputs or not (old.uses() or old.is_graph_output()):
            continue
        new = outputs[index]
        if new in claimed:  # another operator computes the same
            writer.forget()
            new = writer.op("Identity", new)
        claimed.add(new)
        made.append((old, new))
        new.name, new.type, new.shape, new.doc_string = old.name, old.type, old.shape, old.doc_string
        new.metadata_props.update(old.metadata_props)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    return Spelled(block.name, node, inputs, tuple(made))


def _attended(writer: Writer, block: AttentionBlock, node: ir.Node, parts: _Parts) -> ir.Value:
    """The output of an operator."""
    kind = block.score_type
    key, value = (_repeated(writer, each, parts.repeated) for each in (parts.key, parts.value))
    scores = writer.op("MatMul", parts.query, writer.transposed(key, (0, 1, 3, 2)))
    scale = node.attributes.get_float("scale", 0.0) or 1 / math.sqrt(block.width)
    scores = writer.op("Mul", scores, writer.number(scale, kind))
    if block.softcap:
        cap = writer.number(block.softcap, kind)
        scores = writer.op("Mul", writer.op("Tanh", writer.op("Div", scores, cap)), cap)
    for bias in parts.hidden:
        scores = writer.op("Add", scores, bias)
    weights = writer.op("Softmax", scores, axis=-1)
    softmax = weights.producer()
    assert softmax is not None
    softmax.name = block.name
    if parts.guarded:
        weights = writer.op("Where", writer.op("IsNaN", weights), writer.number(0, kind), weights)
    result = writer.op("MatMul", weights, value)
    if len(block.output_axes) == _SPLIT:
        return result
    return writer.reshaped(writer.transposed(result, (0, 2, 1, 3)), [0, 0, block.heads * block.value_width])


def _repeated(writer: Writer, value: ir.Value, times: int) -> ir.Value:
    """Keys or values `[batch, heads, length, width]`, each head several times."""
    if times == 1:
        return value
    wider = writer.op("Expand", writer.unsqueezed(value, 2), writer.constant([1, 1, times, 1, 1]))
    return writer.reshaped(wider, [writer.size(value, 0), -1, writer.size(value, 2), writer.size(value, 3)])


@dataclass(frozen=True, eq=False)
class _Operator:
    """An operator, with shorter ways to write what it does."""

    writer: Writer
    block: AttentionBlock
    node: ir.Node
    shapes: Shapes

    def input(self, index: int) -> ir.Value | None:
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def needed(self, index: int) -> ir.Value:
        value = self.input(index)
        assert value is not None
        return value

    def split(self, value: ir.Value, heads: int, width: int) -> ir.Value:
        """`[batch, heads, length, width]` of `[batch, length, heads * width]`."""
        return self.writer.transposed(self.writer.reshaped(value, [0, 0, heads, width]), (0, 2, 1, 3))

    def cut(self, value: ir.Value, axis: int, sizes: Sequence[int]) -> list[ir.Value]:
        """Consecutive parts along an axis."""
        ends = np.cumsum(sizes)
        parts = zip(ends - np.array(sizes), ends, strict=True)
        return [self.writer.part(value, axis, int(start), int(end)) for start, end in parts]

    @property
    def kind(self) -> ir.DataType:
        """Element type of the scores."""
        return self.block.score_type

    @property
    def widths(self) -> tuple[int, int, int]:
        """Of all heads of queries, of keys and of values."""
        block = self.block
        return block.heads * block.width, block.kv_heads * block.width, block.kv_heads * block.value_width

    def heads(self, parts: Sequence[ir.Value]) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Queries, keys and values by head."""
        block, (query, key, value) = self.block, parts
        return (
            self.split(query, block.heads, block.width),
            self.split(key, block.kv_heads, block.width),
            self.split(value, block.kv_heads, block.value_width),
        )

    def masks(self, bias: ir.Value | None, key: ir.Value) -> tuple[ir.Value, ...]:
        """What scores get: a bias, what hides keys, and what hides later keys; `key` is by head."""
        fill = self.node.attributes.get_float("mask_filter_value", _FILTER)
        padding = hidden(self.writer, self.node, key, self.shapes, fill, self.kind)
        order = later(self.writer, key, self.kind) if self.block.causal == "yes" else None
        return tuple(value for value in (bias, padding, order) if value is not None)


def _multi_head(operator: _Operator) -> _Parts:
    packed = [operator.shapes.rank(operator.input(i)) == _SPLIT + 1 for i in (0, 1)]
    if _by_head(operator.node, operator.shapes):
        query = operator.split(operator.needed(0), operator.block.heads, operator.block.width)
        key, value = operator.needed(1), operator.needed(2)
        return _Parts(query=query, key=key, value=value, hidden=operator.masks(operator.input(5), key), further={})
    if packed[0]:
        flat = _unpacked(operator, operator.needed(0), 3)
    elif packed[1]:
        flat = [operator.needed(0), *_unpacked(operator, operator.needed(1), 2)]
    else:
        flat = [operator.needed(i) for i in range(3)]
    bias = operator.input(3)
    if bias is not None:
        parts = operator.cut(bias, 0, operator.widths)
        flat = [operator.writer.op("Add", value, part) for value, part in zip(flat, parts, strict=True)]
    query, key, value = operator.heads(flat)
    masks = operator.masks(operator.input(5), key)
    return _Parts(query=query, key=key, value=value, hidden=masks, further={1: key, 2: value})


def _unpacked(operator: _Operator, value: ir.Value, count: int) -> list[ir.Value]:
    """`[batch, length, heads * width]` each, of `[batch, length, heads, count, width]`."""
    writer, width = operator.writer, operator.block.heads * operator.block.width
    parts = [writer.op("Gather", value, writer.constant(np.array(i, np.int64)), axis=3) for i in range(count)]
    return [writer.reshaped(part, [0, 0, width]) for part in parts]


def _group_query(operator: _Operator) -> _Parts:
    """Without a cache its lengths of keys say nothing: they hide what lies behind the last query."""
    if operator.input(1) is None:
        flat = operator.cut(operator.needed(0), 2, operator.widths)
    else:
        flat = [operator.needed(i) for i in range(3)]
    query, key, value = operator.heads(flat)
    masks, times = operator.masks(operator.input(10), key), operator.block.heads // operator.block.kv_heads
    return _Parts(query=query, key=key, value=value, hidden=masks, further={1: key, 2: value}, repeated=times)


def _projecting(operator: _Operator) -> _Parts:
    writer = operator.writer
    projected = writer.op("MatMul", operator.needed(0), operator.needed(1))
    return _of_projected(operator, projected, operator.input(2), operator.input(5))


def _projecting_integers(operator: _Operator) -> _Parts:
    writer, offsets = operator.writer, [operator.input(6), operator.input(7)]
    sums = writer.op("MatMulInteger", operator.needed(0), operator.needed(1), *offsets[: 1 if None in offsets else 2])
    factor = writer.op("Mul", operator.needed(3), operator.needed(4))
    projected = writer.op("Mul", writer.op("Cast", sums, to=int(operator.kind)), factor)
    return _of_projected(operator, projected, operator.input(2), None)


def _of_projected(operator: _Operator, projected: ir.Value, bias: ir.Value | None, added: ir.Value | None) -> _Parts:
    writer = operator.writer
    whole = projected if bias is None else writer.op("Add", projected, bias)
    query, key, value = operator.heads(operator.cut(whole, 2, operator.widths))
    further = dict[int, ir.Value]()
    if len(operator.node.outputs) > 1:
        further[1] = writer.op("Concat", writer.unsqueezed(key, 0), writer.unsqueezed(value, 0), axis=0)
    return _Parts(query=query, key=key, value=value, hidden=operator.masks(added, key), further=further)


def _standard(operator: _Operator) -> _Parts:
    block, writer, mask = operator.block, operator.writer, operator.input(3)
    given, split = [operator.needed(i) for i in range(3)], operator.shapes.of(operator.needed(1)) or ()
    kv_heads = split[1] if len(split) == _SPLIT else block.kv_heads  # the core may start ahead of repeated heads
    assert isinstance(kv_heads, int)
    sizes = ((block.heads, block.width), (kv_heads, block.width), (kv_heads, block.value_width))
    query, key, value = (
        each if operator.shapes.rank(each) == _SPLIT else operator.split(each, *size)
        for each, size in zip(given, sizes, strict=True)
    )
    added = mask
    if mask is not None and operator.shapes.dtype(mask) == ir.DataType.BOOL:
        added = writer.op("Where", mask, *(writer.number(number, operator.kind) for number in (0, -np.inf)))
    masks = operator.masks(added, key)
    return _Parts(
        query=query,
        key=key,
        value=value,
        hidden=masks,
        further={},
        guarded=mask is not None,
        repeated=block.heads // kv_heads,
    )


_READERS: dict[tuple[str, str], Callable[[_Operator], _Parts]] = {
    ("", "Attention"): _standard,
    (_MICROSOFT, "Attention"): _projecting,
    (_MICROSOFT, "GroupQueryAttention"): _group_query,
    (_MICROSOFT, "MultiHeadAttention"): _multi_head,
    (_MICROSOFT, "QAttention"): _projecting_integers,
}
