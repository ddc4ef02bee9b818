"""Windows without weights, and means over whole images."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from graphopt_backends._fold import static_shape
from graphopt_backends.npu.emitter import Refusal
from graphopt_backends.npu.lower.sums import pointwise
from graphopt_backends.npu.lower.windows import Window, as_image, pick, window_of
from graphopt_backends.npu.tosa import Tensor
from graphopt_backends.npu.units import Operand, Unit
from graphopt_backends.npu.work import Work, channels_last

__all__ = ["arg_max", "average_pool", "global_average_pool", "global_max_pool", "max_pool", "reduce"]

Array = np.ndarray[Any, np.dtype[Any]]

_MOST_MEAN = 4096  # windows of convolutions
_MOST_MAX, _HIGH_MAX = 65536, 256  # windows of pools
_MOST_COMPARED, _MOST_ROWS = 127, 65536  # of ARGMAX on U55 and U65
_MOST_REDUCED = 65536  # elements along an axis that is summed, before it, and behind it
_COUNT_BITS = 24


def max_pool(unit: Unit, work: Work) -> None:
    """MAX_POOL2D."""
    data = _data(unit)
    window = window_of(unit.node, unit.node.attributes.get_ints("kernel_shape", ()) or (), data.shape[2:])
    if max(window.dilations) > 1:
        raise Refusal("its window is dilated")
    image, made = _image(unit, work, data)
    image, window = window.fitted(work.emitter, image, made)
    window, made, steps = window.slowed(made)
    window.check(_MOST_MAX, high=_HIGH_MAX)
    found = work.emitter.add(
        "MAX_POOL2D", [image], (image.shape[0], *made, image.shape[3]), image.dtype, kernel=list(window.kernel),
        stride=list(window.strides), pad=list(window.pads), nan_mode="PROPAGATE",
    )  # fmt: skip
    _put(unit, work, work.regridded(pick(work.emitter, found, steps), _grid(data), unit))


def average_pool(unit: Unit, work: Work) -> None:
    """Sums of a depthwise convolution with ones, divided once, when they are rounded.

    One window is a mean as any other, in half the cycles. AVG_POOL2D would round to the grid of the input first. Where
    windows at the border have fewer elements, sums are multiplied by what each divides by.
    """
    data = _data(unit)
    window = window_of(unit.node, unit.node.attributes.get_ints("kernel_shape", ()) or (), data.shape[2:])
    if max(window.dilations) > 1:
        raise Refusal("its window is dilated")
    image, made = _image(unit, work, data)
    if made == (1, 1) and not any(window.pads) and window.kernel == image.shape[1:3]:
        _mean(unit, work, data, tuple(range(2, len(data.shape))), keep=True)
        return
    counts = _counts(unit, window, image, made)
    image, window = window.fitted(work.emitter, image, made)
    window, _, steps = window.slowed(made)
    window.check(_MOST_MEAN)
    sums, grid = _sums(work, image, data, window), _grid(data)
    if len(np.unique(counts)) == 1:
        found = pick(work.emitter, work.rounded(unit, sums, grid.step / int(counts.flat[0])), steps)
    elif grid.dtype == "int16":
        raise Refusal("sums of 16 bits that are divided by different numbers are wider than 32")
    else:  # a sum times 2**24 / count is exact to 2**-17, shifted to have 8 bits behind the point
        factors = np.rint(2.0**_COUNT_BITS / counts).astype(np.int64).reshape(1, *made, 1)
        sums = pick(work.emitter, sums, steps)
        fine = work.emitter.elementwise("MUL", sums, work.emitter.constant(factors, "int32"), shift=_COUNT_BITS - 16)
        found = work.rounded(unit, fine, grid.step / (1 << 16))
    _put(unit, work, found)


def global_average_pool(unit: Unit, work: Work) -> None:
    """The mean of each channel."""
    data = _data(unit)
    _mean(unit, work, data, tuple(range(2, len(data.shape))), keep=True)


def global_max_pool(unit: Unit, work: Work) -> None:
    """REDUCE_MAX over height and width."""
    data = _data(unit)
    _largest(unit, work, data, tuple(range(2, len(data.shape))), keep=True)


def reduce(unit: Unit, work: Work) -> None:
    """ReduceMean, ReduceSum, ReduceMax and ReduceMin."""
    data = _data(unit)
    rank = len(data.shape)
    operand = unit.inputs[1] if len(unit.inputs) > 1 else None
    given = operand.array if operand is not None else unit.node.attributes.get_ints("axes", None)
    if operand is not None and given is None:
        raise Refusal("its axes are computed")
    axes = tuple(sorted(int(axis) % rank for axis in given)) if given is not None and len(given) else None
    if axes is None and unit.node.attributes.get_int("noop_with_empty_axes", 0):
        axes = ()
    axes = tuple(range(rank)) if axes is None else axes
    keep = bool(unit.node.attributes.get_int("keepdims", 1))
    if unit.kind in ("ReduceMax", "ReduceMin"):
        _largest(unit, work, data, axes, keep=keep)
    else:
        _mean(unit, work, data, axes, keep=keep)


def arg_max(unit: Unit, work: Work) -> None:
    """ARGMAX, which counts in 32 bits where ONNX counts in 64."""
    data, node = _data(unit), unit.node
    rank = len(data.shape)
    axis = node.attributes.get_int("axis", 0) % rank
    if node.attributes.get_int("select_last_index", 0):
        raise Refusal("it wants the last of equals")
    placed, emitter = work.placed(data), work.emitter
    order = (*(a for a in placed.order if a != axis), axis)
    tensor = work.read(data, order)
    length = tensor.shape[-1]
    rows = int(np.prod(tensor.shape[:-1]))
    if work.family != "u85" and tensor.dtype != "int8":
        raise Refusal("it compares 16-bit integers")
    if work.family != "u85" and (length > _MOST_COMPARED or rows > _MOST_ROWS):
        most = f"{_MOST_COMPARED} at {_MOST_ROWS}"
        raise Refusal(f"it compares {length} elements at {rows} places, and the NPU at most {most}")
    flat = emitter.reshape(tensor, (rows, length))
    found = emitter.add("ARGMAX", [flat], (rows,), "int32", axis=1, nan_mode="PROPAGATE")
    keep = bool(node.attributes.get_int("keepdims", 1))
    _reduced(unit, work, emitter.reshape(found, (*tensor.shape[:-1], 1)), order, (axis,), keep=keep)


def _data(unit: Unit) -> Operand:
    data = unit.inputs[0]
    if data is None or data.array is not None or data.grid is None:
        raise Refusal("its input is constant")
    return data


def _grid(data: Operand) -> Any:
    return data.grid


def _image(unit: Unit, work: Work, data: Operand) -> tuple[Tensor, tuple[int, int]]:
    image = as_image(work.emitter, work.read(data, channels_last(len(data.shape))))
    height, width = (1, *(static_shape(unit.results[0]) or ())[2:])[-2:]
    return image, (height, width)


def _put(unit: Unit, work: Work, found: Tensor) -> None:
    shape = static_shape(unit.results[0]) or ()
    if len(shape) == 3:
        found = work.emitter.reshape(found, (found.shape[0], found.shape[2], found.shape[3]))
    work.put(unit.results[0], found, channels_last(len(shape)))


def _counts(unit: Unit, window: Window, image: Tensor, made: tuple[int, int]) -> Array:
    """How many elements each window divides by, `[H, W]`."""
    whole = bool(unit.node.attributes.get_int("count_include_pad", 0))
    axes = list[Array]()
    for axis in (0, 1):
        begin, end = window.pads[2 * axis : 2 * axis + 2]
        size = image.shape[1 + axis]
        low, high = (-begin, size + end) if whole else (0, size)
        starts = np.arange(made[axis]) * window.strides[axis] - begin
        ends = np.minimum(starts + window.kernel[axis], high)
        axes.append(ends - np.maximum(starts, low))
    return axes[0][:, None] * axes[1][None, :]


def _sums(work: Work, image: Tensor, data: Operand, window: Window) -> Tensor:
    channels = image.shape[3]
    ones = np.ones((channels, *window.kernel), np.int8)
    return pointwise(work, image, _grid(data), ones, window)


def _mean(unit: Unit, work: Work, data: Operand, axes: tuple[int, ...], *, keep: bool) -> None:
    """Sums over axes, divided for a mean when they are rounded."""
    elements = int(np.prod([data.shape[axis] for axis in axes]))
    count = elements if unit.kind != "ReduceSum" else 1
    grid, order = _grid(data), work.placed(data).order
    if elements > 1 << (15 if grid.dtype == "int16" else 23):
        raise Refusal(f"sums of {elements} elements are wider than 32 bits")
    sums = work.centred(work.read(data, order), grid)
    for run in _neighbours([order.index(axis) for axis in axes]):
        sums = _summed(work, sums, run)
    _reduced(unit, work, work.rounded(unit, sums, grid.step / Fraction(count)), order, axes, keep=keep)


def _neighbours(places: Sequence[int]) -> list[list[int]]:
    """Places that follow each other, together."""
    runs = list[list[int]]()
    for place in sorted(places):
        if runs and runs[-1][-1] == place - 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs


def _summed(work: Work, tensor: Tensor, run: Sequence[int]) -> Tensor:
    """REDUCE_SUM over axes that are neighbours, as over one."""
    shape = tensor.shape
    parts = [int(np.prod(part)) for part in (shape[: run[0]], shape[run[0] : run[-1] + 1], shape[run[-1] + 1 :])]
    last = parts[2] == 1  # the NPU's own form, for which other axes can have any size
    if max(parts[1:2] if last else parts) > _MOST_REDUCED:
        raise Refusal(f"it sums {'x'.join(map(str, shape))}, more than the NPU does")
    flat = work.emitter.reshape(tensor, parts[:2] if last else parts)
    found = work.emitter.add("REDUCE_SUM", [flat], (parts[0], 1, *flat.shape[2:]), "int32", axis=1)
    return work.emitter.reshape(found, [1 if axis in run else size for axis, size in enumerate(shape)])


def _largest(unit: Unit, work: Work, data: Operand, axes: tuple[int, ...], *, keep: bool) -> None:
    kind = "REDUCE_MIN" if unit.kind == "ReduceMin" else "REDUCE_MAX"
    order = work.placed(data).order
    tensor = work.read(data, order)
    for axis in axes:
        at = order.index(axis)
        shape = [1 if a == at else s for a, s in enumerate(tensor.shape)]
        tensor = work.emitter.add(kind, [tensor], shape, tensor.dtype, axis=at, nan_mode="PROPAGATE")
    _reduced(unit, work, work.regridded(tensor, _grid(data), unit), order, axes, keep=keep)


def _reduced(
    unit: Unit, work: Work, tensor: Tensor, order: tuple[int, ...], axes: tuple[int, ...], *, keep: bool
) -> None:
    """Keep a result with or without the axes that were reduced to one element."""
    if keep:
        work.put(unit.results[0], tensor, order)
        return
    rest = [axis for axis in range(len(order)) if axis not in axes]
    kept = [axis for axis in order if axis not in axes]
    found = work.emitter.reshape(tensor, [tensor.shape[order.index(axis)] for axis in kept])
    work.put(unit.results[0], found, tuple(rest.index(axis) for axis in kept))
