"""Which operators the NPU runs, and which its host."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.backend_base import Unsupported
from graphopt_backends._fold import is_constant
from graphopt_backends._parts import GraphPart, cut
from graphopt_backends._plan import Engine
from graphopt_backends.npu.operators import refusal
from graphopt_backends.npu.units import Unit, find_units

__all__ = ["Partition", "partition"]

_FRAME = ("DequantizeLinear", "QuantizeLinear")


@dataclass(frozen=True)
class Partition:
    """A model in parts.

    Attributes:
        parts: In order.
        taken: Units that the NPU runs.
        refused: Operators that it does not run, by name, but for QuantizeLinear and DequantizeLinear at its borders.
    """

    parts: tuple[GraphPart, ...]
    taken: tuple[Unit, ...]
    refused: Mapping[str, Unsupported]


def partition(model: ir.Model, family: str, host: Engine = "onnxruntime", left: Collection[str] = ()) -> Partition:
    """Divide a lowered model between NPU and host; its DequantizeLinear nodes get one reader each.

    Args:
        model: Fixed sizes, constants folded.
        family: `u55`, `u65` or `u85`.
        host: What runs the host's parts.
        left: Names of nodes that ONNX Runtime runs instead.
    """
    _compute_outputs(model.graph)
    _tell_readers_apart(model.graph)
    units, reasons = find_units(model.graph)
    refused = {node.name or "": _unsupported(node, why) for node, why in reasons.items()}
    taken, inside = list[Unit](), set[str]()
    for unit in units.values():
        if why := refusal(unit, family):
            refused |= {node.name or "": _unsupported(node, why) for node in unit.nodes}
        else:
            taken.append(unit)
            inside.update(node.name or "" for node in (*unit.nodes, *unit.frame))
    engines: dict[str, Engine] = {}
    for node in model.graph:
        name = node.name or ""
        engines[name] = "npu" if name in inside else "onnxruntime" if name in left else host
    return Partition(tuple(cut(model, engines)), tuple(taken), refused)


def _unsupported(node: ir.Node, why: str) -> Unsupported:
    operator = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
    return Unsupported(node.name or "", operator, why)


def _compute_outputs(graph: ir.Graph) -> None:
    """Let a node make what the model returns as it is stored, so that some part has it."""
    for place, value in enumerate(graph.outputs):
        if is_constant(value):
            name = str(value.name)
            graph.initializers.pop(name)
            value.name = f"{name}.stored"
            graph.register_initializer(value)
            node = ir.node("Identity", [value], name=f"{name}.returned")
            node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, value.type, value.shape
            graph.append(node)
            graph.outputs[place] = node.outputs[0]


def _tell_readers_apart(graph: ir.Graph) -> None:
    """Give every reader of dequantized integers a DequantizeLinear of its own, so that parts can share the integers."""
    for node in list(graph):
        if node.op_type != "DequantizeLinear" or any(is_constant(value) for value in node.inputs[:1]):
            continue
        output = node.outputs[0]
        for count, (user, index) in enumerate(list(output.uses())[0 if output.is_graph_output() else 1 :], start=1):
            copy = ir.node("DequantizeLinear", node.inputs, node.attributes, name=f"{node.name}.{count}")
            copy.outputs[0].name = f"{output.name}.{count}"
            copy.outputs[0].type, copy.outputs[0].shape = output.type, output.shape
            graph.insert_after(node, copy)
            user.replace_input_with(index, copy.outputs[0])
