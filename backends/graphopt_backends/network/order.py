"""ArgMax, ArgMin, CumSum, TopK, and reductions of what is not float32 or by products."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import onnx_ir as ir

from graphopt_backends._fold import is_constant, static_shape
from graphopt_backends.kernels.order import Cumulate, Extreme, Top
from graphopt_backends.kernels.total import Combination, Total
from graphopt_backends.network.network import Network, constant_of, dtype_of, shape_of
from graphopt_backends.network.regions import Region
from graphopt_backends.network.views import View

__all__ = ["CHECKS", "CONVERTERS", "INTEGER_CHECKS", "INTEGER_CONVERTERS"]

_KINDS = (
    ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.UINT8,
)  # fmt: skip


def _sizes(source: View, axis: int) -> tuple[int, int, int]:
    """Elements of the axes before an axis, of itself, and of those behind."""
    return math.prod(source.shape[:axis]), source.shape[axis], math.prod(source.shape[axis + 1 :])


def _extreme(network: Network, node: ir.Node, _: Region | None) -> None:
    source = network.contiguous(network.input(node), node)
    axis = node.attributes.get_int("axis", 0) % source.rank
    last = bool(node.attributes.get_int("select_last_index", 0))
    kernel = Extreme(network.isa, source.dtype, *_sizes(source, axis), node.op_type == "ArgMin", last)
    network.call(kernel, [source, network.new(node.outputs[0])], node)


def _cumulate(network: Network, node: ir.Node, _: Region | None) -> None:
    source = network.contiguous(network.input(node), node)
    assert node.inputs[1] is not None
    axis = int(constant_of(node.inputs[1]).reshape(-1)[0]) % source.rank
    exclusive, reverse = (bool(node.attributes.get_int(name, 0)) for name in ("exclusive", "reverse"))
    kernel = Cumulate(network.isa, source.dtype, *_sizes(source, axis), exclusive, reverse)
    network.call(kernel, [source, network.new(node.outputs[0])], node)


def _top(network: Network, node: ir.Node, _: Region | None) -> None:
    """Rows are what is ordered: another axis is moved to the end and back."""
    source, shape = network.input(node), shape_of(node.outputs[0])
    axis = node.attributes.get_int("axis", -1) % source.rank
    order = (*(i for i in range(source.rank) if i != axis), axis)
    moved = network.contiguous(source.permuted(order), node)
    count, length = shape[axis], source.shape[axis]
    kernel = Top(
        network.isa, source.dtype, math.prod(shape) // max(1, count), length, count,
        not node.attributes.get_int("largest", 1),
    )  # fmt: skip
    results = [network.new(output, order) for output in node.outputs]
    network.call(kernel, [moved, *results], node)


_COMBINATIONS: Mapping[str, Combination] = {
    "ReduceMax": "max", "ReduceMin": "min", "ReduceProd": "product", "ReduceSum": "sum",
}  # fmt: skip


def _total(network: Network, node: ir.Node, _: Region | None) -> None:
    """Axes that go are moved to the end."""
    source, axes = network.input(node), _axes(node)
    kept = [axis for axis in range(source.rank) if axis not in axes]
    moved = network.contiguous(source.permuted((*kept, *axes)), node)
    length = math.prod(source.shape[axis] for axis in axes)
    kernel = Total(
        network.isa, _COMBINATIONS[node.op_type], source.dtype, source.size // length, length, 1,
    )  # fmt: skip
    network.call(kernel, [moved, network.new(node.outputs[0])], node)


def _axes(node: ir.Node) -> list[int]:
    value = node.inputs[0]
    assert value is not None
    rank = len(shape_of(value))
    given = list(node.attributes.get_ints("axes") or ())
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        given = [int(i) for i in constant_of(node.inputs[1]).reshape(-1)]
    if not given and not node.attributes.get_int("noop_with_empty_axes", 0):
        given = list(range(rank))
    return sorted({axis % rank for axis in given})


def _total_check(node: ir.Node) -> bool:
    return _is_plain(node) and (len(node.inputs) < 2 or node.inputs[1] is None or is_constant(node.inputs[1]))


def _is_plain(node: ir.Node) -> bool:
    """All shapes are fixed, and there is something to look at."""
    value, shape = node.inputs[0], static_shape(node.inputs[0])
    fixed = shape is not None and 0 not in shape and static_shape(node.outputs[0]) is not None
    return fixed and value is not None and value.dtype in _KINDS


def _cumulate_check(node: ir.Node) -> bool:
    return _is_plain(node) and is_constant(node.inputs[1])


def _top_check(node: ir.Node) -> bool:
    return (
        _is_plain(node) and is_constant(node.inputs[1]) and len(node.outputs) == 2
        and dtype_of(node.outputs[1]) == "int64" and 0 not in shape_of(node.outputs[0])
    )  # fmt: skip


CONVERTERS: Mapping[str, Callable[[Network, ir.Node, Region | None], None]] = {
    "ArgMax": _extreme,
    "ArgMin": _extreme,
    "CumSum": _cumulate,
    "ReduceProd": _total,
    "TopK": _top,
}

CHECKS: Mapping[str, Callable[[ir.Node], bool]] = {
    "ArgMax": _is_plain,
    "ArgMin": _is_plain,
    "CumSum": _cumulate_check,
    "ReduceProd": _total_check,
    "TopK": _top_check,
}

INTEGER_CONVERTERS: Mapping[str, Callable[[Network, ir.Node, Region | None], None]] = dict.fromkeys(
    _COMBINATIONS, _total
)
"""Reductions of integers; those of floats have faster kernels."""

INTEGER_CHECKS: Mapping[str, Callable[[ir.Node], bool]] = dict.fromkeys(_COMBINATIONS, _total_check)
