"""Codebooks are judged by what they do to the outputs of the model, beside those chosen before."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from passes.share.share_models import ORT, share
from rewritten_models import actions
from text_models import build

from graphopt.pass_base import Context
from graphopt_passes.share.judge import Judge
from graphopt_passes.share.tensors import find_tensors

Array = np.ndarray
TWO = "g (float[B,32] x) => (float[B,32] y) { m = MatMul(x, a) y = MatMul(m, b) }"


def weights() -> tuple[Array, Array]:
    a, b = np.random.default_rng(0).standard_normal((2, 32, 32)).astype(np.float32)
    return a, b


def judge(model: ir.Model) -> Judge:
    feeds = [{"x": np.random.default_rng(seed).standard_normal((3, 32)).astype(np.float32)} for seed in range(2)]
    return Judge(model, find_tensors(model)[0], Context(model, ORT), feeds)


def test_what_changes_the_outputs_less_is_chosen() -> None:
    a, b = weights()
    model = build(TWO, a=a, b=b)
    first = find_tensors(model)[0][0]
    assert judge(model).settle(first, [a + 0.1, a + 0.01, a + 0.5]) == 1
    assert judge(model).noise(first, a) == 0


def test_what_was_settled_before_is_taken_into_account() -> None:
    a, b = weights()
    model = build(TWO, a=a, b=b)
    first, second = find_tensors(model)[0]
    one = judge(model)
    assert one.settle(second, [b, b / 2]) == 0
    one = judge(model)
    one.settle(first, [2 * a])
    assert one.settle(second, [b, b / 2]) == 1


def test_only_weights_that_it_was_given_are_known() -> None:
    a, b = weights()
    model = build(TWO, a=a, b=b)
    first, second = find_tensors(model)[0]
    one = Judge(model, [first], Context(model, ORT), [])
    assert one.knows(first) and not one.knows(second)


def test_outputs_that_are_scaled_afterwards_have_errors_relative_to_their_size() -> None:
    rng = np.random.default_rng(1)
    weight, sizes = rng.standard_normal((64, 48)), np.exp(rng.normal(0, 2, 48))
    text = "g (float[B,64] x) => (float[B,48] y) { m = MatMul(x, w) y = Mul(m, s) }"
    scaled = build(text, w=(weight * sizes).astype(np.float32), s=(1 / sizes).astype(np.float32))
    plain = build(text, w=(weight * sizes).astype(np.float32), s=np.ones(48, np.float32))
    found = [str(actions(share(model, bits=3, calibrated=True))) for model in (scaled, plain)]
    assert ["relative to the size of each output" in text for text in found] == [True, False]
