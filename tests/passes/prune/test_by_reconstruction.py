from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.analyses import CHANNEL_GROUPS
from graphopt.analyses.streaming import expose
from graphopt.calibration import Dataset
from graphopt.pass_base import Context
from graphopt.reference import Feed, Reference
from graphopt.targets import Target
from graphopt_passes.prune import Prune
from graphopt_passes.prune.criteria import reconstruction as _prune_by_reconstruction
from graphopt_passes.prune.criteria.reconstruction import Reconstruction, elimination_costs, inverse_covariance

BODY = """
    [first] a = Conv<pads=[1,1,1,1]>(x, w1, b1) r = Relu(a)
    [second] c = Conv(r, w2) s = Relu(c)
    f = Flatten(s)
    [last] y = Gemm<transB=1>(f, head)
"""
SHAPES = {"w1": (6, 3, 3, 3), "b1": (6,), "w2": (8, 6, 1, 1), "head": (5, 8 * 16)}


def build(body: str = BODY, shapes: dict[str, tuple[int, ...]] | None = None) -> ir.Model:
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(s).astype(np.float32) for name, s in (shapes or SHAPES).items()}
    declared = ", ".join(f"float[{','.join(map(str, a.shape))}] {name}" for name, a in arrays.items())
    text = f'<ir_version: 8, opset_import: ["" : 17]> main (float[N,3,4,4] x) => (float[N,5] y) <{declared}> {{{body}}}'
    return ir.from_onnx_text(text, initializers=[ir.tensor(a, name=name) for name, a in arrays.items()])


def samples(count: int = 64) -> Dataset:
    def read() -> Iterator[Feed]:
        rng = np.random.default_rng(2)
        for _ in range(count):
            yield {"x": rng.standard_normal((1, 3, 4, 4)).astype(np.float32)}

    return Dataset("random", None, read, stacked=True)


def judged(model: ir.Model) -> list[np.ndarray | None]:
    ctx = Context(model, Target(name="ort"), calibration=samples())
    return Reconstruction().scores(model, ctx.fact(CHANNEL_GROUPS).free, ctx)


def costs(covariance: np.ndarray, energy: np.ndarray, rows: int = 1 << 30) -> np.ndarray:
    inverse = inverse_covariance(covariance, rows)
    assert inverse is not None
    shares = energy / (energy @ np.diag(covariance))
    return elimination_costs([(np.arange(len(energy))[:, None], shares, inverse)], np.zeros(len(energy)))


def test_channels_that_nothing_explains_cost_their_share_of_the_output() -> None:
    found = costs(np.diag([1.0, 4.0, 2.0]), np.array([1.0, 1.0, 3.0]))
    np.testing.assert_allclose(found, np.array([1, 4, 6]) / 11, rtol=1e-4)


def test_of_two_copies_one_is_free_and_the_other_is_dear() -> None:
    x = np.random.default_rng(0).standard_normal((1000, 3))
    x[:, 2] = 2 * x[:, 0]
    found = costs(np.cov(x.T), np.ones(3))
    assert found.argmin() == 0
    assert found[0] < 1e-4
    assert found[2] > 0.5


def test_costs_are_those_of_the_best_repair() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4000, 5)) @ rng.standard_normal((5, 5))
    x -= x.mean(axis=0)
    cheapest = costs(np.cov(x.T), np.ones(5)).min()
    missed = []
    for u in range(5):
        others = np.delete(x, u, axis=1)
        missed.append(np.square(x[:, u] - others @ np.linalg.lstsq(others, x[:, u], rcond=None)[0]).sum())
    assert cheapest == pytest.approx(min(missed) / np.square(x).sum(), rel=1e-2)


def test_few_samples_do_not_make_channels_look_superfluous() -> None:
    x = np.random.default_rng(0).standard_normal((8, 40))
    covariance = np.cov(x.T, bias=True)
    assert costs(covariance, np.ones(40), rows=8).sum() > 0.5
    assert costs(covariance, np.ones(40)).sum() < 0.5


def test_there_is_no_inverse_where_nothing_varies() -> None:
    assert inverse_covariance(np.zeros((2, 2)), 10) is None


def test_costs_besides_are_added() -> None:
    inverse = inverse_covariance(np.eye(3), 1 << 30)
    assert inverse is not None
    found = elimination_costs([(np.arange(3)[:, None], np.ones(3) / 3, inverse)], np.array([0.0, 1.0, 2.0]))
    np.testing.assert_allclose(found, [1 / 3, 4 / 3, 7 / 3], rtol=1e-4)


def test_a_channel_that_is_a_copy_leaves_first() -> None:
    model = build()
    for name in ("w1", "b1"):
        array = model.graph.initializers[name].const_value.numpy().copy()
        array[4] = 3 * array[1]
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    first, second = judged(model)
    assert first is not None
    assert second is not None
    assert first.argmin() in (1, 4)
    assert np.sort(first)[0] < 0.1 * np.sort(first)[1]
    assert second.shape == (8,)


def test_portions_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    together = judged(build())
    monkeypatch.setattr(_prune_by_reconstruction, "_AT_ONCE", 1)
    for alone, expected in zip(judged(build()), together, strict=True):
        assert expected is not None
        np.testing.assert_allclose(alone, expected, rtol=1e-6)


def test_channels_too_many_for_a_covariance_are_taken_for_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_prune_by_reconstruction, "_WIDEST", 6)
    model = build()
    narrow, wide = judged(model)
    assert narrow is not None
    assert wide is not None
    assert wide.sum() == pytest.approx(1.0, rel=1e-6)
    seen = Reference(expose(model, ["s"])).run({"x": np.concatenate([feed["x"] for feed in samples().feeds()])})["s"]
    head = model.graph.initializers["head"].const_value.numpy().astype(np.float64)
    power = np.square(head).sum(axis=0) * seen.reshape(len(seen), -1).astype(np.float64).var(axis=0)
    np.testing.assert_allclose(wide, power.reshape(8, 16).sum(axis=1) / power.sum(), rtol=1e-4)


def test_layers_that_read_the_same_share_a_covariance_and_each_counts() -> None:
    body = BODY.replace("[last] y = Gemm<transB=1>(f, head)", "[a] g = Gemm<transB=1>(f, head) [b] h = Gemm<transB=1>"
                        "(f, head2) y = Add(g, h)")  # fmt: skip
    shapes = SHAPES | {"head2": (5, 8 * 16)}
    both, one = judged(build(body, shapes))[1], judged(build())[1]
    assert both is not None
    assert one is not None
    assert 1.5 < both.sum() / one.sum() < 2.5


def test_readers_with_groups_are_measured_group_by_group() -> None:
    body = """
        [first] a = Conv(x, w1) r = Relu(a) [grouped] c = Conv<group=2>(r, w2)
        p = GlobalAveragePool(c) f = Flatten(p) [last] y = Gemm<transB=1>(f, head)
    """
    model = build(body, {"w1": (6, 3, 1, 1), "w2": (4, 3, 1, 1), "head": (5, 4)})
    array = model.graph.initializers["w2"].const_value.numpy().copy()
    array[:, 1] = 0
    model.graph.initializers["w2"].const_value = ir.tensor(array, name="w2")
    first = judged(model)[0]
    assert first is not None
    assert first.shape == (3,)
    assert first[1] == 0
    assert first[[0, 2]].min() > 0.05


def test_a_transposed_convolution_reads_its_channels() -> None:
    body = """
        [first] a = Conv(x, w1) r = Relu(a) [turned] c = ConvTranspose<group=2>(r, w2)
        p = GlobalAveragePool(c) f = Flatten(p) [last] y = Gemm<transB=1>(f, head)
    """
    model = build(body, {"w1": (6, 3, 1, 1), "w2": (6, 2, 1, 1), "head": (5, 4)})
    first = judged(model)[0]
    assert first is not None
    assert first.shape == (3,)
    assert first.min() > 0


def test_auto_means_reconstruction_with_data_and_l2_without() -> None:
    for data, named in ((samples(), Prune(criterion="reconstruction")), (None, Prune(criterion="l2"))):
        changes = []
        for step in (Prune(), named):
            model = build()
            changes.append(step.run(model, Context(model, Target(name="ort"), calibration=data)).changes)
        assert changes[0] == changes[1]


@pytest.mark.parametrize("copies", [1, 3])
def test_costs_are_those_of_inverting_anew_each_time(copies: int) -> None:
    """Units leave in several portions, and what is left is multiplied out more than once."""
    rng = np.random.default_rng(0)
    inputs, units = 24 * copies, 24
    covariance = np.cov(rng.standard_normal((inputs, 200)) + rng.standard_normal(200))
    positions, shares = rng.permutation(inputs).reshape(units, copies), rng.random(inputs)
    found = elimination_costs([(positions, shares, np.linalg.inv(covariance))], np.zeros(units))
    left, expected, dearest = list(range(units)), np.zeros(units), 0.0
    while left:
        kept = np.sort(positions[left].reshape(-1))
        saliency = dict(zip(kept, shares[kept] / np.diag(np.linalg.inv(covariance[np.ix_(kept, kept)])), strict=True))
        costs_now = [sum(saliency[at] for at in positions[unit]) for unit in left]
        dearest = max(dearest, min(costs_now))
        expected[left.pop(int(np.argmin(costs_now)))] = dearest
    np.testing.assert_allclose(found, expected, rtol=1e-8)
