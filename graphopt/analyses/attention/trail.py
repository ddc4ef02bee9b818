"""The way of the scores: from the first product to the softmax, and of the weights from there to the second."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import onnx_ir as ir

from graphopt.analyses.attention.labels import CARRIERS, LAYOUT
from graphopt.analyses.attention.product import Product, read_product
from graphopt.analyses.attention.sizes import Sizes
from graphopt.analyses.attention.uniform import is_computed, uniform

__all__ = ["Step", "Trail", "Weighing", "scores_before", "weights_after"]

_LONGEST = 24
_STACKED = 3
_CUT_OFF = -6e4  # a lower bound of scores at the least float16 or below changes nothing that is seen

Kind = Literal["layout", "cast", "scale", "tanh", "add", "where", "other"]


@dataclass(frozen=True, eq=False)
class Step:
    """One operator on the way.

    Attributes:
        kind: `layout`: moves elements. `scale`: by a scalar. `where`: replaces scores by `fill`.
        node: The operator.
        source: What it reads of the scores.
        made: What it makes of them.
        operand: What it reads besides: the mask, the scalar, the condition.
        inverse: Of `scale`: whether it divides. Of `where`: whether a True condition replaces.
        fill: Of `where`.
    """

    kind: Kind
    node: ir.Node
    source: ir.Value
    made: ir.Value
    operand: ir.Value | None = None
    inverse: bool = False
    fill: float = 0.0


@dataclass(frozen=True, eq=False)
class Trail:
    """A product and what its result goes through."""

    product: Product
    steps: tuple[Step, ...] = ()

    def then(self, step: Step) -> Trail:
        """The same, one step longer."""
        return replace(self, steps=(*self.steps, step))


@dataclass(frozen=True, eq=False)
class Weighing:
    """The second product and what the weights go through ahead of it.

    Attributes:
        product: The product.
        operand: Which of its operands the weights are.
        steps: What they go through.
        guard: The Where that makes zeros of NaN, with its IsNaN.
        readers: Operators that read weights besides.
    """

    product: Product
    operand: int
    steps: tuple[Step, ...] = ()
    guard: tuple[ir.Node, ...] = ()
    readers: tuple[ir.Node, ...] = ()


def scores_before(value: ir.Value, sizes: Sizes, longest: int = _LONGEST) -> Trail | None:
    """Follow scores back to the product of queries and keys; the shortest way if several lead to one."""
    node = value.producer()
    if node is None or longest == 0:
        return None
    product = read_product(node, sizes)
    if product is not None:
        return Trail(product) if _meets(product, sizes) else None
    found: list[Trail] = []
    for step in _steps_back(node, sizes):
        trail = scores_before(step.source, sizes, longest - 1)
        if trail is not None:
            found.append(trail.then(step))
    return min(found, key=lambda trail: len(trail.steps)) if found else None


def _meets(product: Product, sizes: Sizes) -> bool:
    """Whether two activations meet, or one and learned queries: no layer with a weight."""
    fixed = [not is_computed(value, sizes) for value in product.operands]
    matrix = any(known and len(word) < _STACKED for known, word in zip(fixed, product.letters, strict=True))
    return not all(fixed) and not matrix


def _steps_back(node: ir.Node, sizes: Sizes) -> list[Step]:
    """What a node may be to each of the scores that it reads."""
    if node.domain not in ("", "ai.onnx") or not node.inputs:
        return []
    operator, values, made = node.op_type, node.inputs, node.outputs[0]
    first = values[0]
    if first is None:
        return []
    if operator in LAYOUT:
        return [Step("layout", node, first, made)]
    if operator in CARRIERS:
        return [Step("other" if operator == "Dropout" and _trains(node) else "layout", node, first, made)]
    if operator == "Cast":
        return [Step("cast", node, first, made)]
    if operator == "Tanh":
        return [Step("tanh", node, first, made)]
    if operator == "Max" and len(values) == 2:
        bounded = ((a, uniform(b, sizes)) for a, b in ((first, values[1]), (values[1], first)))
        return [Step("layout", node, a, made) for a, low in bounded if a is not None and (low or 0) <= _CUT_OFF]
    if operator == "Where" and len(values) == 3:
        return _where(node, sizes)
    if operator in ("Add", "Sum", "Sub", "Mul", "Div") and len(values) == 2:
        return _arithmetic(node, sizes)
    return []


def _trains(node: ir.Node) -> bool:
    return len(node.inputs) > 2 and node.inputs[2] is not None


def _where(node: ir.Node, sizes: Sizes) -> list[Step]:
    condition, yes, no = node.inputs
    found: list[Step] = []
    for scores, other, inverse in ((yes, no, False), (no, yes, True)):
        fill = uniform(other, sizes)
        if scores is not None and fill is not None:
            found.append(Step("where", node, scores, node.outputs[0], condition, inverse, fill))
    return found


def _arithmetic(node: ir.Node, sizes: Sizes) -> list[Step]:
    made, found = node.outputs[0], list[Step]()
    for scores, other in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
        first = scores is node.inputs[0]
        if scores is None or (node.op_type in ("Sub", "Div") and not first):
            continue
        if node.op_type in ("Add", "Sum"):
            found.append(Step("add", node, scores, made, other))
        elif node.op_type == "Sub" or not _scalar(other, sizes):
            found.append(Step("other", node, scores, made, other))
        else:
            found.append(Step("scale", node, scores, made, other, node.op_type == "Div"))
    return found


def _scalar(value: ir.Value | None, sizes: Sizes) -> bool:
    rank = sizes.rank(value)
    return rank is not None and all(sizes.fixed(value, axis) == 1 for axis in range(rank))


def weights_after(value: ir.Value, sizes: Sizes, longest: int = _LONGEST) -> Weighing | None:
    """Follow the weights to the product with the values."""
    uses = [(use.node, use.idx) for use in value.uses()]
    guard = _guard(value, [node for node, _ in uses], sizes)
    if guard:
        others = tuple(node for node, _ in uses if node not in guard)
        found = weights_after(guard[-1].outputs[0], sizes, longest - 1)
        return None if found is None else replace(found, guard=guard, readers=(*found.readers, *others))
    for node, index in uses if longest else ():
        others = tuple(other for other, _ in uses if other is not node)
        product = read_product(node, sizes)
        if product is not None and index < 2:
            return Weighing(product, index, readers=others)
        step = _step_on(node, value, sizes)
        found = None if step is None else weights_after(step.made, sizes, longest - 1)
        if found is not None and step is not None:
            return replace(found, steps=(step, *found.steps), readers=(*found.readers, *others))
    return None


def _step_on(node: ir.Node, value: ir.Value, sizes: Sizes) -> Step | None:
    if node.op_type in ("Mul", "Where", "Cast", *LAYOUT, *CARRIERS):
        return next((step for step in _steps_back(node, sizes) if step.source is value), None)
    return None


def _guard(value: ir.Value, users: list[ir.Node], sizes: Sizes) -> tuple[ir.Node, ...]:
    """`Where(IsNaN(weights), 0, weights)`, which exporters write for rows without a key."""
    for test in users:
        for choice in test.outputs[0].consumers() if test.op_type == "IsNaN" else ():
            zero = choice.inputs[1] if choice.op_type == "Where" and choice.inputs[0] is test.outputs[0] else None
            if zero is not None and choice.inputs[2] is value and uniform(zero, sizes) == 0:
                return test, choice
    return ()
