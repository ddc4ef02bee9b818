"""A part of a model as one TOSA graph."""

from __future__ import annotations

import onnx_ir as ir

from graphopt_backends.npu.emitter import Emitter
from graphopt_backends.npu.operators import lower, take
from graphopt_backends.npu.tosa import Graph
from graphopt_backends.npu.units import find_units
from graphopt_backends.npu.work import Work, plain

__all__ = ["emit"]


def emit(model: ir.Model, family: str) -> Graph:
    """Lower a model all of whose operators the NPU takes.

    Args:
        model: Its inputs and outputs are integers; they lie in the TOSA graph as in ONNX, in the same order.
        family: `u55`, `u65` or `u85`.

    Raises:
        Refusal: The NPU cannot compute an operator.
    """
    work = Work(Emitter(family))
    units, _ = find_units(model.graph)
    readers = {operand.value: operand for unit in units.values() for operand in unit.inputs if operand is not None}
    for value in model.graph.inputs:
        take(readers[value], work)
    for unit in units.values():
        lower(unit, work)
    graph = work.emitter.graph
    for value in model.graph.outputs:
        placed = work.values[value]
        tensor = work.emitter.arrange(placed, plain(len(placed.order)))
        if tensor in graph.inputs or tensor in graph.outputs:  # it must be made, and by itself
            tensor = work.emitter.add("IDENTITY", [tensor], tensor.shape, tensor.dtype)
        graph.outputs.append(tensor)
    _drop_unread(graph)
    return graph


def _drop_unread(graph: Graph) -> None:
    """Remove what nothing reads: reshapes that another one stands for."""
    read = set(graph.outputs)
    for operator in reversed(graph.operators):
        if operator.output in read:
            read.update(operator.inputs)
    graph.operators = [operator for operator in graph.operators if operator.output in read]
