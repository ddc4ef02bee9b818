"""What an error of a weight counts: the same whichever side of a product a scale stands on."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from passes.share.share_models import share
from rewritten_models import actions, sqnr
from text_models import build

from graphopt_passes.quant.blockwise.layout import Layout
from graphopt_passes.share._importance import by_data, by_size, relative, supposed_moments
from graphopt_passes.share.cut import cut_of
from graphopt_passes.share.fit import Method, share_weight

Array = np.ndarray
SCALED = "g (float[B,64] x) => (float[B,64] y) { s = Mul(x, a) m = MatMul(s, w) y = Mul(m, b) }"


def scaled(seed: int) -> ir.Model:
    """A layer whose inputs and outputs are multiplied by what its rows and columns are divided by."""
    rng = np.random.default_rng(seed)
    a, b = np.exp(rng.normal(0, 0.5, (2, 64))).astype(np.float32)
    weight = rng.standard_normal((64, 64)).astype(np.float32) / a[:, None] / b
    return build(SCALED, w=weight, a=a, b=b)


def test_channels_of_one_size_count_the_same_and_small_ones_more_but_not_without_end() -> None:
    gains = relative(np.array([4.0, 4.0, 1.0, 1e-9, 0.0]))
    assert gains[0] == gains[1] < gains[2] < gains[3]
    assert gains[4] == pytest.approx(gains[3]) and gains[4] < 4 * relative(np.ones(1))[0]
    assert (relative(np.zeros(3)) == 1).all()


def test_the_gain_does_not_depend_on_the_unit() -> None:
    powers = np.random.default_rng(0).random(20)
    np.testing.assert_allclose(relative(powers), relative(1e6 * powers), rtol=1e-5)


def test_rows_and_columns_count_by_their_size() -> None:
    matrix = np.ones((6, 4))
    matrix[2], matrix[:, 3] = 5.0, 0.2
    found = by_size(matrix, 1, 1)
    assert found.shape == (6, 4)
    assert found[2, 0] < found[0, 0] < found[0, 3]


def test_taps_of_a_kernel_count_as_their_channel_and_parts_by_themselves() -> None:
    matrix = np.random.default_rng(1).standard_normal((12, 6))
    by_taps = by_size(matrix, 1, 4) / relative(np.square(matrix).mean(axis=0))
    assert np.allclose(by_taps.reshape(3, 4, 6), by_taps.reshape(3, 4, 6)[:, :1, :1])
    matrix[:, 3:] *= 10
    parts = by_size(matrix, 2, 4)
    assert (parts[:, 3:].mean() < parts[:, :3].mean()) and parts.shape == (12, 6)


def test_data_says_what_each_input_brings() -> None:
    importance, gains = np.array([[1.0, 2.0], [3.0, 4.0]]), np.split(relative(np.array([1.0, 1, 9, 9])), 2)
    found = by_data(np.ones((2, 4)), importance, gains)
    np.testing.assert_allclose(found[1] / found[0], [2, 2, 4 / 3, 4 / 3], rtol=1e-6)
    assert found[0, 2] < 3 * found[0, 0]


@pytest.mark.parametrize("seed", range(4))
def test_scales_on_both_sides_of_a_layer_do_not_mislead_codebooks(seed: int) -> None:
    plain, sized = scaled(seed), scaled(seed)
    before = plain.clone()
    share(plain, bits=3, algorithm="nearest")
    result = share(sized, bits=3)
    assert "relative to the size of row and column" in str(actions(result))
    assert sqnr(before, sized) > sqnr(before, plain) + 0.5


@pytest.mark.parametrize("groups", [1, 2])
def test_without_data_errors_of_a_kernel_cancel_each_other(groups: int) -> None:
    shape = (16, 8, 3, 3)
    weight = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    layout, cut = Layout(shape, (16, 72), 1, groups), cut_of(shape, 0, 0, 1)
    errors = [
        share_weight(weight, cut, layout, Method(8, algorithm), None).real(cut) - weight
        for algorithm in ("auto", "nearest")
    ]
    sums = [float(np.square(error.sum(axis=(1, 2, 3))).mean()) for error in errors]
    sizes = [float(np.square(error).mean()) for error in errors]
    assert sums[0] < 0.3 * sums[1] and sizes[0] < 2 * sizes[1]


def test_supposed_moments_hold_what_neighbours_and_channels_share() -> None:
    matrix = np.random.default_rng(4).standard_normal((12, 6))
    matrix[4:8] *= 3
    (found,) = supposed_moments(matrix, 1, 4)
    assert np.linalg.eigvalsh(found).min() > 0
    assert found[0, 0] > found[0, 1] > found[0, 8] > 0
    assert found[4, 4] < found[0, 0] == found[3, 3]
