from __future__ import annotations

import numpy as np
import pytest

from graphopt_passes.lowrank._cp import Kernel, outer_sum, polyadic
from graphopt_passes.lowrank._factors import Problem
from graphopt_passes.lowrank.schemes import Geometry, full_rank, macs_of, params_of, prepared

RNG = np.random.default_rng(0)
SIZES = (8, 3, 4, 10)


def lost(tensor: np.ndarray, rank: int) -> float:
    return float(np.square(tensor - outer_sum(polyadic(tensor, rank))).sum())


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_sum_of_a_few_outer_products_is_found_again(rank: int) -> None:
    tensor = outer_sum([RNG.standard_normal((size, rank)) for size in SIZES])
    assert lost(tensor, rank) < 1e-3 * np.square(tensor).sum()


def test_of_orthogonal_terms_the_largest_stay() -> None:
    axes = [np.linalg.qr(RNG.standard_normal((size, 3)))[0] for size in SIZES]
    weights = np.array([5.0, 3.0, 1.0])
    tensor = outer_sum([*axes[:-1], axes[-1] * weights])
    for rank in (1, 2, 3):  # the best of a rank, as with singular values
        assert lost(tensor, rank) == pytest.approx(np.square(weights[rank:]).sum(), abs=1e-6)


def test_of_a_matrix_terms_are_those_of_its_singular_values() -> None:
    matrix = RNG.standard_normal((8, 10))
    values = np.linalg.svd(matrix, compute_uv=False)
    for rank in (1, 4, 7):
        bound = float(np.square(values[rank:]).sum())
        assert lost(matrix.reshape(8, 1, 1, 10), rank) == pytest.approx(bound, rel=1e-4)


def test_full_rank_loses_nothing_and_more_terms_lose_less() -> None:
    tensor = RNG.standard_normal((4, 3, 2, 7))
    errors = [lost(tensor, rank) for rank in (1, 4, 12, 24)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-12 * np.square(tensor).sum()


def test_terms_do_not_grow_where_the_best_ones_would_without_bound() -> None:
    rng = np.random.default_rng(0)
    (a, d), (b, e), (c, f) = (rng.standard_normal((2, size)) for size in (4, 5, 6))
    terms = ((a, b, f), (a, e, c), (d, b, c))
    tensor = np.sum([np.einsum("i,j,k->ijk", *each) for each in terms], axis=0)
    found = polyadic(tensor, 2)  # of rank 3, and as near to rank 2 as one likes
    assert np.square(found[-1]).sum() <= 100 * np.square(tensor).sum()
    assert lost(tensor, 2) < 0.1 * np.square(tensor).sum()


def test_a_kernel_of_zeros_stays_one() -> None:
    found = Kernel(Problem(np.zeros((12, 5)), np.eye(12)), (4, 3)).factors(2)
    assert all(np.isfinite(factor).all() for factor in found)
    assert not any(factor.any() for factor in found)


def test_channels_count_as_much_as_the_data_says() -> None:
    weight, x = RNG.standard_normal((24, 6)), RNG.standard_normal((300, 24)) * np.repeat(np.geomspace(9, 0.1, 4), 6)
    problem = Problem(weight, x.T @ x / len(x))
    plain, data = (Kernel(each, (4, 3, 2)) for each in (Problem(weight), problem))
    errors = [problem.error(kernel.dense(kernel.factors(3))) for kernel in (plain, data)]
    assert errors[1] < 0.5 * errors[0]


def test_the_outputs_factor_answers_to_the_others_by_least_squares() -> None:
    weight, x = RNG.standard_normal((24, 6)), RNG.standard_normal((300, 24)) @ RNG.standard_normal((24, 24))
    kernel = Kernel(Problem(weight, x.T @ x / len(x)), (4, 3, 2))
    *others, last = kernel.factors(5)
    z = x @ np.einsum("ir,ar,br->iabr", *others).reshape(24, 5)
    best = np.linalg.lstsq(z, x @ weight, rcond=None)[0]
    np.testing.assert_allclose(z @ last.T, z @ best, atol=1e-4 * np.abs(x @ weight).max())


def test_terms_are_as_large_along_one_axis_as_along_another_and_always_the_same() -> None:
    problem = Problem(RNG.standard_normal((24, 6)))
    factors = Kernel(problem, (4, 3, 2)).factors(4)
    sizes = np.array([np.linalg.norm(factor, axis=0) for factor in factors])
    np.testing.assert_allclose(sizes, sizes[:1].repeat(4, axis=0))
    for one, other in zip(factors, Kernel(problem, (4, 3, 2)).factors(4), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("parts", [1, 3])
def test_costs_are_those_of_the_chain(parts: int) -> None:
    geometry = Geometry(8, 16, (3, 5), (100, 50, 25), parts=parts)
    assert params_of("cp", geometry, (4,)) == parts * 4 * (8 + 3 + 5 + 16)
    assert macs_of("cp", geometry, (4,)) == parts * 4 * (100 * 8 + 50 * 3 + 25 * 5 + 25 * 16)
    turned = Geometry(8, 16, (3, 5), (25, 50, 100), parts=parts, transposed=True)
    assert turned.macs == parts * 25 * 8 * 15 * 16
    assert macs_of("cp", turned, (4,)) == parts * 4 * (25 * 8 + 25 * 3 + 50 * 5 + 100 * 16)
    assert full_rank("cp", geometry) == (8 * 15,)


def test_the_chain_stands_for_the_matrix_that_was_judged() -> None:
    geometry = Geometry(4, 6, (3, 2), (64, 64, 64))
    ready = prepared("cp", geometry, Problem(RNG.standard_normal((24, 6))))
    chain = ready.chain((5,))
    first, tall, wide, last = chain.weights
    dense = np.einsum("ri,ra,rb,or->iabo", first[:, :, 0, 0], tall[:, 0, :, 0], wide[:, 0, 0], last[:, :, 0, 0])
    np.testing.assert_allclose(dense.reshape(24, 6), chain.dense, atol=1e-12)
    assert [link.groups for link in chain.links] == [1, 5, 5, 1]
    assert [link.moves for link in chain.links] == [(False, False), (True, False), (False, True), (False, False)]
