"""The arithmetic behind folding, against a direct computation."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt_passes.fold import _batchnorm as maths

RNG = np.random.default_rng(0)


def grouped(x: np.ndarray, weight: np.ndarray, groups: int) -> np.ndarray:
    """A 1x1 grouped convolution of [C_in] vectors, written out."""
    per_group, outs = weight.shape[1], weight.shape[0] // groups
    parts = [weight[g * outs : (g + 1) * outs, :, 0] @ x[g * per_group : (g + 1) * per_group] for g in range(groups)]
    return np.concatenate(parts)


def test_affine_of_batchnorm_is_the_formula_of_the_operator() -> None:
    scale, bias, mean, x = RNG.standard_normal((4, 5))
    variance = RNG.random(5) + 0.1
    factor, shift = maths.affine_of_batchnorm(scale, bias, mean, variance, 1e-3)
    np.testing.assert_allclose(factor * x + shift, scale * (x - mean) / np.sqrt(variance + 1e-3) + bias)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_scale_conv_scales_outputs(groups: int) -> None:
    weight, x, scale = RNG.standard_normal((8, 8 // groups, 1)), RNG.standard_normal(8), RNG.standard_normal(8)
    np.testing.assert_allclose(grouped(x, maths.scale_conv(weight, scale), groups), grouped(x, weight, groups) * scale)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_scale_conv_transpose_scales_outputs_group_by_group(groups: int) -> None:
    weight, scale = RNG.standard_normal((8, 3, 2)), RNG.standard_normal(3 * groups)
    scaled = maths.scale_conv_transpose(weight, scale, groups)
    for row in range(8):
        group = row // (8 // groups)
        for column in range(3):
            np.testing.assert_allclose(scaled[row, column], weight[row, column] * scale[group * 3 + column])


@pytest.mark.parametrize("transposed", [False, True])
def test_scale_columns_scales_outputs(transposed: bool) -> None:
    weight, x, scale = RNG.standard_normal((4, 6)), RNG.standard_normal(4), RNG.standard_normal(6)
    scaled = maths.scale_columns(weight.T if transposed else weight, scale, transposed=transposed)
    np.testing.assert_allclose(x @ (scaled.T if transposed else scaled), (x @ weight) * scale)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_shift_through_conv_moves_a_map_of_the_inputs(groups: int) -> None:
    weight = RNG.standard_normal((8, 8 // groups, 1))
    x, scale, shift = RNG.standard_normal((3, 8))
    moved, added = maths.shift_through_conv(weight, scale, shift, groups)
    np.testing.assert_allclose(grouped(x, moved, groups) + added, grouped(scale * x + shift, weight, groups))
