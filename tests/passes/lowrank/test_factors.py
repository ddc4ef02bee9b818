from __future__ import annotations

import numpy as np
import pytest

from graphopt_passes.lowrank._factors import Problem, leading, root_of, split
from graphopt_passes.lowrank.schemes import Geometry, forms_of, full_rank, macs_of, params_of, prepared

RNG = np.random.default_rng(0)


def rows(count: int, inputs: int) -> np.ndarray:
    """Correlated rows, some directions far larger than others."""
    return (
        RNG.standard_normal((count, inputs))
        @ np.diag(np.geomspace(10, 0.1, inputs))
        @ RNG.standard_normal((inputs, inputs))
    )


def second_of(x: np.ndarray) -> np.ndarray:
    return x.T @ x / len(x)


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_plain_factors_reach_the_bound_that_singular_values_set(shape: tuple[int, int]) -> None:
    weight = RNG.standard_normal(shape)
    values = np.linalg.svd(weight, compute_uv=False)
    ready = split(Problem(weight))
    for rank in range(1, min(shape) + 1):
        first, second = ready.factors(rank)
        assert first.shape == (shape[0], rank)
        bound = float(np.square(values[rank:]).sum())
        assert np.square(weight - first @ second).sum() == pytest.approx(bound, abs=1e-9)
        assert ready.error(rank) == pytest.approx(bound / np.square(values).sum(), abs=1e-12)


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_whitened_factors_lose_as_little_of_the_output_as_any_of_their_rank(shape: tuple[int, int]) -> None:
    weight, x = RNG.standard_normal(shape), rows(200, shape[0])
    values = np.linalg.svd(x @ weight, compute_uv=False)
    ready = split(Problem(weight, second_of(x)))
    for rank in (1, 3, 6):
        first, second = ready.factors(rank)
        lost = np.square(x @ weight - x @ first @ second).sum()
        assert lost == pytest.approx(np.square(values[rank:]).sum(), rel=1e-5)
        assert ready.error(rank) == pytest.approx(lost / np.square(x @ weight).sum(), rel=1e-3)


def test_whitened_factors_lose_less_than_asvd_and_asvd_less_than_plain_ones() -> None:
    weight = RNG.standard_normal((24, 16))
    x = RNG.standard_normal((300, 24)) * np.geomspace(10, 0.1, 24)
    second, scales = second_of(x), np.sqrt(np.sqrt(np.square(x).mean(axis=0)))
    problem = Problem(weight, second)
    ways = (problem, Problem(weight, second, scales), Problem(weight))
    errors = [problem.error(np.matmul(*split(way).factors(6))) for way in ways]
    assert errors[0] < errors[1] < errors[2]


def test_directions_that_no_row_has_do_not_break_the_factors() -> None:
    x = rows(5, 12)  # fewer rows than inputs
    x[:, 3] = 0
    weight = RNG.standard_normal((12, 8))
    first, second = split(Problem(weight, second_of(x))).factors(5)
    np.testing.assert_allclose(x @ first @ second, x @ weight, atol=1e-4)
    assert np.isfinite(root_of(np.zeros((4, 4)))).all()


def test_both_factors_are_equally_large() -> None:
    first, second = leading(RNG.standard_normal((10, 6)), None).factors(4)
    np.testing.assert_allclose(np.linalg.norm(first, axis=0), np.linalg.norm(second, axis=1))


def dense_of(form: str, weights: tuple[np.ndarray, ...], geometry: Geometry) -> np.ndarray:
    """`[inputs, *kernel, outputs]` that kernels one after another stand for."""
    maps = [np.moveaxis(w, 0, -1) for w in weights]  # [inputs, a, b, outputs]
    if form == "tucker":
        return np.einsum("ir,rabs,so->iabo", maps[0][:, 0, 0], maps[1], maps[2][:, 0, 0])
    if form == "spatial":
        return np.einsum("iar,rbo->iabo", maps[0][:, :, 0], maps[1][:, 0])
    if form == "input":
        return np.einsum("ir,rabo->iabo", maps[0][:, 0, 0], maps[1])
    return np.einsum("iabr,ro->iabo", maps[0], maps[1][:, 0, 0])


@pytest.mark.parametrize("form", ["output", "input", "spatial", "tucker"])
@pytest.mark.parametrize("moments", [False, True])
def test_kernels_of_every_chain_stand_for_the_matrix_that_was_judged(form: str, moments: bool) -> None:
    geometry = Geometry(4, 6, (3, 2), (64, 64, 64))
    weight = RNG.standard_normal((24, 6))
    problem = Problem(weight, second_of(rows(100, 24)) if moments else None)
    ready = prepared(form, geometry, problem)
    full = full_rank(form, geometry)
    whole = ready.chain(full)
    np.testing.assert_allclose(whole.dense, weight, atol=1e-5)
    errors = []
    for ranks in [tuple(max(1, size * part // 4) for size in full) for part in (1, 2, 3)]:
        chain = ready.chain(ranks)
        dense = dense_of(form, chain.weights, geometry)
        np.testing.assert_allclose(dense.reshape(24, 6), chain.dense, atol=1e-9)
        assert sum(w.size for w in chain.weights) == params_of(form, geometry, ranks)
        errors.append(problem.error(chain.dense))
        if form != "tucker":
            assert ready.error(ranks) == pytest.approx(errors[-1], abs=1e-7)
    assert errors[0] > errors[1] > errors[2] > 0


def test_the_second_factor_of_a_split_answers_to_the_first_by_least_squares() -> None:
    x, weight = rows(200, 12), RNG.standard_normal((12, 5))
    ready = split(Problem(weight, second_of(x)), inner=3)
    first, second = ready.factors(2)
    z = np.einsum("nik,ir->nrk", x.reshape(-1, 4, 3), first).reshape(-1, 6)
    best = np.linalg.lstsq(z, x @ weight, rcond=None)[0]
    np.testing.assert_allclose(z @ second, z @ best, atol=1e-3 * np.abs(x @ weight).max())


def test_costs_are_those_of_the_kernels() -> None:
    geometry = Geometry(8, 16, (3, 3), (100, 50, 25))
    assert forms_of(geometry) == ("output", "input", "spatial", "tucker", "cp")
    assert macs_of("output", geometry, (4,)) == 25 * (8 * 9 * 4 + 4 * 16)
    assert macs_of("input", geometry, (4,)) == 100 * 8 * 4 + 25 * 4 * 9 * 16
    assert macs_of("spatial", geometry, (4,)) == 50 * 8 * 3 * 4 + 25 * 4 * 3 * 16
    assert macs_of("tucker", geometry, (4, 5)) == 100 * 8 * 4 + 25 * (4 * 9 * 5 + 5 * 16)
    assert forms_of(Geometry(8, 16)) == ("product",)
    assert forms_of(Geometry(8, 16, (1, 1))) == ("output",)
    assert forms_of(Geometry(8, 16, (5,))) == ("output", "input", "tucker", "cp")
