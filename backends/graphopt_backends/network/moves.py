"""Operators that move elements: most make a view, the others copy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal

import numpy as np
import onnx_ir as ir

from graphopt_backends._fold import is_constant
from graphopt_backends.kernels.expression import number
from graphopt_backends.kernels.lookup import Lookup
from graphopt_backends.network.network import Network, constant_of, shape_of
from graphopt_backends.network.regions import Region
from graphopt_backends.network.views import View

__all__ = ["CHECKS", "CONVERTERS"]


def _ints(node: ir.Node, index: int, name: str) -> list[int] | None:
    """An input of constant integers, or the attribute that it was before; None if neither is there."""
    if len(node.inputs) > index and node.inputs[index] is not None:
        value = node.inputs[index]
        assert value is not None
        return [int(i) for i in constant_of(value).reshape(-1)]
    found = node.attributes.get_ints(name)
    return None if found is None else [int(i) for i in found]


def _reshape(network: Network, node: ir.Node, _: Region | None) -> None:
    source, shape = network.input(node), shape_of(node.outputs[0])
    view = source.reshaped(shape)
    if view is None:
        view = network.copied(source, _order_for(source, shape), node).reshaped(shape)
        assert view is not None
    network.views[node.outputs[0]] = view


def _order_for(view: View, shape: Sequence[int]) -> tuple[int, ...]:
    """An order of axes in which a copy can have another shape, as near to that of the memory as it goes.

    Axes that become, together, one or more others stay together; the runs of them come from the slowest to the fastest.
    """
    if view.size == 0:
        return tuple(range(view.rank))
    runs: list[list[int]] = []
    wanted, want, have = iter(shape), 1, 1
    for axis, size in enumerate(view.shape):
        if have == want:
            runs.append([])
            have = want = 1
        runs[-1].append(axis)
        have *= size
        while want < have:
            want *= next(wanted)
    steps = {id(run): min((view.strides[i] for i in run if view.shape[i] > 1), default=math.inf) for run in runs}
    return tuple(axis for run in sorted(runs, key=lambda run: -steps[id(run)]) for axis in run)


def _transpose(network: Network, node: ir.Node, _: Region | None) -> None:
    source = network.input(node)
    axes = node.attributes.get_ints("perm") or list(reversed(range(source.rank)))
    network.views[node.outputs[0]] = source.permuted(axes)


def _expand(network: Network, node: ir.Node, _: Region | None) -> None:
    network.views[node.outputs[0]] = network.input(node).broadcast(shape_of(node.outputs[0]))


def _slice(network: Network, node: ir.Node, _: Region | None) -> None:
    view = network.input(node)
    starts, ends = _ints(node, 1, "starts") or [], _ints(node, 2, "ends") or []
    axes = _ints(node, 3, "axes") or list(range(len(starts)))
    steps = _ints(node, 4, "steps") or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis %= view.rank
        positions = range(view.shape[axis])[slice(start, end if abs(end) < 1 << 40 else None, step)]
        if step < 0 and end < -view.shape[axis]:
            positions = range(view.shape[axis])[slice(start, None, step)]
        view = view.sliced(axis, positions.start, len(positions), step)
    network.views[node.outputs[0]] = view


def _split(network: Network, node: ir.Node, _: Region | None) -> None:
    source = network.input(node)
    axis, start = node.attributes.get_int("axis", 0) % source.rank, 0
    for output in node.outputs:
        size = shape_of(output)[axis]
        network.views[output] = source.sliced(axis, start, size)
        start += size


def _concat(network: Network, node: ir.Node, _: Region | None) -> None:
    sources = [network.view(value) for value in node.inputs if value is not None]
    largest = max(sources, key=lambda view: view.size)
    order = largest.order if largest.is_dense else None
    result, start = network.new(node.outputs[0], order), 0
    axis = node.attributes.get_int("axis", 0) % result.rank
    for source in sources:
        part = result.sliced(axis, start, source.shape[axis])
        start += source.shape[axis]
        if source.size:
            network.copy(source, part, node)


def _pad(network: Network, node: ir.Node, _: Region | None) -> None:
    source = network.input(node)
    pads = _pads(node, source.rank)
    mode = node.attributes.get_string("mode", "constant")
    if mode != "constant":
        _pad_by_number(network, node, source, pads, mode)
        return
    fill = 0.0
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        fill = float(constant_of(node.inputs[2]).reshape(-1)[0])
    result = network.new(node.outputs[0], source.order if source.is_dense else None)
    for axis in range(source.rank):  # the border first, then what it frames
        for start, size in ((0, pads[axis]), (result.shape[axis] - pads[axis + source.rank], pads[axis + source.rank])):
            if size > 0:
                network.loops(number(fill, source.dtype), [], result.sliced(axis, start, size), node)
    inner, cut = result, source
    for axis in range(source.rank):
        before, behind = pads[axis], pads[axis + source.rank]
        size = source.shape[axis] + min(0, before) + min(0, behind)
        inner, cut = inner.sliced(axis, max(0, before), size), cut.sliced(axis, max(0, -before), size)
    network.copy(cut, inner, node)


def _pad_by_number(network: Network, node: ir.Node, source: View, pads: list[int], mode: str) -> None:
    """Repeat what lies inside: along each axis, positions beyond an end are positions that are there."""
    view = source
    for axis in range(source.rank):
        before, behind = pads[axis], pads[axis + source.rank]
        if before or behind:
            wanted = np.arange(-before, view.shape[axis] + behind)
            positions = np.pad(np.arange(view.shape[axis]), (max(0, before), max(0, behind)), mode=_PAD_MODES[mode])
            positions = positions[max(0, -before) : max(0, -before) + wanted.size]
            view = _looked_up(network, node, view, axis, network.constant(positions))
    network.views[node.outputs[0]] = view


_PAD_MODES: Mapping[str, Literal["edge", "reflect", "wrap"]] = {"edge": "edge", "reflect": "reflect", "wrap": "wrap"}


def _tile(network: Network, node: ir.Node, _: Region | None) -> None:
    view = network.input(node)
    repeats = [int(i) for i in constant_of(node.inputs[1]).reshape(-1)] if node.inputs[1] is not None else []
    shape = tuple(size for pair in zip(repeats, view.shape, strict=True) for size in pair)
    strides = tuple(step for stride in view.strides for step in (0, stride))
    whole = replace(view, shape=shape, strides=strides)
    wanted = shape_of(node.outputs[0])
    reshaped = whole.reshaped(wanted) or network.copied(whole, node=node).reshaped(wanted)
    assert reshaped is not None
    network.views[node.outputs[0]] = reshaped


def _pads(node: ir.Node, rank: int) -> list[int]:
    given = _ints(node, 1, "pads") or [0] * (2 * rank)
    axes = _ints(node, 3, "axes")
    if axes is None:
        return given
    found = [0] * (2 * rank)
    for i, axis in enumerate(axes):
        found[axis % rank], found[axis % rank + rank] = given[i], given[i + len(axes)]
    return found


def _pad_check(node: ir.Node) -> bool:
    return len(node.inputs) < 2 or (node.inputs[1] is not None and is_constant(node.inputs[1]))


def _constant_inputs(first: int) -> Callable[[ir.Node], bool]:
    return lambda node: all(value is None or is_constant(value) for value in node.inputs[first:])


def _gather(network: Network, node: ir.Node, _: Region | None) -> None:
    """Constant positions at even steps are a view; all others are looked up."""
    source, indices, output = network.input(node), node.inputs[1], node.outputs[0]
    assert indices is not None
    axis = node.attributes.get_int("axis", 0) % source.rank
    if is_constant(indices):
        flat = [int(i) % source.shape[axis] for i in constant_of(indices).reshape(-1)]
        steps = {b - a for a, b in pairwise(flat)}
        if flat and len(steps) <= 1:
            view = source.sliced(axis, flat[0], len(flat), steps.pop() if steps else 1).reshaped(shape_of(output))
            if view is not None:
                network.views[output] = view
                return
    found = _looked_up(network, node, source, axis, network.contiguous(network.input(node, 1), node))
    reshaped = found.reshaped(shape_of(output))
    assert reshaped is not None
    network.views[output] = reshaped


def _looked_up(network: Network, node: ir.Node, source: View, axis: int, numbers: View) -> View:
    """Elements along an axis by number."""
    source = network.contiguous(source, node)
    outer, inner = (int(np.prod(part)) for part in (source.shape[:axis], source.shape[axis + 1 :]))
    kernel = Lookup(network.isa, source.dtype, outer, source.shape[axis], inner, numbers.size, numbers.dtype)
    result = network.temporary((*source.shape[:axis], numbers.size, *source.shape[axis + 1 :]), source.dtype)
    network.call(kernel, [source, numbers, result], node)
    return result


CONVERTERS: Mapping[str, Callable[[Network, ir.Node, Region | None], None]] = {
    "Concat": _concat,
    "Expand": _expand,
    "Flatten": _reshape,
    "Gather": _gather,
    "Pad": _pad,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _reshape,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _reshape,
}

CHECKS: Mapping[str, Callable[[ir.Node], bool]] = {
    "Expand": _constant_inputs(1),
    "Pad": _pad_check,
    "Slice": _constant_inputs(1),
    "Tile": _constant_inputs(1),
}
