"""Writing nodes in front of one that is there already, each of them once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.opset import opset_version
from graphopt_passes._own_constants import taken_names

__all__ = ["Writer", "sweep"]

Array = np.ndarray[Any, np.dtype[Any]]
Operand = ir.Value | None
_Key = tuple[object, ...]


class Writer:
    """Adds nodes to one graph; a node that stands there already, with the same inputs, serves again.

    Nodes are asked for from the front of the graph to its back: what was made for one place serves all later ones. Who
    reads a value that was replaced since gets what took its place.

    Args:
        model: The model, whose names are not to be used again.
        graph: Where nodes go.
        instead: What took the place of values that were replaced; it may grow.
    """

    def __init__(self, model: ir.Model, graph: ir.Graph, instead: Mapping[ir.Value, ir.Value]) -> None:
        self.graph = self._home = graph
        self.before: ir.Node | None = None
        self.turn: ir.Value | None = None
        self._instead = instead
        self._opset = opset_version(model)
        self._taken = taken_names(model.graph)
        self._numbers: dict[str, int] = {}
        self._made: dict[_Key, ir.Value] = {}
        self._constants: dict[_Key, ir.Value] = {}

    def inside(self, body: ir.Graph, number: ir.Value) -> Writer:
        """A writer for the body of a loop, which goes to the body's end and knows the number of the turn."""
        inner = copy(self)
        inner.graph, inner.before, inner.turn = body, None, number
        inner.forget()
        return inner

    def forget(self) -> None:
        """Let no node serve again."""
        self._made = {}

    def op(self, kind: str, *inputs: Operand, **attributes: Any) -> ir.Value:
        """The first output of a node."""
        inputs = self._current(inputs)
        given = {name: value for name, value in attributes.items() if value is not None}
        key = (kind, inputs, tuple((name, _hashable(value)) for name, value in sorted(given.items())))
        if key not in self._made:
            name = self.name(f"sparse_{kind}")
            node = ir.node(kind, list(inputs), given, outputs=[ir.Value(name=name)], name=name)
            self._insert(node)
            self._made[key] = node.outputs[0]
        return self._made[key]

    def again(self, node: ir.Node, inputs: Sequence[Operand]) -> ir.Value:
        """The output of a node like another, on other inputs."""
        inputs, attributes = self._current(inputs), tuple(node.attributes.values())
        key = (node.domain, node.op_type, tuple(inputs), tuple(map(id, attributes)))
        if key not in self._made:
            name = self.name(f"sparse_{node.op_type}")
            twin = ir.Node(
                node.domain, node.op_type, list(inputs), attributes, outputs=[ir.Value(name=name)], name=name
            )
            self._insert(twin)
            self._made[key] = twin.outputs[0]
        return self._made[key]

    def constant(self, array: Array | Sequence[int]) -> ir.Value:
        """A constant; lists are integers of 64 bits."""
        data = np.asarray(array, None if isinstance(array, np.ndarray) else np.int64)
        key = (str(data.dtype), data.shape, data.tobytes())
        if key not in self._constants:
            name = self.name("sparse_constant")
            tensor = ir.tensor(data, name=name)
            self._constants[key] = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(data.shape), const_value=tensor
            )
            self._home.register_initializer(self._constants[key])
        return self._constants[key]

    def number(self, value: float, dtype: ir.DataType) -> ir.Value:
        """A scalar of an element type."""
        return self.constant(np.array(value, dtype.numpy()))

    def size(self, value: ir.Value, axis: int) -> ir.Value:
        """`[1]`, the size of an axis counted from the front."""
        whole = self.op("Shape", value)
        return self.op("Slice", whole, self.constant([axis]), self.constant([axis + 1]))

    def reshaped(self, value: ir.Value, sizes: Sequence[int | ir.Value]) -> ir.Value:
        """A value in another shape; sizes are numbers (-1: what is left) and values of shape `[1]`."""
        if all(isinstance(size, int) for size in sizes):
            return self.op("Reshape", value, self.constant([size for size in sizes if isinstance(size, int)]))
        parts = [self.constant([size]) if isinstance(size, int) else size for size in sizes]
        return self.op("Reshape", value, self.op("Concat", *parts, axis=0))

    def transposed(self, value: ir.Value, order: Sequence[int]) -> ir.Value:
        """A value with its axes in another order."""
        return value if list(order) == sorted(order) else self.op("Transpose", value, perm=list(order))

    def unsqueezed(self, value: ir.Value, *axes: int) -> ir.Value:
        """A value with axes of size 1 where they stand in the result."""
        return self.op("Unsqueeze", value, self.constant(axes))

    def highest(self, value: ir.Value) -> ir.Value:
        """The greatest number along the last axis, which stays with size 1."""
        if self._opset < 18:
            return self.op("ReduceMax", value, axes=[-1], keepdims=1)
        return self.op("ReduceMax", value, self.constant([-1]), keepdims=1)

    def part(self, value: ir.Value, axis: int, start: int | ir.Value, end: int | ir.Value) -> ir.Value:
        """A value from one position of an axis to another."""
        bounds = [self.constant([bound]) if isinstance(bound, int) else bound for bound in (start, end)]
        return self.op("Slice", value, *bounds, self.constant([axis]))

    def name(self, stem: str) -> str:
        """A name that nothing bears."""
        number = self._numbers.get(stem, 0)
        while (name := f"{stem}_{number}" if number else stem) in self._taken:
            number += 1
        self._numbers[stem] = number + 1
        self._taken.add(name)
        return name

    def _current(self, inputs: Sequence[Operand]) -> tuple[Operand, ...]:
        return tuple(None if value is None else self._instead.get(value, value) for value in inputs)

    def _insert(self, node: ir.Node) -> None:
        if self.before is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(self.before, node)


def sweep(nodes: Sequence[ir.Node]) -> None:
    """Remove those of these nodes that nothing reads, and then what only they read."""
    pending = list(nodes)
    while pending:
        node = pending.pop()
        graph = node.graph
        if not isinstance(graph, ir.Graph) or any(out.uses() or out.is_graph_output() for out in node.outputs):
            continue
        read = [value for value in node.inputs if value is not None]
        graph.remove(node, safe=True)
        for value in dict.fromkeys(read):
            maker = value.producer()
            if maker is not None:
                pending.append(maker)
            elif not value.uses() and value.is_initializer() and not value.is_graph_input():
                _drop(value)


def _drop(value: ir.Value) -> None:
    if not value.is_graph_output() and isinstance(value.graph, ir.Graph):
        value.graph.initializers.pop(value.name or "", None)


def _hashable(value: Any) -> object:
    if isinstance(value, ir.Graph):
        return id(value)
    return tuple(value) if isinstance(value, list) else value
