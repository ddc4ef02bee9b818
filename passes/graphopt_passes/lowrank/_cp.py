"""Kernels as sums of outer products (canonical polyadic form): one vector along each axis for every term.

    W[i, a, b, o] = sum over r of F1[i, r] F2[a, r] F3[b, r] F4[o, r]

A convolution becomes 1 x 1, depthwise a x 1, depthwise 1 x b, and 1 x 1 (Lebedev et al., 2015). There is no closed form
of the best terms: alternating least squares improves one axis after another. It starts from the higher-order singular
vectors (De Lathauwer et al., 2000), those that lead along one axis with those that lead along the others; at full rank
from each with each, which loses nothing.

Terms may grow without bound while their sum stays small; then float32 would lose what they have in common. Equations
get a ridge, and sweeps end before terms hold far more than the kernel does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from graphopt_passes.lowrank._factors import Problem, marginal_of, root_of

__all__ = ["Kernel", "outer_sum", "polyadic"]

Array = np.ndarray[Any, np.dtype[Any]]

_SWEEPS = 20
_GAIN = 1e-3
_RIDGE = 1e-8
_NOTHING = 1e-13
_MOST = 100.0
"""Energy of all terms in parts of that of the kernel: above, they would cancel each other."""


class Kernel:
    """A kernel that becomes a sum of outer products.

    Args:
        problem: Its weight, and how errors count.
        sizes: Of its axes: channels read, and those of the kernel that are longer than 1.
    """

    def __init__(self, problem: Problem, sizes: Sequence[int]) -> None:
        self._problem, self._sizes = problem, tuple(sizes)
        self._root = _channel_root(problem, self._sizes)
        tensor = problem.weight.reshape(*self._sizes, -1)
        self._tensor = tensor if self._root is None else np.tensordot(self._root.T, tensor, (1, 0))

    def factors(self, rank: int) -> tuple[Array, ...]:
        """`[size, rank]` for each axis, the outputs' last; each term is as large along one axis as along another."""
        found = polyadic(self._tensor, rank)
        if self._root is not None:
            found[0] = np.linalg.solve(self._root.T, found[0])
        if self._problem.second is not None and self._problem.scales is None:
            found[-1] = self._answer(found[:-1])
        return _balanced(found)

    def dense(self, factors: Sequence[Array]) -> Array:
        """`[inputs, outputs]`: what factors stand for."""
        return _khatri_rao(factors[:-1]) @ factors[-1].T

    def _answer(self, others: Sequence[Array]) -> Array:
        """`[outputs, rank]`: what is least squares on the rows, given the factors of the other axes."""
        rows = _khatri_rao(others)
        weighted = self._problem.second @ rows
        return _solved(rows.T @ weighted, self._problem.weight.T @ weighted)


def polyadic(tensor: Array, rank: int) -> list[Array]:
    """Write a tensor as a sum of outer products.

    Args:
        tensor: `[..., outputs]`, of three axes at least.
        rank: Terms, at most as many as the other axes have places.

    Returns:
        `[size, rank]` for each axis; columns have unit length on all axes but the last.
    """
    whole = float(np.vdot(tensor, tensor))
    best, least = _start(tensor, rank, whole)
    found = best
    for _ in range(_SWEEPS if least > _NOTHING * whole else 0):
        found, error = _sweep(tensor, found, whole)
        if not error < least or float(np.square(found[-1]).sum()) > _MOST * whole:
            break
        gain, best, least = 1 - error / least, found, error
        if gain < _GAIN or least < _NOTHING * whole:
            break
    return best


def outer_sum(factors: Sequence[Array]) -> Array:
    """The tensor that factors stand for."""
    sizes = [len(factor) for factor in factors]
    return (_khatri_rao(factors[:-1]) @ factors[-1].T).reshape(sizes)


def _channel_root(problem: Problem, sizes: tuple[int, ...]) -> Array | None:
    """What weights the channels while factors are sought: `L` of their moments, all places of the kernel together."""
    inner = int(np.prod(sizes[1:]))
    if problem.scales is not None:
        return np.diag(np.sqrt(np.square(problem.scales).reshape(-1, inner).mean(axis=1)))
    return None if problem.second is None else root_of(marginal_of(problem.second, inner))


def _start(tensor: Array, rank: int, whole: float) -> tuple[list[Array], float]:
    """Singular vectors along all axes but the last, the answer along that, and what is lost."""
    sizes = tensor.shape[:-1]
    unfolded = [np.moveaxis(tensor, axis, 0).reshape(size, -1) for axis, size in enumerate(sizes)]
    bases = [np.linalg.eigh(matrix @ matrix.T)[1][:, ::-1] for matrix in unfolded]
    full = rank >= int(np.prod(sizes))
    places = np.unravel_index(np.arange(rank), sizes) if full else [np.arange(rank) % size for size in sizes]
    found = [basis[:, place] for basis, place in zip(bases, places, strict=True)]
    return _answered(tensor, found, whole)


def _sweep(tensor: Array, factors: Sequence[Array], whole: float) -> tuple[list[Array], float]:
    """Solve every axis anew, given the others, what terms hold moved to the last; and what is lost then."""
    found, last = list(factors), len(factors) - 1
    thin = np.tensordot(found[last], tensor, (0, last))  # [rank, *other axes], for all of these
    for axis in (*range(1, last), 0):
        gram = _gram([factor for i, factor in enumerate(found) if i != axis])
        answer = _solved(gram, _along(thin, [None if i == axis else found[i] for i in range(last)]))
        sizes = np.linalg.norm(answer, axis=0)
        found[axis] = answer / np.where(sizes > 0, sizes, 1.0)
    return _answered(tensor, found[:last], whole)


def _answered(tensor: Array, others: Sequence[Array], whole: float) -> tuple[list[Array], float]:
    """Factors with the least-squares answer along the last axis; what is lost with it."""
    longest = int(np.argmax([len(factor) for factor in others]))
    thin = np.moveaxis(np.tensordot(others[longest], tensor, (0, longest)), -1, 1)
    rest = [factor for axis, factor in enumerate(others) if axis != longest]
    gram, wanted = _gram(others), _along(thin, [None, *rest])
    answer = _solved(gram, wanted)
    held = 2 * np.vdot(wanted, answer) - np.vdot(answer @ gram, answer)
    return [*others, answer], float(whole - held)


def _gram(factors: Sequence[Array]) -> Array:
    """`[rank, rank]`: products of terms."""
    found = factors[0].T @ factors[0]
    for factor in factors[1:]:
        found = found * (factor.T @ factor)
    return found


def _along(thin: Array, factors: Sequence[Array | None]) -> Array:
    """`[size, rank]`: terms' shares `[rank, *axes]` of a tensor, with factors along all axes but the one without."""
    for axis, factor in reversed(list(enumerate(factors, 1))):
        if factor is not None:
            thin = np.einsum("r...s,sr->r...", np.moveaxis(thin, axis, -1), factor)
    return thin.T


def _solved(gram: Array, wanted: Array) -> Array:
    """`[size, rank]` with `answer gram = wanted`; a ridge keeps terms that are alike from growing."""
    level = float(np.trace(gram)) / len(gram)
    damped = gram + max(_RIDGE * level, 1e-30) * np.eye(len(gram))
    return np.linalg.solve(damped, wanted.T).T


def _khatri_rao(factors: Sequence[Array]) -> Array:
    """`[product of sizes, rank]`: outer products of columns, the first axis outermost."""
    found = factors[0]
    for factor in factors[1:]:
        found = (found[:, None, :] * factor[None, :, :]).reshape(-1, found.shape[1])
    return found


def _balanced(factors: Sequence[Array]) -> tuple[Array, ...]:
    sizes = np.array([np.linalg.norm(factor, axis=0) for factor in factors])
    with np.errstate(divide="ignore"):
        mean = np.exp(np.log(sizes).mean(axis=0))  # 0 where a term is nothing
    scales = np.divide(mean, sizes, out=np.zeros_like(sizes), where=sizes > 0)
    return tuple(factor * scale for factor, scale in zip(factors, scales, strict=True))
