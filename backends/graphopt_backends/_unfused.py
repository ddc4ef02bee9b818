"""Quantized operators, ONNX's own and ONNX Runtime's, as the DequantizeLinear, operator and QuantizeLinear they mean.

Everything behind this sees one form of quantized graphs. Inputs of such an operator are triples of integers, scale and
zero point, and the pair of scale and zero point of its result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt_backends._builder import Builder
from graphopt_backends._fold import is_constant

__all__ = ["UNFUSED", "unfuse"]


@dataclass(frozen=True)
class _Form:
    """Inputs of a quantized operator.

    Attributes:
        operator: What it computes.
        tensors: First inputs of its triples; None: from the third on, all are triples.
        result: First input of the pair.
        bias: Input of an int32 bias, in steps of the product of the first two scales.
        dropped: Attributes that only the quantized form has.
    """

    operator: str
    tensors: tuple[int, ...] | None
    result: int
    bias: int = -1
    dropped: tuple[str, ...] = ()


_ONE, _TWO = (0,), (0, 3)

UNFUSED: Mapping[str, _Form] = {
    "QGemm": _Form("Gemm", _TWO, 7, bias=6),
    "QLinearAdd": _Form("Add", _TWO, 6),
    "QLinearAveragePool": _Form("AveragePool", _ONE, 3, dropped=("channels_last",)),
    "QLinearConcat": _Form("Concat", None, 0),
    "QLinearConv": _Form("Conv", _TWO, 6, bias=8),
    "QLinearGlobalAveragePool": _Form("GlobalAveragePool", _ONE, 3, dropped=("channels_last",)),
    "QLinearLeakyRelu": _Form("LeakyRelu", _ONE, 3),
    "QLinearMatMul": _Form("MatMul", _TWO, 6),
    "QLinearMul": _Form("Mul", _TWO, 6),
    "QLinearSigmoid": _Form("Sigmoid", _ONE, 3),
    "QLinearSoftmax": _Form("Softmax", _ONE, 3, dropped=("opset",)),
}
"""Quantized operators by name."""


def unfuse(graph: ir.Graph, node: ir.Node) -> bool:
    """Replace a quantized operator, unless its channels come last or the steps of its bias are not known."""
    form, inputs = UNFUSED[node.op_type], list(node.inputs)
    biased = 0 <= form.bias < len(inputs) and inputs[form.bias] is not None
    if node.attributes.get_int("channels_last", 0) or (biased and not _steps_are_known(inputs)):
        return False
    make = Builder(graph, node)
    starts = form.tensors if form.tensors is not None else range(2, len(inputs), 3)
    values: list[ir.Value | None] = []
    for start in starts:
        axis = _channel_axis(node, form.operator) if start else 1
        values.append(make("DequantizeLinear", inputs[start : start + 3], axis=axis))
    if biased:
        steps = make.array(_scale(inputs[1]) * _scale(inputs[4]))
        values.append(make("DequantizeLinear", [inputs[form.bias], steps], axis=0))
    attributes = {name: a.value for name, a in node.attributes.items() if name not in form.dropped}
    pair = inputs[form.result : form.result + 2]
    if pair and pair[0] is not None:
        make.finish("QuantizeLinear", [make(form.operator, values, **attributes), *pair], node.outputs[0])
    else:  # a QGemm may have floats as its result
        make.finish(form.operator, values, node.outputs[0], **attributes)
    return True


def _channel_axis(node: ir.Node, operator: str) -> int:
    """Axis of the second operand that has a scale for each index."""
    return 0 if operator == "Conv" or node.attributes.get_int("transB", 0) else 1


def _steps_are_known(inputs: list[ir.Value | None]) -> bool:
    return is_constant(inputs[1]) and is_constant(inputs[4])


def _scale(value: ir.Value | None) -> np.ndarray:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()
