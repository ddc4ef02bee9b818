"""Puts nodes in the place of one node, under names made from its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt_backends._fold import add_constant

__all__ = ["Builder"]


class Builder:
    """Adds nodes before the one that they replace; a call adds one with one output."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self._graph, self._node, self._count = graph, node, 0

    def __call__(self, op: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Value:
        self._count += 1
        name = f"{self._node.name}/lowered/{op}_{self._count}"
        made = ir.Node("", op, inputs, ir.convenience.convert_attributes(attributes), name=name)
        made.outputs[0].name = name
        self._graph.insert_before(self._node, made)
        return made.outputs[0]

    @property
    def opset(self) -> int:
        """Version of ONNX's operators that the graph uses."""
        return int(self._graph.opset_imports.get("", 0))

    def ints(self, values: Sequence[int] | np.ndarray) -> ir.Value:
        """A constant list of numbers."""
        return self.array(np.asarray(values, np.int64))

    def array(self, array: np.ndarray) -> ir.Value:
        """A constant."""
        self._count += 1
        return add_constant(self._graph, f"{self._node.name}/lowered/const_{self._count}", array)

    def split(self, value: ir.Value, parts: int, axis: int, size: int) -> list[ir.Value]:
        """Cut a value into parts of one size."""
        return self.parts(value, [size] * parts, axis)

    def parts(self, value: ir.Value, sizes: Sequence[int], axis: int) -> list[ir.Value]:
        """Cut a value into parts."""
        if len(sizes) == 1:
            return [value]
        self._count += 1
        name = f"{self._node.name}/lowered/Split_{self._count}"
        attributes = ir.convenience.convert_attributes({"axis": axis})
        made = ir.Node("", "Split", [value, self.ints(sizes)], attributes, num_outputs=len(sizes), name=name)
        for i, output in enumerate(made.outputs):
            output.name = f"{name}_{i}"
        self._graph.insert_before(self._node, made)
        return list(made.outputs)

    def reduce(self, op: str, value: ir.Value | None, axes: Sequence[int]) -> ir.Value:
        """Reduce along axes, which stay with a size of 1."""
        if self.opset >= 18 or op == "ReduceSum":
            return self(op, [value, self.ints(axes)], keepdims=1)
        return self(op, [value], keepdims=1, axes=list(axes))

    def finish(self, op: str, inputs: list[ir.Value | None], output: ir.Value, **attributes: Any) -> None:
        """Make the last node, which takes over the name of `output`, and remove the old one."""
        self.put(op, inputs, output, **attributes)
        self._graph.remove(self._node, safe=True)

    def give(self, values: Sequence[ir.Value | None]) -> None:
        """Let values be the outputs of the old node, as far as it is read, and remove it."""
        for output, value in zip(self._node.outputs, values, strict=False):
            if value is not None and (output.uses() or output.is_graph_output()):
                self.put("Identity", [value], output)
        self._graph.remove(self._node, safe=True)

    def put(self, op: str, inputs: list[ir.Value | None], output: ir.Value, **attributes: Any) -> None:
        """Make a node that takes over the name and uses of `output`."""
        new = self(op, inputs, **attributes)
        new.type, new.shape = output.type, output.shape
        name, output.name = output.name, f"{output.name}/replaced"
        ir.convenience.replace_all_uses_with(output, new, replace_graph_outputs=True)
        new.name = name
