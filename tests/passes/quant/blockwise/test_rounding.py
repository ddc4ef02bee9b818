from __future__ import annotations

import numpy as np
import pytest

from graphopt_passes.quant.blockwise._grids import GridRule, round_matrix
from graphopt_passes.quant.blockwise._rounding import damped, output_error, refine, round_gptq
from graphopt_passes.quant.blockwise._scaling import search_scales


def problem(inputs: int = 100, outputs: int = 24, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A weight, and moments of inputs that hang together and differ in size."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4 * inputs, inputs)) @ rng.standard_normal((inputs, inputs)) / np.sqrt(inputs)
    x = (x + rng.standard_normal((4 * inputs, 3)) @ rng.standard_normal((3, inputs))) * rng.lognormal(0, 1, inputs)
    return rng.standard_normal((inputs, outputs)).astype(np.float32), x.T @ x / len(x)


def error_of(weight: np.ndarray, real: np.ndarray, moments: np.ndarray) -> float:
    return output_error(weight - real, moments)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("inputs", "group"), [(100, 32), (150, 128), (130, 130), (64, 16)])
def test_gptq_beats_the_nearest_codes_at_the_output(act_order: bool, symmetric: bool, inputs: int, group: int) -> None:
    weight, moments = problem(inputs)
    h = damped(moments, 0.01)
    nearest = round_matrix(weight, GridRule(4, group, symmetric, "minmax"))
    best_grids = round_matrix(weight, GridRule(4, group, symmetric, "mse"))
    rounded = round_gptq(weight, h, GridRule(4, group, symmetric, "mse"), act_order=act_order)
    reached = error_of(weight, rounded.real(), moments)
    assert reached < 0.6 * error_of(weight, nearest.real(), moments)
    assert reached < 0.7 * error_of(weight, best_grids.real(), moments)


@pytest.mark.parametrize("symmetric", [True, False])
def test_refining_makes_the_error_less_and_never_more(symmetric: bool) -> None:
    rule = GridRule(4, 32, symmetric, "mse")
    for seed in range(4):
        weight, moments = problem(seed=seed)
        h = damped(moments, 0.01)
        start = round_gptq(weight, h, rule)
        refined = refine(weight, start, h, rule)
        assert error_of(weight, refined.real(), h) < 0.98 * error_of(weight, start.real(), h)
        assert refined.codes.max() <= 15 and (refined.scales > 0).all()


def test_refining_leaves_what_is_exact() -> None:
    rule = GridRule(4, 16, False, "minmax")
    weight = round_matrix(problem()[0], rule).real()
    blocks = round_matrix(weight, rule)
    refined = refine(weight, blocks, damped(problem()[1], 0.01), rule)
    np.testing.assert_allclose(refined.real(), weight, atol=1e-5)


def test_inputs_that_are_never_seen_do_not_spoil_the_others() -> None:
    weight, moments = problem()
    moments[10:20] = moments[:, 10:20] = 0
    h, rule = damped(moments, 0.01), GridRule(4, 32, False, "mse")
    rounded = refine(weight, round_gptq(weight, h, rule), h, rule)
    assert np.isfinite(rounded.real()).all()
    assert error_of(weight, rounded.real(), moments) < error_of(weight, round_matrix(weight, rule).real(), moments)


def test_moments_of_nothing_round_to_the_nearest_codes() -> None:
    weight, rule = problem()[0], GridRule(4, 32, False, "mse")
    h = damped(np.zeros((100, 100)), 0.01)
    np.testing.assert_array_equal(round_gptq(weight, h, rule).codes, round_matrix(weight, rule).codes)


def test_rounding_twice_gives_the_same_codes() -> None:
    weight, moments = problem()
    h, rule = damped(moments, 0.05), GridRule(4, 32, False, "mse")
    first, second = (refine(weight, round_gptq(weight, h, rule), h, rule) for _ in range(2))
    assert first.codes.tobytes() == second.codes.tobytes() and first.scales.tobytes() == second.scales.tobytes()


def test_scaled_inputs_beat_unscaled_ones_at_the_output() -> None:
    weight, moments = problem()
    rule = GridRule(4, 32, False, "mse")
    found = search_scales([weight, weight[:, :5]], moments, rule)
    assert found is not None
    scales, left = found
    importance = np.diag(moments)
    plain = error_of(weight, round_matrix(weight, rule, importance).real(), moments)
    real = round_matrix(weight * scales[:, None], rule, importance / scales**2).real() / scales[:, None]
    assert left < 0.98 and error_of(weight, real, moments) < 0.98 * plain


def test_equal_inputs_need_no_scales() -> None:
    assert search_scales([problem()[0]], np.eye(100), GridRule(4, 32, False, "mse")) is None
    assert search_scales([problem()[0]], np.zeros((100, 100)), GridRule(4, 32, False, "mse")) is None
