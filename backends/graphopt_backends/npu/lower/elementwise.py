"""Sums, differences, products and extremes of pairs of elements, and factors and summands of channels."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

from graphopt_backends._fold import static_shape
from graphopt_backends.npu.emitter import Order, Refusal
from graphopt_backends.npu.lower.sums import pointwise
from graphopt_backends.npu.tosa import Tensor
from graphopt_backends.npu.units import Grid, Operand, Unit
from graphopt_backends.npu.work import Work, channels_last, exact, plain

__all__ = ["add", "divide", "largest", "multiply", "normalize", "prelu", "subtract"]

Array = np.ndarray[Any, np.dtype[Any]]

_WHOLE = 32767
"""The largest whole number by which Vela multiplies an operand of ADD on its way in; for others it adds operations."""
_HEADROOM = (
    19  # bits below those of the coarser operand: what Vela makes one ADD of on U55 and U65; 20 make it six operations
)
_FACTOR_BITS = 21  # of a constant that 9 bits are multiplied by


def add(unit: Unit, work: Work) -> None:
    """ADD of both operands, brought to one grid in 32 bits."""
    _sum(unit, work, "ADD")


def subtract(unit: Unit, work: Work) -> None:
    """SUB, likewise."""
    _sum(unit, work, "SUB")


def multiply(unit: Unit, work: Work) -> None:
    """MUL in 32 bits, exact for two int8; a factor for each channel is a part of its scale."""
    left, right = _pair(unit)
    _products(unit, work, left, right, _reals(left), _reals(right))


def divide(unit: Unit, work: Work) -> None:
    """Likewise, by what is 1 / constant."""
    left, right = _pair(unit)
    divisors = right.real
    if divisors is None or not divisors.all():
        raise Refusal("it divides by computed numbers, or by 0")
    _products(unit, work, left, right, None, 1 / divisors)


def largest(unit: Unit, work: Work) -> None:
    """MAXIMUM or MINIMUM of two operands, brought to the grid of the result first."""
    left, right = _pair(unit)
    order = _order(unit, work, left, right)
    first, second = (work.regridded(_laid(work, o, order), _grid(o), unit) for o in (left, right))
    found = _extreme(work, "MAXIMUM" if unit.kind == "Max" else "MINIMUM", first, second)
    work.put(unit.results[0], found, order)


def prelu(unit: Unit, work: Work) -> None:
    """The larger of an element and its product with its channel's slope; the smaller where slopes are above 1."""
    data, slope = unit.inputs[0], unit.inputs[1]
    assert data is not None
    slopes = slope.real if slope is not None else None
    rank = len(data.shape)
    channels = data.shape[1] if rank > 1 else 1
    if slopes is None or slopes.size not in (1, channels):
        raise Refusal("its slopes are not one for each channel")
    if not ((slopes <= 1).all() or (slopes >= 1).all()):
        raise Refusal("its slopes are on both sides of 1")
    order = channels_last(rank)
    tensor = work.read(data, order)
    inclined = _scaled(unit, work, tensor, _grid(data), np.broadcast_to(slopes.reshape(-1), (channels,)))
    straight = work.regridded(tensor, _grid(data), unit)
    kind = "MAXIMUM" if (slopes <= 1).all() else "MINIMUM"
    work.put(unit.results[0], _extreme(work, kind, straight, inclined), order)


def normalize(unit: Unit, work: Work) -> None:
    """BatchNormalization that no convolution could take: a factor and a summand for each channel."""
    data = unit.inputs[0]
    reals = [operand.real if operand is not None else None for operand in unit.inputs[1:5]]
    if data is None or any(real is None for real in reals):
        raise Refusal("its statistics are computed")
    scale, bias, mean, variance = (np.asarray(real, np.float64) for real in reals)
    factor = scale / np.sqrt(variance + unit.node.attributes.get_float("epsilon", 1e-5))
    order = channels_last(len(data.shape))
    added = (bias - mean * factor).reshape((1,) * (len(order) - 1) + (-1,))
    work.put(unit.results[0], _affine(unit, work, work.read(data, order), _grid(data), factor, added), order)


def _sum(unit: Unit, work: Work, kind: str) -> None:
    left, right = _pair(unit)
    order = _order(unit, work, left, right)
    for operand, other in ((left, right), (right, left)):
        if (reals := _off_grid(other)) is not None:
            sign = -1.0 if kind == "SUB" else 1.0
            factor, summand = (1.0, sign) if operand is left else (sign, 1.0)
            added = _spread(reals, order) * summand
            found = _affine(unit, work, _laid(work, operand, order), _grid(operand), np.array([factor]), added)
            work.put(unit.results[0], found, order)
            return
    grids = _grid(left), _grid(right)
    step, factors = _common(grids[0].step, grids[1].step, 8 if any(grid.dtype == "int16" for grid in grids) else 0)
    operands = zip((left, right), grids, factors, strict=True)
    pair = [work.centred(_laid(work, operand, order), grid, factor) for operand, grid, factor in operands]
    work.put(unit.results[0], work.rounded(unit, work.emitter.elementwise(kind, *pair), step), order)


def _common(left: Fraction, right: Fraction, wider: int) -> tuple[Fraction, tuple[Fraction, Fraction]]:
    """One step for two operands, and what their integers are multiplied by.

    Whole factors, where there are some that stand for the steps to 2**-22 of the coarser; else it is 2**20 times finer,
    or by fewer bits where operands have more than 8.
    """
    coarse, fine = max(left, right), min(left, right)
    near = (fine / coarse).limit_denominator(_WHOLE >> max(wider - 7, 0))
    if abs(near - fine / coarse) < Fraction(1, 1 << 22):
        large, small, step = Fraction(near.denominator), Fraction(near.numerator), coarse / near.denominator
    else:
        step = coarse / (1 << _HEADROOM - wider)
        large, small = coarse / step, fine / step
    return step, ((large, small) if left >= right else (small, large))


def _products(unit: Unit, work: Work, left: Operand, right: Operand, reals: Array | None, others: Array | None) -> None:
    """MUL, where either operand may be a constant of real numbers."""
    for operand, factor in ((left, others), (right, reals)):
        if factor is not None and (order := _channel_order(unit, operand, factor)) is not None:
            tensor = work.read(operand, order)
            found = _scaled(unit, work, tensor, _grid(operand), np.broadcast_to(factor.reshape(-1), tensor.shape[-1:]))
            work.put(unit.results[0], found, order)
            return
    order = _order(unit, work, left, right)
    factor = others if others is not None else reals
    if factor is None:
        grids = _grid(left), _grid(right)
        pair = [work.centred(_laid(work, o, order), grid) for o, grid in zip((left, right), grids, strict=True)]
        step = grids[0].step * grids[1].step
    else:
        data = left if others is not None else right
        fine = exact(max(float(np.abs(factor).max()), 1e-30)) / (1 << _FACTOR_BITS)
        whole = work.emitter.constant(np.rint(_spread(factor, order) / float(fine)), "int32")
        pair = [work.centred(_laid(work, data, order), _grid(data)), whole]
        step = _grid(data).step * fine
        if _grid(data).dtype == "int16":
            raise Refusal("products of 16 bits with real numbers are wider than 32")
    work.put(unit.results[0], work.rounded(unit, work.emitter.elementwise("MUL", *pair), step), order)


def _scaled(unit: Unit, work: Work, tensor: Tensor, grid: Grid, factor: Array) -> Tensor:
    """Elements times the factor of the last axis, rounded once: a window of 1 x 1 with weights of 1 and -1."""
    channels, shape = tensor.shape[-1], tensor.shape
    image = tensor if len(shape) == 4 else work.emitter.reshape(tensor, (1, 1, int(np.prod(shape[:-1])), channels))
    sums = pointwise(work, image, grid, np.sign(factor).astype(np.int8).reshape(channels, 1, 1))
    steps = [exact(abs(f)) * grid.step for f in factor]
    return work.emitter.reshape(work.rounded(unit, sums, steps), shape)


def _affine(unit: Unit, work: Work, tensor: Tensor, grid: Grid, factor: Array, added: Array) -> Tensor:
    """`x * factor + added` in 30 bits; one factor, or one for each index of the last axis."""
    top = float(1 << (16 if grid.dtype == "int16" else 8)) * float(grid.step) * float(np.abs(factor).max()) + float(
        np.abs(added).max()
    )
    fine = Fraction(2) ** (int(np.ceil(np.log2(top))) - 30)
    scales = [exact(abs(f)) * grid.step / fine for f in factor]
    sums = work.emitter.rescale(tensor, scales if len(scales) > 1 else scales[0], "int32", zero_in=grid.zero_point)
    constant = work.emitter.constant(np.rint(added / float(fine)), "int32")
    if (factor <= 0).all():
        total = work.emitter.elementwise("SUB", constant, sums)
    else:
        if (factor < 0).any():
            signs = np.sign(factor).reshape((1,) * (len(tensor.shape) - 1) + (-1,))
            sums = work.emitter.elementwise("MUL", sums, work.emitter.constant(signs, "int32"))
        total = work.emitter.elementwise("ADD", sums, constant)
    return work.rounded(unit, total, fine)


def _extreme(work: Work, kind: str, left: Tensor, right: Tensor) -> Tensor:
    """MAXIMUM or MINIMUM, which TOSA has in 32 bits."""
    pair = [work.emitter.rescale(tensor, Fraction(1), "int32") for tensor in (left, right)]
    return work.emitter.rescale(work.emitter.elementwise(kind, *pair), Fraction(1), left.dtype)


def _pair(unit: Unit) -> tuple[Operand, Operand]:
    operands = [operand for operand in unit.inputs if operand is not None]
    if len(operands) != 2:
        raise Refusal(f"it has {len(operands)} operands, not 2")
    return operands[0], operands[1]


def _grid(operand: Operand) -> Grid:
    if operand.grid is None:
        raise Refusal("an operand of it is a constant of floats")
    return operand.grid


def _off_grid(operand: Operand) -> Array | None:
    """The real numbers of a constant that is on no grid, or on several."""
    return operand.real if operand.grid is None or operand.grid.axis is not None else None


def _reals(operand: Operand) -> Array | None:
    """Real numbers that a factor stands for: of a constant that is no matrix on one grid."""
    real = operand.real
    along = real is not None and max(real.shape, default=1) == real.size
    return real if along else _off_grid(operand)


def _spread(array: Array, order: Order) -> Array:
    """A constant with all axes of the result, as they lie."""
    return array.reshape((1,) * (len(order) - array.ndim) + array.shape).transpose(order)


def _order(unit: Unit, work: Work, left: Operand, right: Operand) -> Order:
    """The order in which the larger operand lies, if it has all axes of the result."""
    rank = len(static_shape(unit.results[0]) or ())
    computed = [operand for operand in (left, right) if operand.array is None]
    fullest = max(computed, key=lambda operand: (len(operand.shape), int(np.prod(operand.shape))))
    order = work.placed(fullest).order
    return order if len(order) == rank else plain(rank)


def _laid(work: Work, operand: Operand, order: Order) -> Tensor:
    """An operand with all axes of the result, as they lie."""
    rank, placed = len(operand.shape), work.placed(operand)
    if placed.tensor.data is not None:
        return work.emitter.constant(_spread(placed.tensor.data, order), placed.tensor.dtype)
    if rank == len(order):
        return work.read(operand, order)
    own = work.read(operand, plain(rank))
    return work.emitter.transpose(work.emitter.reshape(own, (1,) * (len(order) - rank) + own.shape), order)


def _channel_order(unit: Unit, data: Operand, factor: Array) -> Order | None:
    """The order of axes in which the last has a factor for each index; None if factors differ along more axes."""
    rank = len(data.shape)
    if data.array is not None or rank == 0 or factor.ndim > rank or static_shape(unit.results[0]) != data.shape:
        return None
    long = [axis for axis, size in enumerate((1,) * (rank - factor.ndim) + factor.shape) if size != 1]
    if len(long) > 1:
        return None
    images = channels_last(rank)
    axis = long[0] if long else images[-1]
    return images if axis == images[-1] else (*(a for a in range(rank) if a != axis), axis)
