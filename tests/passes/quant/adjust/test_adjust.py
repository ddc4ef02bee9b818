"""The accuracy helpers of the pass: what they gain on layers made hard, and that they change nothing in float."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import pytest
from small_models import build, context, feeds

from graphopt.analyses import SHAPES
from graphopt.calibration import Dataset
from graphopt.errors import OptionError
from graphopt.model_io import ShapeBinding, input_specs, model_bytes
from graphopt.options import build as build_options
from graphopt.pass_base import Change, Context, PassResult
from graphopt.reference import Feed, Reference, random_feed
from graphopt.runner import run_pass
from graphopt.targets import Target
from graphopt_passes.fold.rewiring import FreshNames
from graphopt_passes.quant import Quant
from graphopt_passes.quant.adjust import Aims, balance_channels
from graphopt_passes.quant.adjust.components import components, find_scales
from graphopt_passes.quant.adjust.constants import scale_constant
from graphopt_passes.quant.adjust.outliers import outlying, split_outliers
from graphopt_passes.quant.sites import find_sites

OFF = {"equalize": False, "smooth": False, "bias_correction": False}
CONVS = (
    "(float[N,3,16,16] x) => (float[N,5,M,K] y)",
    """a = Conv<pads = [1,1,1,1]>(x, w1, b1) r = Relu(a) c = Conv<pads = [1,1,1,1]>(r, w2, b2) q = Relu(c)
    y = Conv(q, w3)""",
    {"w1": (16, 3, 3, 3), "b1": (16,), "w2": (16, 16, 3, 3), "b2": (16,), "w3": (5, 16, 1, 1)},
)
NORM = (
    "(float[N,S,32] x) => (float[N,S,32] y)",
    "n = LayerNormalization(x, g, h) a = MatMul(n, w1) m = Mul(n, v) y = Add(a, m)",
    {"g": (32,), "h": (32,), "w1": (32, 32), "v": (32,)},
)
GELU = (
    "(float[N,S,32] x) => (float[N,S,8] y)",
    "a = MatMul(x, w1) s = Add(a, b) e = Gelu(s) t = MatMul(e, w2) y = Add(t, c)",
    {"w1": (32, 64), "b": (64,), "w2": (64, 8), "c": (8,)},
)


def data(model: ir.Model, count: int = 8) -> Dataset:
    def read() -> Iterator[Feed]:
        rng = np.random.default_rng(3)
        for _ in range(count):
            yield random_feed(input_specs(model), ShapeBinding(dims={"N": 2, "S": 16}), rng)

    return Dataset("samples", "0", read)


def rescaled(seed: int = 0) -> ir.Model:
    """Two convolutions between which channels differ by up to 256."""
    model = build(*CONVS)
    rng, names = np.random.default_rng(seed), FreshNames(model)
    scales = find_scales(model, context(model).fact(SHAPES))
    for component in components(scales):
        factors = np.append(2.0 ** rng.integers(-4, 5, len(component.roots)), 1.0)
        for term in dict.fromkeys((*component.makers, *component.readers)):
            made, read = (1.0 if a is None else factors[component.slots(scales, a)] for a in (term.made, term.read))
            scale_constant(term.node, term.index, np.asarray(made / read), names)
    return model


def with_outlier(kind: str) -> ir.Model:
    """A channel 50 times as large as the others, which the layer behind divides out."""
    signature, body, weights = NORM if kind == "norm" else GELU
    model = build(signature, body, weights, opset=20)
    names, factors = FreshNames(model), np.ones(32 if kind == "norm" else 64)
    factors[5] = 50.0
    nodes = {node.outputs[0].name: node for node in model.graph}
    if kind == "norm":
        scale_constant(nodes["n"], 1, factors, names)
        scale_constant(nodes["n"], 2, factors, names)
        scale_constant(nodes["m"], 1, 1 / factors, names)
        scale_constant(nodes["a"], 1, 1 / factors[:, None], names)
    else:
        scale_constant(nodes["a"], 1, factors, names)
        scale_constant(nodes["t"], 1, 1 / factors[:, None], names)
    return model


def run(model: ir.Model, *, static: bool = True, **options: object) -> PassResult:
    ctx = Context(model, Target(name="ort"), calibration=data(model) if static else None)
    limits = {"min_sqnr": -100.0, "min_output_sqnr": -100.0}
    return run_pass(Quant(**{**limits, **options}), ctx).result  # type: ignore[arg-type]


def quality(model: ir.Model, **options: object) -> float:
    """Signal to noise of the quantized model in dB, the least of four random inputs."""
    exact, worst = Reference(model.clone()), np.inf
    rounded = model.clone()
    assert run(rounded, **options).modified
    got = Reference(rounded)
    for feed in feeds(model):
        wanted = exact.run(feed)["y"]
        noise = np.square(got.run(feed)["y"] - wanted).sum()
        worst = min(worst, 10 * np.log10(np.square(wanted).sum() / max(noise, 1e-30)))
    return float(worst)


def aims(model: ir.Model, **options: object) -> Aims:
    keys = frozenset(site.key for site in find_sites(model)[0])
    known = {"form": "static", "keys": keys, "bits": 8, "per_channel": True, "equalize": True, "smooth": True}
    return Aims(**{**known, **options})  # type: ignore[arg-type]


def said(changes: list[Change] | tuple[Change, ...], word: str) -> list[Change]:
    return [change for change in changes if word in change.action]


@pytest.mark.parametrize("option", ["equalize", "smooth"])
def test_rescaled_convolutions_come_back_to_what_easy_ones_keep(option: str) -> None:
    easy, hard = quality(build(*CONVS), **OFF), quality(rescaled(), **OFF)
    helped = quality(rescaled(), **{**OFF, option: True})
    assert hard < easy - 8
    assert helped > easy - 3


def test_an_outlier_behind_a_norm_is_folded_into_it() -> None:
    model = with_outlier("norm")
    assert quality(model, **{**OFF, "smooth": True}) > quality(model, **OFF) + 10
    result = run(model, **{**OFF, "smooth": True})
    assert said(result.changes, "channels scaled for")
    assert sum(node.op_type == "Mul" for node in model.graph) == 1


def test_an_outlier_that_nothing_can_absorb_gets_a_mul() -> None:
    model = with_outlier("gelu")
    assert quality(model, **{**OFF, "smooth": True}) > quality(model, **OFF) + 6
    result = run(model, **{**OFF, "smooth": True})
    assert said(result.changes, "outliers migrated by a Mul before 1 layers")
    assert sum(node.op_type == "Mul" for node in model.graph) == 1


@pytest.mark.parametrize("kind", ["convs", "norm", "gelu"])
def test_balancing_leaves_the_float_model_alone(kind: str) -> None:
    model = rescaled() if kind == "convs" else with_outlier(kind)
    exact, ctx = Reference(model.clone()), context(model, calibration=data(model))
    assert any(change.done for change in balance_channels(model, ctx, aims(model)))
    same = Reference(model)
    for feed in feeds(model):
        wanted = exact.run(feed)["y"]
        np.testing.assert_allclose(same.run(feed)["y"], wanted, atol=2e-5 * float(np.abs(wanted).max()))


def test_without_data_equalization_goes_by_the_weights() -> None:
    model = rescaled()
    exact, ctx = Reference(model.clone()), context(model)
    done = [change for change in balance_channels(model, ctx, aims(model)) if change.done]
    assert [change.site for change in done] and all(change.details["strength"] == 0.5 for change in done)
    same = Reference(model)
    for feed in feeds(model):
        wanted = exact.run(feed)["y"]
        np.testing.assert_allclose(same.run(feed)["y"], wanted, atol=2e-5 * float(np.abs(wanted).max()))


def test_models_in_balance_are_left_as_they_are_with_a_reason() -> None:
    model = build(*CONVS)
    balance_channels(model, context(model, calibration=data(model)), aims(model))
    before = model_bytes(model)
    changes = balance_channels(model, context(model, calibration=data(model)), aims(model))
    assert model_bytes(model) == before
    assert changes and not any(change.done for change in changes)
    assert all("keep their scale" in change.action for change in changes)


@pytest.mark.parametrize("rounding", ["gptq", "adaround"])
def test_rounding_by_data_beats_rounding_to_nearest(rounding: str) -> None:
    signature, body, weights = GELU
    model = build(signature, body, weights, opset=20)
    mixing = np.random.default_rng(5).standard_normal((32, 32)) + 1
    weight = model.graph.initializers["w1"]
    weight.const_value = ir.Tensor((mixing @ weight.const_value.numpy()).astype(np.float32), name="w1")  # type: ignore[union-attr]
    nearest, better = (quality(model, mode="weight", **OFF, rounding=r) for r in ("nearest", rounding))
    assert better > nearest - 0.2
    result = run(model, mode="weight", **OFF, rounding=rounding)
    gains = [change.details["expected_gain_db"] for change in said(result.changes, f"rounded by {rounding}")]
    assert len(gains) == 2 and all(float(gain) > 0 for gain in gains)


def test_bias_correction_removes_the_mean_of_the_error() -> None:
    signature, body, weights = CONVS
    model = build(signature, body, weights)
    off = {"mode": "static", **OFF}

    def mean_error(**options: object) -> float:
        exact, rounded = Reference(model.clone()), model.clone()
        run(rounded, **{**off, **options})
        got, total = Reference(rounded), np.zeros(5)
        for feed in data(model).feeds():
            total += (got.run(feed)["y"] - exact.run(feed)["y"]).mean(axis=(0, 2, 3))
        return float(np.abs(total).sum())

    assert mean_error(bias_correction=True) < 0.5 * mean_error()


def test_a_matmul_is_corrected_in_the_add_behind_it() -> None:
    model = build(*GELU[:2], GELU[2], opset=20)
    result = run(model, mode="static", bias_correction=True)
    assert [change.site for change in said(result.changes, "bias corrected")]
    bare = build("(float[N,S,32] x) => (float[N,S,64] y)", "y = MatMul(x, w1)", {"w1": (32, 64)})
    told = said(run(bare, mode="static").changes, "bias not corrected")
    assert "no Add with a constant follows" in told[0].action


def test_outliers_are_the_few_channels_that_make_the_range() -> None:
    reach = np.array([1.0, 60.0, 1.2, 50.0, 0.5, 1.1, 0.9, 1.0, 1.0, 1.0])
    np.testing.assert_array_equal(outlying(-reach, reach, 0.2), [1, 3])
    assert not outlying(-reach, reach, 0.1).size  # one of two does not help
    assert not outlying(-np.ones(10), np.ones(10), 0.5).size
    assert not outlying(-reach, reach, 0.0).size


@pytest.mark.parametrize("operator", ["MatMul", "Gemm"])
def test_split_outliers_leave_the_float_model_alone_and_save_the_others(operator: str) -> None:
    attributes = "<transB = 1>" if operator == "Gemm" else ""
    shape = (96, 32) if operator == "Gemm" else (32, 96)
    signature = "(float[N,32] x) => (float[N,96] y)"
    model = build(signature, f"a = Mul(x, v) y = {operator}{attributes}(a, w)", {"v": (32,), "w": shape})
    scale_constant(next(iter(model.graph)), 1, np.where(np.arange(32) == 3, 200.0, 1.0), FreshNames(model))
    plain, helped = quality(model, mode="static", **OFF), quality(model, mode="static", **OFF, outliers=0.05)
    assert helped > plain + 3
    exact, changed = Reference(model.clone()), model.clone()
    changes = split_outliers(changed, find_sites(changed)[0], 0.05, context(changed, calibration=data(model)))
    assert [change.action for change in changes] == ["outlier channels split off, in float"]
    same = Reference(changed)
    for feed in feeds(model):
        np.testing.assert_allclose(same.run(feed)["y"], exact.run(feed)["y"], rtol=1e-4, atol=1e-3)
    told = said(run(model, mode="static", **OFF, outliers=0.05).changes, "outlier channels stay in float")
    assert len(told) == 1


def test_every_helper_gives_the_same_bytes_again() -> None:
    options = {"equalize": True, "smooth": True, "bias_correction": True, "rounding": "adaround", "outliers": 0.05}
    written: list[bytes] = []
    for _ in range(2):
        model = rescaled()
        run(model, **options)
        written.append(model_bytes(model))
    assert written[0] == written[1]


def test_an_unknown_rounding_is_a_usage_error() -> None:
    with pytest.raises(OptionError, match="'up' is not one of nearest, gptq, adaround"):
        build_options(Quant, {"rounding": ("up",)}, "quant")
