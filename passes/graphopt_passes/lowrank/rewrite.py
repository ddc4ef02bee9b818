"""Putting a chain of thin layers in the place of a layer; the last one keeps its name, its output and its bias."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt_passes._own_constants import new_constant, taken_names, unused_name
from graphopt_passes.lowrank.schemes import Chain
from graphopt_passes.lowrank.sites import Site

__all__ = ["Rewriter"]

Array = np.ndarray[Any, np.dtype[Any]]
_CARRIERS = ("Constant", "Identity", "Reshape", "Transpose")


class Rewriter:
    """Replaces layers of a model.

    Args:
        model: The model; it is changed.
    """

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._taken = taken_names(model.graph)

    def replace(self, site: Site, chain: Chain) -> None:
        """Compute a layer by a chain."""
        node = site.node
        index = 0 if site.table else 1
        weight = node.inputs[index]
        assert weight is not None
        constants = [self._constant(weight, array, node) for array in chain.weights]
        made = self._chain(node, site, constants)
        self._describe(node, made)
        self._graph.insert_before(node, made)
        self._take_over(node, made[-1])
        _drop(weight)

    def _constant(self, weight: ir.Value, array: Array, node: ir.Node) -> ir.Value:
        dtype = (weight.const_value.dtype if weight.const_value is not None else weight.dtype) or ir.DataType.FLOAT
        numbers = np.ascontiguousarray(array.astype(dtype.numpy()))
        return new_constant(self._graph, f"{weight.name}_factor", numbers, beside=node, taken=self._taken)

    def _chain(self, node: ir.Node, site: Site, weights: Sequence[ir.Value]) -> list[ir.Node]:
        source = node.inputs[0]
        assert source is not None
        if site.table:
            looked_up = self._node("Gather", node, [weights[0], node.inputs[1]], dict(node.attributes))
            return [looked_up, self._node("MatMul", node, [looked_up.outputs[0], weights[1]])]
        if node.op_type == "Conv":
            return self._convolutions(node, site, source, weights)
        first = self._node("MatMul", node, [source, weights[0]])
        if node.op_type == "MatMul":
            return [first, self._node("MatMul", node, [first.outputs[0], weights[1]])]
        kept = {name: value for name, value in node.attributes.items() if name == "beta"}
        return [first, self._node("Gemm", node, [first.outputs[0], weights[1], *node.inputs[2:]], kept)]

    def _convolutions(self, node: ir.Node, site: Site, source: ir.Value, weights: Sequence[ir.Value]) -> list[ir.Node]:
        kernel, found = site.geometry.kernel, list[ir.Node]()
        moved = False
        for number, weight in enumerate(weights):
            assert weight.shape is not None
            sizes = [int(size) for size in weight.shape.numpy()[2:]]
            mine = [size > 1 for size in sizes]
            if math.prod(sizes) == math.prod(kernel) and not moved:
                mine = [True] * len(sizes)  # all strides and pads
            moved = moved or any(mine)
            inputs = [source, weight, *(node.inputs[2:] if number == len(weights) - 1 else ())]
            found.append(self._node("Conv", node, inputs, _window(node, sizes, mine)))
            source = found[-1].outputs[0]
        return found

    def _node(
        self,
        operator: str,
        like: ir.Node,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, ir.Attr] | None = None,
    ) -> ir.Node:
        stem = f"{like.name or like.op_type}_factor"
        output = ir.Value(
            name=unused_name(self._graph, f"{like.outputs[0].name}_factor", self._taken), type=like.outputs[0].type
        )
        name = unused_name(self._graph, stem, self._taken)
        return ir.Node("", operator, inputs, list((attributes or {}).values()), outputs=[output], name=name)

    @staticmethod
    def _describe(node: ir.Node, made: Sequence[ir.Node]) -> None:
        for each in made:
            each.metadata_props.update(node.metadata_props)
        made[-1].doc_string, made[-1].name = node.doc_string, node.name

    @staticmethod
    def _take_over(node: ir.Node, last: ir.Node) -> None:
        """Let the last node make what the old one made, under the same name."""
        old, new, graph = node.outputs[0], last.outputs[0], node.graph
        assert graph is not None
        name, old.name = old.name, f"{old.name}_whole"
        new.name, new.shape, new.doc_string = name, old.shape, old.doc_string
        new.metadata_props.update(old.metadata_props)
        new.meta.update(old.meta)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _window(node: ir.Node, sizes: Sequence[int], mine: Sequence[bool]) -> dict[str, ir.Attr]:
    """Attributes of a convolution that moves along some axes as `node` does, and looks at one place on the others."""
    axes, old = len(sizes), node.attributes
    found = [ir.AttrInt64s("kernel_shape", list(sizes))]
    mode = old.get_string("auto_pad", "NOTSET")
    for name in ("strides", "dilations"):
        values = [v if own else 1 for v, own in zip(old.get_ints(name, [1] * axes), mine, strict=True)]
        if any(value != 1 for value in values):
            found.append(ir.AttrInt64s(name, values))
    if mode not in ("", "NOTSET"):
        found.append(ir.AttrString("auto_pad", mode))
    else:
        pads = [v if own else 0 for v, own in zip(old.get_ints("pads", [0] * 2 * axes), [*mine, *mine], strict=True)]
        if any(pads):
            found.append(ir.AttrInt64s("pads", pads))
    return {attribute.name: attribute for attribute in found}


def _drop(value: ir.Value) -> None:
    """Remove a constant that nobody reads any more, with what it was made of."""
    if value.uses() or value.is_graph_output():
        return
    maker = value.producer()
    if maker is None:
        if value.is_initializer() and not value.is_graph_input() and isinstance(value.graph, ir.Graph):
            value.graph.initializers.pop(value.name or "")
        return
    if maker.op_type not in _CARRIERS or not isinstance(maker.graph, ir.Graph):
        return
    read = [each for each in maker.inputs if each is not None]
    maker.graph.remove(maker, safe=True)
    for each in dict.fromkeys(read):
        _drop(each)
