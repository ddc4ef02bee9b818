"""Rounding of weights that looks at what the layer makes of the errors; plain numpy.

With E the difference of a rounded weight `[rows, inputs]` from the exact one and X the rows that the layer reads, the
result is off by X E', and the sum of squares of that is tr(E X'X E'). Rounding to nearest makes every element of E
small; here errors of inputs that move together are made to cancel.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["damped", "flip", "gptq", "nearest", "output_error"]

Array = np.ndarray[Any, np.dtype[Any]]

_DAMP = 0.01
_BLOCK = 128
_ENOUGH = 1e-6
_SWEEPS = 8
_FEW = 1e-4


def nearest(weight: Array, scales: Array, top: int) -> Array:
    """Round each element; float64 of whole numbers.

    Args:
        weight: `[rows, inputs]`.
        scales: `[rows]` step of each row.
        top: Greatest integer.
    """
    return np.clip(np.rint(weight / scales[:, None]), -top, top)


def damped(xx: Array, rows: int) -> Array:
    """X'X for one row of X, `[inputs, inputs]`, with as much added to the diagonal as makes it safe to invert.

    Inputs that were always zero get the mean of the others, so that they round to nearest.
    """
    product = xx / max(1, rows)
    diagonal = np.diag(product)
    mean = float(diagonal.mean()) or 1.0
    added = np.where(diagonal > 0, _DAMP * mean, mean)
    return product + np.diag(added)


def output_error(weight: Array, scales: Array, integers: Array, product: Array) -> Array:
    """`[rows]` mean square of what the rounding of each row does to the result, under X'X for one row."""
    error = integers * scales[:, None] - weight
    return np.einsum("ri,ri->r", error @ product, error)


def gptq(weight: Array, scales: Array, top: int, product: Array) -> Array:
    """Round column by column and let the columns not yet rounded make up for the error.

    GPTQ (Frantar et al., 2022): with U'U the inverse of X'X, U upper triangular, an error e in column i changes the
    best choice of the later columns by -e U[i, later] / U[i, i]. Columns with large inputs come first.

    Args:
        weight: `[rows, inputs]`.
        scales: `[rows]` step of each row.
        top: Greatest integer.
        product: `[inputs, inputs]` X'X, positive definite.

    Returns:
        Whole numbers as float64, `[rows, inputs]`.
    """
    order = np.argsort(-np.diag(product), kind="stable")
    left = weight[:, order].astype(np.float64)
    upper = np.linalg.cholesky(np.linalg.inv(product[np.ix_(order, order)])).T
    integers = np.empty_like(left)
    for start in range(0, left.shape[1], _BLOCK):
        stop = min(start + _BLOCK, left.shape[1])
        errors = np.empty((len(left), stop - start))
        for i in range(start, stop):
            integers[:, i] = np.clip(np.rint(left[:, i] / scales), -top, top)
            errors[:, i - start] = (left[:, i] - integers[:, i] * scales) / upper[i, i]
            left[:, i + 1 : stop] -= np.outer(errors[:, i - start], upper[i, i + 1 : stop])
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    found = np.empty_like(integers)
    found[:, order] = integers
    return found


def flip(weight: Array, scales: Array, integers: Array, top: int, product: Array) -> Array:
    """Round single elements the other way for as long as that lowers the error of the result.

    The problem of AdaRound (Nagel et al., 2020): every element goes up or down such that tr(E X'X E') is least. There
    it is relaxed and followed by gradients; here columns are visited in turn, and each element takes the better of its
    two choices. With g = E X'X, a change d of element i costs 2 d g_i + d^2 (X'X)_ii.

    Args:
        weight: `[rows, inputs]`.
        scales: `[rows]` step of each row.
        integers: Where to start; each element is brought to one of its two choices first.
        top: Greatest integer.
        product: `[inputs, inputs]` X'X.

    Returns:
        Whole numbers as float64, `[rows, inputs]`.
    """
    exact = np.ascontiguousarray((weight / scales[:, None]).T)
    low, high = np.clip(np.floor(exact), -top, top), np.clip(np.ceil(exact), -top, top)
    found = np.clip(integers.T, low, high)
    gradient, diagonal = product @ (found - exact), np.diag(product)
    order = np.argsort(-diagonal, kind="stable")
    for _ in range(_SWEEPS):
        flips = 0
        for i in order:
            other = low[i] + high[i] - found[i]
            change = other - found[i]
            helps = change * (2 * gradient[i] + change * diagonal[i]) < -_ENOUGH * diagonal[i]
            if helps.any():
                found[i, helps] = other[helps]
                gradient[:, helps] += product[i][:, None] * change[helps]
                flips += int(helps.sum())
        if flips <= _FEW * found.size:
            break
    return found.T
