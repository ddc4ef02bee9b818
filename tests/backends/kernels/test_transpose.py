"""Copies that exchange axes equal NumPy's, for every size of element and any strides."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from kernel_runner import run, runnable

from graphopt.targets import Isa
from graphopt_backends.kernels.transpose import transpose_of

ISAS = runnable()
pytestmark = pytest.mark.skipif(not ISAS, reason="this CPU runs none of the kernels")
few = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)
isas = st.sampled_from(ISAS or [None])
dtypes = st.sampled_from(["float32", "uint8", "int8", "int64", "float16", "bool"])

_RANDOM = np.random.default_rng(11)


def _check(isa: Isa, x: np.ndarray, axes: tuple[int, ...]) -> None:
    moved = x.transpose(axes)
    expected = np.ascontiguousarray(moved)
    strides = [[step // x.itemsize for step in array.strides] for array in (moved, expected)]
    kernel = transpose_of(isa, str(x.dtype), expected.shape, strides[0], strides[1])
    assert kernel is not None
    np.testing.assert_array_equal(run(kernel, [x], np.empty_like(expected)), expected)


def _drawn(dtype: str, *shape: int) -> np.ndarray:
    return _RANDOM.integers(0, 2 if dtype == "bool" else 100, shape).astype(dtype)


@few
@given(isas, dtypes, st.integers(1, 3), st.integers(5, 150), st.integers(5, 150))
def test_matrices_of_any_size(isa: Isa, dtype: str, batch: int, rows: int, columns: int) -> None:
    _check(isa, _drawn(dtype, batch, rows, columns), (0, 2, 1))


@few
@given(isas, dtypes, st.integers(2, 5), st.integers(2, 130))
def test_a_few_channels_are_woven_and_taken_apart(isa: Isa, dtype: str, channels: int, pixels: int) -> None:
    _check(isa, _drawn(dtype, 2, channels, pixels), (0, 2, 1))
    _check(isa, _drawn(dtype, 2, pixels, channels), (0, 2, 1))


@few
@given(
    isas,
    st.sampled_from([(0, 2, 3, 1), (0, 3, 1, 2), (3, 2, 1, 0), (2, 0, 3, 1)]),
    st.tuples(*[st.integers(2, 23)] * 4),
)
def test_four_axes_in_any_order(isa: Isa, axes: tuple[int, ...], shape: tuple[int, int, int, int]) -> None:
    _check(isa, _drawn("float32", *shape), axes)


@few
@given(isas, st.integers(2, 40), st.integers(2, 40))
def test_parts_of_larger_tensors(isa: Isa, rows: int, columns: int) -> None:
    kernel = transpose_of(isa, "float32", (rows, columns), (1, rows + 7), (columns, 1))
    x = _drawn("float32", columns, rows + 7)
    assert kernel is not None
    got = run(kernel, [x], np.empty((rows, columns), np.float32))
    np.testing.assert_array_equal(got, x[:, :rows].T)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_what_lies_in_order_on_both_sides_is_no_transposition(isa: Isa) -> None:
    assert transpose_of(isa, "float32", (5, 6), (6, 1), (6, 1)) is None
    assert transpose_of(isa, "float32", (5, 6), (0, 0), (6, 1)) is None
