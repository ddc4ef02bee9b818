"""Elements that coordinates name: GatherND, GatherElements, ScatterND, ScatterElements.

Coordinates become the number of an element, or of a run of elements, in memory. Constant ones that lie at even steps
along every axis name a view, which is copied from or to; all others are looked up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from graphopt_backends._fold import is_constant, static_shape
from graphopt_backends.kernels.expression import Expression, call, number, operand
from graphopt_backends.kernels.lookup import Lookup
from graphopt_backends.kernels.scatter import Combine, Scatter
from graphopt_backends.network.network import Network, constant_of, shape_of
from graphopt_backends.network.regions import Region
from graphopt_backends.network.views import View, contiguous_strides

__all__ = ["CHECKS", "CONVERTERS", "even_steps"]


def even_steps(numbers: np.ndarray) -> tuple[int, tuple[int, ...]] | None:
    """The first number and the steps along all axes, if numbers are a sum of steps; None if they are not."""
    if not numbers.size:
        return None
    first = int(numbers.flat[0])
    steps = tuple(
        int(numbers[tuple(1 if i == axis else 0 for i in range(numbers.ndim))]) - first if size > 1 else 0
        for axis, size in enumerate(numbers.shape)
    )
    expected = np.full(numbers.shape, first)
    for axis, step in enumerate(steps):
        shape = [-1 if i == axis else 1 for i in range(numbers.ndim)]
        expected = expected + step * np.arange(numbers.shape[axis]).reshape(shape)
    return (first, steps) if np.array_equal(expected, numbers) else None


def _numbers(network: Network, node: ir.Node, sizes: Sequence[int], batch: Sequence[int]) -> np.ndarray | View:
    """Numbers of the runs that the coordinates of GatherND or ScatterND name, known or computed.

    Args:
        network: Where they are computed.
        node: Its second input are coordinates along the last axis.
        sizes: Of the axes that coordinates are for, those of the batch first.
        batch: Sizes of the axes of the batch, which have no coordinates.
    """
    value, depth = node.inputs[1], len(sizes) - len(batch)
    assert value is not None
    strides = contiguous_strides(sizes)
    shape = shape_of(value)[:-1]
    base = np.zeros(shape, np.int64)
    for axis in range(len(batch)):
        base = base + strides[axis] * np.arange(sizes[axis]).reshape(
            [-1 if i == axis else 1 for i in range(len(shape))]
        )
    sizes, strides = sizes[len(batch) :], strides[len(batch) :]
    if is_constant(value):
        given = constant_of(value)
        return base + ((given + np.where(given < 0, sizes, 0)) * np.array(strides)).sum(-1)
    source = network.view(value)
    parts = [source.sliced(source.rank - 1, i, 1) for i in range(depth)]
    views = [replace(part, shape=part.shape[:-1], strides=part.strides[:-1]) for part in parts]
    total: Expression = number(0, source.dtype)
    for i, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
        total = call("add", total, call("mul", _wrapped(operand(i, source.dtype), size), number(stride, source.dtype)))
    if len(batch):
        views.append(network.constant(base.astype(source.dtype)))
        total = call("add", total, operand(depth, source.dtype))
    result = network.temporary(shape, source.dtype)
    network.loops(total, views, result, node)
    return result


def _wrapped(coordinate: Expression, size: int) -> Expression:
    """Negative coordinates count from the end."""
    below = call("less", coordinate, number(0, coordinate.dtype))
    return Expression(
        "where", coordinate.dtype, (below, call("add", coordinate, number(size, coordinate.dtype)), coordinate)
    )


def _element_numbers(network: Network, node: ir.Node, sizes: Sequence[int]) -> np.ndarray | View:
    """Numbers of the elements that GatherElements or ScatterElements name."""
    value = node.inputs[1]
    assert value is not None
    shape, strides = shape_of(value), contiguous_strides(sizes)
    axis = node.attributes.get_int("axis", 0) % len(sizes)
    base = np.zeros(shape, np.int64)
    for i, stride in enumerate(strides):
        if i != axis:
            base = base + stride * np.arange(shape[i]).reshape([-1 if j == i else 1 for j in range(len(shape))])
    if is_constant(value):
        given = constant_of(value).astype(np.int64)
        return base + (given + np.where(given < 0, sizes[axis], 0)) * strides[axis]
    source = network.view(value)
    along = call("mul", _wrapped(operand(0, source.dtype), sizes[axis]), number(strides[axis], source.dtype))
    total = call("add", along, operand(1, source.dtype))
    result = network.temporary(shape, source.dtype)
    network.loops(total, [source, network.constant(base.astype(source.dtype))], result, node)
    return result


def _view_of(whole: View, numbers: np.ndarray | View, run: int, shape: Sequence[int]) -> View | None:
    """The part of contiguous memory that numbers of runs name, if it is a view; `shape` has the axes of a run last."""
    if isinstance(numbers, View):
        return None
    found = even_steps(numbers)
    if found is None:
        return None
    inner = contiguous_strides(shape[numbers.ndim :])
    strides = (*(step * run for step in found[1]), *inner)
    return replace(whole, shape=tuple(shape), strides=strides, offset=whole.offset + found[0] * run)


def _placed(network: Network, numbers: np.ndarray | View) -> View:
    if isinstance(numbers, View):
        return network.contiguous(numbers)
    return network.constant(numbers.astype(np.int32))


def _gathered(network: Network, node: ir.Node, source: View, numbers: np.ndarray | View, run: int) -> None:
    """Give the output the runs that numbers name."""
    output = node.outputs[0]
    shape = shape_of(output)
    view = _view_of(source, numbers, run, shape)
    if view is None:
        places = _placed(network, numbers)
        view = network.new(output)
        kernel = Lookup(network.isa, source.dtype, 1, source.size // run, run, places.size, places.dtype)
        network.call(kernel, [source, places, view], node)
    network.views[output] = view


def _gather_nd(network: Network, node: ir.Node, _: Region | None) -> None:
    source = network.contiguous(network.input(node), node)
    batch = source.shape[: node.attributes.get_int("batch_dims", 0)]
    named = len(batch) + _depth(node)
    numbers = _numbers(network, node, source.shape[:named], batch)
    _gathered(network, node, source, numbers, math.prod(source.shape[named:]))


def _gather_elements(network: Network, node: ir.Node, _: Region | None) -> None:
    source = network.contiguous(network.input(node), node)
    _gathered(network, node, source, _element_numbers(network, node, source.shape), 1)


def _scattered(
    network: Network, node: ir.Node, updates: View, result: View, numbers: np.ndarray | View, run: int
) -> None:
    """Write runs, if there are any, into a copy of the first input."""
    if not updates.size:
        return
    combine = _combine(node)
    view = _view_of(result, numbers, run, updates.shape) if combine == "none" else None
    if view is not None and (0 not in _steps(view)):
        network.copy(updates, view, node)
        return
    places, updates = _placed(network, numbers), network.contiguous(updates, node)
    kernel = Scatter(network.isa, result.dtype, places.size, result.size // run, run, places.dtype, combine)
    network.call(kernel, [updates, places, result], node)


def _steps(view: View) -> list[int]:
    """Strides of axes with more than one element; 0: one place is written more than once."""
    return [stride for size, stride in zip(view.shape, view.strides, strict=True) if size > 1]


def _combine(node: ir.Node) -> Combine:
    return {"none": "none", "add": "add", "mul": "mul", "max": "max", "min": "min"}[
        node.attributes.get_string("reduction", "none")
    ]  # pyright: ignore[reportReturnType]


def _scatter_nd(network: Network, node: ir.Node, _: Region | None) -> None:
    updates, result = network.input(node, 2), network.new(node.outputs[0])
    network.copy(network.input(node), result, node)
    named = _depth(node)
    numbers = _numbers(network, node, result.shape[:named], ())
    _scattered(network, node, updates, result, numbers, math.prod(result.shape[named:]))


def _scatter_elements(network: Network, node: ir.Node, _: Region | None) -> None:
    updates, result = network.input(node, 2), network.new(node.outputs[0])
    network.copy(network.input(node), result, node)
    _scattered(network, node, updates, result, _element_numbers(network, node, result.shape), 1)


def _depth(node: ir.Node) -> int:
    value = node.inputs[1]
    assert value is not None
    return shape_of(value)[-1]


def _check(node: ir.Node) -> bool:
    known = ("none", "add", "mul", "max", "min")
    plain = node.attributes.get_string("reduction", "none") in known
    kinds = (ir.DataType.INT32, ir.DataType.INT64)
    fixed = all(static_shape(value) is not None for value in (*node.inputs, node.outputs[0]))
    return plain and fixed and node.inputs[1] is not None and node.inputs[1].dtype in kinds


CONVERTERS: Mapping[str, Callable[[Network, ir.Node, Region | None], None]] = {
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
}

CHECKS: Mapping[str, Callable[[ir.Node], bool]] = dict.fromkeys(CONVERTERS, _check)
