from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import pytest
from small_models import build

from graphopt.analyses import CONSTANTS
from graphopt.calibration import Dataset
from graphopt.pass_base import Context
from graphopt.reference import Feed
from graphopt.targets import Target
from graphopt_passes.lowrank.judge import Judge
from graphopt_passes.lowrank.places import Place

SIGNATURE = "(float[N,12] x) => (float[N,12] early, float[N,6] y, float[12] fixed)"
BODY = """
    [a] h = Gemm(x, u, b)
    early = Relu(h)
    [c] m = MatMul(early, v)
    s = Add(m, x)
    [d] r = Gemm(s, w, e)
    y = Tanh(r)
    fixed = Identity(b)
"""
WEIGHTS = {"u": (12, 12), "b": (12,), "v": (12, 12), "w": (12, 6), "e": (6,)}
WEIGHT_OF = {"a": "u", "c": "v", "d": "w"}


def samples(count: int = 24, width: int = 12) -> Dataset:
    def read() -> Iterator[Feed]:
        rng = np.random.default_rng(5)
        for _ in range(count):
            yield {"x": rng.standard_normal((1, width)).astype(np.float32)}

    return Dataset("random", None, read, stacked=True)


def judged(model: ir.Model) -> tuple[Judge, Context]:
    ctx = Context(model, Target(name="ort"), calibration=samples())
    return Judge(model, samples(), ctx), ctx


def matrix_of(model: ir.Model, name: str, ctx: Context) -> np.ndarray:
    node = next(node for node in model.graph if node.name == name)
    place = Place.of(node, ctx.fact(CONSTANTS))
    assert isinstance(place, Place)
    return place.matrices()[0]


def with_weight(model: ir.Model, name: str, array: np.ndarray) -> ir.Model:
    other = model.clone()
    other.graph.initializers[name].const_value = ir.tensor(array.astype(np.float32), name=name)
    return other


def test_of_outputs_with_many_rows_fewer_samples_judge_single_layers() -> None:
    model = build("(float[N,12] x) => (float[N,12] y)", "[a] y = MatMul(x, u)", {"u": (12, 12)})
    for rows, count in ((1, 16), (16, 8), (400, 4)):
        feeds = [{"x": np.random.default_rng(i).standard_normal((rows, 12)).astype(np.float32)} for i in range(32)]
        data = Dataset("random", None, lambda feeds=feeds: iter(feeds), stacked=False)
        ctx = Context(model, Target(name="ort"), calibration=data)
        judge, dense = Judge(model, data, ctx), matrix_of(model, "a", ctx)
        moved = dense + 0.2 * np.random.default_rng(0).standard_normal(dense.shape)
        used = [feeds[2 * i] for i in range(0, 16, 16 // count)]
        wanted, found = (np.concatenate([feed["x"] @ matrix for feed in used]) for matrix in (dense, moved))
        expected = np.square(found - wanted).sum() / np.square(wanted - wanted.mean(axis=0)).sum()
        assert judge.lost_by("a", moved, np.zeros(12)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("order", ["acd", "dca", "cda", "aacc"])
def test_one_layer_costs_what_the_model_with_it_loses(order: str) -> None:
    model = build(SIGNATURE, BODY, WEIGHTS)
    judge, ctx = judged(model)
    rng = np.random.default_rng(0)
    for name in order:
        dense = matrix_of(model, name, ctx)
        dense = dense + 0.2 * rng.standard_normal(dense.shape)
        expected = judge.loss(with_weight(model, WEIGHT_OF[name], dense)).energy
        assert expected > 0
        assert judge.lost_by(name, dense, np.zeros(dense.shape[1])) == pytest.approx(expected, rel=1e-4)


def test_a_shift_of_the_bias_counts() -> None:
    model = build(SIGNATURE, BODY, WEIGHTS)
    judge, ctx = judged(model)
    shift = np.linspace(-1, 1, 6)
    expected = judge.loss(with_weight(model, "e", model.graph.initializers["e"].const_value.numpy() + shift)).energy
    assert judge.lost_by("d", matrix_of(model, "d", ctx), shift) == pytest.approx(expected, rel=1e-4)


def test_the_same_weight_costs_nothing_and_the_model_stays_as_it_is() -> None:
    model = build(SIGNATURE, BODY, WEIGHTS)
    judge, ctx = judged(model)
    for name in WEIGHT_OF:
        dense = matrix_of(model, name, ctx)
        assert judge.lost_by(name, dense, np.zeros(dense.shape[1])) < 1e-9
        judge.lost_by(name, 0 * dense, np.zeros(dense.shape[1]))
    assert judge.loss(model).energy == 0
    assert judge.loss(model).nats == pytest.approx(0, abs=1e-9)


def test_a_weight_that_two_nodes_read_changes_for_both() -> None:
    body = "[a] h = MatMul(x, u) t = Tanh(h) [c] y = MatMul(t, u)"
    model = build("(float[N,12] x) => (float[N,12] y)", body, {"u": (12, 12)})
    judge, ctx = judged(model)
    dense = matrix_of(model, "a", ctx) + 0.2 * np.random.default_rng(0).standard_normal((12, 12))
    expected = judge.loss(with_weight(model, "u", dense)).energy
    for name in "ca":
        assert judge.lost_by(name, dense, np.zeros(12)) == pytest.approx(expected, rel=1e-4)


def test_what_is_not_finite_is_lost_altogether() -> None:
    model = build(SIGNATURE, BODY, WEIGHTS)
    judge, ctx = judged(model)
    dense = np.full_like(matrix_of(model, "c", ctx), np.inf)
    assert judge.lost_by("c", dense, np.zeros(12)) == np.inf
