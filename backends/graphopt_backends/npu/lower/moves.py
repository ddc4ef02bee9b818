"""Operators that move integers without arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphopt_backends._fold import static_shape
from graphopt_backends.npu.emitter import Order, Placed, Refusal
from graphopt_backends.npu.lower.windows import strided
from graphopt_backends.npu.tosa import Tensor
from graphopt_backends.npu.units import Grid, Operand, Unit
from graphopt_backends.npu.work import Work, plain

__all__ = ["concat", "depth_to_space", "identity", "pad", "reshape", "slices", "space_to_depth", "split", "transpose"]


def identity(unit: Unit, work: Work) -> None:
    """Nothing, or another grid; a Relu or Clip by itself as well."""
    data, placed = _data(unit, work)
    work.put(unit.results[0], work.regridded(placed.tensor, _grid(data), unit), placed.order)


def reshape(unit: Unit, work: Work) -> None:
    """RESHAPE; axes keep their order in memory where only some of one element come or go."""
    data, placed = _data(unit, work)
    tensor = work.regridded(placed.tensor, _grid(data), unit)
    shape = static_shape(unit.results[0]) or ()
    order = _kept_order(Placed(tensor, placed.order), shape)
    if order is None:
        order = plain(len(shape))
        tensor = work.emitter.arrange(Placed(tensor, placed.order), plain(len(placed.order)))
    found = work.emitter.reshape(tensor, [shape[axis] for axis in order])
    work.put(unit.results[0], found, order)


def transpose(unit: Unit, work: Work) -> None:
    """Nothing: only what the axes mean changes."""
    data, placed = _data(unit, work)
    rank = len(placed.order)
    axes = list(unit.node.attributes.get_ints("perm", None) or range(rank)[::-1])
    order = tuple(axes.index(axis) for axis in placed.order)
    work.put(unit.results[0], work.regridded(placed.tensor, _grid(data), unit), order)


def concat(unit: Unit, work: Work) -> None:
    """CONCAT of operands brought to the grid of the result."""
    operands = [operand for operand in unit.inputs if operand is not None]
    rank = len(operands[0].shape)
    axis = unit.node.attributes.get_int("axis", 0) % rank
    computed = [operand for operand in operands if operand.array is None]
    order = work.placed(computed[0]).order if computed else plain(rank)
    parts = [work.regridded(work.read(operand, order), _grid(operand), unit) for operand in operands]
    work.put(unit.results[0], work.emitter.concat(parts, order.index(axis)), order)


def split(unit: Unit, work: Work) -> None:
    """SLICE for each result."""
    data, placed = _data(unit, work)
    axis = placed.order.index(unit.node.attributes.get_int("axis", 0) % len(placed.order))
    start = 0
    for index, result in enumerate(unit.results):
        size = (static_shape(result) or ())[placed.order[axis]]
        starts, sizes = [0] * len(placed.order), list(placed.tensor.shape)
        starts[axis], sizes[axis] = start, size
        part = work.emitter.slice(placed.tensor, starts, sizes)
        work.put(result, work.regridded(part, _grid(data), unit, index), placed.order)
        start += size


def slices(unit: Unit, work: Work) -> None:
    """SLICE; steps other than 1 by a RESHAPE that makes them an axis."""
    data, placed = _data(unit, work)
    rank = len(placed.order)
    starts, ends = _constant(unit, 1), _constant(unit, 2)
    axes = _constant(unit, 3) if _has(unit, 3) else list(range(len(starts)))
    steps = _constant(unit, 4) if _has(unit, 4) else [1] * len(starts)
    tensor = placed.tensor
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size, at = placed.shape[axis % rank], placed.order.index(axis % rank)
        begin, _, _ = slice(start, end, step).indices(size)
        count = len(range(*slice(start, end, step).indices(size)))
        if step < 0:  # from the element that it ends with
            tensor = _reversed(work, strided(work.emitter, tensor, at, begin + (count - 1) * step, count, -step), at)
        else:
            tensor = strided(work.emitter, tensor, at, begin, count, step)
    work.put(unit.results[0], work.regridded(tensor, _grid(data), unit), placed.order)


def pad(unit: Unit, work: Work) -> None:
    """PAD with the integer that stands for the constant."""
    data, placed = _data(unit, work)
    mode = unit.node.attributes.get_string("mode", "constant") or "constant"
    if mode != "constant":
        raise Refusal(f"it pads with {mode}")
    rank, grid = len(placed.order), _grid(data)
    amounts = _constant(unit, 1)
    axes = [axis % rank for axis in _constant(unit, 3)] if _has(unit, 3) else list(range(rank))
    if min(amounts) < 0:
        raise Refusal("its padding is negative")
    ends = {axis: (amounts[i], amounts[i + len(axes)]) for i, axis in enumerate(axes)}
    operand = unit.inputs[2] if _has(unit, 2) else None
    value = float(operand.real.reshape(-1)[0]) if operand is not None and operand.real is not None else 0.0
    filling = unit.grids[0]
    assert filling is not None
    tensor = work.regridded(placed.tensor, grid, unit)
    pads = [ends.get(axis, (0, 0)) for axis in placed.order]
    work.put(unit.results[0], work.emitter.pad(tensor, pads, filling.integer(value)), placed.order)


def depth_to_space(unit: Unit, work: Work) -> None:
    """RESHAPE, TRANSPOSE, RESHAPE."""
    data, placed = _data(unit, work)
    block = unit.node.attributes.get_int("blocksize", 1)
    samples, channels, height, width = placed.shape
    image = work.emitter.arrange(placed, (0, 2, 3, 1))
    inner = channels // block**2
    crd = unit.node.attributes.get_string("mode", "DCR") == "CRD"
    sizes = (inner, block, block) if crd else (block, block, inner)
    tensor = work.emitter.reshape(image, (samples * height, width, *sizes))
    tensor = work.emitter.transpose(tensor, (0, 3, 1, 4, 2) if crd else (0, 2, 1, 3, 4))
    tensor = work.emitter.reshape(tensor, (samples, height * block, width * block, inner))
    work.put(unit.results[0], work.regridded(tensor, _grid(data), unit), (0, 2, 3, 1))


def space_to_depth(unit: Unit, work: Work) -> None:
    """The way back."""
    data, placed = _data(unit, work)
    block = unit.node.attributes.get_int("blocksize", 1)
    samples, channels, height, width = placed.shape
    image = work.emitter.arrange(placed, (0, 2, 3, 1))
    tensor = work.emitter.reshape(image, (samples * height // block, block, width // block, block * channels))
    tensor = work.emitter.transpose(tensor, (0, 2, 1, 3))
    tensor = work.emitter.reshape(tensor, (samples, height // block, width // block, block * block * channels))
    work.put(unit.results[0], work.regridded(tensor, _grid(data), unit), (0, 2, 3, 1))


def _data(unit: Unit, work: Work) -> tuple[Operand, Placed]:
    data = unit.inputs[0]
    assert data is not None
    return data, work.placed(data)


def _grid(operand: Operand) -> Grid:
    if operand.grid is None:
        raise Refusal("an operand of it is a constant of floats")
    return operand.grid


def _has(unit: Unit, index: int) -> bool:
    return len(unit.inputs) > index and unit.inputs[index] is not None


def _constant(unit: Unit, index: int) -> list[int]:
    operand = unit.inputs[index]
    array = operand.array if operand is not None else None
    if array is None:
        raise Refusal("where it reads is computed")
    return [int(number) for number in array.reshape(-1)]


def _kept_order(placed: Placed, shape: Sequence[int]) -> Order | None:
    """The order in memory of a reshaped value that needs no transpose; None if it does.

    So it is where axes of more than one element stay what they are, or where they lie in ONNX's order anyway.
    """
    old = [axis for axis in placed.order if placed.shape[axis] != 1]
    before = [size for size in placed.shape if size != 1]
    after = [axis for axis, size in enumerate(shape) if size != 1]
    if before == [shape[axis] for axis in after]:
        ranks = {axis: after[i] for i, axis in enumerate(a for a, s in enumerate(placed.shape) if s != 1)}
        rest = [axis for axis, size in enumerate(shape) if size == 1]
        moved = [ranks[axis] for axis in old]
        if rest and len(shape) > 2 and 0 in rest:  # a leading axis of one sample stays in front
            return (0, *(axis for axis in rest if axis), *moved)
        return (*rest, *moved)
    return plain(len(shape)) if old == sorted(old) else None


def _reversed(work: Work, tensor: Tensor, axis: int) -> Tensor:
    """The last element first."""
    shape = tensor.shape
    wide = (int(np.prod(shape[:axis])), shape[axis], int(np.prod(shape[axis + 1 :])))
    found = work.emitter.reshape(tensor, wide)
    return work.emitter.reshape(work.emitter.add("REVERSE", [found], wide, tensor.dtype, axis=1), shape)
