"""Layers of which the calibration data tells nothing keep the range of their input open."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from small_models import build

from graphopt.calibration import Dataset
from graphopt.model_io import ShapeBinding
from graphopt.pass_base import Context, PassResult
from graphopt.reference import Feed, Reference
from graphopt.runner import run_pass
from graphopt.targets import IntegerRules, Target
from graphopt_passes.quant import Quant

ORT = Target(name="ort")
BODY = "[one] a = MatMul(x, w1)\nr = Relu(a)\n[two] y = MatMul(r, w2)"


def quantized(value: float, target: Target = ORT) -> tuple[PassResult, float]:
    """Quantize a network on samples of one value; returns the result and its signal to noise on others, in dB."""

    def read() -> Iterator[Feed]:
        return iter([{"x": np.full((4, 64), value, np.float32)}] * 2)

    model = build("(float[N,64] x) => (float[N,64] y)", BODY, {"w1": (64, 64), "w2": (64, 64)})
    before = Reference(model)
    ctx = Context(model, target, calibration=Dataset("samples", "0", read), binding=ShapeBinding(dims={"N": 4}))
    result = run_pass(Quant(), ctx).result
    feed = {"x": np.random.default_rng(4).standard_normal((16, 64)).astype(np.float32)}
    exact, got = before.run(feed)["y"], Reference(model).run(feed)["y"]
    return result, 10 * float(np.log10(np.square(exact).sum() / np.square(exact - got).sum()))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (np.nan, "no finite number in 'x' on the calibration data"),
        (np.inf, "no finite number in 'x' on the calibration data"),
        (0.0, "'x' holds nothing but zeros on the calibration data"),
    ],
)
def test_data_that_tells_nothing_leaves_ranges_to_be_found_on_every_run(value: float, reason: str) -> None:
    result, level = quantized(value)
    actions = {change.site: change.action for change in result.changes if change.done}
    assert actions["one"] == f"int8, input ranges found on every run: {reason}"
    assert level > 25


def test_a_target_with_static_integers_only_takes_zeros_for_what_they_are() -> None:
    result, _ = quantized(0.0, Target(name="chip", integers=IntegerRules(static_only=True)))
    assert {change.site for change in result.changes if "calibrated ranges" in change.action} == {"one", "two"}
