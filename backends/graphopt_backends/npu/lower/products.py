"""Products of matrices."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from graphopt_backends._fold import static_shape
from graphopt_backends.npu.emitter import Refusal
from graphopt_backends.npu.lower.sums import convolve, layer_of, weighted
from graphopt_backends.npu.lower.windows import ONE
from graphopt_backends.npu.tosa import Tensor
from graphopt_backends.npu.units import Operand, Unit
from graphopt_backends.npu.work import Work, exact, plain

__all__ = ["dense", "matmul"]


def dense(unit: Unit, work: Work) -> None:
    """Gemm or MatMul with a constant matrix: a convolution of 1 x 1 over its rows."""
    data, weight = weighted(unit)
    attributes, rank = unit.node.attributes, len(data.shape)
    turned, flipped = (unit.kind == "Gemm" and bool(attributes.get_int(name, 0)) for name in ("transA", "transB"))
    factor = exact(attributes.get_float("alpha", 1.0)) if unit.kind == "Gemm" else Fraction(1)
    weight = weight if flipped else weight.T
    layer = layer_of(unit, weight[:, :, None, None], 0 if flipped else 1, factor=factor)
    rows = work.read(data, (1, 0) if turned else plain(rank))
    lead, (outputs, inner) = rows.shape[:-1], weight.shape
    image = work.emitter.reshape(rows, (1, 1, int(np.prod(lead)), inner))
    found = work.emitter.reshape(convolve(unit, work, image, layer, ONE, image.shape[1:3]), (*lead, outputs))
    work.put(unit.results[0], found, plain(len(lead) + 1))


def matmul(unit: Unit, work: Work) -> None:
    """MATMUL of two activations; a convolution where the right matrix is constant."""
    left, right = unit.inputs[0], unit.inputs[1]
    assert left is not None
    assert right is not None
    if right.array is not None and right.array.ndim == 2:
        dense(unit, work)
        return
    if left.grid is None or right.grid is None:
        raise Refusal("an operand of it is a constant of floats")
    if "int16" in (left.grid.dtype, right.grid.dtype):
        raise Refusal("products of two 16-bit matrices are wider than 32 bits")
    if min(len(left.shape), len(right.shape)) < 2:
        raise Refusal("an operand of it is a vector")
    if unit.kind == "Gemm":
        raise Refusal("its weight is computed")
    shape = static_shape(unit.results[0]) or ()
    batch = shape[:-2]
    a, b = (_batched(work, operand, batch) for operand in (left, right))
    zeros = [work.emitter.constant([grid.zero_point], grid.dtype) for grid in (left.grid, right.grid)]
    sums = work.emitter.add("MATMUL", [a, b, *zeros], (a.shape[0], a.shape[1], b.shape[2]), "int32")
    found = work.rounded(unit, sums, left.grid.step * right.grid.step)
    work.put(unit.results[0], work.emitter.reshape(found, shape), plain(len(shape)))


def _batched(work: Work, operand: Operand, batch: tuple[int, ...]) -> Tensor:
    """`[N, rows, columns]`, matrices repeated where the other operand has more."""
    rank, shape = len(operand.shape), operand.shape
    tensor = work.read(operand, plain(rank))
    own = (1,) * (len(batch) + 2 - rank) + shape[:-2]
    if own != batch:
        tensor = work.emitter.reshape(tensor, (*own, *shape[-2:]))
        times = [wanted // have for wanted, have in zip(batch, own, strict=True)]
        tensor = work.emitter.add(
            "TILE", [tensor, work.emitter.shape([*times, 1, 1])], (*batch, *shape[-2:]), tensor.dtype
        )
    return work.emitter.reshape(tensor, (int(np.prod(batch)), *shape[-2:]))
