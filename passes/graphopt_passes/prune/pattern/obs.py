"""Which weights of a linear layer can be zero, and what the others become: mathematics on second moments only.

A layer computes X W. With H = X'X, zeroing weights and changing the others costs `|X W - X V|^2`, that is the trace of
`(W - V)' H (W - V)`. Four tools, in the order of what they know:

- scores: `|w|`, or `|w| |x|` (Wanda, Sun et al., 2023);
- `sweep`: inputs are visited in order, each zeroed where `w^2 / [H^-1]_jj` is small, and later inputs take over what is
  lost (SparseGPT, Frantar and Alistarh, 2023; Optimal Brain Surgeon, Hassibi and Stork, 1993);
- `improve`: the choice of zeros is bettered as a whole by the alternating direction method of multipliers (ALPS, Meng
  et al., 2024);
- `solve_kept`: the exact least squares for a given choice of zeros, by conjugate gradients for all outputs at once
  (Hestenes and Stiefel, 1952).

All arrays are float64: weights and scores `[groups, inputs, outputs]`, H `[groups, inputs, inputs]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Rule", "cost", "damped", "find_sparse", "improve", "inverse_factor", "norm_scores", "solve_kept", "sweep"]

_BLOCK = 128
_ROUNDS = 50
_EVERY = 3
_START = 0.1
_STEPS = 100
_PRECISION = 1e-6
_ROUGH = 1e-3
_FAINT = 1e-12


@dataclass(frozen=True)
class Rule:
    """How many weights are dropped, and where.

    Attributes:
        count: Unstructured: so many of the layer, wherever they are.
        keep: N:M: at most so many are left
        of: in each run of so many inputs; 0: unstructured.
    """

    count: int = 0
    keep: int = 0
    of: int = 0

    def drop(self, scores: np.ndarray) -> np.ndarray:
        """`bool[groups, inputs, outputs]`: where the scores are smallest; the first of equals goes."""
        if self.of:
            runs = scores.reshape(len(scores), -1, self.of, scores.shape[-1])
            rank = np.argsort(np.argsort(runs, axis=2, kind="stable"), axis=2, kind="stable")
            return (rank < self.of - self.keep).reshape(scores.shape)
        flat = scores.reshape(-1)
        if not 0 < self.count < flat.size:
            return np.full(scores.shape, self.count > 0)
        border = np.partition(flat, self.count - 1)[self.count - 1]
        dropped = flat < border
        dropped[np.flatnonzero(flat == border)[: self.count - np.count_nonzero(dropped)]] = True
        return dropped.reshape(scores.shape)

    def fits(self, weight: np.ndarray) -> bool:
        """Whether there are zeros enough already."""
        if self.of:
            filled = np.count_nonzero(weight.reshape(len(weight), -1, self.of, weight.shape[-1]), axis=2)
            return bool((filled <= self.keep).all())
        return int(np.count_nonzero(weight == 0)) >= self.count

    def part(self, size: int, whole: int) -> Rule:
        """The rule for `size` of `whole` weights."""
        return self if self.of else Rule(count=round(self.count * size / whole))


def damped(hessian: np.ndarray, ridge: float) -> np.ndarray:
    """H with `ridge` times its mean diagonal added to the diagonal; inputs that are always zero do no harm."""
    inputs = hessian.shape[-1]
    level = np.trace(hessian, axis1=1, axis2=2) / inputs
    # nothing comes in at all: every choice costs the same
    level = np.where(level > 0, (ridge + _FAINT) * level, 1.0)
    return hessian + level[:, None, None] * np.eye(inputs)


def norm_scores(weight: np.ndarray, power: np.ndarray | None = None) -> np.ndarray:
    """What weights contribute: their squares, times the mean square of their inputs if that is known.

    Args:
        weight: `[groups, inputs, outputs]`.
        power: `[groups, inputs]`; inputs that were never seen to differ from zero still rank by weight.
    """
    if power is None:
        return np.square(weight)
    level = float(power.mean())
    return np.square(weight) * (power + _FAINT * (level if level > 0 else 1.0))[:, :, None]


def cost(change: np.ndarray, hessian: np.ndarray) -> float:
    """What a change of the weights does to the output: `trace(D' H D)`."""
    return float((change * (hessian @ change)).sum())


def inverse_factor(hessian: np.ndarray) -> np.ndarray:
    """`[groups, inputs, inputs]`: the upper triangle U with U'U the inverse of `hessian`."""
    return np.linalg.cholesky(np.linalg.inv(hessian)).transpose(0, 2, 1)


def sweep(
    weight: np.ndarray, hessian: np.ndarray, rule: Rule, factor: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Drop weights input by input and let the inputs behind make up for it.

    Args:
        weight: `[groups, inputs, outputs]`.
        hessian: `[groups, inputs, inputs]`, positive definite.
        rule: What to drop. Unstructured, each block of 128 inputs gives its share.
        factor: Its `inverse_factor`; None: it is computed.

    Returns:
        The new weights with exact zeros, and which were dropped.
    """
    left = weight.copy()
    inputs, dropped = weight.shape[1], np.zeros(weight.shape, dtype=bool)
    upper = inverse_factor(hessian) if factor is None else factor
    pivots = np.diagonal(upper, axis1=1, axis2=2)
    width = max(rule.of, _BLOCK // rule.of * rule.of) if rule.of else _BLOCK
    for begin in range(0, inputs, width):
        end = min(inputs, begin + width)
        if not rule.of:
            dropped[:, begin:end] = _choose(left, pivots, begin, end, rule.part(left[:, begin:end].size, left.size))
        errors = np.zeros((len(weight), end - begin, weight.shape[2]))
        for j in range(begin, end):
            if rule.of and (j - begin) % rule.of == 0:
                dropped[:, j : j + rule.of] = _choose(left, pivots, j, j + rule.of, rule)
            errors[:, j - begin] = np.where(dropped[:, j], left[:, j], 0.0) / pivots[:, j, None]
            left[:, j:end] -= upper[:, j, j:end, None] * errors[:, None, j - begin]
        left[:, end:] -= upper[:, begin:end, end:].transpose(0, 2, 1) @ errors
    left[dropped] = 0.0
    return left, dropped


def _choose(weight: np.ndarray, pivots: np.ndarray, begin: int, end: int, rule: Rule) -> np.ndarray:
    return rule.drop(np.square(weight[:, begin:end] / pivots[:, begin:end, None]))


def improve(weight: np.ndarray, hessian: np.ndarray, rule: Rule, dropped: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Better a choice of zeros: dense weights that are free to follow the data, and sparse ones, are pulled together.

    Args:
        weight: `[groups, inputs, outputs]`.
        hessian: `[groups, inputs, inputs]`, positive definite.
        rule: What to drop.
        dropped: Where to start.

    Returns:
        Weights and which of them are dropped, once the choice has settled.
    """
    scale = np.sqrt(np.diagonal(hessian, axis1=1, axis2=2))[:, :, None]
    values, vectors = np.linalg.eigh(hessian / (scale * scale.transpose(0, 2, 1)))
    largest = max(float(np.abs(weight * scale).max()), np.finfo(np.float64).tiny)
    # a choice needs no more than float32, once nothing can overflow
    vectors, dense = vectors.astype(np.float32), (weight * scale / largest).astype(np.float32)
    back, values = vectors.transpose(0, 2, 1), np.maximum(values, 0.0)[:, :, None].astype(np.float32)
    wanted = values * (back @ dense)
    sparse, price, pull = np.where(dropped, np.float32(0), dense), np.zeros_like(dense), _START
    for turn in range(_ROUNDS):
        dense = vectors @ ((wanted + back @ (pull * sparse - price)) / (values + pull))
        free = dense + price / pull
        now = rule.drop(np.square(free))
        sparse = np.where(now, np.float32(0), free)
        price += pull * (dense - sparse)
        moved, dropped = float((now != dropped).mean()), now
        if turn % _EVERY == _EVERY - 1:
            if not moved:
                break
            pull *= 1.3 if moved > 0.1 else 1.2 if moved > 0.005 else 1.1
    return np.where(dropped, 0.0, dense * largest / scale), dropped


def solve_kept(
    weight: np.ndarray,
    hessian: np.ndarray,
    dropped: np.ndarray,
    start: np.ndarray | None = None,
    *,
    rough: bool = False,
) -> np.ndarray:
    """The weights closest to `weight` in what they compute, zero where they are dropped.

    Args:
        weight: `[groups, inputs, outputs]`, the least-squares solution without zeros.
        hessian: `[groups, inputs, inputs]`, positive definite.
        dropped: Where the result is zero.
        start: A guess; None: `weight`.
        rough: Close enough to compare choices by.
    """
    precision = _ROUGH if rough else _PRECISION
    found = np.where(dropped, 0.0, weight if start is None else start)
    diagonal = np.diagonal(hessian, axis1=1, axis2=2)[:, :, None]
    missed = np.where(dropped, 0.0, hessian @ (weight - found))
    enough = precision**2 * (np.square(hessian @ weight) / diagonal).sum(axis=1, keepdims=True)
    step = missed / diagonal
    square = (missed * step).sum(axis=1, keepdims=True)
    for _ in range(_STEPS):
        if (square <= enough).all():
            break
        seen = hessian @ step
        curve = (step * seen).sum(axis=1, keepdims=True)
        length = np.divide(square, curve, out=np.zeros_like(square), where=curve > 0)
        found += length * step
        missed -= length * np.where(dropped, 0.0, seen)
        last, square = square, (np.square(missed) / diagonal).sum(axis=1, keepdims=True)
        step = missed / diagonal + np.divide(square, last, out=np.zeros_like(square), where=last > 0) * step
    return found


def find_sparse(weight: np.ndarray, hessian: np.ndarray, rule: Rule) -> np.ndarray:
    """`bool[groups, inputs, outputs]`: the best choice of zeros that is known for the least-squares solution `weight`.

    Args:
        weight: `[groups, inputs, outputs]`.
        hessian: `[groups, inputs, inputs]`, positive definite.
        rule: What to drop.
    """
    swept, first = sweep(weight, hessian, rule)
    by_norm = rule.drop(norm_scores(weight, np.diagonal(hessian, axis1=1, axis2=2)))
    options = [(swept, first), improve(weight, hessian, rule, first), (weight, by_norm)]
    solved = (solve_kept(weight, hessian, zeros, start, rough=True) for start, zeros in options)
    return options[int(np.argmin([cost(weight - found, hessian) for found in solved]))][1]
