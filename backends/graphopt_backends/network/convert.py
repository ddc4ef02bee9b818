"""From a graph with fixed shapes to a network: which kernel computes which nodes."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping

import onnx_ir as ir

from graphopt.targets import Isa
from graphopt_backends._fold import is_constant
from graphopt_backends.network import (
    attention,
    blockwise,
    choice,
    dynamic,
    linear,
    moves,
    norms,
    order,
    recurrent,
    resize,
    rows,
    scatter,
    scores,
)
from graphopt_backends.network.half import Widened
from graphopt_backends.network.integers import dequantized
from graphopt_backends.network.network import Network, dtype_of, shape_of
from graphopt_backends.network.passing import pass_on
from graphopt_backends.network.regions import Region, find_regions
from graphopt_backends.network.views import Buffer, View, contiguous_strides
from graphopt_backends.network.weights import Weights

__all__ = ["convert", "unsupported"]

Converter = Callable[[Network, ir.Node, Region | None], None]

_ANCHORS: Mapping[str, Converter] = linear.CONVERTERS
_FAMILIES = (attention, choice, dynamic, moves, order, recurrent, resize, rows, scatter)
_OTHERS: Mapping[str, Converter] = {op: made for family in _FAMILIES for op, made in family.CONVERTERS.items()}
_CHECKS: Mapping[str, Callable[[ir.Node], bool]] = {
    op: check for family in _FAMILIES for op, check in family.CHECKS.items()
}


def convert(model: ir.Model, isa: Isa, weights: Weights) -> Network:
    """Convert a lowered model.

    Args:
        model: Fixed shapes, constants folded, nodes in order.
        isa: The CPU.
        weights: Where constants go.
    """
    pass_on(model)
    _fuse(model)
    network, graph = Network(isa, weights), model.graph
    network.inputs = tuple(str(value.name) for value in graph.inputs)
    network.outputs = tuple(str(value.name) for value in graph.outputs)
    for value in graph.inputs:
        shape = shape_of(value)
        buffer = Buffer(dtype_of(value), max(1, int(_product(shape))), "input", str(value.name))
        network.views[value] = View(buffer, shape, contiguous_strides(shape))
    regions = find_regions(graph, _has_epilogue, linear.accepts)
    guards = choice.find_guards(graph)
    for node in graph:
        region = regions.get(node)
        before, known = len(network.calls), set(network.views) if node in guards else set[ir.Value]()
        if blockwise.keeps(node):
            pass  # a part of the weight of what reads it
        elif region is None and not _is_read_with_its_user(node):
            _OTHERS[node.op_type](network, node, None)
        elif region is not None and node is region.last:
            anchor = region.anchor
            if blockwise.is_supported(anchor):
                blockwise.convert(network, anchor, region)
            elif anchor.op_type in _ANCHORS and _has_epilogue(anchor):
                _ANCHORS[anchor.op_type](network, anchor, region)
            else:
                _arithmetic(network, region)
        if node in guards:
            choice.put_under(network, before, guards[node], known, guards)
        _let_go(node)
    for value in graph.outputs:
        _deliver(network, value)
    return network


def _let_go(node: ir.Node) -> None:
    """Give the memory of mapped weights back, which are written by now; who reads them again finds them in the file."""
    makers = [value.producer() for value in node.inputs if value is not None]
    for value in (*node.inputs, *(v for maker in makers if maker is not None for v in maker.inputs)):
        tensor = value.const_value if value is not None else None
        mapped = getattr(tensor.narrow if isinstance(tensor, Widened) else tensor, "raw", None)
        if isinstance(mapped, mmap.mmap):
            mapped.madvise(mmap.MADV_DONTNEED)


def unsupported(model: ir.Model) -> list[ir.Node]:
    """Nodes that no kernel computes; those of a quantized model are brought into order first."""
    pass_on(model)
    found = _unknown(model)
    if found:
        fused = model.clone()
        _fuse(fused)
        names = {node.name for node in _unknown(fused)}
        found = [node for node in found if node.name in names]
    return found


def _fuse(model: ir.Model) -> None:
    """Put nodes that are one kernel in place of what exporters write for them."""
    norms.fuse(model)
    scores.fuse(model)


def _unknown(model: ir.Model) -> list[ir.Node]:
    regions = find_regions(model.graph, _has_epilogue, linear.accepts)
    return [node for node in model.graph if node not in regions and not _is_known(node)]


def _is_read_with_its_user(node: ir.Node) -> bool:
    """A DequantizeLinear is a part of what reads it, or of the weight that it makes."""
    if blockwise.keeps(node):
        return True
    return node.op_type == "DequantizeLinear" and (
        dequantized(node.outputs[0]) is not None or all(v is None or is_constant(v) for v in node.inputs)
    )


def _is_known(node: ir.Node) -> bool:
    if node.op_type not in _OTHERS:
        return _is_read_with_its_user(node)
    check = _CHECKS.get(node.op_type)
    return check is None or check(node)


def _has_epilogue(node: ir.Node) -> bool:
    return blockwise.is_supported(node) or (node.op_type in _ANCHORS and linear.is_supported(node))


def _arithmetic(network: Network, region: Region) -> None:
    sources = [network.view(value) for value in region.operands]
    order = None
    for source in sources:
        if source.shape == shape_of(region.result) and not source.is_contiguous and source.is_dense:
            order = source.order
            break
    result = network.new(region.result, order or _wanted_order(region.result))
    network.loops(region.expression, sources, result, *region.nodes)


def _wanted_order(value: ir.Value) -> tuple[int, ...] | None:
    """Channels last, if that is how a reader wants them."""
    users = [user for user, _ in value.uses()]
    users += [reader for user in users if user.op_type == "DequantizeLinear" for reader, _ in user.outputs[0].uses()]
    rank = len(shape_of(value))
    return linear.image_order(rank) if rank > 2 and any(user.op_type in _IMAGES for user in users) else None


_IMAGES = frozenset({"AveragePool", "Conv", "ConvInteger", "MaxPool", "Resize"})


def _deliver(network: Network, value: ir.Value) -> None:
    """Let a result be computed where the caller wants it, or copy it there."""
    view = network.view(value)
    if view.buffer.origin == "output" and view.buffer.name == value.name:
        return
    shape = shape_of(value)
    buffer = Buffer(view.dtype, max(1, int(_product(shape))), "output", str(value.name))
    network.copy(view, View(buffer, shape, contiguous_strides(shape)))


def _product(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size
