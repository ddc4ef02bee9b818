"""Sums of a convolution or product with a constant: of floats, or of bytes with what they need besides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.targets import Isa
from graphopt_backends.kernels.expression import Expression, call, operand, parameter, simplified, substituted
from graphopt_backends.kernels.multiply import Kind, Multiply, Stored, integer_kind, stored_as
from graphopt_backends.network.half import narrowed
from graphopt_backends.network.integers import as_bytes, integers_of, is_weight, weight_of
from graphopt_backends.network.network import Network
from graphopt_backends.network.views import View

__all__ = ["Operands", "Sums", "Term", "is_depthwise", "matrices_of", "operands_of", "taken_factor"]


@dataclass(frozen=True)
class Operands:
    """What a convolution or product with a constant works on.

    Attributes:
        source: Activations.
        weight: The constant.
        bias: Added to the sums, or None.
        kind: Element types.
        zero_point: Of the activations; a value where only a run tells it.
        scale: What a step of the sums is worth; None: they are the result.
        excess: What the weights of each output channel have too little to be bytes.
        tiles: Products of tiles make the sums, which take activations of either sign.
    """

    source: View
    weight: np.ndarray
    bias: np.ndarray | None
    kind: Kind = "f32"
    zero_point: int | ir.Value = 0
    scale: np.ndarray | None = None
    excess: np.ndarray | None = None
    tiles: bool = False


def operands_of(network: Network, node: ir.Node, channel_axis: int) -> Operands:
    """Integers where all operands are, else floats."""
    integers = integers_of(node, channel_axis)
    if integers is not None:
        source, weight, excess = network.view(integers.source), integers.weight, None
        if not is_depthwise(node, weight):
            weight, excess = as_bytes(weight, channel_axis)
        kind = integer_kind(network.isa, source.dtype, weight)
        return Operands(source, weight, integers.bias, kind, integers.zero_point, integers.scale, excess)
    bias = weight_of(_input(node, 2)) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    return Operands(network.input(node, 0), weight_of(_input(node, 1)), bias)


def is_depthwise(node: ir.Node, weight: np.ndarray) -> bool:
    """One filter for every channel."""
    groups = node.attributes.get_int("group", 1)
    return groups > 1 and weight.shape[:2] == (groups, 1)


def matrices_of(network: Network, value: ir.Value) -> tuple[View, Stored]:
    """The second operand of a product of many matrices; constants that 16 bits hold have rows of whole vectors."""
    weight = narrowed(weight_of(value)) if is_weight(value) else np.zeros(0)
    stored = stored_as(weight)
    if stored == "float32":
        return network.view(value), stored
    lanes, columns = Multiply(network.isa, "f32", stored).lanes, weight.shape[-1]
    rows = np.zeros((*weight.shape[:-1], -(-columns // lanes) * lanes), weight.dtype)
    rows[..., :columns] = weight
    return network.constant(rows).sliced(weight.ndim - 1, 0, columns), stored


Term = tuple[View, View]
"""Integers whose product belongs to a sum; both are repeated to the shape of the result."""


@dataclass(frozen=True)
class Sums:
    """What sums of bytes need besides: weights are seen as a matrix whose columns are those of the sums.

    Attributes:
        on: Operands.
        weight: The matrix.
    """

    on: Operands
    weight: np.ndarray

    @property
    def whole(self) -> np.ndarray:
        """Sums of the weights of each column."""
        sums = self.weight.sum(0, dtype=np.int64)
        return sums if self.on.excess is None else sums + self.on.excess * self.weight.shape[0]

    def bias(self, isa: Isa, bias: np.ndarray | None) -> np.ndarray | None:
        """The bias without what zero point and sign of the activations add to the sums."""
        if self.on.kind == "f32":
            return bias
        shift = 0 if self.on.tiles else Multiply(isa, self.on.kind).shift
        added = self.weight.sum(0, dtype=np.int64) * shift
        if isinstance(self.on.zero_point, int):
            added = added + self.whole * self.on.zero_point
        return ((0 if bias is None else bias) - added).astype(np.int32) if added.any() else bias

    def terms(self, network: Network, shape: Sequence[int], totals: Callable[[], View]) -> list[Term]:
        """What is known only when sums are: a zero point, and activations that weights are too little for.

        Args:
            network: Where operands are.
            shape: Of a number for each column, as it is repeated to the result.
            totals: Gives sums of the activations alone.
        """
        found: list[Term] = []
        if not isinstance(self.on.zero_point, int):
            sums = -self.whole.astype(np.int32)
            found.append((network.view(self.on.zero_point), network.constant(sums.reshape(shape))))
        if self.on.excess is not None:
            found.append((totals(), network.constant(self.on.excess.astype(np.int32).reshape(shape))))
        return found


def taken_factor(expression: Expression, scale: np.ndarray) -> tuple[Expression, np.ndarray]:
    """Let the scales of the columns take the one factor that all sums are multiplied with first, if there is one."""
    whole = simplified(substituted(expression, {operand(0): call("mul", operand(0), parameter(1.0))}))
    factors = _factors(whole)
    if len(factors) != 1:
        return expression, scale
    factor = factors.pop()
    return substituted(whole, {factor: operand(0)}), (scale * np.float32(factor.args[1].value)).astype(np.float32)


def _factors(expression: Expression) -> set[Expression]:
    """Products of the sums and a constant."""
    if expression.op == "mul" and expression.args[0] == operand(0) and expression.args[1].op == "parameter":
        return {expression}
    return {factor for arg in expression.args for factor in _factors(arg)}


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value
