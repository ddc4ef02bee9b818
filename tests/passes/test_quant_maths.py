from __future__ import annotations

from typing import Literal

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from graphopt.reference import Reference
from graphopt_passes.quant._maths import (
    Grid,
    activation_grid,
    bias_floor,
    decibel,
    dequantize,
    quantize,
    quantize_bias,
    quantize_weight,
    raise_scales,
    weight_scales,
)

ENDS = st.floats(-(2.0**60), 2.0**60, width=32)
DTYPES = st.sampled_from(["uint8", "int8"])
WEIGHTS = arrays(np.float32, array_shapes(min_dims=2, max_dims=4, max_side=6), elements=st.floats(-8, 8, width=32))


@settings(deadline=None)
@given(ENDS, ENDS, DTYPES, st.booleans())
def test_zero_is_always_on_the_grid(first: float, second: float, dtype: str, symmetric: bool) -> None:
    grid = activation_grid(min(first, second), max(first, second), dtype, symmetric=symmetric)  # type: ignore[arg-type]
    info = np.iinfo(grid.dtype)
    assert info.min <= grid.zero_point <= info.max
    assert grid.scale == np.float32(grid.scale) > 0
    zero = np.zeros(1, np.float32)
    assert dequantize(quantize(zero, grid), grid)[0] == 0
    if symmetric:
        assert grid.zero_point == (128 if dtype == "uint8" else 0)


@settings(deadline=None)
@given(st.floats(-1000, 0, width=32), st.floats(0.125, 1000, width=32), DTYPES, st.booleans())
def test_a_round_trip_errs_by_half_a_step_inside_the_range(
    low: float, high: float, dtype: str, symmetric: bool
) -> None:
    grid = activation_grid(low, high, dtype, symmetric=symmetric)  # type: ignore[arg-type]
    values = np.linspace(low, high, 257).astype(np.float32)
    error = np.abs(dequantize(quantize(values, grid), grid) - values)
    # rounding the zero point shifts the grid by up to half a step, which the two ends feel
    inside = (values >= grid.bounds[0]) & (values <= grid.bounds[1])
    assert error[inside].max() <= grid.scale * 0.501
    assert error.max() <= grid.scale * 1.01


def test_a_constant_zero_has_a_grid() -> None:
    assert activation_grid(0, 0, "uint8") == Grid(1.0, 0, "uint8")


def test_rounding_is_that_of_onnx_runtime() -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[N] x) => (uint8[N] y) <float s = {0.1}, uint8 z = {7}>'
    session = Reference(ir.from_onnx_text(text + "{ y = QuantizeLinear(x, s, z) }"))
    x = np.concatenate([np.arange(-2, 30, 0.05), [-1e9, 1e9]]).astype(np.float32)
    grid = Grid(float(np.float32(0.1)), 7, "uint8")
    np.testing.assert_array_equal(session.run({"x": x})["y"], quantize(x, grid))


@settings(deadline=None)
@given(WEIGHTS, st.integers(0, 3), st.sampled_from([7, 8]), st.booleans())
def test_weights_err_by_half_a_step_of_their_channel(weight: np.ndarray, axis: int, bits: int, whole: bool) -> None:
    used = None if whole else axis % weight.ndim
    scales = weight_scales(weight, used, bits)
    integers = quantize_weight(weight, scales, used, bits)
    assert np.abs(integers.astype(int)).max() <= (63 if bits == 7 and whole else 127)
    shape = [1] * weight.ndim
    if used is not None:
        shape[used] = -1
        assert scales.shape == (weight.shape[used],)
    error = np.abs(integers * scales.reshape(shape) - weight)
    assert (error <= scales.reshape(shape) * 0.501).all()
    assert (integers[weight == 0] == 0).all()


@settings(deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(4, 6), (4, 3, 3, 3), (2, 5, 1, 1), (3, 4, 7)]))
def test_two_neighbouring_products_fit_16_bits(seed: int, shape: tuple[int, ...]) -> None:
    weight = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    integers = quantize_weight(weight, weight_scales(weight, 0, 7), 0, 7).astype(int)
    for order in (integers, np.moveaxis(integers, 1, -1)):
        rows = order.reshape(shape[0], -1)
        for sign in (1, -1):
            ends = np.maximum(sign * rows, 0) * 255
            assert (ends[:, 1:] + ends[:, :-1]).max() < 2**15


def test_a_great_weight_beside_small_ones_keeps_its_bits() -> None:
    weight = np.array([[1.0, 0.1, -1.0, 0.2, -0.9], [1.0, 1.0, 0.1, 0.1, 0.1]], np.float32)
    integers = quantize_weight(weight, weight_scales(weight, 0, 7), 0, 7)
    assert np.abs(integers).max(axis=1).tolist() == [115, 64]


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_a_power_of_two_covers_the_range(dtype: Literal["uint8", "int8"]) -> None:
    for high in (0.3, 1.0, 1.0001, 255.0):
        for symmetric in (False, True):
            grid = activation_grid(-0.1, high, dtype, symmetric=symmetric, power_of_two=True)
            assert np.log2(grid.scale).is_integer()
            assert grid.bounds[1] >= high - grid.scale
            assert grid.bounds[0] <= -0.1 + grid.scale
    weight = np.random.default_rng(0).standard_normal((4, 9)).astype(np.float32)
    scales = weight_scales(weight, 0, power_of_two=True)
    assert (np.log2(scales) == np.rint(np.log2(scales))).all()
    assert np.abs(quantize_weight(weight, scales, 0) * scales[:, None] - weight).max() <= scales.max() / 2


def test_a_channel_of_zeros_has_a_scale() -> None:
    weight = np.array([[0, 0], [1, -2]], np.float32)
    scales = weight_scales(weight, 0)
    np.testing.assert_allclose(scales, [1, 2 / 127], rtol=1e-6)
    assert not quantize_weight(weight, scales, 0)[0].any()


def test_a_bias_that_does_not_fit_is_refused() -> None:
    scale = np.array([1e-3, 1e-3], np.float32)
    np.testing.assert_array_equal(quantize_bias(np.array([1, -0.5], np.float32), scale), [1000, -500])  # type: ignore[arg-type]
    assert quantize_bias(np.array([1, 1e7], np.float32), scale) is None


@given(st.integers(0, 10_000), st.sampled_from([1, 2, 6]), st.booleans())
def test_raised_scales_make_every_bias_fit(seed: int, channels: int, whole: bool) -> None:
    rng = np.random.default_rng(seed)
    bias = (rng.standard_normal(6) * 10.0 ** rng.integers(-6, 9, 6)).astype(np.float32)
    usual = (10.0 ** rng.integers(-14, 0, channels)).astype(np.float32)
    usual = np.exp2(np.rint(np.log2(usual))) if whole else usual
    least = bias_floor(bias, 0.02, channels)
    scales = raise_scales(usual, least, power_of_two=whole)
    np.testing.assert_array_equal(scales[least < usual], usual[least < usual])
    assert not whole or not (np.log2(scales) % 1).any()
    steps = np.tile((scales.astype(np.float64) * 0.02).astype(np.float32), 6 // channels)
    integers = quantize_bias(bias, steps)
    assert integers is not None
    np.testing.assert_array_less(np.abs(integers * steps.astype(np.float64) - bias), steps * 0.5001)


def test_a_bias_that_is_not_finite_raises_no_scale() -> None:
    assert not bias_floor(np.array([1, np.inf], np.float32), 1e-3, 2).any()


@pytest.mark.parametrize(("signal", "noise", "level"), [(100, 1, 20), (1, 0, np.inf), (0, 1, -np.inf)])
def test_decibels(signal: float, noise: float, level: float) -> None:
    assert decibel(signal, noise) == level
