from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt_passes.prune.pattern.obs import Rule, cost, damped, find_sparse, improve, norm_scores, solve_kept, sweep


def problem(
    groups: int = 1, inputs: int = 8, outputs: int = 3, seed: int = 0, dead: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """A weight and the damped second moments of correlated inputs, of which some are always zero."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((inputs, inputs))
    rows = rng.standard_normal((groups, 4 * inputs, inputs)) @ mixing
    rows[:, :, :dead] = 0
    hessian = rows.transpose(0, 2, 1) @ rows / rows.shape[1]
    return rng.standard_normal((groups, inputs, outputs)), damped(hessian, 1e-2)


def brute_force(weight: np.ndarray, hessian: np.ndarray, zeros: np.ndarray) -> np.ndarray:
    """Normal equations of every output for itself."""
    found = np.zeros_like(weight)
    for group, output in itertools.product(range(len(weight)), range(weight.shape[2])):
        kept = np.flatnonzero(~zeros[group, :, output])
        if len(kept):
            whole = hessian[group]
            right = (whole @ weight[group, :, output])[kept]
            found[group, kept, output] = np.linalg.solve(whole[np.ix_(kept, kept)], right)
    return found


def best_cost(weight: np.ndarray, hessian: np.ndarray, rule: Rule) -> float:
    """The least cost over all choices of zeros for one output."""
    costs = list[float]()
    for flags in itertools.product((False, True), repeat=weight.shape[1]):
        zeros = np.array(flags).reshape(1, -1, 1)
        if rule.fits(np.where(zeros, 0.0, 1.0)):
            costs.append(cost(weight - brute_force(weight, hessian, zeros), hessian))
    return min(costs)


RULES = [Rule(count=12), Rule(keep=2, of=4), Rule(keep=1, of=2), Rule(keep=3, of=8)]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("rule", RULES)
def test_kept_weights_are_those_of_brute_force_least_squares(rule: Rule, groups: int) -> None:
    weight, hessian = problem(groups)
    zeros = rule.drop(np.square(weight))
    found = solve_kept(weight, hessian, zeros)
    np.testing.assert_allclose(found, brute_force(weight, hessian, zeros), rtol=1e-4, atol=1e-5)
    assert not found[zeros].any()


def test_the_first_weight_that_goes_is_that_of_optimal_brain_surgeon() -> None:
    weight, hessian = problem(outputs=1)
    inverse = np.linalg.inv(hessian[0])
    saliency = np.square(weight[0, :, 0]) / np.diag(inverse)
    first = int(saliency.argmin())
    zeros = np.zeros(weight.shape, dtype=bool)
    zeros[0, first] = True
    expected = weight[0, :, 0] - weight[0, first, 0] / inverse[first, first] * inverse[:, first]
    found = solve_kept(weight, hessian, zeros)
    np.testing.assert_allclose(found[0, :, 0], np.where(zeros[0, :, 0], 0, expected), atol=1e-8)
    assert cost(weight - found, hessian) == pytest.approx(saliency[first], rel=1e-6)
    assert find_sparse(weight, hessian, Rule(count=1))[0, first, 0]


def test_the_sweep_makes_up_for_an_input_with_all_inputs_behind_it() -> None:
    weight, hessian = problem(inputs=2, outputs=1, seed=3)
    weight[0, 0], weight[0, 1] = 0.01, 1.0
    found, zeros = sweep(weight, hessian, Rule(keep=1, of=2))
    assert zeros[0, :, 0].tolist() == [True, False]
    np.testing.assert_allclose(found, brute_force(weight, hessian, zeros), atol=1e-12)


@pytest.mark.parametrize("rule", [Rule(count=4), Rule(keep=2, of=4)])
@pytest.mark.parametrize("seed", range(6))
def test_the_choice_of_zeros_is_between_the_best_of_all_and_that_by_norms(rule: Rule, seed: int) -> None:
    weight, hessian = problem(outputs=1, seed=seed)
    zeros = find_sparse(weight, hessian, rule)
    found = cost(weight - solve_kept(weight, hessian, zeros), hessian)
    by_norm = rule.drop(norm_scores(weight, np.diagonal(hessian, axis1=1, axis2=2)))
    most = cost(weight - solve_kept(weight, hessian, by_norm), hessian)
    best = best_cost(weight, hessian, rule)
    assert best * (1 - 1e-6) <= found <= min(most * (1 + 1e-6), 2 * best)


@pytest.mark.parametrize("rule", RULES)
def test_every_step_brings_the_output_closer(rule: Rule) -> None:
    weight, hessian = problem(groups=2, inputs=32, outputs=6)
    masked = np.where(rule.drop(norm_scores(weight)), 0.0, weight)
    swept, first = sweep(weight, hessian, rule)
    resolved = solve_kept(weight, hessian, first, swept)
    better = solve_kept(weight, hessian, find_sparse(weight, hessian, rule))
    costs = [cost(weight - found, hessian) for found in (masked, swept, resolved, better)]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 0.8 * costs[0]


@settings(deadline=None, max_examples=60)
@given(
    groups=st.integers(1, 3),
    runs=st.integers(1, 5),
    of=st.integers(2, 8),
    keep=st.integers(1, 7),
    outputs=st.integers(1, 4),
    dead=st.integers(0, 6),
    seed=st.integers(0, 1000),
)
def test_no_run_keeps_more_than_it_may(
    groups: int, runs: int, of: int, keep: int, outputs: int, dead: int, seed: int
) -> None:
    keep = min(keep, of - 1)
    rule = Rule(keep=keep, of=of)
    weight, hessian = problem(groups, runs * of, outputs, seed, min(dead, runs * of))
    swept, first = sweep(weight, hessian, rule)
    _, second = improve(weight, hessian, rule, first)
    for zeros in (first, second, rule.drop(norm_scores(weight)), find_sparse(weight, hessian, rule)):
        per_run = zeros.reshape(groups, runs, of, outputs).sum(axis=2)
        assert (per_run == of - keep).all()
    solved = solve_kept(weight, hessian, second)
    assert rule.fits(swept)
    assert rule.fits(solved)
    assert np.isfinite(swept).all()
    assert np.isfinite(solved).all()


@settings(deadline=None, max_examples=40)
@given(inputs=st.integers(1, 150), part=st.floats(0, 1), dead=st.integers(0, 20), seed=st.integers(0, 1000))
def test_as_many_weights_go_as_were_asked_for(inputs: int, part: float, dead: int, seed: int) -> None:
    weight, hessian = problem(1, inputs, 2, seed, min(dead, inputs))
    rule = Rule(count=round(part * weight.size))
    assert int(find_sparse(weight, hessian, rule).sum()) == pytest.approx(rule.count, abs=1)
    assert int(rule.drop(norm_scores(weight)).sum()) == rule.count


def test_weights_that_are_zero_already_go_first_and_the_others_stay() -> None:
    weight, hessian = problem(inputs=16, outputs=4)
    weight.reshape(4, 4, 4)[:, 1:3] = 0
    for rule in (Rule(keep=2, of=4), Rule(count=weight.size // 2)):
        assert rule.fits(weight)
        np.testing.assert_array_equal(find_sparse(weight, hessian, rule), weight == 0)
        np.testing.assert_array_equal(sweep(weight, hessian, rule)[0], weight)
        np.testing.assert_array_equal(solve_kept(weight, hessian, weight == 0), weight)


def test_dead_inputs_leave_no_trace_of_nan() -> None:
    for dead in (3, 8):
        weight, hessian = problem(dead=dead)
        rule = Rule(count=12)
        swept, first = sweep(weight, hessian, rule)
        zeros = find_sparse(weight, hessian, rule)
        solved = solve_kept(weight, hessian, zeros)
        assert np.isfinite(swept).all()
        assert np.isfinite(solved).all()
        assert first.sum() == zeros.sum() == 12
        if dead == 3:
            assert zeros[0, :3].mean() > zeros[0, 3:].mean()


def test_wanda_weighs_weights_with_what_comes_in() -> None:
    weight = np.array([[[1.0], [2.0], [3.0]]])
    power = np.array([[100.0, 1.0, 0.0]])
    assert Rule(count=1).drop(norm_scores(weight)).ravel().tolist() == [True, False, False]
    assert Rule(count=1).drop(norm_scores(weight, power)).ravel().tolist() == [False, False, True]
    # inputs that were never seen rank by the weight
    assert Rule(count=1).drop(norm_scores(weight, 0 * power)).ravel().tolist() == [True, False, False]


def test_equal_scores_always_give_the_same_zeros() -> None:
    scores = np.ones((1, 8, 2))
    assert Rule(keep=1, of=4).drop(scores)[0, :, 0].tolist() == [True, True, True, False] * 2
    assert Rule(count=3).drop(scores).sum() == 3
