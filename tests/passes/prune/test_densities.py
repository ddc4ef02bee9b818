"""How much of a budget of zeros each layer gets."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.calibration import Dataset
from graphopt.model_io import model_bytes
from graphopt.pass_base import Context
from graphopt.reference import Feed, Reference
from graphopt.targets import Target
from graphopt.testing import check_pass
from graphopt_passes.prune import Prune
from graphopt_passes.prune.pattern.densities import _levelled, _refined, _rungs, by_sensitivity, spread
from graphopt_passes.prune.pattern.sites import find_sites
from graphopt_passes.prune.pattern.trial import Replacement, Trial

BODY = """
    [wide] a = Gemm(x, w1, b1) r = Relu(a)
    [deaf] c = MatMul(r, w2) d = Mul(c, faint) e = Add(r, d)
    [last] y = Gemm(e, w3)
"""
SHAPES = {"w1": (16, 24), "b1": (24,), "w2": (24, 24), "w3": (24, 6), "faint": ()}


def build_model(body: str = BODY, seed: int = 0, outputs: str = "float[N,6] y") -> ir.Model:
    rng = np.random.default_rng(seed)
    arrays = {name: np.array(rng.standard_normal(shape), np.float32) for name, shape in SHAPES.items()}
    arrays["faint"] = np.array(1e-3, np.float32)
    used = {name: array for name, array in arrays.items() if name in body}
    declared = ", ".join(f"float[{','.join(map(str, a.shape))}] {name}" for name, a in used.items())
    text = f'<ir_version: 8, opset_import: ["" : 17]> main (float[N,16] x) => ({outputs}) <{declared}> {{{body}}}'
    return ir.from_onnx_text(text, initializers=[ir.tensor(array, name=name) for name, array in used.items()])


def samples(count: int = 64, seed: int = 1) -> Dataset:
    mixing = np.random.default_rng(7).standard_normal((16, 16)) * np.linspace(0.1, 2, 16)

    def read() -> Iterator[Feed]:
        rng = np.random.default_rng(seed)
        for _ in range(count):
            yield {"x": (rng.standard_normal((1, 16)) @ mixing + 0.5).astype(np.float32)}

    return Dataset("random", None, read, stacked=True)


def context(model: ir.Model, data: Dataset | None) -> Context:
    return Context(model, Target(name="ort"), calibration=data)


def distance(model: ir.Model, whole: ir.Model) -> float:
    """Error of the outputs in parts of their energy, on samples that nothing was fitted to."""
    pairs = [(Reference(whole).run(feed)["y"], Reference(model).run(feed)["y"]) for feed in samples(16, 5).feeds()]
    return sum(float(np.square(b - a).sum()) for a, b in pairs) / sum(float(np.square(a).sum()) for a, _ in pairs)


def sparsities(model: ir.Model) -> dict[str, float]:
    arrays = {name: model.graph.initializers[name].const_value.numpy() for name in ("w1", "w2", "w3")}
    return {name: float((array == 0).mean()) for name, array in arrays.items()}


def test_a_layer_that_outputs_hardly_hear_gets_most_of_the_zeros() -> None:
    model = build_model()
    sites, _ = find_sites(model, context(model, None))
    counts = by_sensitivity(model, sites, 0.5, "obs", context(model, samples()))
    share = {site.name: count / site.size for site, count in zip(sites, counts, strict=True)}
    assert share["deaf"] > 0.9
    assert share["wide"] < 0.3
    assert sum(counts) == round(0.5 * sum(site.size for site in sites))
    by_weights = dict(zip([site.name for site in sites], spread(sites, 0.5), strict=True))
    assert counts[1] > by_weights["deaf"]


def test_weights_of_the_model_stay_while_it_is_tried() -> None:
    model = build_model()
    before = model_bytes(model)
    sites, _ = find_sites(model, context(model, None))
    by_sensitivity(model, sites, 0.6, "obs", context(model, samples()))
    assert model_bytes(model) == before


def test_outputs_lose_less_than_with_the_same_fraction_of_every_layer() -> None:
    whole, found = build_model(), dict[str, float]()
    for scope in ("uniform", "sensitivity"):
        model = build_model()
        Prune(pattern="unstructured", ratio=0.5, scope=scope).run(model, context(model, samples()))
        assert sum(sparsities(model).values()) > 0
        found[scope] = distance(model, whole)
    assert found["sensitivity"] < 0.3 * found["uniform"]


def test_auto_is_sensitivity_with_samples_and_magnitudes_without() -> None:
    for data, scope in ((samples(), "sensitivity"), (None, "global")):
        named, automatic = build_model(), build_model()
        result = Prune(pattern="unstructured", ratio=0.5).run(automatic, context(automatic, data))
        Prune(pattern="unstructured", ratio=0.5, scope=scope).run(named, context(named, data))
        assert result.metrics["scope"] == scope
        assert model_bytes(named) == model_bytes(automatic)


def test_a_layer_that_loses_nothing_says_that_others_can_spare_more() -> None:
    model = build_model()
    result = Prune(pattern="unstructured", ratio=0.2).run(model, context(model, samples()))
    reasons = {change.site: change.action for change in result.changes if not change.done}
    assert reasons
    assert set(reasons.values()) == {"skipped: other layers can spare weights better"}


@pytest.mark.parametrize("ratio", [0.3, 0.9, 0.999])
def test_the_pass_keeps_its_contract_at_any_ratio(ratio: float) -> None:
    result = check_pass(Prune(pattern="unstructured", ratio=ratio), build_model(), calibration=samples())
    assert result.metrics["sparsity"] == pytest.approx(ratio, abs=0.002)


def test_layers_that_samples_tell_nothing_of_share_the_level_of_the_others() -> None:
    body = """
        s = ReduceSum<keepdims=0>(x) z = Cast<to=9>(s) a = Gemm(x, w1, b1) r = Relu(a)
        t = If<then_branch = left () => (float[N,24] l) { [inner] l = MatMul(r, w2) },
               else_branch = right () => (float[N,24] k) { k = Identity(r) }>(z)
        [last] y = Gemm(t, w3)
    """
    model = build_model(body)
    sites, _ = find_sites(model, context(model, None))
    counts = by_sensitivity(model, sites, 0.5, "obs", context(model, samples()))
    assert sum(counts) == round(0.5 * sum(site.size for site in sites))
    Prune(pattern="unstructured", ratio=0.5).run(model, context(model, samples()))
    assert all(np.isfinite(Reference(model).run(feed)["y"]).all() for feed in samples(4, 9).feeds())


def test_a_trial_measures_what_replaced_weights_do_to_the_outputs() -> None:
    whole, other = build_model(), build_model()
    ctx = context(whole, samples())
    sites, _ = find_sites(whole, ctx)
    trial = Trial(whole, sites, {site.name: site.name == "wide" for site in sites}, 1, ctx)
    rng = np.random.default_rng(3)
    matrix, offset = sites[0].matrix() + rng.standard_normal((1, 16, 24)), rng.standard_normal((1, 24))
    found = trial.change({sites[0]: Replacement(matrix, offset, 0.0)})
    for name, array in (("w1", matrix[0]), ("b1", other.graph.initializers["b1"].const_value.numpy() + offset[0])):
        other.graph.initializers[name].const_value = ir.tensor(array.astype(np.float32), name=name)
    pairs = [(Reference(whole).run(f)["y"], Reference(other).run(f)["y"]) for f in samples().feeds()]
    expected = sum(float(np.square(b - a).sum()) for a, b in pairs) / sum(float(np.square(a).sum()) for a, _ in pairs)
    assert found == pytest.approx(expected, rel=1e-4)
    assert trial.change({}) == 0


def test_rungs_begin_at_nothing_and_leave_one_weight() -> None:
    model = build_model()
    sites, _ = find_sites(model, context(model, None))
    for site in sites:
        rungs = _rungs(site)
        assert rungs[0] == 0
        assert rungs[-1] < site.size
        counts, costs = _refined(rungs, np.linspace(0, 1, len(rungs)) ** 3)
        assert set(rungs) <= set(counts)
        assert (np.diff(costs) > 0).all()
        assert costs[0] == 0


def test_measured_levels_correct_what_was_predicted() -> None:
    predicted = [np.array([0.0, 1.0, 2.0]), np.array([0.0, 1.0, 2.0]), np.array([0.0, 1.0, 3.0])]
    curves = _levelled(predicted, [[(1, 10.0), (2, 20.0)], [(2, 20.0)], []])
    np.testing.assert_allclose(curves[0], [0, 10, 20], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(curves[2], [0, 10, 30], rtol=1e-6, atol=1e-6)
