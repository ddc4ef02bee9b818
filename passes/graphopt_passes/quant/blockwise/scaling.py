"""Divide what layers read by the scales that their weights were multiplied with, in the operator before if it can."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt_passes.quant.builder import Builder
from graphopt_passes.quant.sites import graph_of, tensor_of

__all__ = ["divide_input"]

Array = np.ndarray[Any, np.dtype[Any]]
_NORMS = {"LayerNormalization": (1, 2), "RMSNormalization": (1,)}


def divide_input(builder: Builder, value: ir.Value, readers: Collection[ir.Node], scales: Array) -> str:
    """Divide a value, along its last axis, for some of its readers; exact up to rounding of float32.

    Args:
        builder: Edits the model.
        value: What the layers read as their first input.
        readers: The layers, all in one graph.
        scales: float32 `[channels]`.

    Returns:
        Where the division went, for reports.
    """
    producer = value.producer()
    alone = not value.is_graph_output() and all(user in readers for user in value.consumers())
    if producer is not None and alone and _divide_producer(builder, producer, scales):
        return f"scales in {producer.name or producer.op_type}"
    first = min(readers, key=_position)
    name = value.name or "input"
    factors = builder.constant(f"{name}_by", (1 / scales).astype(np.float32), first.graph)
    divide = builder.node("Mul", [value, factors], f"{name}_scaled")
    graph_of(first).insert_before(first, divide)
    for reader in readers:
        reader.replace_input_with(0, divide.outputs[0])
    return "scales in a Mul of its own"


def _position(node: ir.Node) -> int:
    return next(i for i, other in enumerate(node.graph or ()) if other is node)


def _divide_producer(builder: Builder, producer: ir.Node, scales: Array) -> bool:
    """Divide the constant vectors that an operator multiplies its result with, and adds to it."""
    if producer.domain not in ("", "ai.onnx"):
        return False
    if producer.op_type in _NORMS:
        ports = [i for i in _NORMS[producer.op_type] if i < len(producer.inputs) and producer.inputs[i] is not None]
    elif producer.op_type == "Mul":
        ports = [i for i, value in enumerate(producer.inputs) if _vector(value, len(scales)) is not None][:1]
    else:
        return False
    vectors = [_vector(producer.inputs[i], len(scales)) for i in ports]
    if not vectors or any(vector is None for vector in vectors):
        return False
    for index, vector in zip(ports, vectors, strict=True):
        old = producer.inputs[index]
        if vector is None or old is None:
            raise TypeError("checked above")
        new = builder.constant(f"{old.name}_scaled", (vector / scales).astype(np.float32), producer.graph)
        producer.replace_input_with(index, new)
        builder.discard(old)
    return True


def _vector(value: ir.Value | None, size: int) -> Array | None:
    """A constant float vector of that size that lies on the last axis of whatever it meets."""
    tensor = tensor_of(value)
    if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) != 1 or tensor.size != size:
        return None
    return tensor.numpy()
