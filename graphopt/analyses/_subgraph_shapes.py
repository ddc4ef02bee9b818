"""What ONNX's shape inference leaves open inside subgraphs: loops, and what constants outside say.

A value that is carried from one turn of a Loop to the next is assumed to keep the shape that it starts with. Inference
then says what one turn makes of it: where that is the same, the assumption holds by induction; axes that come out
otherwise are opened, and inference starts again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.analyses.constants import Constants

__all__ = ["carried_values", "infer_carried", "lend_constants"]

_SMALL = 1 << 10


@dataclass(frozen=True, eq=False)
class _Carried:
    """A value on its way round a loop: before it, at the start and at the end of a turn, behind the loop."""

    before: ir.Value
    start: ir.Value
    end: ir.Value
    behind: ir.Value

    @property
    def lacks_shape(self) -> bool:
        """Whether there is anything to find out."""
        return self.start.shape is None or bool(self.behind.name and self.behind.shape is None)


def carried_values(model: ir.Model) -> Iterator[_Carried]:
    """What all Loops of a model carry, where it is a tensor."""
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        body = node.attributes.get("body")
        if node.op_type != "Loop" or node.domain != "" or body is None or body.is_ref():
            continue
        graph = body.as_graph()
        around = zip(node.inputs[2:], graph.inputs[2:], graph.outputs[1:], node.outputs, strict=False)
        for before, start, end, behind in around:
            if before is not None and isinstance(start.type, ir.TensorType):
                yield _Carried(before, start, end, behind)


def lend_constants(model: ir.Model, constants: Constants) -> frozenset[ir.Value]:
    """Give subgraphs copies of the small constants that they capture: inference does not look outside for numbers.

    Args:
        model: A model with names that are unique; it changes.
        constants: Its constants.

    Returns:
        The copies.
    """
    lent: list[ir.Value] = []
    for graph in model.graph.subgraphs():
        own: dict[ir.Value, ir.Value] = {}
        for node in graph:
            for i, value in enumerate(node.inputs):
                tensor = None if value is None or value.graph is graph else constants.of(value)
                if value is None or tensor is None or tensor.nbytes > _SMALL:
                    continue
                if value not in own:
                    own[value] = _lend(graph, value, tensor, len(lent))
                    lent.append(own[value])
                node.replace_input_with(i, own[value])
    return frozenset(lent)


def _lend(graph: ir.Graph, value: ir.Value, tensor: ir.TensorProtocol, number: int) -> ir.Value:
    copy = ir.Value(
        name=f"{value.name}/lent_{number}",
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(tensor.shape.numpy()),
        const_value=ir.tensor(tensor.numpy(), tensor.dtype),  # a value names its tensor, which is the model's own
    )
    graph.register_initializer(copy)
    return copy


def infer_carried(model: ir.Model, infer: Callable[[ir.Model], object]) -> None:
    """Infer shapes again with what loops carry.

    Args:
        model: A model whose shapes have been inferred once; its shapes change.
        infer: Infers shapes, keeping those that are there.
    """
    open_axes: dict[_Carried, set[int]] = {value: set() for value in carried_values(model) if value.lacks_shape}
    known = {value: value.shape for graph in model.graphs() for value in _shaped(graph)} if open_axes else {}
    while open_axes:
        assumed = _assume_all(model, open_axes, infer)
        changed = {value: _changed_axes(value, shape) for value, shape in assumed.items()}
        if not any(axes is None or axes for axes in changed.values()):
            return
        for value, shape in known.items():
            value.shape = shape
        for value, axes in changed.items():
            if axes is None:
                del open_axes[value]
            else:
                open_axes[value] |= axes


def _shaped(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def _assume_all(
    model: ir.Model, open_axes: Mapping[_Carried, set[int]], infer: Callable[[ir.Model], object]
) -> dict[_Carried, ir.Shape]:
    """Assume shapes as soon as it is known what goes into a loop, those of inner loops after those of outer ones."""
    assumed: dict[_Carried, ir.Shape] = {}
    while new := [value for value in open_axes if value not in assumed and value.before.shape is not None]:
        assumed |= {value: _assume(value, open_axes[value]) for value in new}
        infer(model)
    return assumed


def _assume(value: _Carried, open_axes: set[int]) -> ir.Shape:
    """Write down what a carried value has for a shape on every turn, if it has it on the first and keeps it."""
    before, start = value.before.shape or ir.Shape([]), value.start.shape
    dims: list[int | ir.SymbolicDim | None] = [None if i in open_axes else dim for i, dim in enumerate(before)]
    if start is not None:  # somebody wrote it down
        fits = [len(start) == len(before) and _same(dim, start[i]) for i, dim in enumerate(before)]
        dims = [dim if fit else None for dim, fit in zip(dims, fits, strict=True)]
    shape = ir.Shape(dims)
    if start is None:
        value.start.shape = shape
    if value.behind.name and value.behind.shape is None and len(value.start.shape or ()) == len(shape):
        value.behind.shape = shape
    return shape


def _changed_axes(value: _Carried, assumed: ir.Shape) -> set[int] | None:
    """Axes that one turn does not surely keep, None if not even their number."""
    end = value.end.shape
    if end is None or len(end) != len(assumed):
        return None
    return {axis for axis, dim in enumerate(assumed) if _is_known(dim) and not _same(dim, end[axis])}


def _is_known(dim: int | ir.SymbolicDim) -> bool:
    return isinstance(dim, int) or dim.value is not None


def _same(a: int | ir.SymbolicDim, b: int | ir.SymbolicDim) -> bool:
    return _is_known(a) and a == b
