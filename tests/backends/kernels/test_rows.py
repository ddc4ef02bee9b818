"""Softmax, normalizations and reductions equal NumPy's: rows in registers and in memory, along any axis."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from kernel_runner import run, runnable

from graphopt.targets import Isa
from graphopt_backends.kernels.reduce import Reduce
from graphopt_backends.kernels.rows import Normalize, Softmax

ISAS = runnable()
pytestmark = pytest.mark.skipif(not ISAS, reason="this CPU runs none of the kernels")
few = settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)
isas = st.sampled_from(ISAS or [None])

_RANDOM = np.random.default_rng(17)


def _softmax(x: np.ndarray, axis: int) -> np.ndarray:
    weights = np.exp((x - x.max(axis, keepdims=True)).astype(np.float64))
    return weights / weights.sum(axis, keepdims=True)


@few
@given(isas, st.integers(1, 4), st.integers(1, 40), st.integers(2, 60), st.booleans())
def test_softmax_along_an_axis_that_is_not_the_last(isa: Isa, outer: int, columns: int, inner: int, log: bool) -> None:
    x = (_RANDOM.standard_normal((outer, columns, inner)) * 8).astype(np.float32)
    got = run(Softmax(isa, outer, columns, log, inner), [x], x)
    expected = np.log(_softmax(x, 1)) if log else _softmax(x, 1)
    np.testing.assert_allclose(got, expected, rtol=4e-6, atol=1e-5 if log else 1e-7)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("columns", [7, 32, 197, 700])
def test_masked_elements_are_exactly_zero(isa: Isa, columns: int) -> None:
    for hidden in (-np.inf, -1e9, float(np.finfo(np.float32).min), -100.0):
        x = _RANDOM.standard_normal((3, columns)).astype(np.float32)
        x[:, 1::2] = hidden
        got = run(Softmax(isa, 3, columns), [x], x)
        assert not got[:, 1::2].any()
        np.testing.assert_allclose(got, _softmax(x, 1), rtol=2e-6, atol=1e-30)


@few
@given(isas, st.sampled_from(["layer", "rms"]), st.integers(1, 5), st.sampled_from([1, 5, 64, 100, 333, 768]))
def test_normalizations_of_short_and_long_rows(isa: Isa, kind: str, rows: int, columns: int) -> None:
    x, scale, shift = (_RANDOM.standard_normal(s).astype(np.float32) for s in ((rows, columns), columns, columns))
    centred = x - x.mean(1, keepdims=True, dtype=np.float64) if kind == "layer" else x.astype(np.float64)
    expected = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-3) * scale + shift
    got = run(Normalize(isa, kind, rows, columns, 1e-3, True), [x, scale, shift], x)  # type: ignore[arg-type]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5)


@few
@given(isas, st.integers(1, 4), st.integers(1, 33), st.integers(1, 50))
def test_extremes_do_not_count_what_is_behind_the_end(isa: Isa, outer: int, reduced: int, inner: int) -> None:
    x = -1 - _RANDOM.random((outer, reduced, inner)).astype(np.float32)
    got = run(Reduce(isa, "max", outer, reduced, inner), [x], np.empty((outer, inner), np.float32))
    np.testing.assert_array_equal(got, x.max(1))
    got = run(Reduce(isa, "min", outer, reduced, inner), [-x], np.empty((outer, inner), np.float32))
    np.testing.assert_array_equal(got, (-x).min(1))
