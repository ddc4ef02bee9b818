from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest
from small_models import IMAGE, build, context

from graphopt.analyses import CHANNEL_GROUPS, ChannelGroup
from graphopt.calibration import Dataset
from graphopt.criterion_base import Criterion, judge, weight_parts, weights_of
from graphopt.errors import ExitCode, OptionError, PassError
from graphopt.pass_base import Context
from graphopt.testing import ContractError, check_criterion
from graphopt_passes.prune import Prune
from graphopt_passes.prune.criteria import find_criterion, worth
from graphopt_passes.prune.criteria import output as _prune_by_output
from graphopt_passes.prune.criteria.output import output_distance

ROWS = "(float[N,2] x) => (float[N,2] y)"
DENSE = "[first] a = MatMul(x, w1) r = Relu(a) [second] y = MatMul(r, w2)"


def put(model: ir.Model, **arrays: Any) -> ir.Model:
    for name, array in arrays.items():
        model.graph.initializers[name].const_value = ir.tensor(np.asarray(array, np.float32), name=name)
    return model


def dense(w1: Any, w2: Any, body: str = DENSE) -> ir.Model:
    arrays = {"w1": np.asarray(w1, np.float32), "w2": np.asarray(w2, np.float32)}
    return put(build(ROWS, body, {name: array.shape for name, array in arrays.items()}), **arrays)


def rows(*values: Any) -> Dataset:
    return Dataset("rows", None, lambda: ({"x": np.array([row], np.float32)} for row in values), stacked=True)


def judged(name: str, model: ir.Model, data: Dataset | None = None) -> list[np.ndarray]:
    ctx = context(model, calibration=data, rng=np.random.default_rng(5))
    return worth(find_criterion(name, ctx), model, ctx.fact(CHANNEL_GROUPS).free, ctx)


# ---------------------------------------------------------------- answers known in advance


def test_l1_multiplies_sums_of_magnitudes_of_makers_and_readers() -> None:
    (found,) = judged("l1", dense([[1, 0, 3], [-1, 1, 2]], [[1, 1], [2, -2], [0, 1]]))
    product = np.array([2, 1, 5]) * np.array([2, 4, 1])
    np.testing.assert_allclose(found, product / product.mean())


def test_l2_multiplies_euclidean_norms() -> None:
    (found,) = judged("l2", dense([[3, 0, 1], [4, 1, 0]], [[0, 2], [3, 4], [1, 0]]))
    np.testing.assert_allclose(found, np.array([10, 5, 1]) / (16 / 3))


def test_norms_count_as_the_batch_norm_behind_scales_them() -> None:
    body = """
        [c] a = Conv(x, w1) b = BatchNormalization(a, s, o, m, var)
        p = GlobalAveragePool(b) f = Flatten(p) y = MatMul(f, w2)
    """
    model = build(IMAGE, body, {"w1": (2, 3, 1, 1), "s": (2,), "o": (2,), "m": (2,), "var": (2,), "w2": (2, 5)})
    put(model, w1=np.ones((2, 3, 1, 1)), s=[1, -6], var=[1, 4], w2=np.ones((2, 5)))
    (found,) = judged("l2", model)
    np.testing.assert_allclose(found, [0.5, 1.5], rtol=1e-4)
    (found,) = judged("bn-scale", model)
    np.testing.assert_allclose(found, np.array([1, 6]) / 3.5)


def test_bn_scale_is_l2_where_there_is_no_normalization() -> None:
    model = dense([[3, 0, 1], [4, 1, 0]], [[0, 2], [3, 4], [1, 0]])
    np.testing.assert_array_equal(judged("bn-scale", model)[0], judged("l2", model)[0])


def test_fpgm_sums_distances_to_the_other_filters() -> None:
    (found,) = judged("fpgm", dense([[0, 3, 9], [0, 4, 12]], np.ones((3, 2))))
    np.testing.assert_allclose(found, np.array([20, 15, 25]) / 20)


def test_fpgm_compares_with_some_where_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    model = dense(rng.standard_normal((2, 600)), np.ones((600, 2)))
    (exact,) = judged("fpgm", model)
    monkeypatch.setattr("graphopt_passes.prune.criteria.weights._DISTANCES", 1)
    (found,) = judged("fpgm", model)
    assert np.abs(found - exact).max() < 0.2
    assert np.corrcoef(found, exact)[0, 1] > 0.98


def test_activation_is_the_mean_magnitude_behind_the_activation_function() -> None:
    model = dense([[1, 0, -1], [0, 2, 0]], np.ones((3, 2)))
    (found,) = judged("activation", model, rows([1, 1], [3, -1], [-2, 0]))
    means = np.array([1 + 3 + 0, 2 + 0 + 0, 0 + 0 + 2]) / 3
    np.testing.assert_allclose(found, means / means.mean())


def test_apoz_counts_what_is_not_zero_behind_the_activation_function() -> None:
    model = dense([[1, 0, -1], [0, 2, 0]], np.ones((3, 2)))
    (found,) = judged("apoz", model, rows([1, 1], [3, -1], [2, 0], [1, -1]))
    shares = np.array([4, 1, 0]) / 4
    np.testing.assert_allclose(found, shares / shares.mean())


def test_apoz_is_l2_where_nothing_is_ever_zero() -> None:
    model = dense([[3, 0, 1], [4, 1, 0]], [[0, 2], [3, 4], [1, 0]], DENSE.replace("Relu", "Sigmoid"))
    np.testing.assert_array_equal(judged("apoz", model, rows([1, 2], [2, 1]))[0], judged("l2", model)[0])


def test_wanda_multiplies_readers_with_the_root_mean_square() -> None:
    model = dense([[1, 0, -1], [0, 2, 0]], [[1, -1], [3, 0], [0, 5]])
    (found,) = judged("wanda", model, rows([1, 1], [3, -1], [-2, 0]))
    loud = np.sqrt(np.array([1 + 9, 4, 4]) / 3) * np.array([2, 3, 5])
    np.testing.assert_allclose(found, loud / loud.mean())


def test_wanda_of_grouped_convolutions_pairs_each_filter_with_its_channels() -> None:
    body = "[a] a = Conv(x, w1) [b] b = Conv<group=2>(a, w2) p = GlobalAveragePool(b) f = Flatten(p) y = MatMul(f, w3)"
    model = build("(float[N,4,1,1] x) => (float[N,5] y)", body, {"w1": (4, 4, 1, 1), "w2": (4, 2, 1, 1), "w3": (4, 5)})
    w2 = np.array([[1, 2], [3, 4], [5, 6], [7, 8]], np.float32)
    put(model, w1=np.eye(4)[:, :, None, None], w2=w2[:, :, None, None])
    data = Dataset(
        "x", None, lambda: iter([{"x": np.array([1, 2, 3, 4], np.float32).reshape(1, 4, 1, 1)}]), stacked=True
    )
    found = judged("wanda", model, data)[0]
    expected = np.array([4 * 1 + 12 * 3, 6 * 2 + 14 * 4])
    np.testing.assert_allclose(found, expected / expected.mean())


def test_output_change_is_what_the_outputs_lose() -> None:
    model = dense([[1, 0, -1], [0, 2, 0]], [[1, 1], [2, 0], [0, 3]])
    x = np.array([[1, 1], [3, -1], [-2, 0.0]])
    hidden = np.maximum(x @ [[1, 0, -1], [0, 2, 0]], 0)
    readers = np.array([[1, 1], [2, 0], [0, 3]])
    (found,) = judged("output-change", model, rows(*x))
    lost = [np.square(np.outer(hidden[:, u], readers[u])).sum() for u in range(3)]
    np.testing.assert_allclose(found, lost / np.square(hidden @ readers).sum(), rtol=1e-5)


def test_random_follows_the_generator_and_nothing_else() -> None:
    model = dense(np.ones((2, 3)), np.ones((3, 2)))
    expected = np.random.default_rng(5).random(3)
    np.testing.assert_allclose(judged("random", model)[0], expected / expected.mean())


# ---------------------------------------------------------------- output-change counts its runs


def test_units_are_masked_in_chunks_where_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    model = dense(rng.standard_normal((2, 40)), rng.standard_normal((40, 2)))
    data = rows(*rng.standard_normal((8, 2)))
    (exact,) = judged("output-change", model, data)
    runs: list[int] = []
    change = _prune_by_output._Masked.change

    def counted(self: Any, group: ChannelGroup, masks: Any, units: np.ndarray) -> float:
        runs.append(len(units))
        return change(self, group, masks, units)

    monkeypatch.setattr(_prune_by_output._Masked, "change", counted)
    monkeypatch.setattr(_prune_by_output, "_MOST_RUNS", 10)
    (found,) = judged("output-change", model, data)
    assert runs == [4] * 10
    assert (found > 0).all()
    assert np.corrcoef(np.argsort(np.argsort(found)), np.argsort(np.argsort(exact)))[0, 1] > 0.5
    runs.clear()
    monkeypatch.setattr(_prune_by_output, "_MACS", 1)
    judged("output-change", model, data)
    assert runs == [20, 20]


def test_large_outputs_are_compared_on_fewer_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_prune_by_output, "_KEPT_BYTES", 1)
    monkeypatch.setattr(_prune_by_output, "_BATCH", 1)
    model = dense([[1, 0], [0, 1]], [[1, 0], [0, 1]])
    (found,) = judged("output-change", model, rows([1, 3], [5, 0]))
    np.testing.assert_allclose(found, [0.1, 0.9], rtol=1e-5)


def test_outputs_are_compared_by_their_kind() -> None:
    one = np.array([3.0, 4.0])
    assert output_distance([one], [one]) == 0
    assert output_distance([one], [np.array([0.0, 4.0])]) == pytest.approx(9 / 25)
    assert output_distance([one], [np.array([np.nan, 4.0])]) == 1e6
    assert output_distance([one], [one[:1]]) == 1
    assert output_distance([np.array([1, 2, 3, 4])], [np.array([1, 2, 0, 0])]) == 0.5
    assert output_distance([np.zeros(2)], [np.zeros(2)]) == 0
    assert output_distance([np.zeros(2)], [np.ones(2)]) == 1


# ---------------------------------------------------------------- names, options and the contract


class Fixed(Criterion):
    """Whatever it is told."""

    name: ClassVar[str] = "fixed"

    def __init__(self, *scores: Any) -> None:
        self.told = scores

    def scores(self, model: ir.Model, groups: Any, ctx: Context) -> list[Any]:
        return list(self.told)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("taylor", "prune.criterion: taylor needs gradients, not available yet; use l2"),
        ("wnada", "prune.criterion: no criterion called 'wnada'; did you mean 'wanda'?"),
        ("zzz", "prune.criterion: no criterion called 'zzz'; known: activation, apoz, auto, bn-scale, fpgm, l1, l2, "),
        ("wanda", "prune.criterion: wanda needs samples; give --calibration, or use l2"),
        ("output-change", "prune.criterion: output-change needs samples; give --calibration, or use l2"),
    ],
)
def test_criteria_that_cannot_judge_are_refused(name: str, message: str) -> None:
    model = dense(np.ones((2, 3)), np.ones((3, 2)))
    with pytest.raises(OptionError) as caught:
        Prune(criterion=name).requires(model, context(model))
    assert str(caught.value).startswith(message)
    assert caught.value.exit_code == ExitCode.USAGE


def test_criteria_of_the_context_are_found() -> None:
    model = dense(np.ones((2, 3)), np.ones((3, 2)))
    ctx = context(model, criteria={"fixed": Fixed([3.0, 1.0, 2.0])})
    Prune(criterion="fixed").requires(model, ctx)
    Prune(criterion="fixed", ratio=0.6).run(model, ctx)
    assert model.graph.initializers["w1"].const_value.shape == (2, 1)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ((), "criterion fixed: returns 0 scores for 1 groups"),
        (([1.0],), r"criterion fixed: gives 3 units of 'first' scores of shape \(1,\)"),
        (([1.0, -1.0, 0.0],), "criterion fixed: gives units of 'first' scores that are negative or not finite"),
        (([1.0, np.nan, 0.0],), "scores that are negative or not finite"),
    ],
)
def test_a_criterion_that_breaks_its_contract_is_named(scores: Any, message: str) -> None:
    with pytest.raises(PassError, match=message):
        check_criterion(Fixed(*scores), dense(np.ones((2, 3)), np.ones((3, 2))))


def test_a_criterion_that_has_nothing_to_go_by_leaves_it_to_the_norms() -> None:
    model = dense([[3, 0, 1], [4, 1, 0]], [[0, 2], [3, 4], [1, 0]])
    ctx = context(model)
    groups = ctx.fact(CHANNEL_GROUPS).free
    np.testing.assert_array_equal(worth(Fixed(None), model, groups, ctx)[0], judged("l2", model)[0])
    shared = type("Shared", (Fixed,), {"comparable": True})(None)
    assert worth(shared, model, groups, ctx)[0].sum() == pytest.approx(1)
    assert judge(Fixed([0.0, 0.0, 0.0]), model, groups, ctx)[0].tolist() == [1, 1, 1]


def test_the_kit_notices_scores_that_differ_between_runs() -> None:
    class Moody(Fixed):
        def scores(self, model: ir.Model, groups: Any, ctx: Context) -> list[Any]:
            self.told = (*self.told, 1.0)
            return [np.full(3, len(self.told)) + np.eye(3)[len(self.told) % 3]]

    with pytest.raises(ContractError, match="two runs on the same model give the same scores"):
        check_criterion(Moody(), dense(np.ones((2, 3)), np.ones((3, 2))))


def test_slices_come_in_parts_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    body = "[a] a = Conv(x, w1) r = Relu(a) f = Flatten(r) y = Gemm(f, w2)"
    model = build(IMAGE, body, {"w1": (6, 3, 7, 7), "w2": (24, 5)})
    ctx = context(model)
    (group,) = ctx.fact(CHANNEL_GROUPS).free
    (place,) = weights_of(group, "input")
    whole = np.concatenate(list(weight_parts(place, ctx)), axis=1)
    assert whole.shape == (6, 20)
    monkeypatch.setattr("graphopt.criterion_base._PART_BYTES", 1)
    parts = list(weight_parts(place, ctx))
    assert len(parts) == 5
    np.testing.assert_array_equal(np.sort(np.concatenate(parts, axis=1), axis=1), np.sort(whole, axis=1))
