"""Which engine runs each node of a lowered model: our kernels, else TVM's own lowering, else ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.backend_base import Unsupported
from graphopt.model_io import weight_bytes
from graphopt_backends._fold import is_constant, static_shape
from graphopt_backends._import import unsupported_nodes
from graphopt_backends._native import quiet
from graphopt_backends._parts import GraphPart, cut, data_dependent
from graphopt_backends._plan import Engine

__all__ = ["EMBED_BYTES", "Division", "divide", "lift_weights"]

EMBED_BYTES = 64 << 20
"""Weights above this are no part of what TVM imports."""

_LIFT_BYTES = 1 << 16
_TYPES = frozenset(
    {
        ir.DataType.BOOL, ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32,
        ir.DataType.INT64, ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64,
        ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16,
    }
)  # fmt: skip


@dataclass(frozen=True)
class Division:
    """A model in parts.

    Attributes:
        parts: In order.
        engines: What runs the nodes that kernels do not, by name.
        refused: Nodes that only ONNX Runtime can run, by name.
    """

    parts: tuple[GraphPart, ...]
    engines: Mapping[str, Engine]
    refused: Mapping[str, Unsupported]


def divide(model: ir.Model) -> Division:
    """Divide a lowered model; those of its nodes that are quantized are brought into order first."""
    engines: dict[str, Engine] = dict.fromkeys(_without_kernel(model), "tvm")
    refused: dict[str, Unsupported] = {}
    for name, node in data_dependent(model).items():
        engines[name] = "onnxruntime"
        refused[name] = _data_dependent(node)
    while engines:
        parts = cut(model, engines)
        found = _mistaken(parts)
        if not found:
            return Division(tuple(parts), engines, refused)
        for name, why in found.items():
            engines[name] = "tvm" if why is None else "onnxruntime"
            if why is not None:
                refused[name] = why
    return Division((GraphPart(model, "kernels"),), {}, {})


def _data_dependent(node: ir.Node) -> Unsupported:
    if node.domain not in ("", "ai.onnx"):
        operator = f"{node.domain}.{node.op_type}"
        return Unsupported(node.name or "", operator, "nothing is known about the shape of its result")
    return Unsupported(node.name or "", node.op_type, "the shape of its input or output depends on the data")


def _without_kernel(model: ir.Model) -> list[str]:
    from graphopt_backends.network.convert import unsupported

    found = {node.name or "" for node in unsupported(model)}
    for node in model.graph:
        values = [value for value in (*node.inputs, *node.outputs) if value is not None and value.name]
        if any(value.dtype not in _TYPES for value in values if not is_constant(value)):
            found.add(node.name or "")
    return [node.name or "" for node in model.graph if (node.name or "") in found]


def _mistaken(parts: list[GraphPart]) -> dict[str, Unsupported | None]:
    """Nodes whose engine cannot take them after all: None for kernels, the reason for TVM."""
    found: dict[str, Unsupported | None] = {}
    for part in parts:
        if part.engine == "kernels":
            found |= dict.fromkeys(_without_kernel(part.model))
        elif part.engine == "tvm":
            imported = part.model
            if weight_bytes(imported) > EMBED_BYTES:
                imported = imported.clone()
                lift_weights(imported)
            with quiet():
                found |= unsupported_nodes(imported)
    return found


def lift_weights(model: ir.Model) -> list[tuple[str, ir.TensorProtocol]]:
    """Turn large constants into inputs after the real ones; returns them in that order."""
    lifted: list[tuple[str, ir.TensorProtocol]] = []
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        shape = static_shape(value)
        if tensor is None or tensor.nbytes < _LIFT_BYTES or shape is None or not is_constant(value):
            continue
        model.graph.initializers.pop(name)
        value.const_value = None
        value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(shape)
        model.graph.inputs.append(value)
        lifted.append((name, tensor))
    return lifted
