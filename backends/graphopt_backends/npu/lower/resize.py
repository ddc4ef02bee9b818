"""Images made larger or smaller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from graphopt_backends._fold import static_shape
from graphopt_backends.npu.emitter import Refusal
from graphopt_backends.npu.lower.sums import MOST_WINDOW, pointwise
from graphopt_backends.npu.lower.windows import MOST_STRIDE, Window
from graphopt_backends.npu.tosa import Tensor
from graphopt_backends.npu.units import Grid, Unit
from graphopt_backends.npu.work import Work, channels_last, exact

__all__ = ["resize"]

Array = np.ndarray[Any, np.dtype[Any]]
_ENLARGED = (2, 4, 8)
"""By how much RESIZE enlarges one sample on U55 and U65, both axes alike."""


@dataclass(frozen=True)
class _Axis:
    """Where results lie along an axis: `(index * step + offset) / size` (TOSA 1.0, RESIZE)."""

    size: int
    step: int
    offset: int

    def border(self, before: int, after: int) -> int:
        return (after - 1) * self.step - (before - 1) * self.size + self.offset

    def weights(self) -> _Weights | None:
        """Interpolation as sums of neighbours; None where places are no whole number of halves apart."""
        if self.step and self.size % self.step == 0:  # neighbours of elements that are repeated
            times, place = self.size // self.step, Fraction(self.offset, self.step)
            first = place.numerator // place.denominator
            ones = np.ones(times, np.int8)
            return _Weights(times, first, ones if place == first else np.convolve(ones, [1, 1]).astype(np.int8), 1)
        if self.step % self.size == 0 and 1 <= self.step // self.size <= MOST_STRIDE:
            place = Fraction(self.offset, self.size)
            first = place.numerator // place.denominator
            if place - first in (0, Fraction(1, 2)):
                return _Weights(1, first, np.ones(1 if place == first else 2, np.int8), self.step // self.size)
        return None


@dataclass(frozen=True)
class _Weights:
    """Result j along an axis is the sum of `taps[t] * u[j * stride + first + t]`, divided by the sum of taps.

    u are the elements, each repeated a number of times, the outermost for ever: `[1, 2, .. 2, 1]` of those repeated
    are the triangle of linear interpolation at the places between them, `[1, .. 1]` that at the places on them.
    """

    times: int
    first: int
    taps: Array
    stride: int


def resize(unit: Unit, work: Work) -> None:
    """RESIZE, or elements repeated where a whole number of them become of each."""
    data, node = unit.inputs[0], unit.node
    assert data is not None
    assert data.grid is not None
    mode = node.attributes.get_string("mode", "nearest")
    shape = static_shape(unit.results[0]) or ()
    if len(shape) != 4 or shape[:2] != data.shape[:2]:
        raise Refusal("it resizes other axes than height and width")
    if node.attributes.get_int("antialias", 0):
        raise Refusal("it smooths what it makes smaller")
    image = work.read(data, channels_last(4))
    axes = [_axis(unit, axis, data.shape[axis], shape[axis]) for axis in (2, 3)]
    if mode == "nearest":
        found = work.regridded(_nearest(unit, work, image, axes, shape[2:]), data.grid, unit)
    elif mode == "linear":
        found = _linear(unit, work, image, axes, shape[2:])
    else:
        raise Refusal(f"it interpolates by {mode}")
    work.put(unit.results[0], found, channels_last(4))


def _axis(unit: Unit, axis: int, before: int, after: int) -> _Axis:
    attributes = unit.node.attributes
    way = attributes.get_string("coordinate_transformation_mode", "half_pixel") or "half_pixel"
    scale = _scale(unit, axis) or Fraction(after, before)
    if way == "asymmetric":
        found = _Axis(scale.numerator, scale.denominator, 0)
    elif way == "half_pixel" or (way == "pytorch_half_pixel" and after > 1):
        n, d = scale.numerator, scale.denominator
        found = _Axis(2 * n, 2 * d, d - n)
    elif way == "align_corners" and after > 1:
        found = _Axis(after - 1, before - 1, 0) if before > 1 else _Axis(1, 0, 0)
    elif way in ("pytorch_half_pixel", "align_corners"):
        found = _Axis(1, 1, 0)
    else:
        raise Refusal(f"its coordinates are {way}")
    divisor = int(np.gcd.reduce([found.size, found.step, found.offset]))
    return _Axis(found.size // divisor, found.step // divisor, found.offset // divisor)


def _scale(unit: Unit, axis: int) -> Fraction | None:
    operand = unit.inputs[2] if len(unit.inputs) > 2 else None
    array = operand.array if operand is not None else None
    if array is None or array.size == 0:
        return None
    axes = unit.node.attributes.get_ints("axes", None)
    position = list(axes).index(axis) if axes else axis
    return exact(np.float32(array.reshape(-1)[position])).limit_denominator(1 << 10)


def _nearest(unit: Unit, work: Work, image: Tensor, axes: list[_Axis], sizes: tuple[int, ...]) -> Tensor:
    rounding = unit.node.attributes.get_string("nearest_mode", "round_prefer_floor") or "round_prefer_floor"
    maps = [
        _indices(axis, size, limit, rounding) for axis, size, limit in zip(axes, sizes, image.shape[1:3], strict=True)
    ]
    times = [size // before for size, before in zip(sizes, image.shape[1:3], strict=True)]
    places = zip(maps, times, image.shape[1:3], strict=True)
    if all(np.array_equal(found, np.repeat(np.arange(size), n)) for found, n, size in places):
        return _repeated(work, image, times)
    for at, indices in enumerate(maps, start=1):
        image = _picked(work, image, at, indices)
    return image


def _indices(axis: _Axis, size: int, limit: int, rounding: str) -> np.ndarray:
    """Which element each result is, as ONNX defines it."""
    found = list[int]()
    for i in range(size):
        place = Fraction(i * axis.step + axis.offset, axis.size)
        low = place.numerator // place.denominator
        part = place - low
        up = {
            "floor": False,
            "ceil": part > 0,
            "round_prefer_floor": part > Fraction(1, 2),
            "round_prefer_ceil": part >= Fraction(1, 2),
        }[rounding]
        found.append(min(max(low + up, 0), limit - 1))
    return np.array(found)


def _repeated(work: Work, image: Tensor, times: Sequence[int]) -> Tensor:
    """Every element a number of times, along height and width."""
    samples, height, width, channels = image.shape
    shape = (samples, height * times[0], width * times[1], channels)
    alike = times[0] == times[1] > 1 and (samples == 1 or work.family == "u85")
    if alike and (times[0] in _ENLARGED or (work.family == "u85" and times[0] <= 16)):
        n = times[0]  # the place of the middle of each, as TOSA rounds to the nearest
        scale, offset = work.emitter.shape([2 * n, 2, 2 * n, 2]), work.emitter.shape([1 - n, 1 - n])
        return work.emitter.add(
            "RESIZE", [image, scale, offset, work.emitter.shape([n - 1, n - 1])], shape, image.dtype, mode="NEAREST"
        )
    for axis in (1, 2):
        if times[axis - 1] > 1:
            lead, tail = int(np.prod(image.shape[: axis + 1])), int(np.prod(image.shape[axis + 1 :]))
            flat = work.emitter.reshape(image, (lead, 1, tail))
            counts = work.emitter.shape([1, times[axis - 1], 1])
            tiled = work.emitter.add("TILE", [flat, counts], (lead, times[axis - 1], tail), image.dtype)
            image = work.emitter.reshape(tiled, (*shape[: axis + 1], *image.shape[axis + 1 :]))
    return image


def _picked(work: Work, image: Tensor, axis: int, indices: np.ndarray) -> Tensor:
    """Elements at given places: runs of neighbours, one behind the other."""
    if len(indices) > 4 * image.shape[axis] or len(indices) > 64:
        raise Refusal("it picks elements at uneven places")
    parts = list[Tensor]()
    for index in indices:
        starts, sizes = [0] * 4, list(image.shape)
        starts[axis], sizes[axis] = int(index), 1
        parts.append(work.emitter.slice(image, starts, sizes))
    return work.emitter.concat(parts, axis)


def _linear(unit: Unit, work: Work, image: Tensor, axes: list[_Axis], sizes: tuple[int, ...]) -> Tensor:
    data = unit.inputs[0]
    assert data is not None
    assert data.grid is not None
    rows, columns = (axis.weights() for axis in axes)
    if work.family == "u85" and data.grid.dtype == "int8":
        return _interpolated(unit, work, image, data.grid, axes, sizes)
    if rows is None or columns is None:
        raise Refusal("it does not enlarge by a whole number")
    image = _extended(work, image, (rows, columns), sizes)
    channels = image.shape[3]
    taps = np.broadcast_to(rows.taps[:, None] * columns.taps, (channels, rows.taps.size, columns.taps.size))
    window = Window((rows.taps.size, columns.taps.size), (rows.stride, columns.stride), (1, 1), (0, 0, 0, 0))
    window.check(MOST_WINDOW)
    sums = pointwise(work, image, data.grid, taps, window)
    return work.rounded(unit, sums, data.grid.step / int(rows.taps.sum() * columns.taps.sum()))


def _extended(work: Work, image: Tensor, weights: tuple[_Weights, _Weights], sizes: tuple[int, ...]) -> Tensor:
    """Elements repeated, and those of the border beyond it, as far as sums reach."""
    starts, reaches = [0, 0, 0, 0], [0, *(0, 0), image.shape[3]]
    for axis, (axis_weights, size) in enumerate(zip(weights, sizes, strict=True), start=1):
        n, before = axis_weights.times, image.shape[axis]
        reach = (size - 1) * axis_weights.stride + axis_weights.taps.size
        end = axis_weights.first + reach
        edges = list(image.shape)
        edges[axis] = 1
        last = [0] * 4
        last[axis] = before - 1
        first = [work.emitter.slice(image, [0] * 4, edges)] if axis_weights.first < 0 else []
        final = [work.emitter.slice(image, last, edges)] if end > n * before else []
        image = work.emitter.concat([*first, image, *final], axis)
        starts[axis] = axis_weights.first + n * len(first)
        reaches[axis] = reach
    reaches[0] = image.shape[0]
    image = _repeated(work, image, [w.times for w in weights])
    return work.emitter.slice(image, starts, reaches)


def _interpolated(
    unit: Unit, work: Work, image: Tensor, grid: Grid, axes: list[_Axis], sizes: tuple[int, ...]
) -> Tensor:
    """RESIZE to 32 bits; the weights of a place add up to what the zero point is then taken away with."""
    borders = [a.border(b, s) for a, b, s in zip(axes, image.shape[1:3], sizes, strict=True)]
    constants = (
        work.emitter.shape([axes[0].size, axes[0].step, axes[1].size, axes[1].step]),
        work.emitter.shape([axis.offset for axis in axes]),
        work.emitter.shape(borders),
    )
    made = (image.shape[0], *sizes, image.shape[3])
    sums = work.emitter.add("RESIZE", [image, *constants], made, "int32", mode="BILINEAR")
    weight = axes[0].size * axes[1].size
    if grid.zero_point:
        offset = work.emitter.constant(np.full((1,) * 4, grid.zero_point * weight), "int32")
        sums = work.emitter.elementwise("SUB", sums, offset)
    return work.rounded(unit, sums, grid.step / weight)
