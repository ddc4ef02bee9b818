"""The first of two factors as the least-squares answer to the second.

A weight `W [outer * inner, outputs]` stands as `(A x I) B`: `A [outer, rank]` mixes the outer part of a row and leaves
the inner one alone, `B [rank * inner, outputs]` does the rest. With one factor given the other is a linear least-
squares problem; taken in turns they descend to where neither can be bettered (Carroll and Chang, 1970). For `B` its
equations are small. Those for `A` have `outer * rank` unknowns, so that they are solved by conjugate gradients, which
need nothing but products with `C = X'X`, preconditioned by what the equations would be if places of the kernel were
not correlated: a Kronecker product.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["first_answer"]

Array = np.ndarray[Any, np.dtype[Any]]

_STEPS = 4
_RIDGE = 1e-9


def first_answer(second: Array, weight: Array, first: Array, last: Array) -> Array:
    """A better first factor for a given last one; the error never grows.

    Args:
        second: `[outer * inner, outer * inner]` products of inputs.
        weight: `[outer * inner, outputs]`.
        first: `[outer, rank]`: where to start from.
        last: `[rank * inner, outputs]`.
    """
    outer, rank = first.shape
    rows = last.reshape(rank, -1)

    def transposed(matrix: Array) -> Array:
        return (second @ matrix).reshape(outer, -1) @ rows.T

    left, right = _preconditioner(second, rows, outer)
    found, missed = first.copy(), transposed(weight - (first @ rows).reshape(weight.shape))
    eased = left @ missed @ right
    direction, power = eased, float((missed * eased).sum())
    for _ in range(_STEPS):
        answer = transposed((direction @ rows).reshape(weight.shape))
        curvature = float((direction * answer).sum())
        if power <= 0 or curvature <= 0:
            break
        found += power / curvature * direction
        missed = missed - power / curvature * answer
        eased = left @ missed @ right
        power, before = float((missed * eased).sum()), power
        direction = eased + power / before * direction
    return found


def _preconditioner(second: Array, rows: Array, outer: int) -> tuple[Array, Array]:
    """Inverses of `[outer, outer]` mean products of inputs at one place, and of `[rank, rank]` products of rows."""
    inner = len(second) // outer
    marginal = np.einsum("ikjk->ij", second.reshape(outer, inner, outer, inner)) / inner
    return _inverse(marginal), _inverse(rows @ rows.T)


def _inverse(gram: Array) -> Array:
    ridge = _RIDGE * max(float(np.trace(gram)) / len(gram), 1e-30)
    return np.linalg.inv(gram + ridge * np.eye(len(gram)))
