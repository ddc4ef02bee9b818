"""Attention: the operator, and the products around a softmax that exporters write instead, become one kernel.

`fuse` looks for MatMul(softmax(arithmetic on MatMul(Q, K)), V) and puts one node in its place. Factors of Q and K move
behind their product. Keys and values that are repeated for several heads are read as they were before, with strides of
zero: what takes part may have its batch axes split in different ways, and the finest split serves all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as ir_passes

from graphopt_backends._fold import is_constant, static_shape
from graphopt_backends.kernels.attention import Attention
from graphopt_backends.kernels.expression import Expression, call, number, operand, simplified, substituted
from graphopt_backends.network.elementwise import expression_of, is_elementwise
from graphopt_backends.network.integers import dequantized
from graphopt_backends.network.linear import order_of_reader
from graphopt_backends.network.network import Network, constant_of, dtype_of, shape_of
from graphopt_backends.network.regions import Region
from graphopt_backends.network.views import View

__all__ = ["CHECKS", "CONVERTERS", "fuse"]

_NAME = "FusedAttention"
_FEWEST_QUERIES = 4  # with fewer, most lanes of a vector of queries would be empty
_MASKED = -1e9
_MOST_MASKS = 3

Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Side:
    """A value that takes part, and the batch axes that it is read with."""

    value: ir.Value
    batch: Shape


@dataclass(frozen=True)
class _Plan:
    """What a fused node computes.

    Attributes:
        sides: Q, K, V, then masks.
        batch: Batch axes that refine those of all sides.
        flipped: Keys are columns of the second side.
        scores: What the softmax is taken of, a function of the product and the masks.
        causal: Query q sees the keys up to q + causal; None: all.
        empty_is_zero: A query without keys has a result of zeros.
    """

    sides: tuple[_Side, ...]
    batch: Shape
    flipped: bool
    scores: Expression
    causal: int | None
    empty_is_zero: bool


def fuse(model: ir.Model) -> None:
    """Put one node in place of the nodes of an attention, in place; shapes must be fixed."""
    graph, changed = model.graph, False
    for node in list(graph):
        plan = _matched(node) if node.op_type == "MatMul" else None
        if plan is None:
            continue
        output = node.outputs[0]
        made = ir.Value(name=output.name, type=output.type, shape=output.shape)
        fused = ir.Node("", _NAME, [side.value for side in plan.sides], outputs=[made], name=node.name)
        fused.meta["plan"] = plan
        graph.insert_before(node, fused)
        output.replace_all_uses_with(made, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        changed = True
    if changed:
        ir_passes.RemoveUnusedNodesPass()(model)


def _matched(weighing: ir.Node) -> _Plan | None:
    """The plan of an attention that ends in a product; None if it is none."""
    probabilities, values = weighing.inputs
    if probabilities is None or values is None or is_constant(values) or dequantized(values) is not None:
        return None
    softmax, empty_is_zero = _softmax_before(probabilities)
    shape = static_shape(probabilities)
    if softmax is None or shape is None or len(shape) < 2 or shape[-2] < _FEWEST_QUERIES:
        return None
    if softmax.attributes.get_int("axis", -1) % len(shape) != len(shape) - 1 or softmax.inputs[0] is None:
        return None
    batch = shape[:-2]
    walk = _Walk()
    scores = walk.expression(softmax.inputs[0], batch)
    if scores is None or walk.product is None or static_shape(weighing.outputs[0]) != (*batch, shape[-2], _last(values)):
        return None
    product, product_batch = walk.product
    query, query_factor = _unscaled(product.inputs[0])
    key, key_factor, flipped = _keys(product.inputs[1], product_batch)
    if query_factor * key_factor != 1.0:
        factor = call("mul", operand(0), number(query_factor * key_factor))
        scores = substituted(scores, {operand(0): factor})
    sides = (_Side(query, product_batch), key, _ungrouped(values, batch), *walk.masks)
    finest = max((side.batch for side in sides), key=len)
    if not all(_refines(finest, side.batch) for side in (*sides, _Side(values, batch))):
        return None
    plan = _Plan(sides, finest, flipped, simplified(_without_division(scores)), None, empty_is_zero)
    return _causal(plan, shape[-2], shape[-1])


def _softmax_before(value: ir.Value) -> tuple[ir.Node | None, bool]:
    """The softmax that a value comes from, and whether rows without a number in them were made zeros behind it."""
    node = value.producer()
    if node is None or value.is_graph_output():
        return None, False
    users = [user for user, _ in value.uses()]
    if node.op_type == "Softmax":
        return (node, False) if len(users) == 1 else (None, False)
    if node.op_type == "Where" and len(users) == 1:
        condition, least, softmax = node.inputs
        test = condition.producer() if condition is not None else None
        found = softmax.producer() if softmax is not None else None
        if (
            test is not None and test.op_type == "IsNaN" and test.inputs[0] is softmax
            and found is not None and found.op_type == "Softmax" and softmax is not None
            and {user for user, _ in softmax.uses()} == {test, node} and not softmax.is_graph_output()
            and _scalar(least) == 0.0
        ):  # fmt: skip
            return found, True
    return None, False


class _Walk:
    """From the operand of a softmax upwards to the product of queries and keys."""

    def __init__(self) -> None:
        self.product: tuple[ir.Node, Shape] | None = None
        self.masks: list[_Side] = []

    def expression(self, value: ir.Value, batch: Shape) -> Expression | None:
        """A value as a function of the product and the masks, where its axes are `batch`, queries, keys."""
        node, shape = value.producer(), static_shape(value)
        if node is None or shape is None or len(list(value.uses())) != 1 or value.is_graph_output():
            return None
        if node.op_type == "MatMul":
            self.product = (node, batch)
            return operand(0)
        source = node.inputs[0]
        if node.op_type == "Reshape" and source is not None:
            before = static_shape(source)
            return self.expression(source, before[:-2]) if before is not None and _keeps_matrix(before, shape) else None
        args = [self._argument(item, batch, shape) for item in node.inputs]
        known = [arg for arg in args if arg is not None]
        return expression_of(node, known) if len(known) == len(args) and is_elementwise(node) else None

    def _argument(self, value: ir.Value | None, batch: Shape, shape: Shape) -> Expression | None:
        if value is None:
            return Expression("absent", "float32")
        scalar = _scalar(value)
        if scalar is not None:
            return number(scalar, dtype_of(value))
        own = static_shape(value)
        if own is None:
            return None
        if self.product is None and _has_product(value, math.prod(shape)):
            return self.expression(value, batch) if own == shape else None
        if value.dtype not in (ir.DataType.FLOAT, ir.DataType.BOOL) or len(own) > len(shape):
            return None
        self.masks.append(_Side(value, batch))
        return operand(len(self.masks), dtype_of(value)) if len(self.masks) <= _MOST_MASKS else None


def _has_product(value: ir.Value, size: int) -> bool:
    """Somewhere above, over arithmetic on as many elements, lies a product of two activations."""
    node, shape = value.producer(), static_shape(value)
    if node is None or shape is None or math.prod(shape) != size:
        return False
    if node.op_type == "MatMul":
        return not any(v is None or is_constant(v) or dequantized(v) is not None for v in node.inputs)
    if node.op_type == "Reshape" or is_elementwise(node):
        return any(v is not None and _has_product(v, size) for v in node.inputs)
    return False


def _keeps_matrix(before: Shape, behind: Shape) -> bool:
    return len(before) >= 2 and len(behind) >= 2 and before[-2:] == behind[-2:]


def _last(value: ir.Value) -> int:
    return shape_of(value)[-1]


def _scalar(value: ir.Value | None) -> float | None:
    if value is None or not is_constant(value) or value.const_value is None or value.const_value.size != 1:
        return None
    return float(value.const_value.numpy().reshape(-1)[0])


def _unscaled(value: ir.Value | None) -> tuple[ir.Value, float]:
    """A value without the constant factors that it was multiplied with last, and their product."""
    assert value is not None
    node = value.producer()
    if node is None or node.op_type not in ("Mul", "Div") or len(list(value.uses())) != 1 or value.is_graph_output():
        return value, 1.0
    left, right = node.inputs
    if node.op_type == "Mul" and _scalar(left) is not None:
        left, right = right, left
    factor = _scalar(right)
    if factor is None or not factor or left is None or static_shape(left) != static_shape(value):
        return value, 1.0
    source, others = _unscaled(left)
    return source, others * (factor if node.op_type == "Mul" else 1 / factor)


def _keys(value: ir.Value | None, batch: Shape) -> tuple[_Side, float, bool]:
    """Keys, their constant factor, and whether they are columns."""
    source, factor = _unscaled(value)
    node = source.producer()
    if node is not None and node.op_type == "Transpose" and node.inputs[0] is not None:
        rank = len(shape_of(source))
        if list(node.attributes.get_ints("perm") or ()) == [*range(rank - 2), rank - 1, rank - 2]:
            rows, more = _unscaled(node.inputs[0])
            return _ungrouped(rows, batch), factor * more, False
    return _Side(source, batch), factor, True


def _ungrouped(value: ir.Value, batch: Shape) -> _Side:
    """Keys or values as they were before they were repeated for several heads."""
    node = value.producer()
    source = node.inputs[0] if node is not None and node.op_type == "Reshape" else None
    maker = source.producer() if source is not None else None
    if source is not None and maker is not None and maker.op_type in ("Expand", "Tile"):
        shape = static_shape(source)
        if shape is not None and _keeps_matrix(shape, shape_of(value)) and shape_of(value)[:-2] == batch:
            return _Side(source, shape[:-2])
    return _Side(value, batch)


def _refines(fine: Shape, coarse: Shape) -> bool:
    """Each axis of `coarse` is made of neighbours in `fine`."""

    def ends(shape: Shape) -> set[int]:
        return {math.prod(shape[:i]) for i in range(len(shape) + 1)}

    return ends(coarse) <= ends(fine) and math.prod(fine) == math.prod(coarse)


def _without_division(expression: Expression) -> Expression:
    args = tuple(_without_division(arg) for arg in expression.args)
    if expression.op == "div" and args[1].op == "number" and args[1].value:
        return call("mul", args[0], number(1 / args[1].value, args[1].dtype))
    return replace(expression, args=args)


def _causal(plan: _Plan, queries: int, keys: int) -> _Plan:
    """Take a constant mask that hides the keys behind each query for what it is."""
    masks, scores = plan.sides[3:], plan.scores
    for i, mask in enumerate(masks, 1):
        if not is_constant(mask.value) or scores.op not in ("add", "where"):
            continue
        array = constant_of(mask.value)
        if scores.op == "add" and operand(i) in scores.args:
            seen, hidden = array == 0, array <= _MASKED
            rest = scores.args[1 - scores.args.index(operand(i))]
        elif scores.args[0] == operand(i, "bool") and scores.args[2].op == "number" and scores.args[2].value <= _MASKED:
            seen, hidden, rest = array, ~array, scores.args[1]
        else:
            continue
        seen, hidden = (part.reshape(-1, *part.shape[-2:]) for part in (seen, hidden))
        offset = int(seen[0, 0].sum()) - 1
        triangle = np.tri(queries, keys, offset, dtype=bool)
        if offset < 0 or seen.shape[1:] != triangle.shape or not ((seen == triangle) & (hidden != triangle)).all():
            continue
        later = {operand(j, dtype_of(side.value)): operand(j - 1, dtype_of(side.value))
                 for j, side in enumerate(masks, 1) if j > i}  # fmt: skip
        sides = (*plan.sides[: 2 + i], *plan.sides[3 + i :])
        return replace(plan, sides=sides, scores=substituted(rest, later), causal=offset)
    return plan


def _convert(network: Network, node: ir.Node, _: Region | None) -> None:
    plan = node.meta["plan"]
    output = node.outputs[0]
    matrices = shape_of(output)[-2:]
    query, key, value = (
        _split(network, _view(network, side), plan.batch)
        for side in plan.sides[:3]
    )  # fmt: skip
    if plan.flipped:
        key = _turned(key)
    masks: list[View] = []
    expression = plan.scores
    for i, side in enumerate(plan.sides[3:], 1):
        if side.value.dtype == ir.DataType.BOOL:
            expression = substituted(expression, {operand(i, "bool"): _is_set(i)})
        mask = _mask(network, side.value).broadcast((*side.batch, matrices[0], key.shape[-2]))
        masks.append(_split(network, mask, plan.batch))
    result = network.new(output, order_of_reader(output))
    if result.strides[-1] != 1:
        result = network.new(output)
    placed = result.reshaped((*plan.batch, *matrices))
    assert placed is not None  # axes are only split
    _attend(network, node, (query, key, value, *masks, placed), expression, plan.causal, plan.empty_is_zero)


def _view(network: Network, side: _Side) -> View:
    view = network.view(side.value)
    return view.broadcast((*side.batch, *view.shape[-2:]))


def _turned(view: View) -> View:
    return view.permuted((*range(view.rank - 2), view.rank - 1, view.rank - 2))


def _split(network: Network, view: View, batch: Shape) -> View:
    shape = (*batch, *view.shape[-2:])
    split = view.reshaped(shape) or network.copied(view).reshaped(shape)
    assert split is not None
    return split


def _is_set(index: int) -> Expression:
    return call("not", call("equal", operand(index), number(0)))


def _mask(network: Network, value: ir.Value) -> View:
    """A mask as floats; a constant one that differs between queries lies so that vectors of queries can be read."""
    if is_constant(value):
        array = constant_of(value).astype(np.float32)
        if array.ndim < 2 or array.shape[-2] == 1:
            return network.constant(array)
        return _turned(network.constant(np.ascontiguousarray(array.swapaxes(-1, -2))))
    view = network.view(value)
    if view.dtype == "float32":
        return view
    floats = network.temporary(view.shape, "float32")
    network.loops(Expression("where", "float32", (operand(0, "bool"), number(1), number(0))), [view], floats)
    return floats


def _attend(
    network: Network, node: ir.Node, views: Sequence[View], scores: Expression, causal: int | None, empty_is_zero: bool
) -> None:
    """Call the kernel on Q, K, V, masks and the result, all with the same batch axes; rows that have gaps are closed."""
    query, key, value, *masks, result = views
    sides = [side if side.strides[-1] == 1 or side.shape[-1] == 1 else network.copied(side, node=node)
             for side in (query, key, value)]  # fmt: skip
    steps = [side.strides[:-1] for side in (*sides, result)]
    kernel = Attention(
        network.isa, result.shape[:-2], query.shape[-2], key.shape[-2], query.shape[-1], value.shape[-1],
        steps[0], steps[1], steps[2], steps[3], scores, tuple(mask.strides for mask in masks), causal, empty_is_zero,
    )  # fmt: skip
    network.call(kernel, [*sides, *masks, result], node)


def _attention(network: Network, node: ir.Node, _: Region | None) -> None:
    """The operator Attention: heads are an axis of their own, or lie side by side in the columns."""
    output = node.outputs[0]
    sides = [network.input(node, i) for i in range(3)]
    heads = [_heads(node, i, side) for i, side in enumerate(sides)]
    query, key, value = (_by_heads(network, side, count) for side, count in zip(sides, heads, strict=True))
    groups = heads[0] // heads[1]
    batch = (query.shape[0], heads[1], groups)
    query = _split(network, query, batch)
    key, value = (
        replace(side, shape=(*side.shape[:2], 1, *side.shape[2:]), strides=(*side.strides[:2], 0, *side.strides[2:]))
        .broadcast((*batch, *side.shape[2:]))
        for side in (key, value)
    )  # fmt: skip
    scale = node.attributes.get_float("scale", 0.0) or query.shape[-1] ** -0.5
    scores = call("mul", operand(0), number(scale))
    cap = node.attributes.get_float("softcap", 0.0)
    if cap:
        scores = call("mul", call("tanh", call("mul", scores, number(1 / cap))), number(cap))
    masks: list[View] = []
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        given = node.inputs[3]
        hidden = number(float("-inf"))
        is_set = given.dtype == ir.DataType.BOOL
        scores = Expression("where", "float32", (_is_set(1), scores, hidden)) if is_set else call("add", scores, operand(1))
        wide = (query.shape[0], heads[0], query.shape[-2], key.shape[-2])
        masks = [_split(network, _mask(network, given).broadcast(wide), batch)]
    result = _by_heads(network, network.new(output), heads[0])
    placed = result.reshaped((*batch, *result.shape[-2:]))
    assert placed is not None
    causal = 0 if node.attributes.get_int("is_causal", 0) else None
    _attend(network, node, (query, key, value, *masks, placed), scores, causal, empty_is_zero=True)


def _heads(node: ir.Node, side: int, view: View) -> int:
    name = "q_num_heads" if side == 0 else "kv_num_heads"
    return view.shape[1] if view.rank == 4 else node.attributes.get_int(name, 1)


def _by_heads(network: Network, view: View, heads: int) -> View:
    """Axes: batch, heads, rows, columns."""
    if view.rank == 4:
        return view
    shape = (*view.shape[:2], heads, view.shape[2] // heads)
    split = view.reshaped(shape) or network.copied(view).reshaped(shape)
    assert split is not None
    return split.permuted((0, 2, 1, 3))


def _attention_check(node: ir.Node) -> bool:
    inputs, shapes = node.inputs, [static_shape(value) for value in node.inputs[:4] if value is not None]
    if any(value is not None for value in inputs[4:]) or any(shape is None for shape in shapes):
        return False
    if any(output.name and output.uses() for output in node.outputs[1:]) or node.outputs[0].dtype != ir.DataType.FLOAT:
        return False
    mask = inputs[3] if len(inputs) > 3 else None
    keys = shape_of(inputs[1])[-2] if inputs[1] is not None else 0
    if mask is not None and (mask.dtype not in (ir.DataType.FLOAT, ir.DataType.BOOL) or shape_of(mask)[-1] != keys):
        return False
    windows = [node.attributes.get_int(f"{side}_window_size", -1) for side in ("left", "right")]
    precise = node.attributes.get_int("softmax_precision", 1) == ir.DataType.FLOAT.value
    return windows == [-1, -1] and precise and static_shape(node.outputs[0]) is not None


CONVERTERS: Mapping[str, Callable[[Network, ir.Node, Region | None], None]] = {
    _NAME: _convert,
    "Attention": _attention,
}

CHECKS: Mapping[str, Callable[[ir.Node], bool]] = {
    "Attention": _attention_check,
}
