"""Arithmetic, functions, rows, reductions and pooling equal NumPy's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from kernel_runner import run, runnable

from graphopt.targets import Isa
from graphopt_backends.kernels.conv import Window
from graphopt_backends.kernels.expression import call, operand
from graphopt_backends.kernels.loops import Loops, merged_axes
from graphopt_backends.kernels.pool import Pool
from graphopt_backends.kernels.reduce import Reduce
from graphopt_backends.kernels.rows import Normalize, Softmax

ISAS = runnable()
pytestmark = pytest.mark.skipif(not ISAS, reason="this CPU runs none of the kernels")
few = settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)
isas = st.sampled_from(ISAS or [None])

_RANDOM = np.random.default_rng(5)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize(
    ("name", "exact"),
    [
        ("exp", np.exp), ("tanh", np.tanh), ("erf", np.vectorize(math.erf)),
        ("sigmoid", lambda x: 1 / (1 + np.exp(-x))), ("log", np.log),
    ],
)  # fmt: skip
def test_functions_are_right_to_a_few_units_in_the_last_place(isa: Isa, name: str, exact: object) -> None:
    x = np.linspace(1e-6 if name == "log" else -80, 80, 10007).astype(np.float32)
    kernel = Loops(isa, call(name, operand(0)), (x.size,), (1,), ((1,),))
    expected = exact(x.astype(np.float64))  # type: ignore[operator]
    np.testing.assert_allclose(run(kernel, [x], np.empty_like(x)), expected, rtol=4e-7, atol=1e-7)


@few
@given(isas, st.permutations(range(3)), st.tuples(*[st.integers(1, 37)] * 3))
def test_loops_read_any_strides(isa: Isa, order: list[int], shape: tuple[int, int, int]) -> None:
    a, b = (_RANDOM.standard_normal(s).astype(np.float32) for s in (shape, shape[-1:]))
    moved, result = a.transpose(order), np.empty([shape[i] for i in order], np.float32)
    repeated = np.broadcast_to(b, shape).transpose(order)
    strides = [[step // 4 for step in array.strides] for array in (moved, repeated, result)]
    sizes, merged = merged_axes(result.shape, strides)
    kernel = Loops(isa, call("add", operand(0), operand(1)), sizes, merged[-1], merged[:-1])
    np.testing.assert_array_equal(run(kernel, [a, b], result), moved + repeated)


@few
@given(isas, st.integers(1, 20), st.integers(1, 300))
def test_softmax_and_its_logarithm(isa: Isa, rows: int, columns: int) -> None:
    x = (_RANDOM.standard_normal((rows, columns)) * 8).astype(np.float32)
    shifted = (x - x.max(1, keepdims=True)).astype(np.float64)
    expected = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    np.testing.assert_allclose(run(Softmax(isa, rows, columns), [x], x), np.exp(expected), rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(run(Softmax(isa, rows, columns, logarithm=True), [x], x), expected, rtol=2e-6, atol=1e-5)


@few
@given(isas, st.integers(1, 20), st.integers(1, 300), st.booleans())
def test_normalizations(isa: Isa, rows: int, columns: int, bias: bool) -> None:
    x, scale, shift = (_RANDOM.standard_normal(s).astype(np.float32) for s in ((rows, columns), columns, columns))
    added = shift if bias else 0
    mean, square = x.mean(1, keepdims=True), (x * x).mean(1, keepdims=True)
    layer = (x - mean) / np.sqrt(x.var(1, keepdims=True) + 1e-5) * scale + added
    rms = x / np.sqrt(square + 1e-5) * scale + added
    operands = [x, scale, shift] if bias else [x, scale]
    for kind, expected in (("layer", layer), ("rms", rms)):
        got = run(Normalize(isa, kind, rows, columns, 1e-5, bias), operands, x)  # type: ignore[arg-type]
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


@few
@given(isas, st.integers(1, 5), st.integers(1, 70), st.integers(1, 70))
def test_reductions_over_any_axis(isa: Isa, outer: int, reduced: int, inner: int) -> None:
    x = _RANDOM.standard_normal((outer, reduced, inner)).astype(np.float32)
    for operator, exact in (("sum", np.sum), ("mean", np.mean), ("max", np.max), ("min", np.min)):
        kernel = Reduce(isa, operator, outer, reduced, inner)  # type: ignore[arg-type]
        got = run(kernel, [x], np.empty((outer, inner), np.float32))
        np.testing.assert_allclose(got, exact(x, axis=1), rtol=1e-5, atol=1e-5)


@few
@given(isas, st.integers(1, 3), st.integers(1, 40), st.sampled_from(["max", "mean"]), st.booleans())
def test_pooling_sees_the_border_as_it_should(isa: Isa, batch: int, channels: int, kind: str, counts: bool) -> None:
    window = Window((3, 2), (2, 1), (1, 1), (1, 1, 2, 0))
    x = _RANDOM.standard_normal((batch, 9, 11, channels)).astype(np.float32)
    size = window.result(9, 11)
    kernel = Pool(isa, kind, "float32", batch, 9, 11, channels, window, size, counts)  # type: ignore[arg-type]
    fill = -np.inf if kind == "max" else 0.0
    padded = np.pad(x, ((0, 0), (1, 2), (1, 0), (0, 0)), constant_values=fill)
    there = np.pad(np.ones_like(x), ((0, 0), (1, 2), (1, 0), (0, 0)))
    taps = [(slice(None), slice(i, i + 2 * size[0] - 1, 2), slice(j, j + size[1])) for i in range(3) for j in range(2)]
    if kind == "max":
        expected = np.max([padded[tap] for tap in taps], axis=0)
    else:
        seen = 6 if counts else np.sum([there[tap] for tap in taps], axis=0)
        expected = np.sum([padded[tap] for tap in taps], axis=0) / seen
    np.testing.assert_allclose(run(kernel, [x], np.empty((batch, *size, channels), np.float32)), expected, rtol=1e-5)
