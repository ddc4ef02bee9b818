"""Softmax in integers, of operations that every Ethos-U has.

    d = x - max x                             0 .. -255 steps
    e = exp(d)                                23 bits, of three tables of 8
    s = sum of e, shifted to 2**30 .. 2**31   and every e by as much
    r = 1 / s                                 a table of 8 bits, then twice r * (2 - s * r) (Newton)
    e * r                                     rounded once

The fixed-point steps are those of gemmlowp's reciprocal; the result is within 2**-20 of the real one for rows of up to
256 elements.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from graphopt_backends.npu.emitter import Refusal
from graphopt_backends.npu.tosa import Tensor
from graphopt_backends.npu.units import Unit
from graphopt_backends.npu.work import Work

__all__ = ["softmax"]

_BITS = 23
_LONGEST = 1 << (31 - _BITS)
_POINT = 29  # bits behind the point of a reciprocal between 1 and 2


def softmax(unit: Unit, work: Work) -> None:
    """The exponentials along an axis, divided by their sum."""
    data = unit.inputs[0]
    if data is None or data.grid is None or data.grid.dtype != "int8":
        raise Refusal("its input is not int8")
    rank = len(data.shape)
    axis = unit.node.attributes.get_int("axis", -1) % rank
    order = (*(a for a in work.placed(data).order if a != axis), axis)
    x = work.read(data, order)
    sums = _normalized(work, x, float(data.grid.step))
    work.put(unit.results[0], work.rounded(unit, sums, Fraction(1, 1 << _POINT)), order)


def _normalized(work: Work, x: Tensor, step: float) -> Tensor:
    """What is left of every element, with 29 bits behind the point."""
    emitter, row = work.emitter, (*x.shape[:-1], 1)
    most = emitter.add("REDUCE_MAX", [x], row, "int8", axis=len(row) - 1, nan_mode="PROPAGATE")
    wide = [emitter.rescale(tensor, Fraction(1), "int32") for tensor in (x, most)]
    index = emitter.rescale(emitter.elementwise("SUB", *wide), Fraction(1), "int8", zero_out=127)
    bits = _BITS - max(0, (x.shape[-1] - 1).bit_length() - _LONGEST.bit_length() + 1)
    powers = _exponentials(work, index, step, bits)
    total = emitter.add("REDUCE_SUM", [powers], row, "int32", axis=len(row) - 1)
    zeros = emitter.add("CLZ", [total], row, "int32")
    shift = emitter.elementwise("SUB", zeros, _scalar(work, 1, len(row)))
    total, powers = (emitter.elementwise("LOGICAL_LEFT_SHIFT", tensor, shift) for tensor in (total, powers))
    return emitter.elementwise("MUL", powers, _reciprocal(work, total), shift=31)


def _exponentials(work: Work, index: Tensor, step: float, bits: int) -> Tensor:
    """`exp(step * (index - 127))` with some bits behind the point, put together of three bytes."""
    exact = np.rint(np.exp(step * np.arange(-255, 1)) * (1 << bits)).astype(np.int64)
    exact = np.minimum(exact, (1 << bits) - 1)
    total: Tensor | None = None
    for byte in (2, 1, 0):
        part = exact >> 8 * byte & 255
        if not part.any():
            continue
        looked_up = work.emitter.table(index, part - 128)
        wide = work.emitter.rescale(looked_up, Fraction(1 << 8 * byte), "int32", zero_in=-128)
        total = wide if total is None else work.emitter.elementwise("ADD", total, wide)
    assert total is not None
    return total


def _reciprocal(work: Work, total: Tensor) -> Tensor:
    """`2**31 / total` for totals of 2**30 .. 2**31, with 29 bits behind the point."""
    emitter, rank = work.emitter, len(total.shape)
    centred = emitter.elementwise("SUB", total, _scalar(work, 3 << 29, rank))
    index = emitter.rescale(centred, Fraction(1, 1 << 22), "int8")
    guess = np.rint((512 / np.arange(256, 512) - 1) * 255).astype(np.int64) - 128
    found = emitter.rescale(emitter.table(index, guess), Fraction(1 << _POINT, 255), "int32", zero_in=-128)
    found = emitter.elementwise("ADD", found, _scalar(work, 1 << _POINT, rank))
    two = _scalar(work, 2 << _POINT, rank)
    for _ in range(2):
        product = emitter.elementwise("MUL", total, found, shift=31)
        found = emitter.elementwise("MUL", found, emitter.elementwise("SUB", two, product), shift=_POINT)
    return found


def _scalar(work: Work, number: int, rank: int) -> Tensor:
    return work.emitter.constant(np.full((1,) * rank, number), "int32")
