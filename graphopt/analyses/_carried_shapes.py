"""Shapes of what goes round a Loop, which ONNX's inference leaves open.

A value that is carried from one turn to the next is assumed to keep the shape that it starts with. Inference then says
what one turn makes of it: where that is the same, the assumption holds by induction; axes that come out otherwise are
opened, and inference starts again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

__all__ = ["carried_values", "infer_carried"]


@dataclass(frozen=True, eq=False)
class _Carried:
    """A value on its way round a loop: before it, at the start and at the end of a turn, behind the loop."""

    before: ir.Value
    start: ir.Value
    end: ir.Value
    behind: ir.Value


def carried_values(model: ir.Model) -> Iterator[_Carried]:
    """What all Loops of a model carry, where it is a tensor."""
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        body = node.attributes.get("body")
        if node.op_type != "Loop" or node.domain != "" or body is None or body.is_ref():
            continue
        graph = body.as_graph()
        for i, before in enumerate(node.inputs[2:]):
            if before is not None and isinstance(graph.inputs[2 + i].type, ir.TensorType):
                yield _Carried(before, graph.inputs[2 + i], graph.outputs[1 + i], node.outputs[i])


def infer_carried(model: ir.Model, infer: Callable[[ir.Model], object]) -> None:
    """Infer shapes again with what loops carry.

    Args:
        model: A model whose shapes have been inferred once; its shapes change.
        infer: Infers shapes, keeping those that are there.
    """
    carried = [value for value in carried_values(model) if value.start.shape is None]
    if not carried:
        return
    known = {value: value.shape for graph in model.graphs() for value in _shaped(graph)}
    opened: dict[_Carried, set[int]] = {}
    refused: set[_Carried] = set()
    assumed: set[_Carried] = set()
    while True:
        new = [v for v in carried if v not in assumed | refused and v.before.shape is not None]
        if not new:
            return
        for value in new:
            _assume(value, opened.setdefault(value, set()))
        assumed.update(new)
        infer(model)
        if all(_holds(value, opened[value], refused) for value in carried if value in assumed):
            continue
        assumed.clear()
        for value, shape in known.items():
            value.shape = shape


def _shaped(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def _assume(value: _Carried, opened: set[int]) -> None:
    dims = [None if axis in opened else dim for axis, dim in enumerate(value.before.shape or ())]
    value.start.shape = ir.Shape(dims)
    if value.behind.name and value.behind.shape is None:
        value.behind.shape = ir.Shape(dims)


def _holds(value: _Carried, opened: set[int], refused: set[_Carried]) -> bool:
    """Whether one turn keeps the assumed shape; what it does not keep is opened or, without a rank, refused."""
    start, end = value.start.shape, value.end.shape
    if start is None or end is None or len(start) != len(end):
        refused.add(value)
        return False
    changed = {axis for axis in range(len(start)) if axis not in opened and not _same(start[axis], end[axis])}
    opened |= changed
    return not changed


def _same(a: int | ir.SymbolicDim, b: int | ir.SymbolicDim) -> bool:
    return a == b and (isinstance(a, int) or a.value is not None)
