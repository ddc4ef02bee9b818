"""Putting a chain of thin layers in the place of a layer; the last one keeps its name, its output and its bias."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt_passes._own_constants import new_constant, taken_names, unused_name
from graphopt_passes.lowrank.schemes import Chain, Link
from graphopt_passes.lowrank.sites import Site

__all__ = ["Rewriter", "drop_constant"]

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
        """Compute a layer, and those that share its weight, by a chain."""
        weight = site.node.inputs[0 if site.left or site.table else 1]
        assert weight is not None
        constants = [self.constant(weight, _stored(site, link)) for link in chain.links]
        for node in site.nodes:
            self.put(node, self._chain(node, constants, chain.links, left=site.left))
        drop_constant(weight)

    def constant(self, weight: ir.Value, array: Array) -> ir.Value:
        """A factor, of the type of the weight and in the same graph."""
        dtype = (weight.const_value.dtype if weight.const_value is not None else weight.dtype) or ir.DataType.FLOAT
        numbers = np.ascontiguousarray(array.astype(dtype.numpy()))
        home = _home(weight)
        return new_constant(home or self._graph, f"{weight.name}_factor", numbers, taken=self._taken)

    def put(self, node: ir.Node, made: Sequence[ir.Node]) -> None:
        """Let nodes compute what one did."""
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        _describe(node, made)
        graph.insert_before(node, made)
        _take_over(node, made[-1])

    def node(
        self,
        operator: str,
        like: ir.Node,
        inputs: Sequence[ir.Value | None],
        attributes: Sequence[ir.Attr] = (),
    ) -> ir.Node:
        """A node with a name and an output of its own; not inserted yet."""
        stem = f"{like.name or like.op_type}_factor"
        output = ir.Value(
            name=unused_name(self._graph, f"{like.outputs[0].name}_factor", self._taken), type=like.outputs[0].type
        )
        name = unused_name(self._graph, stem, self._taken)
        return ir.Node("", operator, inputs, attributes, outputs=[output], name=name)

    def _chain(self, node: ir.Node, weights: Sequence[ir.Value], links: Sequence[Link], *, left: bool) -> list[ir.Node]:
        source = node.inputs[1 if left else 0]
        assert source is not None
        if node.op_type == "Gather":
            looked_up = self.node("Gather", node, [weights[0], node.inputs[1]], list(node.attributes.values()))
            return [looked_up, self.node("MatMul", node, [looked_up.outputs[0], weights[1]])]
        if node.op_type in ("Conv", "ConvTranspose"):
            return self._convolutions(node, source, weights, links)
        if node.op_type == "Gemm":
            return self._gemm(node, source, weights)
        first = self.node("MatMul", node, [weights[0], source] if left else [source, weights[0]])
        made = first.outputs[0]
        return [first, self.node("MatMul", node, [weights[1], made] if left else [made, weights[1]])]

    def _gemm(self, node: ir.Node, source: ir.Value, weights: Sequence[ir.Value]) -> list[ir.Node]:
        """Alpha is in the factors; old operator sets have no Gemm without a bias, so that the first is a MatMul."""
        turned = list[ir.Node]()
        if node.attributes.get_int("transA", 0):
            turned.append(self.node("Transpose", node, [source], [ir.AttrInt64s("perm", [1, 0])]))
            source = turned[0].outputs[0]
        first = self.node("MatMul", node, [source, weights[0]])
        kept = [value for name, value in node.attributes.items() if name == "beta"]
        return [*turned, first, self.node("Gemm", node, [first.outputs[0], weights[1], *node.inputs[2:]], kept)]

    def _convolutions(
        self, node: ir.Node, source: ir.Value, weights: Sequence[ir.Value], links: Sequence[Link]
    ) -> list[ir.Node]:
        """A layer that moves is transposed where the whole one was; the others look at one place."""
        found = list[ir.Node]()
        for weight, link in zip(weights, links, strict=True):
            kind = node.op_type if any(link.moves) else "Conv"
            last = len(found) == len(links) - 1
            attributes = _window(node, link)
            found.append(self.node(kind, node, [source, weight, *(node.inputs[2:] if last else ())], attributes))
            source = found[-1].outputs[0]
        return found


def _stored(site: Site, link: Link) -> Array:
    """The weight of a link as its node reads it."""
    kind, weight = site.node.op_type, link.weight
    if kind == "ConvTranspose":
        return _transposed(link)
    if kind != "MatMul":
        return weight
    matrix = weight.swapaxes(-1, -2) if site.left else weight
    return matrix.reshape(*site.batch, *matrix.shape[-2:])


def _transposed(link: Link) -> Array:
    """`[inputs of all groups, outputs of a group, ...]`, turned round, where the layer moves."""
    if not any(link.moves):
        return link.weight
    outputs, inputs, *kernel = link.weight.shape
    grouped = link.weight.reshape(link.groups, outputs // link.groups, inputs, *kernel).swapaxes(1, 2)
    turned = np.flip(grouped, axis=tuple(range(3, grouped.ndim)))
    return turned.reshape(link.groups * inputs, outputs // link.groups, *kernel)


def _window(node: ir.Node, link: Link) -> list[ir.Attr]:
    """Attributes of a convolution that moves along some axes as `node` does, and looks at one place on the others."""
    mine, old = link.moves, node.attributes
    found: list[ir.Attr] = [ir.AttrInt64s("kernel_shape", list(link.weight.shape[2:]))]
    if link.groups > 1:
        found.append(ir.AttrInt64("group", link.groups))
    mode = old.get_string("auto_pad", "NOTSET")
    plain = mode in ("", "NOTSET")
    for name, nothing, ends in (("strides", 1, 1), ("dilations", 1, 1), ("pads", 0, 2), ("output_padding", 0, 1)):
        if name in old and (plain or name != "pads"):
            values = old.get_ints(name, ())
            values = [v if own else nothing for v, own in zip(values, list(mine) * ends, strict=True)]
            if any(value != nothing for value in values):
                found.append(ir.AttrInt64s(name, values))
    if not plain:
        found.append(ir.AttrString("auto_pad", mode))
    return found


def _describe(node: ir.Node, made: Sequence[ir.Node]) -> None:
    for each in made:
        each.metadata_props.update(node.metadata_props)
    made[-1].doc_string, made[-1].name = node.doc_string, node.name


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


def _home(value: ir.Value) -> ir.Graph | None:
    """The graph that a constant stands in."""
    maker = value.producer()
    graph = maker.graph if maker is not None else value.graph
    return graph if isinstance(graph, ir.Graph) else None


def drop_constant(value: ir.Value) -> None:
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
        drop_constant(each)
