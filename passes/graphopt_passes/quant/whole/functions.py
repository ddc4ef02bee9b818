"""Operators that make each number of a result from one number: a table of 256 entries says all of what they do."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphopt.analyses import Shapes
from graphopt_passes.quant.sites import tensor_of

__all__ = ["BINARY", "UNARY", "operands"]

UNARY = frozenset(
    {"Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Ceil", "Celu", "Clip", "Cos", "Cosh", "Elu", "Erf",
     "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Log", "Mish", "Neg", "Reciprocal", "Relu",
     "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Swish", "Tan",
     "Tanh", "ThresholdedRelu"}
)  # fmt: skip
"""Functions of their first input; others, such as the limits of a Clip, are numbers."""

BINARY = frozenset({"Add", "Div", "Max", "Min", "Mul", "PRelu", "Pow", "Sub"})
"""Functions of one number where all but one input are numbers, or all are functions of the same."""


def operands(node: ir.Node, shapes: Shapes) -> tuple[int, ...] | None:
    """Indices of the activations that a node makes its result of, number by number.

    None for other operators, and where a constant has more than one number, or gives the result more dimensions.
    """
    if node.op_type in UNARY:
        return (0,) if _are_numbers([value for value in node.inputs[1:] if value is not None], 0) else None
    if node.op_type not in BINARY:
        return None
    given = tuple(i for i, value in enumerate(node.inputs) if value is not None and tensor_of(value) is None)
    rank = max((shapes.rank(node.inputs[i]) or 1 for i in given), default=0)
    constants = [value for i, value in enumerate(node.inputs) if value is not None and i not in given]
    return given if given and _are_numbers(constants, rank) else None


def _are_numbers(values: Sequence[ir.Value], rank: int) -> bool:
    """Constants of one element each and of no more than so many dimensions; a vector of one is as good as a scalar."""
    tensors = [tensor_of(value) for value in values]
    return all(tensor is not None and tensor.size == 1 and len(tensor.shape) <= max(1, rank) for tensor in tensors)
