"""How channels pass in and out of the graphs inside a node.

Nodes inside are visited like all others, and what they capture is the same value within and without. What remains is
how the inputs and outputs of the inner graph meet those of the node:

operator   what is tied                                                     what is pinned
If         output of either branch ~ output                                 the condition
Loop       before ~ start of a turn ~ end of a turn ~ behind                count, conditions
             what a turn gives out ~ output, behind an axis for the turns   the turns
Scan       states like a Loop's                                             -
             elements ~ input and output without the axis they lie along    that axis
others     nothing                                                          all that goes in and out
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.analyses.channels.node_view import NodeView
from graphopt.analyses.channels.shape_values import Content, Entry
from graphopt.analyses.names import subgraphs

__all__ = ["visit_inside"]

Enter = Callable[[ir.Graph], None]
"""Visits the nodes of a graph."""

_SCAN_WITHOUT_BATCH = 9


def visit_inside(view: NodeView, enter: Enter) -> None:
    """Visit the graphs inside a node, and tie what goes in and out.

    Args:
        view: The node.
        enter: Visits the nodes of a graph.
    """
    graphs = [graph for _, graph in subgraphs(view.node)]
    for graph in graphs:
        view.answer_for((*graph.inputs, *graph.outputs))
    standard = view.node.domain in ("", "ai.onnx")
    if standard and view.node.op_type == "If" and len(graphs) == 2:
        _if(view, graphs, enter)
    elif standard and view.node.op_type == "Loop" and len(graphs) == 1:
        _loop(view, graphs[0], enter)
    elif standard and view.node.op_type == "Scan" and len(graphs) == 1 and view.opset >= _SCAN_WITHOUT_BATCH:
        _scan(view, graphs[0], enter)
    else:
        for graph in graphs:
            enter(graph)


def _if(view: NodeView, branches: Sequence[ir.Graph], enter: Enter) -> None:
    for graph in branches:
        enter(graph)
    for i, output in enumerate(view.node.outputs):
        results = [graph.outputs[i] for graph in branches]
        for result in results:
            _equate(view, result, output)
        _follow_sizes(view, results, output)
        if output.name and all(view.is_zero(result) for result in results):
            view.maps.zeros.add(view.key(output))


def _follow_sizes(view: NodeView, results: Sequence[ir.Value], output: ir.Value) -> None:
    """A list of sizes that comes out of both branches is still one: where they agree, it says what they say."""
    contents = [view.maps.content(result) for result in results]
    known = [content for content in contents if content is not None]
    if not output.name or len(known) < len(results) or len({content.shape for content in known}) > 1:
        return
    merged: Content = np.empty(known[0].size, dtype=object)
    for place, entries in enumerate(zip(*(content.reshape(-1) for content in known), strict=True)):
        merged[place] = _either(entries)
    view.maps.contents[view.key(output)] = merged.reshape(known[0].shape)
    for value in (*results, output):
        view.follow(value)


def _either(entries: Sequence[Entry]) -> Entry:
    numbers, axes = {entry.number for entry in entries}, {entry.axis for entry in entries}
    reads = tuple(sorted({name for entry in entries for name in entry.reads}))
    return Entry(numbers.pop() if len(numbers) == 1 else None, axes.pop() if len(axes) == 1 else None, reads)


def _loop(view: NodeView, body: ir.Graph, enter: Enter) -> None:
    """Inputs: count, condition, what is carried; of the body: number of the turn, condition, what is carried."""
    carried = len(body.inputs) - 2
    for i in range(carried):
        _equate(view, view.input(2 + i), body.inputs[2 + i])
    enter(body)
    for i in range(carried):
        _carry(view, body.inputs[2 + i], body.outputs[1 + i], i)
    for result, output in zip(body.outputs[1 + carried :], view.node.outputs[carried:], strict=False):
        _equate(view, result, output, extra=0)


def _scan(view: NodeView, body: ir.Graph, enter: Enter) -> None:
    """Inputs and outputs: states, then what is taken apart or put together along one axis each."""
    elements = view.node.attributes.get_int("num_scan_inputs", 0)
    states, results = len(body.inputs) - elements, len(body.outputs)
    attributes = view.node.attributes
    along = attributes.get_ints("scan_input_axes", None) or (0,) * elements
    out_along = attributes.get_ints("scan_output_axes", None) or (0,) * (results - states)
    for i in range(states):
        _equate(view, view.input(i), body.inputs[i])
    for i, axis in enumerate(along, start=states):
        _equate(view, body.inputs[i], view.input(i), extra=axis)
    enter(body)
    for i in range(states):
        _carry(view, body.inputs[i], body.outputs[i], i)
    for i, axis in enumerate(out_along, start=states):
        _equate(view, body.outputs[i], _output(view, i), extra=axis)


def _carry(view: NodeView, start: ir.Value, end: ir.Value, index: int) -> None:
    _equate(view, start, end)
    _equate(view, start, _output(view, index))


def _output(view: NodeView, index: int) -> ir.Value | None:
    """An output, None where those at the end are left out."""
    return view.node.outputs[index] if index < len(view.node.outputs) else None


def _equate(view: NodeView, inner: ir.Value | None, outer: ir.Value | None, extra: int | None = None) -> None:
    """Say that two values are the same, index for index; what cannot be the same is pinned.

    Args:
        view: The node.
        inner: A value.
        outer: The other one.
        extra: An axis that only the other one has.
    """
    if inner is None or outer is None or not outer.name:
        return
    rank = view.rank(inner)
    if rank is None or not (_is_tensor(inner) and _is_tensor(outer)):
        _pin_all(view, inner, outer)
        return
    if outer.producer() is view.node:
        view.declare(outer, [None] * (rank + (extra is not None)))
    if view.rank(outer) != rank + (extra is not None):
        _pin_all(view, inner, outer)
        return
    added = rank + 1 if extra is None else extra % (rank + 1)
    for axis in range(rank):
        to = axis + (axis >= added)
        if not view.link(inner, axis, outer, to):
            view.maps.pin(view.atoms(inner, axis), view.reason)
            view.maps.pin(view.atoms(outer, to), view.reason)


def _pin_all(view: NodeView, *values: ir.Value) -> None:
    for value in values:
        view.maps.pin_value(value, view.reason)


def _is_tensor(value: ir.Value) -> bool:
    """Whether a value is no sequence, map or optional; one without a type has no shape either."""
    return value.type is None or isinstance(value.type, ir.TensorType)
