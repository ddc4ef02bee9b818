"""Products on integers whose input grid is found on every run, and weights in packed blocks, as float operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt_passes.quant.existing._maths import blocks_to_matrix, real_numbers, unpack
from graphopt_passes.quant.existing.floats import Floats
from graphopt_passes.quant.sites import graph_of, tensor_of

__all__ = ["PRODUCTS"]

Array = np.ndarray[Any, np.dtype[Any]]
_COMPUTED = "its weight or its scales are computed"


def _at(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _is_computed(node: ir.Node, index: int) -> bool:
    """Whether an input is there and no constant."""
    value = _at(node, index)
    return value is not None and tensor_of(value) is None


def _sum(floats: Floats, node: ir.Node) -> str:
    """`Cast(MatMulInteger or ConvInteger) * (x_scale * w_scale)`."""
    if floats.numbers(node.inputs[0]) is None and floats.numbers(node.inputs[1]) is None:
        _look_up(floats, node)
    sides = [floats.numbers(value) for value in node.inputs[:2]]
    moved = 0 if sides[0] is not None else 1
    known = sides[moved]
    if known is None:
        return "its input is on an unknown grid"
    if sides[1 - moved] is not None:
        return _both(floats, node)
    end, value = _scaled(node, known.scale), node.inputs[1 - moved]
    integers, zero = tensor_of(value), tensor_of(_at(node, 3 - moved))
    if end is None:
        return "what it is multiplied with is no constant scale"
    if integers is None or _is_computed(node, 3 - moved):
        return _COMPUTED
    last, factor = end
    kernel = node.op_type == "ConvInteger"

    def make() -> Array:
        scale = factor.numpy()
        if kernel and scale.ndim:
            scale = scale.reshape(-1, *(1,) * (len(integers.shape) - 1)) if scale.size > 1 else scale.reshape(())
        return real_numbers(integers.numpy(), scale, zero.numpy() if zero is not None else None, 0 if kernel else -1)

    weight = floats.weight(_name(value, "_quantized", "_q"), make, integers.shape.numpy(), graph_of(node))
    inputs = [known.real, weight] if moved == 0 else [weight, known.real]
    kind = "Conv" if kernel else "MatMul"
    (made,) = floats.emit(last, kind, inputs, node.attributes, name=_plain(node))
    floats.replaced[node], floats.names[node] = None, _plain(node)
    floats.replace(last, last.outputs[0], made)
    return ""


def _both(floats: Floats, node: ir.Node) -> str:
    """A product of two activations."""
    left, right = floats.numbers(node.inputs[0]), floats.numbers(node.inputs[1])
    last, factors = _factors(node)
    if left is None or right is None or last is None or {*factors} != {left.scale, right.scale}:
        return "what it is multiplied with are not the scales of its operands"
    (made,) = floats.emit(last, "MatMul", [left.real, right.real], name=_plain(node))
    floats.replaced[node], floats.names[node] = None, _plain(node)
    floats.replace(last, last.outputs[0], made)
    return ""


def _factors(node: ir.Node) -> tuple[ir.Node | None, tuple[ir.Value | None, ...]]:
    """The node behind an integer sum that makes real numbers of it, and the two factors of what it multiplies with."""
    cast = _only_reader(node, "Cast")
    last = _only_reader(cast, "Mul") if cast is not None else None
    if cast is None or last is None:
        return None, ()
    other = next((value for value in last.inputs if value is not cast.outputs[0]), None)
    maker = other.producer() if other is not None else None
    return (last, tuple(maker.inputs)) if maker is not None and maker.op_type == "Mul" else (None, ())


def _scaled(node: ir.Node, scale: object) -> tuple[ir.Node, ir.TensorProtocol] | None:
    """The node behind an integer sum that makes real numbers of it, and the constant part of its factor."""
    last, factors = _factors(node)
    if last is None:
        return None
    for index in (0, 1):
        factor = tensor_of(factors[1 - index])
        if factor is not None and (factors[index] is scale or _bytes(factors[index]) == scale):
            return last, factor
    return None


def _bytes(value: ir.Value | None) -> bytes | None:
    tensor = tensor_of(value)
    return None if tensor is None else tensor.numpy().reshape(-1).tobytes()


def _look_up(floats: Floats, node: ir.Node) -> None:
    """Rows of a table of integers that an integer product reads as they are: look them up in a table of floats.

    The table's scale is the first factor of what the product is multiplied with.
    """
    look = node.inputs[0].producer() if node.inputs[0] is not None else None
    _, factors = _factors(node)
    if not factors or look is None or look.op_type != "Gather" or look.graph is not node.graph:
        return
    scale = factors[0]
    tensor = tensor_of(scale)
    if tensor is None or tensor.size != 1:
        return
    table = floats.real(look.inputs[0], scale, _at(node, 2), look, -1)
    if table is not None:
        (found,) = floats.emit(look, "Gather", [table, look.inputs[1]], look.attributes, name=_plain(look))
        floats.know(look.outputs[0], found, scale, _at(node, 2))
        floats.replaced[look] = None


def _plain(node: ir.Node) -> str:
    return (node.name or "").removesuffix("_quant")


def _name(value: ir.Value | None, *suffixes: str) -> str:
    """Name of a weight without what quantizers add to it."""
    name = (value.name if value is not None else None) or "weight"
    for suffix in suffixes:
        name = name.removesuffix(suffix)
    return name


def _only_reader(node: ir.Node, kind: str) -> ir.Node | None:
    readers = list(node.outputs[0].consumers())
    fits = len(readers) == 1 and readers[0].op_type == kind and not node.outputs[0].is_graph_output()
    return readers[0] if fits else None


def _fused(floats: Floats, node: ir.Node) -> str:
    """DynamicQuantizeMatMul and MatMulIntegerToFloat, which ONNX Runtime makes of the above."""
    dynamic = node.op_type == "DynamicQuantizeMatMul"
    scale, zero, bias = (2, 3, 4) if dynamic else (3, 5, 6)
    source = node.inputs[0] if dynamic else floats.real(_at(node, 0), _at(node, 2), _at(node, 4), node)
    weight = floats.real(_at(node, 1), _at(node, scale), _at(node, zero), node, -1)
    if source is None or weight is None:
        return _COMPUTED
    _product(floats, node, source, weight, _at(node, bias))
    return ""


def _packed(floats: Floats, node: ir.Node) -> str:
    """MatMulNBits."""
    rows, columns = node.attributes.get_int("K", 0), node.attributes.get_int("N", 0)
    bits, block = node.attributes.get_int("bits", 4), node.attributes.get_int("block_size", 128)
    source, packed, scales, zeros = node.inputs[0], *(tensor_of(_at(node, i)) for i in (1, 2, 3))
    if _at(node, 4) is not None or node.attributes.get_int("weight_prepacked", 0):
        return "its weight is reordered"
    if bits not in (2, 4, 8):
        return f"it packs {bits} bits"
    if source is None or packed is None or scales is None or _is_computed(node, 3):
        return _COMPUTED

    def make() -> Array:
        offset = zeros.numpy() if zeros is not None else None
        return blocks_to_matrix(
            packed.numpy(), scales.numpy(), offset, rows=rows, columns=columns, bits=bits, block=block
        )

    weight = floats.weight(_name(node.inputs[1], f"_Q{bits}"), make, (rows, columns), graph_of(node))
    _product(floats, node, source, weight, _at(node, 5))
    return ""


def _product(floats: Floats, node: ir.Node, source: ir.Value, weight: ir.Value, bias: ir.Value | None) -> None:
    name = node.name or ""
    for suffix in ("_Q2", "_Q4", "_Q8"):
        name = name.removesuffix(suffix)
    (made,) = floats.emit(node, "MatMul", [source, weight], name=name)
    if bias is not None:
        (made,) = floats.emit(node, "Add", [made, bias], name=floats.builder.name(f"{name}_bias"))
    floats.replace(node, node.outputs[0], made)


def _rows(floats: Floats, node: ir.Node) -> str:
    """GatherBlockQuantized with blocks along the last axis."""
    data, scales, zeros = (tensor_of(_at(node, i)) for i in (0, 2, 3))
    if data is None or scales is None or _is_computed(node, 3):
        return _COMPUTED
    bits, block = node.attributes.get_int("bits", 4), node.attributes.get_int("block_size", 128)
    axis = node.attributes.get_int("quantize_axis", 1) % len(data.shape)
    if axis != len(data.shape) - 1:
        return "its blocks do not lie along rows"
    narrow = data.dtype == ir.DataType.UINT8 and bits < 8  # several numbers a byte
    shape = [*data.shape.numpy()[:-1], int(data.shape.numpy()[-1]) * (8 // bits if narrow else 1)]

    def make() -> Array:
        numbers = unpack(data.numpy(), bits, shape[-1]) if narrow else data.numpy()
        offset = zeros.numpy() if zeros is not None else None
        if narrow:
            blocks = scales.shape.numpy()[-1]
            offset = np.full((1,), 2 ** (bits - 1)) if offset is None else unpack(offset, bits, int(blocks))
        return real_numbers(numbers, scales.numpy(), offset, axis, block)

    table = floats.weight(_name(node.inputs[0], f"_Q{bits}"), make, shape, graph_of(node))
    attributes = {"axis": node.attributes.get_int("gather_axis", 0)}
    label = (node.name or "").removesuffix(f"_Q{bits}")
    (made,) = floats.emit(node, "Gather", [table, node.inputs[1]], attributes, name=label)
    floats.replace(node, node.outputs[0], made)
    return ""


def _recurrent(floats: Floats, node: ir.Node) -> str:
    """DynamicQuantizeLSTM: weights `[directions, inputs, 4 * hidden]`, the transpose of what LSTM reads."""
    inputs: list[ir.Value | None] = [*node.inputs[:8], *[None] * (8 - len(node.inputs))]
    for index, scale in ((1, 8), (2, 10)):
        integers, factor, zero = (tensor_of(_at(node, i)) for i in (index, scale, scale + 1))
        if integers is None or factor is None or _is_computed(node, scale + 1):
            return _COMPUTED
        directions, rows, columns = integers.shape.numpy()
        name, make = _name(node.inputs[index], "_quantized"), _turned(integers, factor, zero)
        inputs[index] = floats.weight(name, make, (directions, columns, rows), graph_of(node))
    made = floats.emit(
        node, "LSTM", inputs, node.attributes, name=(node.name or "").removesuffix("_quant"), outputs=len(node.outputs)
    )
    for output, real in zip(node.outputs, made, strict=True):
        if not output.name:
            real.name = ""
        floats.replace(node, output, real)
    return ""


def _turned(
    integers: ir.TensorProtocol, scale: ir.TensorProtocol, zero: ir.TensorProtocol | None
) -> Callable[[], Array]:
    def make() -> Array:
        factor = _by_direction(scale.numpy())
        offset = _by_direction(zero.numpy()) if zero is not None else None
        return np.ascontiguousarray(real_numbers(integers.numpy(), factor, offset).transpose(0, 2, 1))

    return make


def _by_direction(parameter: Array) -> Array:
    """`[directions]` or `[directions, 4 * hidden]`, ready to broadcast with `[directions, inputs, 4 * hidden]`."""
    return parameter.reshape(-1, 1, 1) if parameter.ndim < 2 else parameter[:, None, :]


PRODUCTS: Mapping[str, Callable[[Floats, ir.Node], str]] = {
    "ConvInteger": _sum,
    "DynamicQuantizeLSTM": _recurrent,
    "DynamicQuantizeMatMul": _fused,
    "GatherBlockQuantized": _rows,
    "MatMulInteger": _sum,
    "MatMulIntegerToFloat": _fused,
    "MatMulNBits": _packed,
}
"""Operator -> function that gives the float form; it returns why it could not."""
