"""Weights as products of thin ones: truncated singular values, weighted by what the layer reads.

A layer computes `X W`, with `X` rows and `W [inputs, outputs]`. What counts is the error of its output,

    |X W - X A B|^2 = tr(D' C D),    D = W - A B,    C = X'X

With `C = L L'` (Cholesky) it is `|L' D|^2`, so the best `A B` of a rank follows from the singular values of `L' W`
(Eckart and Young, 1936; SVD-LLM, Wang et al., 2024). With `V` the leading right singular vectors it is `W V V'`, with
`U` the left ones `L'^-1 U U' L' W`; the smaller set is found, as eigenvectors of a Gram matrix. Without data `L` is the
identity; ASVD (Yuan et al., 2023) takes a diagonal one.

Rows of a convolution are channels times kernel positions. Where only a part of that, the outer one, is mixed by the
first factor, with the same numbers for each index of the inner one, `A` is found from the sums of C over the inner
index, and `B` is the least-squares answer to what `A` makes of the input; one turn of both betters `A` too:

    channels, kernel           | nothing        k x k, then 1 x 1
    channels                   | kernel         1 x 1, then k x k
    channels, first kernel axis| second axis    k x 1, then 1 x k
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from graphopt_passes.lowrank._alternate import first_answer

__all__ = ["Basis", "Parts", "Problem", "Split", "leading", "marginal_of", "root_of", "split"]

Array = np.ndarray[Any, np.dtype[Any]]

_RIDGE = 1e-9


@dataclass(frozen=True, eq=False)
class Problem:
    """A weight, and how its errors count; float64.

    Attributes:
        weight: `[inputs, outputs]`.
        second: `[inputs, inputs]` products of inputs, X'X over the rows; None: all inputs count alike.
        scales: `[inputs]` factors that stand for the inputs while factors are sought (ASVD); None: `second` does.
        mean: `[inputs]` of the inputs, where `second` is about it and a bias makes up for it.
        bases: What `split` has found, by the length of the inner part of a row.
    """

    weight: Array
    second: Array | None = None
    scales: Array | None = None
    mean: Array | None = None
    bases: dict[int, Basis] = field(default_factory=dict, repr=False)

    @cached_property
    def whole(self) -> float:
        """Energy of the output."""
        return self.energy(self.weight)

    def shift(self, approximate: Array) -> Array:
        """`[outputs]`: what a bias gains with a matrix in the weight's place."""
        outputs = self.weight.shape[1]
        return np.zeros(outputs) if self.mean is None else self.mean @ (self.weight - approximate)

    def energy(self, matrix: Array) -> float:
        """What a matrix of the weight's shape adds to the output, squared and summed."""
        return float((matrix * (matrix if self.second is None else self.second @ matrix)).sum())

    def error(self, approximate: Array) -> float:
        """Energy of the output's error in parts of that of the output."""
        whole = self.whole
        return max(0.0, self.energy(self.weight - approximate)) / whole if whole > 0 else 0.0


@dataclass(frozen=True, eq=False)
class Parts:
    """Weights of parts that do not meet, such as the groups of a convolution, with one rank for all.

    Attributes:
        problems: Of each part.
    """

    problems: tuple[Problem, ...]

    def shift(self, approximate: Array) -> Array:
        """`[outputs of all parts]`: what a bias gains with matrices in the weights' places."""
        return np.concatenate([one.shift(matrix) for one, matrix in zip(self.problems, approximate, strict=True)])

    def error(self, approximate: Array) -> float:
        """Energy of the output's error in parts of that of the output, over all parts."""
        whole = sum(one.whole for one in self.problems)
        pairs = zip(self.problems, approximate, strict=True)
        lost = sum(one.energy(one.weight - matrix) for one, matrix in pairs)
        return max(0.0, lost) / whole if whole > 0 else 0.0


@dataclass(frozen=True, eq=False)
class Basis:
    """A matrix as a product, most important terms first.

    Attributes:
        first: `[inputs, terms]`.
        second: `[terms, outputs]`.
        energies: `[terms]` what each term adds, squared.
    """

    first: Array
    second: Array
    energies: Array

    def factors(self, rank: int) -> tuple[Array, Array]:
        """The leading terms; each is as large in one factor as in the other, which keeps both easy to quantize."""
        first, second = self.first[:, :rank], self.second[:rank]
        sizes = np.linalg.norm(first, axis=0), np.linalg.norm(second, axis=1)
        known = (sizes[0] > 0) & (sizes[1] > 0)
        scale = np.sqrt(np.divide(sizes[0], sizes[1], out=np.ones(first.shape[1]), where=known))
        scale = np.where(known, scale, 1.0)
        return first / scale, second * scale[:, None]


def root_of(second: Array) -> Array:
    """Lower triangular `L` with `L L' = second`; directions that no row has count a little."""
    size = len(second)
    level = float(np.trace(second)) / max(1, size)
    if level <= 0:
        return np.eye(size)
    ridge = _RIDGE
    while True:
        try:
            return np.linalg.cholesky(second + ridge * level * np.eye(size))
        except np.linalg.LinAlgError:
            ridge *= 10  # what is not finite was refused before, so this ends


def leading(matrix: Array, root: Array | None) -> Basis:
    """A matrix by its singular values as `root` weights them.

    Args:
        matrix: `[inputs, outputs]`.
        root: `L` of `root_of`, or the diagonal of one; None: not weighted.
    """
    weighted = matrix if root is None else root[:, None] * matrix if root.ndim == 1 else root.T @ matrix
    if matrix.shape[1] <= matrix.shape[0]:
        energies, right = _eigenvectors(weighted.T @ weighted)
        return Basis(matrix @ right, right.T, energies)
    energies, left = _eigenvectors(weighted @ weighted.T)
    second = left.T @ weighted
    if root is None:
        return Basis(left, second, energies)
    first = left / root[:, None] if root.ndim == 1 else np.linalg.solve(root.T, left)
    return Basis(first, second, energies)


def _eigenvectors(gram: Array) -> tuple[Array, Array]:
    """Eigenvalues, largest first, and the vectors as columns."""
    values, vectors = np.linalg.eigh(gram)
    return np.maximum(values[::-1], 0.0), vectors[:, ::-1]


@dataclass(frozen=True, eq=False)
class Split:
    """Ways to write a weight as two, by rank.

    Attributes:
        problem: The weight.
        inner: Length of the part of a row that the first factor leaves alone.
        basis: `[outer, inner * outputs]` as a product.
    """

    problem: Problem
    inner: int
    basis: Basis

    def factors(self, rank: int) -> tuple[Array, Array]:
        """`[outer, rank]` and `[rank * inner, outputs]`."""
        first, second = self.basis.factors(rank)
        second = second.reshape(rank * self.inner, -1)
        if self.inner > 1 and self.problem.second is not None and self.problem.scales is None:
            second = second + self._correction(first, second)
            first = first_answer(self.problem.second, self.problem.weight, first, second)
            second = second + self._correction(first, second)
        return first, second

    def _correction(self, first: Array, second: Array) -> Array:
        """What brings a second factor to the least-squares answer; nothing where no row says otherwise."""
        gram, wanted = self._equations(first)
        missed = wanted - gram @ second
        gram[np.diag_indices(len(gram))] += _RIDGE * max(np.trace(gram) / len(gram), 1e-30)
        return np.linalg.solve(gram, missed)

    def _equations(self, first: Array) -> tuple[Array, Array]:
        """`Z'Z` and `Z'Y` of what a first factor makes of the rows."""
        outer, rank = first.shape
        outputs, inner = self.problem.weight.shape[1], self.inner
        second = self._second().reshape(outer, inner, outer, inner)
        left = np.tensordot(first, second, (0, 0))  # [rank, inner, outer, inner]
        gram = np.tensordot(left, first, (2, 0)).transpose(0, 1, 3, 2).reshape(rank * inner, rank * inner)
        wanted = left.reshape(rank * inner, outer * inner) @ self.problem.weight
        return gram, wanted.reshape(rank * inner, outputs)

    def dense(self, first: Array, second: Array) -> Array:
        """`[inputs, outputs]`: what two factors stand for."""
        rank = first.shape[1]
        return (first @ second.reshape(rank, -1)).reshape(self.problem.weight.shape)

    def error(self, rank: int) -> float:
        """Error of the output at a rank, in parts of its energy."""
        problem = self.problem
        if problem.second is None or (self.inner == 1 and problem.scales is None):
            whole = float(self.basis.energies.sum())
            return float(self.basis.energies[rank:].sum()) / whole if whole > 0 else 0.0
        return problem.error(self.dense(*self.factors(rank)))

    def tucker(self, ranks: tuple[int, int]) -> tuple[Array, Array, Array]:
        """`[outer, r1]`, `[r1 * inner, r2]` and `[r2, outputs]`: the answer to the first factor is factored again."""
        first, second = self.factors(ranks[0])
        gram = self._equations(first)[0]
        core, last = leading(second, root_of(gram)).factors(ranks[1])
        return first, core, last

    def _second(self) -> Array:
        size = len(self.problem.weight)
        return np.eye(size) if self.problem.second is None else self.problem.second


def split(problem: Problem, inner: int = 1) -> Split:
    """Prepare the ways to write a weight as two.

    Args:
        problem: The weight; its rows are `[outer, inner]`.
        inner: Length of the part of a row that the first factor leaves alone.
    """
    if inner not in problem.bases:
        problem.bases[inner] = _basis(problem, inner)
    return Split(problem, inner, problem.bases[inner])


def _basis(problem: Problem, inner: int) -> Basis:
    outer, outputs = len(problem.weight) // inner, problem.weight.shape[1]
    matrix = problem.weight.reshape(outer, inner * outputs)
    if problem.scales is not None:
        return leading(matrix, _marginal_scales(problem.scales, inner))
    if problem.second is None:
        return leading(matrix, None)
    return leading(matrix, root_of(marginal_of(problem.second, inner)))


def marginal_of(second: Array, inner: int) -> Array:
    """`[outer, outer]`: sums of `[outer * inner, outer * inner]` products over what both have at the same inner index.

    Args:
        second: Products of inputs.
        inner: Length of the inner part of a row.
    """
    outer = len(second) // inner
    return np.einsum("ikjk->ij", second.reshape(outer, inner, outer, inner))


def _marginal_scales(scales: Array, inner: int) -> Array:
    return np.sqrt(np.square(scales).reshape(-1, inner).mean(axis=1))
