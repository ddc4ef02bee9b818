"""Reductions, normalizations, pooling: kernels that read many elements for one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import onnx_ir as ir

from graphopt_backends._fold import is_constant
from graphopt_backends.kernels.epilogue import SUM
from graphopt_backends.kernels.expression import Expression, call, number, operand
from graphopt_backends.kernels.pool import Pool
from graphopt_backends.kernels.reduce import Operator, Reduce
from graphopt_backends.kernels.rows import Normalize, Softmax
from graphopt_backends.network.integers import dequantized
from graphopt_backends.network.linear import channels_last, image_order, window_of
from graphopt_backends.network.network import Network, constant_of, shape_of
from graphopt_backends.network.order import INTEGER_CHECKS, INTEGER_CONVERTERS
from graphopt_backends.network.regions import Region
from graphopt_backends.network.views import View

__all__ = ["CHECKS", "CONVERTERS"]


def _pool(network: Network, node: ir.Node, _: Region | None) -> None:
    window = window_of(node, list(node.attributes.get_ints("kernel_shape") or ()))
    counts = bool(node.attributes.get_int("count_include_pad", 0))
    bytes_do = node.op_type == "AveragePool" and not (counts and any(window.pads))  # a border that counts is real zeros
    view, after = _averaged(network, node) if bytes_do else (network.input(node), SUM)
    source, pitch = channels_last(network, view, node)
    batch, channels, *sizes = source.shape
    height, width = (1, sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])
    output = node.outputs[0]
    result = network.new(output, image_order(source.rank))
    size = result.shape[2:] if len(sizes) == 2 else (1, result.shape[2])
    kind: Literal["max", "mean"] = "max" if node.op_type == "MaxPool" else "mean"
    kernel = Pool(
        network.isa, kind, source.dtype, batch, height, width, channels, window, (size[0], size[1]), counts, pitch,
        after=after,
    )  # fmt: skip
    network.call(kernel, [source, result], node)


def _averaged(network: Network, node: ir.Node) -> tuple[View, Expression]:
    """What a mean reads, and what happens to it: integers are averaged as they are, and dequantized after that."""
    value = node.inputs[0]
    assert value is not None
    found = dequantized(value)
    if found is None or value in network.views:
        return network.view(value), SUM
    source, grid = found
    return network.view(source), call("mul", call("sub", operand(0), number(grid.zero_point)), number(grid.scale))


def _pool_check(node: ir.Node) -> bool:
    kernel = node.attributes.get_ints("kernel_shape") or ()
    plain = node.attributes.get_string("auto_pad", "NOTSET") in ("NOTSET", "VALID")
    # windows that are cut at the end count what they see, but not a part of the border
    ceiled = node.attributes.get_int("ceil_mode", 0) and node.attributes.get_int("count_include_pad", 0)
    indices = any(output.name and output.uses() for output in node.outputs[1:])
    bytes_too = node.op_type == "MaxPool" and node.outputs[0].dtype in (ir.DataType.UINT8, ir.DataType.INT8)
    return len(kernel) in (1, 2) and plain and not ceiled and not indices and (_is_float(node) or bytes_too)


def _is_float(node: ir.Node) -> bool:
    return node.outputs[0].dtype == ir.DataType.FLOAT


def _global_pool(network: Network, node: ir.Node, _: Region | None) -> None:
    if node.op_type == "GlobalMaxPool":
        source = network.input(node)
        _reduced(network, node, source, tuple(range(2, source.rank)), "max")
    else:
        source, after = _averaged(network, node)
        _reduced(network, node, source, tuple(range(2, source.rank)), "mean", after=after)


def _reduce(network: Network, node: ir.Node, region: Region | None) -> None:
    if not _is_float(node):
        INTEGER_CONVERTERS[node.op_type](network, node, region)
        return
    operator, before, after = _OPERATORS[node.op_type]
    source, after = _averaged(network, node) if operator == "mean" else (network.input(node), after)
    axes = _axes(node, source.rank)
    _reduced(network, node, source, axes, operator, before, after)


def _axes(node: ir.Node, rank: int) -> tuple[int, ...]:
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        given = [int(i) for i in constant_of(node.inputs[1]).reshape(-1)]
    else:
        given = list(node.attributes.get_ints("axes") or ())
    if not given and not node.attributes.get_int("noop_with_empty_axes", 0):
        given = list(range(rank))
    return tuple(sorted({axis % rank for axis in given}))


def _reduced(
    network: Network, node: ir.Node, source: View, axes: tuple[int, ...], operator: Operator,
    before: Expression = SUM, after: Expression = SUM,
) -> None:  # fmt: skip
    """Bring the reduced axes together, in memory, if they are not; then they are one."""
    order = source.order if source.is_dense else tuple(range(source.rank))
    real = [axis for axis in order if source.shape[axis] > 1]
    places = [i for i, axis in enumerate(real) if axis in axes]
    together = not places or places == list(range(places[0], places[-1] + 1))
    if not source.is_dense or not together:
        kept = [axis for axis in range(source.rank) if axis not in axes]
        order = (*kept, *axes)
        source = network.copied(source, order, node)
        real = [axis for axis in order if source.shape[axis] > 1]
        places = [i for i, axis in enumerate(real) if axis in axes]
    first, last = (places[0], places[-1] + 1) if places else (len(real), len(real))
    sizes = [source.shape[axis] for axis in real]
    outer, reduced, inner = (int(np.prod(part)) for part in (sizes[:first], sizes[first:last], sizes[last:]))
    output = node.outputs[0]
    kept_order = [axis for axis in order if axis not in axes]
    keeps = len(shape_of(output)) == source.rank
    if kept_order == sorted(kept_order):
        result = network.new(output)
    elif keeps:
        result = network.new(output, (*kept_order, *axes))
    else:
        ranks = {axis: i for i, axis in enumerate(sorted(kept_order))}
        result = network.new(output, tuple(ranks[axis] for axis in kept_order))
    kernel = Reduce(network.isa, operator, outer, reduced, inner, before, after, source.dtype)
    network.call(kernel, [source, result], node)


_SQUARE = call("mul", operand(0), operand(0))

_OPERATORS: Mapping[str, tuple[Operator, Expression, Expression]] = {
    "ReduceL1": ("sum", call("abs", operand(0)), SUM),
    "ReduceL2": ("sum", _SQUARE, call("sqrt", operand(0))),
    "ReduceLogSum": ("sum", SUM, call("log", operand(0))),
    "ReduceMax": ("max", SUM, SUM),
    "ReduceMean": ("mean", SUM, SUM),
    "ReduceMin": ("min", SUM, SUM),
    "ReduceSum": ("sum", SUM, SUM),
    "ReduceSumSquare": ("sum", _SQUARE, SUM),
}


def _reduce_check(node: ir.Node) -> bool:
    if not _is_float(node):
        return node.op_type in INTEGER_CHECKS and INTEGER_CHECKS[node.op_type](node)
    return len(node.inputs) < 2 or node.inputs[1] is None or is_constant(node.inputs[1])


def _softmax(network: Network, node: ir.Node, _: Region | None) -> None:
    source = network.input(node)
    axis = node.attributes.get_int("axis", -1) % source.rank
    if not source.is_dense:
        source = network.contiguous(source, node)
    order = source.order
    place = order.index(axis)
    outer, inner = (int(np.prod([source.shape[i] for i in part])) for part in (order[:place], order[place + 1 :]))
    result = network.new(node.outputs[0], order)
    kernel = Softmax(network.isa, outer, source.shape[axis], node.op_type == "LogSoftmax", inner)
    network.call(kernel, [source, result], node)


def _normalize(network: Network, node: ir.Node, _: Region | None) -> None:
    source = network.contiguous(network.input(node), node)
    axis = node.attributes.get_int("axis", -1) % source.rank
    columns = int(np.prod(source.shape[axis:]))
    bias = len(node.inputs) > 2 and node.inputs[2] is not None
    kind: Literal["layer", "rms"] = "rms" if node.op_type == "RMSNormalization" else "layer"
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    kernel = Normalize(network.isa, kind, source.size // columns, columns, epsilon, bias)
    scales = [network.contiguous(network.input(node, i), node) for i in ((1, 2) if bias else (1,))]
    network.call(kernel, [source, *scales, network.new(node.outputs[0])], node)


def _normalize_check(node: ir.Node) -> bool:
    value, scale = node.inputs[0], node.inputs[1]
    if value is None or scale is None or not _is_float(node):
        return False
    axis = node.attributes.get_int("axis", -1) % len(shape_of(value))
    only = not any(output.name and output.uses() for output in node.outputs[1:])
    return only and int(np.prod(shape_of(scale))) == int(np.prod(shape_of(value)[axis:]))


CONVERTERS: Mapping[str, Callable[[Network, ir.Node, Region | None], None]] = {
    "AveragePool": _pool,
    "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_pool,
    "LayerNormalization": _normalize,
    "LogSoftmax": _softmax,
    "MaxPool": _pool,
    "RMSNormalization": _normalize,
    "Softmax": _softmax,
    **dict.fromkeys(_OPERATORS, _reduce),
}

CHECKS: Mapping[str, Callable[[ir.Node], bool]] = {
    "AveragePool": _pool_check,
    "GlobalAveragePool": _is_float,
    "GlobalMaxPool": _is_float,
    "LayerNormalization": _normalize_check,
    "LogSoftmax": _is_float,
    "MaxPool": _pool_check,
    "RMSNormalization": _normalize_check,
    "Softmax": _is_float,
    **dict.fromkeys(_OPERATORS, _reduce_check),
}
