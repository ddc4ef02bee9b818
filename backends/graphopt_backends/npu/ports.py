"""Inputs and outputs of a part as a C program sees them: how they lie, and which reals their integers stand for."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphopt_backends.npu.header import Port
from graphopt_backends.npu.tosa import Tensor

__all__ = ["ports"]


def ports(values: Sequence[ir.Value], tensors: Sequence[Tensor]) -> tuple[Port, ...]:
    """Describe the inputs or outputs of a part.

    Args:
        values: Inputs or outputs of the part in the model.
        tensors: The same in TOSA, in the same order.
    """
    pairs = zip(values, tensors, strict=True)
    return tuple(Port(value.name or "", tensor.dtype, tensor.shape, *_grid(value)) for value, tensor in pairs)


def _grid(value: ir.Value) -> tuple[float | None, int]:
    """Scale and zero point of a value: those of what makes it or, where nothing is said there, of what reads it."""
    makers = [node for node in [value.producer()] if node is not None and node.op_type == "QuantizeLinear"]
    readers = [node for node, index in value.uses() if node.op_type == "DequantizeLinear" and index == 0]
    for node in (*makers, *readers):
        scale = _number(node.inputs[1])
        if scale is not None:
            zero_point = _number(node.inputs[2]) if len(node.inputs) > 2 else 0
            return scale, int(zero_point or 0)
    return None, 0


def _number(value: ir.Value | None) -> float | None:
    """The one number of a constant; None where it holds several, or is no constant."""
    tensor = None if value is None else value.const_value
    return float(tensor.numpy().reshape(-1)[0]) if tensor is not None and tensor.size == 1 else None
