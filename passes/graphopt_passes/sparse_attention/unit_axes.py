"""Axes that have size 1 whatever the input, also where shape inference gives up."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.analyses.constants import Constants
from graphopt.analyses.shapes import Shapes

__all__ = ["ELEMENTWISE", "UnitAxes", "axes_of", "integers"]

ELEMENTWISE = frozenset(
    {
        "Abs", "Add", "And", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Cast", "Ceil", "Clip",
        "Cos", "Div", "Equal", "Erf", "Exp", "Floor", "Greater", "GreaterOrEqual", "Identity", "IsInf", "IsNaN", "Less",
        "LessOrEqual", "Log", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Pow", "Reciprocal", "Relu", "Round",
        "Sigmoid", "Sign", "Sin", "Sqrt", "Sub", "Tanh", "Where", "Xor",
    }
)  # fmt: skip
"""Operators whose result at a place depends on their inputs at that place only."""
_DEPTH = 40


class UnitAxes:
    """Finds axes of size 1.

    Args:
        shapes: What inference knows.
        constants: Constants of the model.
    """

    def __init__(self, shapes: Shapes, constants: Constants) -> None:
        self.shapes = shapes
        self.constants = constants

    def one(self, value: ir.Value | None, axis: int, depth: int = _DEPTH) -> bool:
        """Whether an axis, counted from the front, provably has size 1."""
        dims = self.shapes.of(value)
        if value is None or dims is None or not 0 <= axis < len(dims):
            return False
        if isinstance(dims[axis], int):
            return dims[axis] == 1
        node = value.producer()
        if node is None or node.domain not in ("", "ai.onnx") or not depth:
            return False
        return self._by_operator(node, axis, len(dims), depth - 1)

    def _by_operator(self, node: ir.Node, axis: int, rank: int, depth: int) -> bool:
        if node.op_type in ELEMENTWISE:
            return all(self._broadcasts(value, axis - rank, depth) for value in node.inputs if value is not None)
        if node.op_type == "Expand":
            sizes = node.inputs[1]
            length = self.shapes.of(sizes)
            known = length[0] if length and isinstance(length[0], int) else rank
            asked = axis - rank + known
            alone = asked < 0 or self._size_is_one(sizes, asked, depth)
            return alone and self._broadcasts(node.inputs[0], axis - rank, depth)
        if node.op_type == "Transpose":
            order = node.attributes.get_ints("perm", list(reversed(range(rank))))
            return self.one(node.inputs[0], order[axis], depth)
        if node.op_type == "Unsqueeze" and (axes := axes_of(self.constants, node, rank)) is not None:
            return axis in axes or self.one(node.inputs[0], axis - sum(a < axis for a in axes), depth)
        if node.op_type == "GatherND" and not node.attributes.get_int("batch_dims", 0):
            indices = node.inputs[1]
            inner = self.shapes.rank(indices)
            return inner is not None and axis < inner - 1 and self._index_axis_is_one(indices, axis, inner, depth)
        return False

    def _index_axis_is_one(self, value: ir.Value | None, axis: int, rank: int, depth: int) -> bool:
        """The same through a Concat along the last axis: one of its inputs tells."""
        node = None if value is None else value.producer()
        if node is not None and node.op_type == "Concat" and node.attributes.get_int("axis", 0) in (-1, rank - 1):
            return any(self.one(part, axis, depth) for part in node.inputs)
        return self.one(value, axis, depth)

    def _broadcasts(self, value: ir.Value | None, axis: int, depth: int) -> bool:
        """Whether an axis, counted from the back, is missing or has size 1."""
        rank = self.shapes.rank(value)
        return rank is not None and (rank + axis < 0 or self.one(value, rank + axis, depth))

    def _size_is_one(self, value: ir.Value | None, index: int, depth: int) -> bool:
        """Whether an element of a vector of sizes is 1."""
        known = integers(self.constants, value)
        if known is not None:
            return 0 <= index < len(known) and known[index] == 1
        node = None if value is None else value.producer()
        if node is None or not depth:
            return False
        if node.op_type == "Shape":
            return self.one(node.inputs[0], index + node.attributes.get_int("start", 0), depth - 1)
        if node.op_type == "Concat":
            for part in node.inputs:
                dims = self.shapes.of(part)
                if not dims or not isinstance(dims[0], int):
                    return False
                if index < dims[0]:
                    return self._size_is_one(part, index, depth - 1)
                index -= dims[0]
        return False


def axes_of(constants: Constants, node: ir.Node, rank: int) -> list[int] | None:
    """The axes of a Squeeze or an Unsqueeze, from the front; None where they are computed or left out.

    Args:
        constants: Constants of the model.
        node: The node.
        rank: Of the side that has the axes.
    """
    found = node.attributes.get_ints("axes", None)
    if found is None and len(node.inputs) > 1:
        found = integers(constants, node.inputs[1])
    return None if found is None else [axis % rank for axis in found]


def integers(constants: Constants, value: ir.Value | None) -> list[int] | None:
    """A small constant of whole numbers as a list; None if it is none."""
    tensor = constants.of(value)
    if tensor is None or tensor.size > 64 or tensor.dtype not in (ir.DataType.INT64, ir.DataType.INT32):
        return None
    return [int(number) for number in tensor.numpy().reshape(-1)]
