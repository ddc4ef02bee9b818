"""Weights as real numbers: what a quantized constant stands for."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.analyses.constants import Constants

__all__ = ["real_weight"]

Array = np.ndarray[Any, np.dtype[Any]]

_QUANTIZED: dict[str, dict[int, tuple[int | None, int | None, int]]] = {
    "ConvInteger": {1: (None, 3, 0)},
    "DequantizeLinear": {0: (1, 2, 1)},
    "DynamicQuantizeLSTM": {1: (8, 9, -1), 2: (10, 11, -1)},
    "DynamicQuantizeMatMul": {1: (2, 3, -1)},
    "MatMulInteger": {1: (None, 3, -1)},
    "MatMulIntegerToFloat": {1: (3, 5, -1)},
    "QGemm": {3: (4, 5, -1)},
    "QLinearConv": {3: (4, 5, 0)},
    "QLinearMatMul": {3: (4, 5, -1)},
}
"""Operator -> index of a quantized input -> indices of its scale and zero point, and the axis that they lie on."""


def real_weight(key: str, constants: Constants) -> Array:
    """A constant as floating-point numbers; a float one is not copied, so that it stays on disk until it is read.

    A quantized one, `scale * (q - zero point)`, becomes float32. Where scale or zero point are not constant they count
    as 1 and 0, which keeps magnitudes comparable within a weight of symmetric steps. Packed 4-bit weights are unpacked:
    `[rows, blocks, bytes]` becomes `[rows, blocks, 2 * bytes]`.

    Args:
        key: Name of the constant.
        constants: All constants.
    """
    tensor = constants.tensors[key]
    array: Array = tensor.numpy()
    if tensor.dtype.is_floating_point() and tensor.dtype.bitwidth > 8:
        return array
    numbers = array.astype(np.float32)
    value = constants.names.value(key)
    for use in () if value is None else value.uses():
        if use.node.op_type == "MatMulNBits" and use.idx == 1:
            return _unpacked(array, use.node, constants)
        slots = _QUANTIZED.get(use.node.op_type, {}).get(use.idx)
        if slots is not None:
            return _dequantized(numbers, use.node, slots, constants)
    return numbers


def _dequantized(
    numbers: Array, node: ir.Node, slots: tuple[int | None, int | None, int], constants: Constants
) -> Array:
    scale, zero = (_parameter(node, slot, constants) for slot in slots[:2])
    if node.op_type in ("ConvInteger", "MatMulInteger"):
        scale = _later_scale(node, constants)
    axis = node.attributes.get_int("axis", slots[2]) if node.op_type == "DequantizeLinear" else slots[2]
    size = node.attributes.get_int("block_size", 0)
    if zero is not None:
        numbers = numbers - _spread(zero, numbers.shape, axis, size)
    return numbers if scale is None else numbers * _spread(scale, numbers.shape, axis, size)


def _later_scale(node: ir.Node, constants: Constants) -> Array | None:
    """The constant part of the scale that what an integer product makes is multiplied with, as ONNX Runtime writes it.

    `Mul(Cast(product), Mul(scale of the activation, scale of the weight))`
    """
    made = node.outputs[0]
    for kind in ("Cast", "Mul"):
        readers = list(made.consumers())
        if len(readers) != 1 or readers[0].op_type != kind:
            return None
        node, before, made = readers[0], made, readers[0].outputs[0]
        if kind == "Mul":
            other = node.inputs[1] if node.inputs[0] is before else node.inputs[0]
            maker = None if other is None else other.producer()
            factors = [other] if maker is None else maker.inputs if maker.op_type == "Mul" else []
            found = [tensor for factor in factors if (tensor := constants.of(factor)) is not None]
            return found[0].numpy().astype(np.float32) if len(found) == 1 else None
    return None


def _unpacked(packed: Array, node: ir.Node, constants: Constants) -> Array:
    """4-bit weights of MatMulNBits; other widths stay as they are stored."""
    scale, zero = constants.of(node.inputs[2]), constants.of(node.inputs[3]) if len(node.inputs) > 3 else None
    if node.attributes.get_int("bits", 4) != 4 or scale is None:
        return packed.astype(np.float32)
    rows, blocks = packed.shape[:2]
    numbers = np.stack([packed & 15, packed >> 4], axis=-1).reshape(rows, blocks, -1).astype(np.float32)
    middle: Array = np.full((rows, blocks), 8, np.float32)
    if zero is not None and zero.dtype == ir.DataType.UINT8:
        nibbles = zero.numpy().reshape(rows, -1)
        middle = np.stack([nibbles & 15, nibbles >> 4], axis=-1).reshape(rows, -1)[:, :blocks].astype(np.float32)
    elif zero is not None:
        middle = zero.numpy().reshape(rows, blocks).astype(np.float32)
    return (numbers - middle[..., None]) * scale.numpy().reshape(rows, blocks, 1).astype(np.float32)


def _parameter(node: ir.Node, slot: int | None, constants: Constants) -> Array | None:
    tensor = constants.of(node.inputs[slot]) if slot is not None and slot < len(node.inputs) else None
    return None if tensor is None else tensor.numpy().astype(np.float32)


def _spread(parameter: Array, shape: tuple[int, ...], axis: int, block: int) -> Array:
    """Give a parameter a shape that broadcasts: one value for all, one per index of an axis, or one per block."""
    if parameter.size == 1 or not shape:
        return parameter.reshape(-1)[:1]
    axis %= len(shape)
    if parameter.ndim == len(shape):
        repeats = block or -(-shape[axis] // parameter.shape[axis])
        return np.take(np.repeat(parameter, repeats, axis=axis), np.arange(shape[axis]), axis=axis)
    if parameter.size == shape[axis]:
        return parameter.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return np.ones(1, np.float32) * parameter.mean()
