"""Rounding itself, and operators that only move integers around."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from graphopt_passes.quant.existing.floats import Floats, Numbers
from graphopt_passes.quant.existing.tables import look_up_floats
from graphopt_passes.quant.sites import graph_of, tensor_of

__all__ = ["MOVES"]

_PLAIN = (
    "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "MaxPool", "Max", "Min",
    "ReduceMax", "ReduceMin", "Reshape", "Resize", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose",
    "Unsqueeze",
)  # fmt: skip
_NARROW = 8  # bits of what counts as a stored weight
_ALL_INPUTS = frozenset({"Concat", "Max", "Min"})


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _round(floats: Floats, node: ir.Node) -> str:
    """QuantizeLinear: its result stands for what it read; nothing is rounded any more."""
    source, scale, zero = (_input(node, i) for i in range(3))
    if source is None:
        return ""
    floats.know(node.outputs[0], floats.clipped(source, scale, zero, node), scale, zero)
    floats.replaced[node] = None
    return ""


def _round_dynamic(floats: Floats, node: ir.Node) -> str:
    """DynamicQuantizeLinear: as before, on the grid it finds itself."""
    if node.inputs[0] is not None:
        floats.know(node.outputs[0], node.inputs[0], node.outputs[1], node.outputs[2])
        floats.replaced[node] = None
    return ""


def _unround(floats: Floats, node: ir.Node) -> str:
    """DequantizeLinear: readers get the real numbers, or a float weight."""
    integers, scale, zero = (_input(node, i) for i in range(3))
    if floats.numbers(integers) is None:
        _table(floats, node)
    if scale is not None and tensor_of(scale) is None and look_up_floats(floats, node):
        return ""
    real = floats.real(integers, scale, zero, node, node.attributes.get_int("axis", 1))
    if real is None:
        return "" if integers is None or tensor_of(integers) is None else "its scale is computed"
    floats.replace(node, node.outputs[0], real)
    return ""


def _table(floats: Floats, node: ir.Node) -> None:
    """Rows looked up in a table of integers: look them up in a table of floats."""
    look = node.inputs[0].producer() if node.inputs[0] is not None else None
    scale = tensor_of(_input(node, 1))
    if look is None or look.op_type != "Gather" or floats.numbers(look.inputs[0]) is not None or scale is None:
        return
    table = tensor_of(look.inputs[0])
    last = node.attributes.get_int("axis", 1) in (-1, _rank(node.inputs[0]) - 1)
    if table is None or (scale.size > 1 and not (last and len(table.shape) == 2)):
        return
    real = floats.real(look.inputs[0], node.inputs[1], _input(node, 2), node, axis=-1)
    if real is None or look.graph is not node.graph:
        return
    (found,) = floats.emit(look, "Gather", [real, look.inputs[1]], look.attributes, name=look.name or "")
    floats.know(look.outputs[0], found, node.inputs[1], _input(node, 2))
    floats.replaced[look] = None


def _multiply(floats: Floats, node: ir.Node) -> str:
    """`Mul(Cast(weight), scale)`, a zero point taken off between or not: a float weight."""
    for index in (0, 1):
        scale = tensor_of(_input(node, 1 - index))
        maker, zero = _maker(node, index), None
        if maker is not None and maker.op_type == "Sub":
            zero = tensor_of(_input(maker, 1))
            maker = _maker(maker, 0) if zero is not None else None
        integers = tensor_of(_input(maker, 0)) if maker is not None and maker.op_type == "Cast" else None
        if scale is None or integers is None or not integers.dtype.is_integer() or integers.dtype.bitwidth > _NARROW:
            continue
        name = (maker.inputs[0].name or "weight") if maker is not None and maker.inputs[0] is not None else "weight"
        make = _product(integers, scale, zero)
        weight = floats.weight(name.removesuffix("_q"), make, integers.shape.numpy(), graph_of(node), scale.dtype)
        floats.replace(node, node.outputs[0], weight)
    return ""


def _maker(node: ir.Node, index: int) -> ir.Node | None:
    value = _input(node, index)
    return value.producer() if value is not None else None


def _product(
    integers: ir.TensorProtocol, scale: ir.TensorProtocol, zero: ir.TensorProtocol | None
) -> Callable[[], np.ndarray]:
    def make() -> np.ndarray:
        numbers = integers.numpy().astype(np.float32)
        return (numbers if zero is None else numbers - zero.numpy()) * scale.numpy()

    return make


def _rank(value: ir.Value | None) -> int:
    return value.shape.rank() if value is not None and value.shape is not None else 0


def _move(floats: Floats, node: ir.Node) -> str:
    """The same operator on real numbers."""
    data = node.inputs if node.op_type in _ALL_INPUTS else node.inputs[:1]
    known = [found for value in data if (found := floats.numbers(value)) is not None]
    if not known or node.domain not in ("", "ai.onnx"):
        return ""
    if len(known) < len(data) or len({(n.scale, n.zero_point) for n in known}) > 1:
        return "its operands are not on one grid"
    inputs = [n.real for n in known] + list(node.inputs[len(data) :])
    _again(floats, node, inputs, known[0])
    return ""


def _pad(floats: Floats, node: ir.Node) -> str:
    """Padding with an integer becomes padding with what it stands for."""
    known = floats.numbers(node.inputs[0])
    if known is None:
        return ""
    fill = tensor_of(_input(node, 2))
    if node.attributes.get_string("mode", "constant") == "constant":
        scale = np.frombuffer(known.scale, np.float32) if isinstance(known.scale, bytes) else None
        if scale is None or scale.size != 1 or (_input(node, 2) is not None and fill is None):
            return "what it pads with is computed"
        step = float(scale[0])
        if fill is None and known.zero_point is not None:
            return "it pads with the integer zero, which stands for another number"
        kind = fill.numpy().dtype if fill is not None else np.dtype(np.uint8)
        zero = int(np.frombuffer(known.zero_point, kind)[0]) if isinstance(known.zero_point, bytes) else 0
        number = int(fill.numpy().reshape(-1)[0]) if fill is not None else 0
        real = floats.builder.scalar("pad_value", np.array(step * (number - zero), np.float32))
        _again(floats, node, [known.real, node.inputs[1], real, *node.inputs[3:]], known)
    else:
        _again(floats, node, [known.real, *node.inputs[1:]], known)
    return ""


def _again(floats: Floats, node: ir.Node, inputs: list[ir.Value | None], source: Numbers) -> None:
    made = floats.emit(node, node.op_type, inputs, node.attributes, outputs=len(node.outputs))
    for output, real in zip(node.outputs, made, strict=True):
        floats.alike(output, real, source)
    floats.replaced[node] = None


MOVES: Mapping[str, Callable[[Floats, ir.Node], str]] = {
    "Concat": _move,
    "Mul": _multiply,
    "DequantizeLinear": _unround,
    "DynamicQuantizeLinear": _round_dynamic,
    "Pad": _pad,
    "QuantizeLinear": _round,
    **dict.fromkeys(_PLAIN, _move),
}
"""Operator -> function that gives the float form; it returns why it could not, empty if there was nothing to do."""
