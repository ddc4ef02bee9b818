"""Times of steps add up to those of kernels."""

from __future__ import annotations

import pytest

from graphopt.backend_base import Profile, StepTime
from graphopt.bench.breakdown import breakdown

STEPS = (
    StepTime("kernels", "Conv_0", "first", 2e-3, 400_000_000, "float"),
    StepTime("kernels", "Pool_1", "pool", 1e-3, 1000),
    StepTime("kernels", "Conv_0", "second", 2e-3, 400_000_000, "float"),
    StepTime("onnxruntime", "model.part1.onnx", "", 5e-3),
)


def test_calls_of_one_kernel_are_one_row_and_the_dearest_comes_first() -> None:
    found = breakdown(Profile(STEPS, {"float": 400e9}), "m", "x86", 2)
    assert [(k.kernel, k.calls) for k in found.kernels] == [("model.part1.onnx", 1), ("Conv_0", 2), ("Pool_1", 1)]
    assert sum(k.share for k in found.kernels) == pytest.approx(1)
    conv = found.kernels[1]
    assert (conv.sites, conv.time, conv.share) == ("first", pytest.approx(4), pytest.approx(0.4))


def test_a_rate_is_held_against_the_peak_of_all_threads() -> None:
    conv = breakdown(Profile(STEPS, {"float": 400e9}), "m", "x86", 2).kernels[1]
    assert (conv.rate, conv.of_peak) == (pytest.approx(200), pytest.approx(0.25))


def test_what_multiplies_nothing_has_no_rate_and_an_unknown_peak_no_share() -> None:
    found = breakdown(Profile(STEPS, {}), "m", "x86", 1)
    assert [k.rate is None for k in found.kernels] == [True, False, True]
    assert all(k.of_peak is None for k in found.kernels)


def test_nothing_measured_is_nothing_said() -> None:
    assert breakdown(Profile(), "m", "x86", 1).kernels == ()
