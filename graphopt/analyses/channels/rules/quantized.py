"""How channels pass through quantized operators: tables `QUANTIZED_RULES` and, by domain, `QUANTIZED_CONTRIB_RULES`.

operator                        what is tied                                              what is pinned
QuantizeLinear, Dequantize-     every axis; scale, zero point ~ their axis                axes cut into blocks
DynamicQuantizeLinear           every axis                                                -
QLinearConv, ConvInteger        like Conv; scale, zero point of the weight ~ out          space, kernel
QLinearMatMul, MatMulInteger,   like MatMul; scales, zero points ~ rows, columns          -
  MatMulIntegerToFloat, Dynamic-
  QuantizeMatMul, QGemm
MatMulNBits                     packed rows ~ their scales, zero points, bias ~ out       the axis cut into blocks
QLinearAdd, -Mul, -Where,       like the operator without QLinear                         like it
  -Concat, -Sigmoid, -LeakyRelu,
  -Softmax, -ReduceMean
QLinear[Global]AveragePool      batch and channel                                         space
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.analyses.channels.node_view import NodeView
from graphopt.analyses.channels.rules.computing import COMPUTE_RULES, Rule, broadcast
from graphopt.analyses.channels.rules.moves import MOVE_RULES
from graphopt.analyses.channels.rules.norms import NORM_RULES

__all__ = ["QUANTIZED_CONTRIB_RULES", "QUANTIZED_RULES"]


def _quantize(view: NodeView) -> None:
    """QuantizeLinear and DequantizeLinear: per tensor, per channel or per block."""
    source, output, parameters = view.input(0), view.node.outputs[0], (view.input(1), view.input(2))
    rank = view.rank(source)
    if not rank:
        return
    axis = view.node.attributes.get_int("axis", 1) % rank
    blocked = (view.rank(parameters[0]) or 0) > 1
    for other in range(rank):
        if blocked and other == axis:
            continue
        view.link(source, other, output, other)
        for value in parameters:
            if blocked:
                view.link(value, other, output, other)
    if not blocked:
        _per_channel(view, parameters, output, axis)


def _per_channel(view: NodeView, values: tuple[ir.Value | None, ...], output: ir.Value, axis: int) -> None:
    """Scales and zero points of one value per index of an axis; those of a whole tensor have one value."""
    for value in values:
        if view.rank(value):
            view.link(value, -1, output, axis)


def _rows(view: NodeView, values: tuple[ir.Value | None, ...], output: ir.Value) -> None:
    """Scales and zero points of one value per row of the left operand."""
    rank = view.rank(output) or 0
    for value in values:
        own = view.rank(value) or 0
        if own and rank > 1:
            view.link(value, -1 if own == 1 else -2, output, -2)


def _dynamic(view: NodeView) -> None:
    """Zero is always within the range that is measured, so that channels of zeros do not change it."""
    for axis in range(view.rank(view.input(0)) or 0):
        view.link(view.input(0), axis, view.node.outputs[0], axis)


def _conv(view: NodeView) -> None:
    COMPUTE_RULES["Conv"](view.with_inputs(0, 3, 8))
    _per_channel(view, (view.input(4), view.input(5)), view.node.outputs[0], 1)


def _conv_integer(view: NodeView) -> None:
    COMPUTE_RULES["Conv"](view.with_inputs(0, 1))
    _per_channel(view, (view.input(3),), view.node.outputs[0], 1)


def _matmul(left: tuple[int, ...], right: tuple[int, ...], bias: int | None = None) -> Rule:
    """Rule of a quantized MatMul.

    Args:
        left: Inputs of the left side: the matrix, then its scale and zero point.
        right: The same of the right side.
        bias: Input that is added, if there is one.
    """

    def rule(view: NodeView) -> None:
        output = view.node.outputs[0]
        COMPUTE_RULES["MatMul"](view.with_inputs(left[0], right[0]))
        _rows(view, tuple(view.input(i) for i in left[1:]), output)
        columns = (*right[1:], *(() if bias is None else (bias,)))
        _per_channel(view, tuple(view.input(i) for i in columns), output, -1)

    return rule


def _gemm(view: NodeView) -> None:
    COMPUTE_RULES["Gemm"](view.with_inputs(0, 3, 6))
    _per_channel(view, (view.input(4), view.input(5)), view.node.outputs[0], 1)


def _matmul_n_bits(view: NodeView) -> None:
    """A weight `[N, blocks, bytes]` with scales and zero points row after row; the K axis is cut into blocks."""
    source, weight, output = view.input(0), view.input(1), view.node.outputs[0]
    rank = view.rank(source)
    rows = view.atoms(weight, 0)
    if weight is None or rank is None or rows is None:
        return
    for axis in range(rank - 1):
        view.link(source, axis, output, axis)
    parameters = [value for value in (view.input(2), view.input(3)) if value is not None]
    if any((atoms := view.atoms(value, 0)) is None or len(atoms) % len(rows) for value in parameters):
        return
    view.role(weight, 0, "output")
    if not view.link(weight, 0, output, -1):
        return
    view.link(view.input(5), 0, output, -1)
    for value in parameters:
        atoms = view.atoms(value, 0)
        if atoms is not None:
            view.tie(np.repeat(rows, len(atoms) // len(rows)), atoms)
            view.settle(value, 0)
    view.state_sizes("N", (len(rows),), [(0, view.span(weight, 0))], scalar=True)


def _pool(view: NodeView) -> None:
    last = view.node.attributes.get_int("channels_last", 0)
    view.link(view.input(0), 0, view.node.outputs[0], 0)
    view.link(view.input(0), -1 if last else 1, view.node.outputs[0], -1 if last else 1)


def _as(rule: Rule, *inputs: int) -> Rule:
    """The rule of another operator on some of the inputs; the others are numbers for the whole tensor."""
    return lambda view: rule(view.with_inputs(*inputs))


def _concat(view: NodeView) -> None:
    MOVE_RULES["Concat"](view.with_inputs(*range(2, len(view.node.inputs), 3)))


QUANTIZED_RULES: dict[str, Rule] = {
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _quantize,
    "DynamicQuantizeLinear": _dynamic,
    "QLinearConv": _conv,
    "ConvInteger": _conv_integer,
    "QLinearMatMul": _matmul((0, 1, 2), (3, 4, 5)),
    "MatMulInteger": _matmul((0, 2), (1, 3)),
}

QUANTIZED_CONTRIB_RULES: dict[tuple[str, str], Rule] = {
    ("com.microsoft", "QuantizeLinear"): _quantize,
    ("com.microsoft", "DequantizeLinear"): _quantize,
    ("com.microsoft", "QLinearConv"): _conv,
    ("com.microsoft", "QGemm"): _gemm,
    ("com.microsoft", "MatMulIntegerToFloat"): _matmul((0, 2, 4), (1, 3, 5), 6),
    ("com.microsoft", "DynamicQuantizeMatMul"): _matmul((0,), (1, 2, 3), 4),
    ("com.microsoft", "MatMulNBits"): _matmul_n_bits,
    ("com.microsoft", "QLinearAdd"): _as(broadcast, 0, 3),
    ("com.microsoft", "QLinearMul"): _as(broadcast, 0, 3),
    ("com.microsoft", "QLinearWhere"): _as(broadcast, 0, 1, 4),
    ("com.microsoft", "QLinearSigmoid"): _as(broadcast, 0),
    ("com.microsoft", "QLinearLeakyRelu"): _as(broadcast, 0),
    ("com.microsoft", "QLinearSoftmax"): _as(COMPUTE_RULES["Softmax"], 0),
    ("com.microsoft", "QLinearReduceMean"): _as(NORM_RULES["ReduceMean"], 0),
    ("com.microsoft", "QLinearConcat"): _concat,
    ("com.microsoft", "QLinearAveragePool"): _pool,
    ("com.microsoft", "QLinearGlobalAveragePool"): _pool,
}
