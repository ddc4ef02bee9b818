"""Functions of one element, and chains of them: tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.reference import Reference
from graphopt_backends.npu.emitter import Refusal
from graphopt_backends.npu.units import Grid, Operand, Unit
from graphopt_backends.npu.work import Work

__all__ = ["curve"]

Array = np.ndarray[Any, np.dtype[Any]]


def curve(unit: Unit, work: Work) -> None:
    """TABLE: what ONNX Runtime makes of each of the 256 integers."""
    operand = unit.inputs[0]
    assert operand is not None
    assert operand.grid is not None
    placed, entries = work.placed(operand), _entries(unit, operand, operand.grid)
    if np.array_equal(entries, np.arange(-128, 128)):
        work.put(unit.results[0], placed.tensor, placed.order)
    else:
        work.put(unit.results[0], work.emitter.table(placed.tensor, entries), placed.order)


def _entries(unit: Unit, operand: Operand, grid: Grid) -> Array:
    """The results of a chain for -128 .. 127, as ONNX Runtime computes them node by node."""
    if grid.dtype != "int8":
        raise Refusal("tables have entries for int8 alone")
    rounding = next(node for node in reversed(unit.frame) if node.op_type == "QuantizeLinear")
    nodes = [node for node in unit.frame if node.op_type == "DequantizeLinear"] + [*unit.nodes, rounding]
    constants = {v for node in nodes for v in node.inputs if v is not None and v.const_value is not None}
    opsets = unit.node.graph.opset_imports if unit.node.graph else {}
    view = ir.GraphView(
        [operand.value], [rounding.outputs[0]], nodes=nodes, initializers=tuple(constants), opset_imports=opsets
    )
    model = ir.Model(view.clone(), ir_version=10)
    for value in [*model.graph.inputs, *model.graph.outputs, *(o for node in model.graph for o in node.outputs)]:
        value.shape = None
    model.graph.inputs[0].shape = ir.Shape([256])
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.size == 1 and len(tensor.shape):
            value.const_value = ir.tensor(tensor.numpy().reshape(()), name=value.name)
            value.shape = ir.Shape(())
    feed = {str(model.graph.inputs[0].name): np.arange(-128, 128, dtype=np.int8)}
    found = Reference(model, optimize=False, threads=1).run(feed)
    return np.asarray(next(iter(found.values())))
