"""A matrix as integers in blocks plus a thin product that makes up for what rounding lost.

    W  ~  Q + A B          Q in 4 bits or 2, A and B in 4

A B is the best of its rank for the output of the layer (LQER: Zhang et al., 2024, with all moments of the input instead
of their diagonal). What it holds need not be rounded any more (as in SVDQuant: Li et al., 2024), so the two take turns,
each answering for what the other leaves (LoftQ: Li et al., 2023); the best turn counts. The factors make up for errors
of a tenth, so that they themselves need not be right to more than that: 4 bits buy twice the rank that 8 do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.analyses import LayerMoments
from graphopt_passes.lowrank._factors import Problem, split
from graphopt_passes.quant.blockwise._grids import Blocks
from graphopt_passes.quant.blockwise.fit import Method, round_weight
from graphopt_passes.quant.blockwise.layout import Layout

__all__ = ["Compensated", "affordable_rank", "bits_of", "compensated"]

Array = np.ndarray[Any, np.dtype[Any]]

_TURNS = 2
_THIN = Method(bits=4, group_size=0, symmetric=True, algorithm="hqq")
_SCALE_BITS = 32


@dataclass(frozen=True, eq=False)
class Compensated:
    """A matrix in integers.

    Attributes:
        blocks: What stands in few bits, `[inputs, outputs]`.
        thin: The two factors, `[inputs, rank]` and the other turned, `[outputs, rank]`, so that each term has one scale
            in either; empty where no rank helps.
        error: Energy of the output's error in parts of that of the output.
        plain: The same without the factors, all else alike.
    """

    blocks: Blocks
    thin: tuple[Blocks, ...]
    error: float
    plain: float


def affordable_rank(inputs: int, outputs: int, bits: float) -> int:
    """The largest rank whose factors take so many bits for each weight; 1 at least."""
    return max(1, int(bits * inputs * outputs / (_THIN.bits * (inputs + outputs))))


def bits_of(inputs: int, outputs: int, method: Method, rank: int) -> float:
    """Bits for each weight, with scales and zero points."""
    groups = -(-inputs // method.group_size) if method.group_size else 1
    grids = groups * outputs * (_SCALE_BITS + (0 if method.symmetric else method.bits))
    thin = _THIN.bits * rank * (inputs + outputs) + _SCALE_BITS * 2 * rank if rank else 0
    return method.bits + (grids + thin) / (inputs * outputs)


def compensated(problem: Problem, rank: int, method: Method) -> Compensated:
    """Round a matrix, and keep what that loses in a product.

    Args:
        problem: The weight, and how errors count.
        rank: Of the product.
        method: How the weight is rounded.
    """
    weight, moments = problem.weight, _moments(problem)
    blocks = _rounded(weight, method, moments)
    plain = problem.error(blocks.real())
    best, thin = Compensated(blocks, (), plain, plain), np.zeros_like(weight)
    for turn in range(_TURNS):
        if turn:
            blocks = _rounded(weight - thin, method, moments)
        lost = Problem(weight - blocks.real(), problem.second, problem.scales)
        first, second = split(lost).factors(rank)
        factors = tuple(_rounded(factor, _THIN, None) for factor in (first, second.T))
        thin = factors[0].real().astype(np.float64) @ factors[1].real().T
        error = problem.error(blocks.real() + thin)
        if error < best.error:
            best = Compensated(blocks, factors, error, plain)
    return best


def _rounded(matrix: Array, method: Method, moments: LayerMoments | None) -> Blocks:
    narrow = matrix.astype(np.float32)
    return round_weight(narrow, Layout(narrow.shape, narrow.shape, 0), method, moments).blocks


def _moments(problem: Problem) -> LayerMoments | None:
    """What the input's second moments say, as the rounding of quantization reads it."""
    if problem.second is None:
        return None
    squares = np.diag(problem.second)[None]
    return LayerMoments(1, np.zeros_like(squares), squares, problem.second[None])
