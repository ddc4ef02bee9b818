"""Multiply-accumulates of a node as a sum of products of axis lengths.

operator                              multiply-accumulates
Conv, QLinearConv, FusedConv, ...     output elements x weight elements of one output channel
ConvTranspose                         input elements x weight elements of one input channel
Gemm, MatMul and their quantized and  output elements x length that is summed over
  fused forms, MatMulNBits
Einsum                                product of the lengths of all letters
LSTM, GRU, RNN                        steps x elements of W, and of R
Attention in all forms                queries x keys, twice: scores, then the sum of values; projections if packed
MoE                                   tokens x experts that are used x elements of their weights
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.analyses.channels.rules.einsum import einsum_labels
from graphopt.analyses.channels.shape_values import AxisName
from graphopt.analyses.shapes import Shapes

__all__ = ["MacTerm", "mac_terms"]


@dataclass(frozen=True)
class MacTerm:
    """Part of the multiply-accumulates of a node.

    Attributes:
        amount: How many.
        axes: Axes of known values that the amount is proportional to; where one occurs twice, to its square.
    """

    amount: int
    axes: tuple[AxisName, ...]


def mac_terms(node: ir.Node, shapes: Shapes) -> tuple[MacTerm, ...] | None:
    """Count the multiply-accumulates of a linear operator.

    Returns:
        One term per weight or product; none for operators that are not linear; None where a shape is unknown.
    """
    rule = _RULES.get(node.op_type)
    if rule is None:
        return ()
    try:
        return tuple(rule(_Counter(node, shapes)))
    except _UnknownShapeError:
        return None


class _UnknownShapeError(Exception):
    """A shape that the count needs is not known."""


class _Counter:
    """Shapes of one node's operands."""

    def __init__(self, node: ir.Node, shapes: Shapes) -> None:
        self.node, self.shapes = node, shapes

    def input(self, index: int) -> ir.Value | None:
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def sizes(self, value: ir.Value | None) -> tuple[int, ...]:
        sizes = self.shapes.static(value)
        if sizes is None:
            raise _UnknownShapeError
        return sizes

    def axes(self, value: ir.Value | None, first: int = 0, last: int | None = None) -> list[tuple[AxisName, int]]:
        """Axes of a value with their lengths."""
        sizes = self.sizes(value)
        name = "" if value is None else self.shapes.names.key(value)
        return [((name, axis), size) for axis, size in enumerate(sizes)][first:last]

    def flag(self, name: str) -> bool:
        return bool(self.node.attributes.get_int(name, 0))


def _term(*axes: tuple[AxisName, int], times: int = 1) -> MacTerm:
    return MacTerm(times * math.prod(size for _, size in axes), tuple(axis for axis, _ in axes))


def _shaped_by_weight(weight: int, *, transposed: bool = False) -> Callable[[_Counter], Sequence[MacTerm]]:
    def rule(counter: _Counter) -> Sequence[MacTerm]:
        made = counter.input(0) if transposed else counter.node.outputs[0]
        return [_term(*counter.axes(made), *counter.axes(counter.input(weight), 1))]

    return rule


def _matmul(counter: _Counter) -> Sequence[MacTerm]:
    left = counter.axes(counter.input(0))
    turned = counter.flag("transA")
    summed = left[:-1][-1:] if turned else left[-1:]
    return [_term(*counter.axes(counter.node.outputs[0]), *summed)]


def _einsum(counter: _Counter) -> Sequence[MacTerm]:
    operands = [counter.axes(value) for value in counter.node.inputs]
    named = einsum_labels(counter.node.attributes.get_string("equation", ""), [len(axes) for axes in operands])
    if named is None or len(operands) < 2:
        return []
    longest: dict[str, tuple[AxisName, int]] = {}
    for labels, axes in zip(named[0], operands, strict=True):
        for label, axis in zip(labels, axes, strict=True):
            if label not in longest or axis[1] > longest[label][1]:
                longest[label] = axis
    return [_term(*longest.values())]


def _recurrent(counter: _Counter) -> Sequence[MacTerm]:
    steps = math.prod(counter.sizes(counter.input(0))[:2])
    return [_term(*counter.axes(counter.input(i)), times=steps) for i in (1, 2)]


def _attention(counter: _Counter) -> Sequence[MacTerm]:
    """Scores and sums of an attention with q, k and v apart, or packed into the first input."""
    query, key, made = counter.input(0), counter.input(1), counter.node.outputs[0]
    past = counter.input({"GroupQueryAttention": 3, "Attention": 4}.get(counter.node.op_type, 6))
    sizes = counter.sizes(query if key is None else key)
    keys = sizes[1] if len(sizes) == 3 or key is None or len(sizes) == 5 else sizes[2]
    if past is not None:
        keys += counter.sizes(past)[2]
    wide = counter.axes(made)
    scores = wide if key is None else counter.axes(query)
    return [_term(*axes, times=keys) for axes in (scores, wide)]


def _packed_attention(counter: _Counter) -> Sequence[MacTerm]:
    """An attention of ONNX Runtime that projects its input itself."""
    source, weight, made = (
        counter.axes(counter.input(0)),
        counter.axes(counter.input(1)),
        counter.axes(counter.node.outputs[0]),
    )
    return [_term(*source[:2], *weight), *(_term(*made, times=source[1][1]) for _ in range(2))]


def _experts(counter: _Counter) -> Sequence[MacTerm]:
    packed = counter.node.op_type == "QMoE"
    tokens = math.prod(counter.sizes(counter.input(0))[:-1]) * counter.node.attributes.get_int("k", 1)
    weights = [value for i in ((2, 5, 8) if packed else (2, 4, 6)) if (value := counter.input(i)) is not None]
    return [_term(*counter.axes(value, 1), times=tokens) for value in weights]


def _any_attention(counter: _Counter) -> Sequence[MacTerm]:
    packed = counter.node.op_type == "QAttention" or counter.node.domain == "com.microsoft"
    separate = counter.node.op_type in ("MultiHeadAttention", "GroupQueryAttention")
    return _packed_attention(counter) if packed and not separate else _attention(counter)


_MATMULS = (
    "DynamicQuantizeMatMul", "FusedGemm", "FusedMatMul", "Gemm", "MatMul", "MatMulInteger", "MatMulIntegerToFloat",
    "MatMulNBits", "QGemm", "QLinearMatMul", "TransposeMatMul",
)  # fmt: skip
_ATTENTIONS = ("Attention", "GroupQueryAttention", "MultiHeadAttention", "QAttention")
_RULES: dict[str, Callable[[_Counter], Sequence[MacTerm]]] = {
    **dict.fromkeys(("Conv", "ConvInteger", "DeformConv", "FusedConv"), _shaped_by_weight(1)),
    "QLinearConv": _shaped_by_weight(3),
    "ConvTranspose": _shaped_by_weight(1, transposed=True),
    **dict.fromkeys(_MATMULS, _matmul),
    "Einsum": _einsum,
    **dict.fromkeys(("DynamicQuantizeLSTM", "GRU", "LSTM", "RNN"), _recurrent),
    **dict.fromkeys(_ATTENTIONS, _any_attention),
    **dict.fromkeys(("MoE", "QMoE"), _experts),
}
