from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from graphopt_passes.lowrank._alternate import first_answer
from graphopt_passes.lowrank._factors import Problem, split
from graphopt_passes.lowrank.reduced_rank import answer
from graphopt_passes.lowrank.schemes import Chain, Geometry, prepared
from graphopt_passes.prune.refit.clipped_fit import Rows

INPUTS, OUTPUTS = 20, 12


def shorten(rank: int) -> Callable[[Problem], Chain]:
    return lambda problem: prepared("product", Geometry(INPUTS, OUTPUTS), problem).chain((rank,))


def rows_of(x: np.ndarray, wanted: np.ndarray, weight: np.ndarray, low: float = -np.inf, noise: float = 0.0) -> Rows:
    rng = np.random.default_rng(9)
    wanted = wanted + noise * rng.standard_normal(wanted.shape)
    bounds = [np.full((1, 1, wanted.shape[1]), edge, np.float32) for edge in (low, np.inf)]
    arrays = [array[None].astype(np.float32) for array in (x, wanted, x @ weight)]
    return Rows(arrays[0], arrays[1], arrays[2], np.arange(len(x)) >= 4 * len(x) // 5, bounds[0], bounds[1])


def correlated(rng: np.random.Generator, count: int = 3000) -> np.ndarray:
    return rng.standard_normal((count, INPUTS)) @ rng.standard_normal((INPUTS, INPUTS))


def missed(rows: Rows, dense: np.ndarray, bias: np.ndarray, weight: np.ndarray) -> float:
    return rows.error(rows.after((dense - weight)[None], bias[None]))


@pytest.mark.parametrize("seed", range(4))
def test_without_an_activation_no_factors_of_the_rank_do_better(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, weight = correlated(rng), rng.standard_normal((INPUTS, OUTPUTS))
    wanted = x @ (weight + 0.3 * rng.standard_normal(weight.shape))
    rows = rows_of(x, wanted, weight, noise=0.1)
    found = answer(rows, weight, shorten(5), offset=False)
    left, sizes, right = np.linalg.svd(x @ np.linalg.lstsq(x, rows.wanted[0].astype(float), rcond=None)[0], False)
    best = (left[:, :5] * sizes[:5]) @ right[:5]
    least = rows.error(best[None].astype(np.float32))
    assert np.linalg.matrix_rank(found.chain.dense, tol=1e-8) == 5
    assert missed(rows, found.chain.dense, found.bias, weight) == pytest.approx(least, rel=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_both_factors_answer_to_the_output_not_to_the_weight(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, weight = correlated(rng), rng.standard_normal((INPUTS, OUTPUTS))
    other = rng.standard_normal((INPUTS, 3)) @ rng.standard_normal((3, OUTPUTS))  # what is wanted is of rank 3
    found = answer(rows_of(x, x @ other, weight), weight, shorten(3), offset=False)
    np.testing.assert_allclose(x @ found.chain.dense, x @ other, atol=1e-3 * np.abs(x @ other).max())
    assert found.error < 1e-3


@pytest.mark.parametrize("seed", range(4))
def test_what_a_relu_hides_takes_no_rank(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, weight = correlated(rng), rng.standard_normal((INPUTS, OUTPUTS))
    total = x @ rng.standard_normal((INPUTS, 6)) @ rng.standard_normal((6, OUTPUTS))
    deeper = np.abs(rng.standard_normal(total.shape)) * total.std()
    wanted = np.where(total < 0, total - deeper, total)  # of rank 6 where it is seen
    heeding = answer(rows_of(x, wanted, weight, low=0.0), weight, shorten(6), offset=True)
    plain = answer(rows_of(x, wanted, weight), weight, shorten(6), offset=True)
    judge = rows_of(x, wanted, weight, low=0.0)
    errors = [missed(judge, each.chain.dense, each.bias, weight) for each in (heeding, plain)]
    assert errors[0] < 0.7 * errors[1]


def test_the_bias_takes_over_what_a_mean_makes() -> None:
    rng = np.random.default_rng(0)
    x, weight = correlated(rng) + 10 * rng.standard_normal(INPUTS), rng.standard_normal((INPUTS, OUTPUTS))
    rows = rows_of(x, x @ weight, weight)
    found = answer(rows, weight, shorten(4), offset=True)
    after = rows.after((found.chain.dense - weight)[None], found.bias[None])[0]
    np.testing.assert_allclose(after.mean(axis=0), (x @ weight).mean(axis=0), atol=0.02)
    fixed = answer(rows, weight, shorten(4), offset=False)
    assert not fixed.bias.any()
    assert found.error < fixed.error


def test_few_rows_of_noise_do_not_move_the_weight() -> None:
    rng = np.random.default_rng(1)
    x, weight = correlated(rng, 40), rng.standard_normal((INPUTS, OUTPUTS))
    noisy = rows_of(x, x @ weight, weight, noise=40.0)
    found = answer(noisy, weight, shorten(11), offset=False)
    fresh = correlated(np.random.default_rng(1), 2000)
    error = np.square(fresh @ (found.chain.dense - weight)).sum() / np.square(fresh @ weight).sum()
    free = np.linalg.lstsq(x, noisy.wanted[0].astype(float), rcond=None)[0]
    assert error < 0.5 * np.square(fresh @ (free - weight)).sum() / np.square(fresh @ weight).sum()


def test_the_error_told_is_that_of_rows_that_were_not_fitted() -> None:
    rng = np.random.default_rng(2)
    x, weight = correlated(rng, 100), rng.standard_normal((INPUTS, OUTPUTS))
    rows = rows_of(x, x @ weight, weight)
    early = replace(rows.of(~rows.held_out), held_out=np.arange(80) >= 64)
    late = rows.of(rows.held_out)
    found = answer(rows, weight, shorten(6), offset=False)
    ours = answer(early, weight, shorten(6), offset=False)  # without an activation, of all rows but the late ones
    assert found.error == pytest.approx(missed(late, ours.chain.dense, ours.bias, weight), rel=0.02)


@pytest.mark.parametrize(("inner", "rank"), [(3, 4), (9, 2), (9, 5)])
def test_a_turn_of_both_factors_betters_them(inner: int, rank: int) -> None:
    rng = np.random.default_rng(inner + rank)
    inputs = 8 * inner
    x = rng.standard_normal((4000, inputs)) @ rng.standard_normal((inputs, inputs))
    problem = Problem(rng.standard_normal((inputs, 16)), x.T @ x / len(x))
    ready = split(problem, inner)
    first, last = ready.basis.factors(rank)
    last = last.reshape(rank * inner, -1)
    last = last + ready._correction(first, last)
    errors = [problem.error(ready.dense(first, last)), ready.error(rank)]
    assert errors[1] < 0.98 * errors[0]


def test_the_first_factor_is_the_least_squares_answer_in_the_end() -> None:
    rng = np.random.default_rng(4)
    outer, inner, rank, outputs = 5, 3, 2, 6
    x = rng.standard_normal((500, outer * inner))
    second, weight = x.T @ x, rng.standard_normal((outer * inner, outputs))
    first, last = rng.standard_normal((outer, rank)), rng.standard_normal((rank * inner, outputs))
    for _ in range(8):
        first = first_answer(second, weight, first, last)
    unknowns = [np.zeros((outer, rank)) for _ in range(outer * rank)]
    for i, unknown in enumerate(unknowns):
        unknown.flat[i] = 1
    columns = [(x @ (u @ last.reshape(rank, -1)).reshape(weight.shape)).ravel() for u in unknowns]
    exact = np.linalg.lstsq(np.stack(columns, axis=1), (x @ weight).ravel(), rcond=None)[0].reshape(outer, rank)
    np.testing.assert_allclose(first, exact, atol=1e-6)
