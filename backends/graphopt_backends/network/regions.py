"""Which nodes are computed together: a kernel and the arithmetic behind it, or arithmetic alone.

A region grows from its first node over operators that work element by element on results of the same shape. It ends
where only its last value is read from outside, so that nothing in between is ever stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphopt_backends._fold import is_constant, static_shape
from graphopt_backends.kernels.expression import Expression, number, operand
from graphopt_backends.network.elementwise import expression_of, is_elementwise
from graphopt_backends.network.integers import dequantized, real

__all__ = ["Region", "find_regions"]

_MOST_NODES = 32
_MOST_OPERANDS = 6

Shape = tuple[int, ...]
Accepts = Callable[[ir.Node, Shape, ir.Value], bool]
"""May an epilogue of this anchor, with a result of this shape, read that value?"""


@dataclass(frozen=True)
class Region:
    """Nodes that one kernel computes.

    Attributes:
        anchor: The node that the kernel is for; the first of the arithmetic where there is none.
        nodes: All of them, in order.
        result: The value that is stored.
        expression: What happens to the anchor's result, operand 0; or all there is, if arithmetic is all there is.
        operands: Values of operands 1 and on, or of all operands.
    """

    anchor: ir.Node
    nodes: tuple[ir.Node, ...]
    result: ir.Value
    expression: Expression
    operands: tuple[ir.Value, ...]

    @property
    def last(self) -> ir.Node:
        """The node at whose place the kernel runs."""
        return self.nodes[-1]


def find_regions(graph: ir.Graph, anchors: Callable[[ir.Node], bool], accepts: Accepts) -> dict[ir.Node, Region]:
    """The region of every node that is in one.

    Args:
        graph: Nodes in topological order, shapes known.
        anchors: Nodes with a kernel that has an epilogue.
        accepts: What its epilogue may read.
    """
    places = {node: i for i, node in enumerate(graph)}
    found: dict[ir.Node, Region] = {}
    for node in graph:
        if node in found:
            continue
        if anchors(node):
            region = _grown(node, places, found, accepts)
        elif is_elementwise(node) and node.op_type != "DequantizeLinear":  # which what reads it computes
            region = _grown(node, places, found, None)
        else:
            region = None
        if region is not None:
            found |= dict.fromkeys(region.nodes, region)
    return found


class _Growth:
    """A region that grows; expressions of its values by value."""

    def __init__(self, anchor: ir.Node, accepts: Accepts | None) -> None:
        self.anchor, self.accepts = anchor, accepts
        self.shape = static_shape(anchor.outputs[0])
        self.nodes: list[ir.Node] = []
        self.values: dict[ir.Value, Expression] = {}
        self.operands: list[ir.Value] = []

    def begin(self) -> bool:
        """Take the anchor."""
        if self.shape is None:
            return False
        if self.accepts is None:
            return self.take(self.anchor)
        output = self.anchor.outputs[0]
        dtype = "float32" if output.dtype is None else str(output.dtype.numpy())
        self.nodes, self.values = [self.anchor], {output: operand(0, dtype)}
        return True

    def take(self, node: ir.Node) -> bool:
        """Add a node, if it can be."""
        output = node.outputs[0]
        if static_shape(output) != self.shape or any(o.name and o.uses() for o in node.outputs[1:]):
            return False
        before, args = len(self.operands), list[Expression]()
        for value in node.inputs:
            arg = self._argument(node, value)
            if arg is None:
                del self.operands[before:]
                return False
            args.append(arg)
        expression = expression_of(node, args)
        if expression is None or len(self.operands) > _MOST_OPERANDS:
            del self.operands[before:]
            return False
        self.nodes.append(node)
        self.values[output] = expression
        return True

    def _argument(self, node: ir.Node, value: ir.Value | None) -> Expression | None:
        if value is None:
            return Expression("absent", "float32")
        if value in self.values:
            return self.values[value]
        found = dequantized(value)
        if found is not None:  # a part of what reads it
            integers = self._argument(node, found[0])
            return None if integers is None else real(integers, found[1])
        dtype, shape = value.dtype, static_shape(value)
        if dtype is None or shape is None:
            return None
        if is_constant(value) and value.const_value is not None and value.const_value.size == 1:
            return number(float(value.const_value.numpy().reshape(-1)[0]), str(dtype.numpy()))
        if self.accepts is not None and not self.accepts(self.anchor, self.shape or (), value):
            return None
        if value not in self.operands:
            self.operands.append(value)
        first = 0 if self.accepts is None else 1
        return operand(first + self.operands.index(value), str(dtype.numpy()))

    def only_result(self) -> ir.Value | None:
        """The one value that is read from outside, or None if there are several."""
        inside = set(self.nodes)
        out = [
            value
            for value in self.values
            if value.is_graph_output() or any(user not in inside for user, _ in value.uses())
        ]
        return out[0] if len(out) == 1 else None


def _grown(
    anchor: ir.Node, places: dict[ir.Node, int], taken: dict[ir.Node, Region], accepts: Accepts | None
) -> Region | None:
    growth = _Growth(anchor, accepts)
    if not growth.begin():
        return None
    best = _region(growth)
    while len(growth.nodes) < _MOST_NODES:
        following = {user for value in growth.values for user, _ in value.uses()} - set(growth.nodes)
        candidates = sorted((n for n in following if n in places and n not in taken), key=lambda n: places[n])
        if not any(is_elementwise(node) and growth.take(node) for node in candidates):
            break
        if growth.nodes[-1].op_type != "DequantizeLinear":  # integers are what is stored
            best = _region(growth) or best
    return best


def _region(growth: _Growth) -> Region | None:
    result = growth.only_result()
    if result is None:
        return None
    first = 0 if growth.accepts is None else 1
    used = _used(growth.values[result])
    kept = [value for i, value in enumerate(growth.operands, first) if i in used]
    numbers = {first + growth.operands.index(value): first + i for i, value in enumerate(kept)}
    expression = _renumbered(growth.values[result], numbers)
    return Region(growth.anchor, tuple(growth.nodes), result, expression, tuple(kept))


def _used(expression: Expression) -> set[int]:
    if expression.op == "operand":
        return {expression.index}
    return {index for arg in expression.args for index in _used(arg)}


def _renumbered(expression: Expression, numbers: dict[int, int]) -> Expression:
    if expression.op == "operand":
        return operand(numbers.get(expression.index, expression.index), expression.dtype)
    args: Sequence[Expression] = [_renumbered(arg, numbers) for arg in expression.args]
    return Expression(expression.op, expression.dtype, tuple(args), expression.value, expression.index)
