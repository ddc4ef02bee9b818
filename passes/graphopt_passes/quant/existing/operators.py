"""Operators on integers with fixed scales, as operators on floats.

Each takes its operands as triples (integers, scale, zero point) and says on which grid its result is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt_passes.quant.existing._maths import real_numbers
from graphopt_passes.quant.existing.floats import Floats
from graphopt_passes.quant.sites import graph_of, tensor_of

__all__ = ["OPERATORS"]

_REDUCE_INPUT_SINCE = 18
_SOFTMAX_AXIS_SINCE = 13


@dataclass(frozen=True)
class _Form:
    """Where a simple operator keeps what.

    Attributes:
        kind: Operator on floats.
        operands: First index of each triple.
        grid: Index of the scale of the result; its zero point follows.
        drop: Attributes that the float operator does not know.
    """

    kind: str
    operands: tuple[int, ...]
    grid: int
    drop: tuple[str, ...] = ("channels_last",)


_SIMPLE = {
    "QLinearAdd": _Form("Add", (0, 3), 6),
    "QLinearAveragePool": _Form("AveragePool", (0,), 3),
    "QLinearGlobalAveragePool": _Form("GlobalAveragePool", (0,), 3),
    "QLinearLeakyRelu": _Form("LeakyRelu", (0,), 3),
    "QLinearMatMul": _Form("MatMul", (0, 3), 6),
    "QLinearMul": _Form("Mul", (0, 3), 6),
    "QLinearSigmoid": _Form("Sigmoid", (0,), 3),
    "QLinearSoftmax": _Form("Softmax", (0,), 3, ("opset",)),
}


def _at(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _operand(floats: Floats, node: ir.Node, index: int, axis: int = -1) -> ir.Value | None:
    return floats.real(_at(node, index), _at(node, index + 1), _at(node, index + 2), node, axis)


def _simple(floats: Floats, node: ir.Node) -> str:
    form = _SIMPLE[node.op_type]
    if node.attributes.get_int("channels_last", 0):
        return "its channels come last"
    if node.op_type == "QLinearSoftmax":
        written = node.attributes.get_int("opset", floats.opset)
        if (written < _SOFTMAX_AXIS_SINCE) != (floats.opset < _SOFTMAX_AXIS_SINCE):
            return f"it is a Softmax of opset {written}"
    inputs = [_operand(floats, node, index) for index in form.operands]
    if any(value is None for value in inputs):
        return "an operand is on an unknown grid"
    kept: dict[str, Any] = {name: attr for name, attr in node.attributes.items() if name not in form.drop}
    if node.op_type == "QLinearSoftmax":
        kept["axis"] = node.attributes.get_int("axis", -1)
    _finish(floats, node, form.kind, inputs, kept, form.grid)
    return ""


def _conv(floats: Floats, node: ir.Node) -> str:
    data, weight = _operand(floats, node, 0), _operand(floats, node, 3, 0)
    if data is None or weight is None:
        return "an operand is on an unknown grid"
    bias = _bias(floats, node, 8, 1, 4)
    if isinstance(bias, str):
        return bias
    _finish(floats, node, "Conv", [data, weight, *([bias] if bias else [])], node.attributes, 6)
    return ""


def _gemm(floats: Floats, node: ir.Node) -> str:
    data = _operand(floats, node, 0)
    weight = _operand(floats, node, 3, 0 if node.attributes.get_int("transB", 0) else 1)
    if data is None or weight is None:
        return "an operand is on an unknown grid"
    bias = _bias(floats, node, 6, 1, 4, node.attributes.get_float("alpha", 1.0))
    if isinstance(bias, str):
        return bias
    _finish(floats, node, "Gemm", [data, weight, *([bias] if bias else [])], node.attributes, 7)
    return ""


def _bias(
    floats: Floats, node: ir.Node, index: int, first: int, second: int, factor: float = 1.0
) -> ir.Value | str | None:
    """An INT32 bias on the grid of the product of two scales."""
    value = _at(node, index)
    if value is None:
        return None
    integers, left, right = tensor_of(value), tensor_of(_at(node, first)), tensor_of(_at(node, second))
    if integers is None or left is None or right is None:
        return "its bias is computed"
    scale = left.numpy().astype(np.float64) * right.numpy().astype(np.float64) * factor
    real = real_numbers(integers.numpy(), scale.astype(np.float32), None, -1)
    return floats.weight(_plain_name(value), lambda: real, real.shape, graph_of(node))


def _plain_name(value: ir.Value) -> str:
    return (value.name or "bias").removesuffix("_quantized").removesuffix("_q")


def _concat(floats: Floats, node: ir.Node) -> str:
    inputs = [_operand(floats, node, index) for index in range(2, len(node.inputs), 3)]
    if any(value is None for value in inputs):
        return "an operand is on an unknown grid"
    _finish(floats, node, "Concat", inputs, node.attributes, 0)
    return ""


def _where(floats: Floats, node: ir.Node) -> str:
    left, right = _operand(floats, node, 1), _operand(floats, node, 4)
    if left is None or right is None:
        return "an operand is on an unknown grid"
    _finish(floats, node, "Where", [node.inputs[0], left, right], {}, 7)
    return ""


def _mean(floats: Floats, node: ir.Node) -> str:
    data, axes = _operand(floats, node, 0), node.attributes.get_ints("axes")
    if data is None:
        return "its operand is on an unknown grid"
    inputs: list[ir.Value | None] = [data]
    kept: dict[str, Any] = {"keepdims": node.attributes.get_int("keepdims", 1)}
    if axes is not None and floats.opset >= _REDUCE_INPUT_SINCE:
        inputs.append(floats.builder.scalar("axes", np.array(axes, np.int64)))
    elif axes is not None:
        kept["axes"] = tuple(axes)
    _finish(floats, node, "ReduceMean", inputs, kept, 3)
    return ""


def _finish(
    floats: Floats, node: ir.Node, kind: str, inputs: list[ir.Value | None], attributes: Mapping[str, Any], grid: int
) -> None:
    """Compute in float; the result stands for the integers, or is the result where that was float already."""
    (made,) = floats.emit(node, kind, inputs, attributes, name=(node.name or "").removesuffix("_quant"))
    scale, zero = _at(node, grid), _at(node, grid + 1)
    if scale is None:
        floats.replace(node, node.outputs[0], made)
    else:
        floats.know(node.outputs[0], floats.clipped(made, scale, zero, node), scale, zero)
        floats.replaced[node] = None


OPERATORS: Mapping[str, Callable[[Floats, ir.Node], str]] = {
    "QGemm": _gemm,
    "QLinearConcat": _concat,
    "QLinearConv": _conv,
    "QLinearReduceMean": _mean,
    "QLinearWhere": _where,
    **dict.fromkeys(_SIMPLE, _simple),
}
"""Operator -> function that gives the float form; it returns why it could not."""
