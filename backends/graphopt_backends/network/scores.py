"""Recognises attention: the products around a softmax that exporters write become one node.

`fuse` looks for MatMul(softmax(arithmetic on MatMul(Q, K)), V) and puts one node in its place. Factors of Q and K move
behind their product. Keys and values that are repeated for several heads are read as they were before, with strides of
zero: what takes part may have its batch axes split in different ways, and the finest split serves all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as ir_passes

from graphopt_backends._fold import is_constant, static_shape
from graphopt_backends.kernels.expression import Expression, call, number, operand, simplified, substituted
from graphopt_backends.network.elementwise import expression_of, is_elementwise
from graphopt_backends.network.integers import dequantized
from graphopt_backends.network.network import constant_of, dtype_of, shape_of

__all__ = ["FUSED", "Plan", "Side", "fuse"]

FUSED = "FusedAttention"
"""Operator of the node that stands for an attention; its plan is in `meta["plan"]`."""

_FEWEST_QUERIES = 4  # with fewer, most lanes of a vector of queries would be empty
_MASKED = -1e9
_MOST_MASKS = 3

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Side:
    """A value that takes part, and the batch axes that it is read with."""

    value: ir.Value
    batch: Shape


@dataclass(frozen=True)
class Plan:
    """What a fused node computes.

    Attributes:
        sides: Q, K, V, then masks.
        batch: Batch axes that refine those of all sides.
        flipped: Keys are columns of the second side.
        scores: What the softmax is taken of, a function of the product and the masks.
        causal: Query q sees the keys up to q + causal; None: all.
        empty_is_zero: A query without keys has a result of zeros.
    """

    sides: tuple[Side, ...]
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
        fused = ir.Node("", FUSED, [side.value for side in plan.sides], outputs=[made], name=node.name)
        fused.meta["plan"] = plan
        graph.insert_before(node, fused)
        output.replace_all_uses_with(made, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        changed = True
    if changed:
        ir_passes.RemoveUnusedNodesPass()(model)


def _matched(weighing: ir.Node) -> Plan | None:
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
    if (
        scores is None
        or walk.product is None
        or static_shape(weighing.outputs[0]) != (*batch, shape[-2], _last(values))
    ):
        return None
    product, product_batch = walk.product
    query, query_factor = _unscaled(product.inputs[0])
    key, key_factor, flipped = _keys(product.inputs[1], product_batch)
    if query_factor * key_factor != 1.0:
        factor = call("mul", operand(0), number(query_factor * key_factor))
        scores = substituted(scores, {operand(0): factor})
    sides = (Side(query, product_batch), key, _ungrouped(values, batch), *walk.masks)
    finest = max((side.batch for side in sides), key=len)
    if not all(_refines(finest, side.batch) for side in (*sides, Side(values, batch))):
        return None
    plan = Plan(sides, finest, flipped, simplified(_without_division(scores)), None, empty_is_zero)
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
        self.masks: list[Side] = []

    def expression(self, value: ir.Value, batch: Shape) -> Expression | None:
        """A value as a function of the product and the masks, where its axes are `batch`, queries, keys."""
        node, shape = value.producer(), static_shape(value)
        if node is None or shape is None or len(list(value.uses())) != 1 or value.is_graph_output():
            return None
        if node.op_type == "MatMul":
            if value.dtype != ir.DataType.FLOAT or not _has_product(value, math.prod(shape)):
                return None
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
        self.masks.append(Side(value, batch))
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


def _keys(value: ir.Value | None, batch: Shape) -> tuple[Side, float, bool]:
    """Keys, their constant factor, and whether they are columns."""
    source, factor = _unscaled(value)
    node = source.producer()
    if node is not None and node.op_type == "Transpose" and node.inputs[0] is not None:
        rank = len(shape_of(source))
        if list(node.attributes.get_ints("perm") or ()) == [*range(rank - 2), rank - 1, rank - 2]:
            rows, more = _unscaled(node.inputs[0])
            return _ungrouped(rows, batch), factor * more, False
    return Side(source, batch), factor, True


def _ungrouped(value: ir.Value, batch: Shape) -> Side:
    """Keys or values as they were before they were repeated for several heads."""
    node = value.producer()
    source = node.inputs[0] if node is not None and node.op_type == "Reshape" else None
    maker = source.producer() if source is not None else None
    if source is not None and maker is not None and maker.op_type in ("Expand", "Tile"):
        shape = static_shape(source)
        if shape is not None and _keeps_matrix(shape, shape_of(value)) and shape_of(value)[:-2] == batch:
            return Side(source, shape[:-2])
    return Side(value, batch)


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


def _causal(plan: Plan, queries: int, keys: int) -> Plan:
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
