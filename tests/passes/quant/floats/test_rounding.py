from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from graphopt_passes.quant.floats._rounding import float8_scales, narrowed, rounding_of, scaled

RNG = np.random.default_rng(0)


def test_rounding_counts_what_overflows_and_what_vanishes():
    weight = np.array([1.0, -70000.0, 65504.0, 1e-9, 0.0, np.inf], np.float32)
    found = rounding_of(ir.tensor(weight), ir.DataType.FLOAT16)
    assert (found.count, found.overflows, found.vanished) == (6, 1, 1)
    assert (found.low, found.high) == (-70000.0, 65504.0)
    assert not found.exact


def test_rounding_of_exact_numbers_is_exact():
    found = rounding_of(ir.tensor(np.array([0.5, -2.0, 0.0, np.inf], np.float32)), ir.DataType.FLOAT16)
    assert found.exact
    assert found.sqnr == math.inf


def test_normal_weights_keep_seventy_decibels_in_fp16_and_fifty_in_bf16():
    weight = ir.tensor(RNG.standard_normal(10000).astype(np.float32))
    assert 72 < rounding_of(weight, ir.DataType.FLOAT16).sqnr < 76
    assert 53 < rounding_of(weight, ir.DataType.BFLOAT16).sqnr < 58


def test_bf16_takes_what_overflows_fp16():
    weight = ir.tensor(np.array([1e30, -1e-30], np.float32))
    found = rounding_of(weight, ir.DataType.BFLOAT16)
    assert (found.overflows, found.vanished) == (0, 0)


def test_empty_and_infinite_tensors_have_nothing_to_lose():
    for array in (np.zeros(0, np.float32), np.full(3, -np.inf, np.float32), np.zeros(4, np.float32)):
        found = rounding_of(ir.tensor(array), ir.DataType.FLOAT16)
        assert found.exact
        assert (found.low, found.high) == (0.0, 0.0)


def test_a_limit_clips_finite_numbers_and_leaves_infinities():
    array = np.array([-1e9, 1e9, -np.inf, 3.0], np.float32)
    assert narrowed(array, ir.DataType.FLOAT16, 32752.0).tolist() == [-32752.0, 32752.0, -math.inf, 3.0]


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_float8_never_overflows_and_keeps_thirty_decibels(axis: int | None):
    weight = (RNG.standard_normal((64, 32)) * 10.0 ** RNG.integers(-6, 6, (64, 1))).astype(np.float32)
    scales = float8_scales(weight, axis)
    numbers = scaled(weight, scales, axis)
    assert numbers.dtype == ml_dtypes.float8_e4m3fn
    shape = [1, 1]
    if axis is not None:
        shape[axis] = -1
    back = numbers.astype(np.float32) * scales.reshape(shape)
    assert np.isfinite(back).all()
    noise = float(np.square(back - weight, dtype=np.float64).sum())
    assert 10 * math.log10(float(np.square(weight, dtype=np.float64).sum()) / noise) > 30


def test_float8_of_a_channel_of_zeros_is_zero():
    weight = np.zeros((2, 3), np.float32)
    weight[0] = [1, 2, 3]
    scales = float8_scales(weight, 0)
    assert scales[1] == 1.0
    assert not scaled(weight, scales, 0)[1].astype(np.float32).any()
