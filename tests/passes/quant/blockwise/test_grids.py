from __future__ import annotations

import numpy as np
import pytest

from graphopt_passes.quant.blockwise._grids import Fit, GridRule, group_bounds, round_matrix

FITS: tuple[Fit, ...] = ("minmax", "mse", "hqq")


def matrix(inputs: int = 70, outputs: int = 12, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_t(4, (inputs, outputs)) * rng.uniform(0.1, 3, outputs)).astype(np.float32)


def on_grid(rule: GridRule, inputs: int, outputs: int) -> np.ndarray:
    """A matrix whose groups reach both ends of their grids, so that nothing is lost in rounding it."""
    rng = np.random.default_rng(1)
    codes = rng.integers(0, rule.top + 1, (inputs, outputs))
    real = np.empty((inputs, outputs), np.float32)
    for start, stop in group_bounds(inputs, rule.group):
        codes[start] = 1 if rule.symmetric else 0
        codes[stop - 1] = rule.top
        zero = rule.middle if rule.symmetric else rng.integers(0, rule.top + 1, outputs)
        scale = np.exp2(rng.integers(-4, 3, outputs))
        codes[start:stop] = np.maximum(codes[start:stop], codes[start])
        real[start:stop] = (codes[start:stop] - zero) * scale
    return real


@pytest.mark.parametrize("inputs", [64, 65, 33, 7, 100])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_numbers_on_a_grid_are_kept_exactly_whatever_the_last_group(inputs: int, bits: int, symmetric: bool) -> None:
    rule = GridRule(bits, 16, symmetric, "minmax")
    real = on_grid(rule, inputs, 5)
    np.testing.assert_array_equal(round_matrix(real, rule).real(), real)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_codes_and_zero_points_stay_on_the_grid(fit: Fit, symmetric: bool) -> None:
    rule = GridRule(4, 32, symmetric, fit)
    blocks = round_matrix(matrix(), rule)
    assert blocks.codes.max() <= 15 and blocks.zeros.max() <= 15
    assert (blocks.scales > 0).all()
    assert blocks.scales.shape == blocks.zeros.shape == (3, 12)
    if symmetric:
        assert (blocks.zeros == 8).all()


def test_the_range_of_a_group_rounds_to_half_a_step() -> None:
    weight = matrix()
    blocks = round_matrix(weight, GridRule(4, 32, False, "minmax"))
    half = np.repeat(blocks.scales, [32, 32, 6], axis=0) / 2
    assert (np.abs(weight - blocks.real()) <= half * 2.001).all()  # the zero point rounds too
    assert (np.abs(weight - blocks.real()) <= half * 1.001).mean() > 0.95


def test_zero_is_kept_exactly_even_where_all_others_lie_on_one_side() -> None:
    weight = np.abs(matrix()) + 1
    weight[::5] = 0
    for fit in FITS:
        assert (round_matrix(weight, GridRule(4, 16, False, fit)).real()[::5] == 0).all()


def test_a_group_of_zeros_stays_zero() -> None:
    for fit in FITS:
        blocks = round_matrix(np.zeros((40, 3), np.float32), GridRule(4, 16, False, fit))
        assert not blocks.real().any() and np.isfinite(blocks.scales).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_least_squares_grids_err_less_than_ranges(bits: int, symmetric: bool) -> None:
    weight = matrix()
    error = {fit: weight - round_matrix(weight, GridRule(bits, 32, symmetric, fit)).real() for fit in FITS}
    squares = {fit: np.square(e).reshape(-1, 12).sum() for fit, e in error.items()}
    assert squares["mse"] < 0.95 * squares["minmax"]


@pytest.mark.parametrize("symmetric", [False, True])
def test_half_quadratic_grids_err_more_sparsely_than_ranges(symmetric: bool) -> None:
    weight = matrix()
    loss = {}
    for fit in ("minmax", "hqq"):
        error = weight - round_matrix(weight, GridRule(4, 32, symmetric, fit)).real()
        loss[fit] = (np.abs(error) ** 0.7).sum()
    assert loss["hqq"] < 0.99 * loss["minmax"]


def test_importance_moves_the_error_to_inputs_that_matter_less() -> None:
    weight, importance = matrix(), np.where(np.arange(70) % 7 == 0, 100.0, 1.0)
    rule = GridRule(4, 32, False, "mse")
    plain, weighted = (round_matrix(weight, rule, i).real() for i in (None, importance))
    heavy = importance > 1
    assert np.square(weight - weighted)[heavy].sum() < 0.9 * np.square(weight - plain)[heavy].sum()


def test_rows_of_whole_groups_are_the_same_as_all_rows() -> None:
    blocks = round_matrix(matrix(), GridRule(4, 16, False, "minmax"))
    np.testing.assert_array_equal(blocks.rows(32, 70), blocks.real()[32:])


def test_a_transposed_view_rounds_like_its_copy() -> None:
    weight, rule = matrix(), GridRule(4, 16, False, "mse")
    turned = np.asfortranarray(weight)
    np.testing.assert_array_equal(round_matrix(turned, rule).codes, round_matrix(weight, rule).codes)
