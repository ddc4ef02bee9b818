"""Weights of linear layers as matrices that rows of the input meet, and what rounding does to their products.

With `X` the rows that a layer reads and `W` its weight, rounding it to `Q` adds noise of power `tr((W-Q)' X'X (W-Q))`
to an output of power `tr(W' X'X W)`; the ratio is what a layer's own output loses, whatever its size.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["as_matrix", "power"]

Array = np.ndarray[Any, np.dtype[Any]]


def as_matrix(weight: Array, operator: str, index: int, *, groups: int = 1, transposed: bool = False) -> Array:
    """A weight as `[groups, inputs, outputs]`, inputs in the order of `LayerMoments`.

    Args:
        weight: The weight.
        operator: Conv, ConvTranspose, Gemm, MatMul, or a recurrent operator.
        index: Which input of the node it is; a MatMul may hold it on the left.
        groups: Of a convolution.
        transposed: A Gemm with transB.
    """
    if operator == "Conv":
        return weight.reshape(groups, weight.shape[0] // groups, -1).transpose(0, 2, 1)
    if operator == "ConvTranspose":
        return weight.reshape(groups, weight.shape[0] // groups, -1)
    if operator == "Gemm":
        return (weight.T if transposed else weight)[None]
    if operator == "MatMul":
        inputs = -2 if index else -1
        rows = np.moveaxis(weight, inputs if weight.ndim > 1 else 0, 0)
        return rows.reshape(1, rows.shape[0], -1)
    return weight.reshape(-1, weight.shape[-1]).T[None]


def power(matrix: Array, xx: Array | None, squares: Array | None) -> float:
    """Sum of squares of the products of the rows with a matrix.

    Args:
        matrix: `[groups, inputs, outputs]`.
        xx: `[groups, inputs, inputs]` X'X; None where it is not known.
        squares: `[groups, inputs]` its diagonal; None: every input counts alike.
    """
    if xx is not None:
        parts = ((moments @ part * part).sum() for moments, part in zip(xx, matrix, strict=True))
        return max(0.0, float(sum(parts)))
    rows = np.einsum("gio,gio->gi", matrix, matrix, dtype=np.float64)
    return float(rows.sum() if squares is None else (rows * squares).sum())
