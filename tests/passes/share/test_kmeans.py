"""k-means in one dimension against every possible clustering, and of vectors."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from graphopt_passes.share import _kmeans
from graphopt_passes.share._kmeans import fit_tables, nearest
from graphopt_passes.share._vectors import fit_vectors, nearest_vectors

Array = np.ndarray


def error(numbers: Array, weights: Array, table: Array) -> float:
    return float((weights * np.square(numbers[:, None] - table).min(axis=1)).sum())


def least_error(numbers: Array, weights: Array, clusters: int, *, zero: bool) -> float:
    """By trying all ways to cut the sorted numbers."""
    order = np.argsort(numbers)
    x, w, found = numbers[order], weights[order], np.inf
    for cuts in itertools.combinations_with_replacement(range(len(x) + 1), clusters - 1):
        parts = [slice(a, b) for a, b in itertools.pairwise((0, *cuts, len(x))) if b > a]
        table = [float(x[p] @ w[p] / w[p].sum()) for p in parts] + ([0.0] if zero else [])
        found = min(found, error(x, w, np.array(table)))
    return found


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_no_other_clustering_is_better(zero: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    count, entries = int(rng.integers(2, 10)), int(rng.integers(2, 5))
    numbers, weights = rng.standard_normal((2, count)), rng.random((2, count)) + 0.01
    numbers[:, rng.random(count) < 0.3] = 0
    found = fit_tables(numbers, weights, entries, zero=zero)
    assert found.exact
    for x, w, table in zip(numbers, weights, found.values, strict=True):
        assert error(x, w, table) <= least_error(x, w, entries - zero, zero=zero) + 1e-9
        assert (np.diff(table) >= 0).all() and (not zero or 0 in table)


def test_groups_fitted_side_by_side_are_what_each_is_alone() -> None:
    rng = np.random.default_rng(0)
    numbers, weights = rng.standard_normal((7, 150)), rng.random((7, 150))
    together = fit_tables(numbers, weights, 8).values
    alone = [fit_tables(numbers[i : i + 1], weights[i : i + 1], 8).values[0] for i in range(7)]
    np.testing.assert_allclose(together, alone)


def test_a_few_different_numbers_are_kept_exactly() -> None:
    levels = np.array([-3.5, -1, 0.25, 2, 7], np.float32)
    numbers = levels[np.random.default_rng(0).integers(0, 5, (1, 4000))]
    found = fit_tables(numbers, None, 16)
    assert found.exact
    assert np.array_equal(found.values.astype(np.float32)[0][nearest(numbers, found.values)], numbers)


def test_many_numbers_come_close_to_the_exact_solution_and_say_so() -> None:
    numbers = np.random.default_rng(1).standard_t(4, (1, 20_000)).astype(np.float32)
    exact, quick = fit_tables(numbers, None, 16), fit_tables(numbers, None, 16, steps=1e5)
    assert exact.exact and not quick.exact
    ones = np.ones(numbers.shape[1])
    assert error(numbers[0], ones, quick.values[0]) < 1.02 * error(numbers[0], ones, exact.values[0])


@pytest.mark.parametrize("weighted", [False, True])
def test_bins_of_very_many_numbers_come_as_close(monkeypatch: pytest.MonkeyPatch, weighted: bool) -> None:
    rng = np.random.default_rng(5)
    numbers = rng.standard_normal((1, 50_000)).astype(np.float32)
    weights = rng.random(numbers.shape) if weighted else None
    sorted_ = fit_tables(numbers, weights, 8)
    monkeypatch.setattr(_kmeans, "_MANY", 1000)
    binned = fit_tables(numbers, weights, 8)
    assert not binned.exact
    np.testing.assert_allclose(binned.values, sorted_.values, atol=0.02)


def test_the_nearest_entries_are_chosen_in_each_group() -> None:
    rng = np.random.default_rng(2)
    numbers, tables = rng.standard_normal((3, 200)), np.sort(rng.standard_normal((3, 9)), axis=1)
    expected = np.abs(numbers[:, :, None] - tables[:, None]).argmin(axis=2)
    assert np.array_equal(nearest(numbers, tables), expected)


def test_weights_of_zero_still_get_an_entry_nearby() -> None:
    numbers = np.array([[0.0, 0.1, 5.0, 5.1]])
    table = fit_tables(numbers, np.array([[1.0, 1.0, 0.0, 0.0]]), 2).values[0]
    assert np.abs(table - 5.05).min() < 0.1


@pytest.mark.parametrize("weighted", [False, True])
def test_clustered_vectors_are_found(weighted: bool) -> None:
    rng = np.random.default_rng(3)
    centres = 10 * rng.standard_normal((12, 4))
    vectors = centres[rng.integers(0, 12, 3000)] + 0.01 * rng.standard_normal((3000, 4))
    weights = rng.random(vectors.shape) + 0.1 if weighted else None
    table = fit_vectors(vectors, weights, 12)
    assert np.abs(table[nearest_vectors(vectors, weights, table)] - vectors).max() < 0.1
    assert np.array_equal(table, fit_vectors(vectors, weights, 12))


def test_vectors_of_zeros_stay_zero() -> None:
    vectors = np.random.default_rng(4).standard_normal((500, 2))
    vectors[::3] = 0
    table = fit_vectors(vectors, None, 16, zero=True)
    assert not table[nearest_vectors(vectors, None, table)][::3].any()
