from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.analyses import CHANNEL_GROUPS
from graphopt.analyses.ranges import expose
from graphopt.calibration import Dataset, open_calibration
from graphopt.model_io import ShapeBinding, input_specs, load_model, model_bytes
from graphopt.pass_base import Change, Context, PassResult
from graphopt.reference import Feed, Reference
from graphopt.targets import Target
from graphopt.testing import check_pass
from graphopt_passes.fold import Fold
from graphopt_passes.prune import Prune
from graphopt_passes.prune.refit import sites as _refit_sites
from graphopt_passes.prune.refit.outlook import Outlook
from graphopt_passes.prune.refit.refit import Refit, refit
from graphopt_passes.prune.removal import lost_positions, remove

Shapes = dict[str, tuple[int, ...]]

BODY = """
    [first] a = Conv<pads=[1,1,1,1]>(x, w1, b1) r = Relu(a)
    [second] c = Conv(r, w2) s = Relu(c)
    p = GlobalAveragePool(s) f = Flatten(p)
    [last] y = Gemm<transB=1, alpha=0.5>(f, head, bias)
"""
SHAPES: Shapes = {"w1": (6, 3, 3, 3), "b1": (6,), "w2": (8, 6, 1, 1), "head": (5, 8), "bias": (5,)}
TAIL = "p = GlobalAveragePool(c) f = Flatten(p) [last] y = Gemm<transB=1>(f, head)"


def build(body: str = BODY, shapes: Shapes = SHAPES) -> ir.Model:
    rng = np.random.default_rng(0)
    tensors = [ir.tensor(rng.standard_normal(s).astype(np.float32), name=name) for name, s in shapes.items()]
    declared = ", ".join(f"float[{','.join(map(str, s))}] {name}" for name, s in shapes.items())
    text = f'<ir_version: 8, opset_import: ["" : 17]> main (float[N,3,8,8] x) => (float[N,5] y) <{declared}> {{{body}}}'
    return ir.from_onnx_text(text, initializers=tensors)


def samples(count: int = 32, seed: int = 2) -> Dataset:
    def read() -> Iterator[Feed]:
        rng = np.random.default_rng(seed)
        for _ in range(count):
            yield {"x": rng.standard_normal((1, 3, 8, 8)).astype(np.float32)}

    return Dataset("random", None, read, stacked=True)


def context(model: ir.Model, data: Dataset | None = None) -> Context:
    return Context(model, Target(name="ort"), calibration=data)


def outputs(model: ir.Model, count: int = 8) -> np.ndarray:
    session = Reference(model)
    return np.concatenate([session.run(feed)["y"] for feed in samples(count, seed=3).feeds()])


def copy_channel(model: ir.Model, target: int, source: int, *names: str) -> None:
    """Make a channel three times another one, in every tensor named."""
    for name in names:
        value = model.graph.initializers[name]
        array = value.const_value.numpy().copy()
        array[target] = 3 * array[source]
        value.const_value = ir.tensor(array, name=name)


def cut(model: ir.Model, units: dict[str, list[int]], data: Dataset | None = None) -> tuple[Refit, ir.Model]:
    """Remove units of groups by name and refit; returns the whole model too."""
    ctx, whole = context(model, data), model.clone()
    groups = ctx.fact(CHANNEL_GROUPS)
    removals = [(group, units[group.name]) for group in groups.groups if group.name in units]
    assert len(removals) == len(units)
    remove(model, groups, removals)
    ctx.drop_facts()
    return refit(whole, model, lost_positions(removals), data or samples(), ctx), whole


def relative(model: ir.Model, whole: ir.Model) -> float:
    expected = outputs(whole)
    return float(np.abs(outputs(model) - expected).max() / np.abs(expected).max())


def plain(channels: int) -> Outlook:
    """An outlook that knows of no shortcut and no activation."""
    nothing, edge = np.zeros(channels), np.full(channels, np.inf)
    return Outlook(None, nothing, nothing, -edge, edge, nothing + 1)


def actions(refitted: Refit) -> dict[str, str]:
    return {change.site: change.action for change in refitted.changes}


@pytest.mark.parametrize(
    ("body", "shapes"),
    [
        (BODY, SHAPES),
        # no biases at all, one is added
        ("[first] a = Conv<strides=[2,2]>(x, w1, b1) [second] c = Conv(a, w2) " + TAIL, SHAPES),
        # grouped and depthwise layers between
        (
            "[first] a = Conv(x, w1, b1) d = Conv<group=6>(a, deep) [second] c = Conv(d, w2) " + TAIL,
            {**SHAPES, "deep": (6, 1, 3, 3)},
        ),
        # a product of matrices with its bias apart
        (
            "[first] a = Conv(x, w1, b1) p = GlobalAveragePool(a) f = Flatten(p) [last] m = MatMul(f, w) y = Add(m, b)",
            {"w1": (6, 3, 3, 3), "b1": (6,), "w": (6, 5), "b": (5,)},
        ),
        # a transposed convolution
        (
            "[first] a = Conv(x, w1, b1) [second] c = ConvTranspose<strides=[2,2], pads=[1,0,0,1]>(a, up) " + TAIL,
            {**SHAPES, "up": (6, 8, 3, 3)},
        ),
        # a batch norm that stays
        (
            "[first] a = Conv(x, w1, b1) [second] e = Conv(a, w2) "
            "c = BatchNormalization(e, scale, shift, mean, variance) " + TAIL,
            {**SHAPES, "scale": (8,), "shift": (8,), "mean": (8,), "variance": (8,)},
        ),
    ],
)
def test_a_channel_that_others_can_express_leaves_without_a_trace(body: str, shapes: Shapes) -> None:
    shapes = {name: s for name, s in shapes.items() if name in body}
    model = build(body, shapes)
    if "variance" in shapes:
        tensor = model.graph.initializers["variance"].const_value
        model.graph.initializers["variance"].const_value = ir.tensor(np.abs(tensor.numpy()), name="variance")
    copy_channel(model, 5, 2, "w1", "b1", *(["deep"] if "deep" in shapes else []))
    if "deep" in shapes:  # three times the channel through the same filter
        copy_channel(model, 5, 2, "deep")
    refitted, whole = cut(model, {"first": [5]})
    assert refitted.layers >= 1
    assert relative(model, whole) < 1e-4


def test_an_always_constant_channel_becomes_a_bias() -> None:
    model = build(
        "[first] a = Conv(x, w1, b1) [second] c = Conv(a, w2) " + TAIL,
        {k: SHAPES[k] for k in ("w1", "b1", "w2", "head")},
    )
    weight = model.graph.initializers["w1"].const_value.numpy().copy()
    weight[3] = 0
    model.graph.initializers["w1"].const_value = ir.tensor(weight, name="w1")
    _, whole = cut(model, {"first": [3]})
    second = next(node for node in model.graph if node.name == "second")
    assert second.inputs[2] is not None
    assert second.inputs[2].shape == ir.Shape([8])
    assert relative(model, whole) < 1e-4


def test_channels_of_no_weight_leave_everything_as_it_was() -> None:
    model = build()
    for name in ("w1", "b1"):
        array = model.graph.initializers[name].const_value.numpy().copy()
        array[[0, 4]] = 0
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    refitted, whole = cut(model, {"first": [0, 4]})
    assert actions(refitted) == dict.fromkeys(("second", "last"), "skipped: not refitted: its output has not changed")
    assert relative(model, whole) < 1e-6


def test_a_layer_makes_up_for_what_its_shortcut_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    body = (
        '[first] a = Conv<pads=[1,1,1,1]>(x, w1) [short] e = ConvTranspose<auto_pad="SAME_UPPER">(a, w4) '
        "[inner] i = Conv(a, w2) j = Relu(i) "
        "[outer] o = Conv(j, w3) c = Add(o, e) " + TAIL
    )
    shapes: Shapes = {"w1": (6, 3, 3, 3), "w2": (16, 6, 1, 1), "w3": (6, 16, 1, 1), "w4": (6, 6, 1, 1), "head": (5, 6)}

    def sum_error() -> float:
        model = build(body, shapes)
        copy_channel(model, 5, 2, "w1")
        refitted, whole = cut(model, {"first": [5]})
        assert set(actions(refitted)) == {"short", "inner", "outer", "last"}
        feed = {"x": np.concatenate([feed["x"] for feed in samples(seed=3).feeds()])}
        before, after = (Reference(expose(m, ["c"])).run(feed)["c"] for m in (whole, model))
        return float(np.square(before - after).mean())

    with_shortcut = sum_error()
    monkeypatch.setattr(_refit_sites, "outlook", lambda output, channels, *rest: plain(channels))
    assert with_shortcut < 0.5 * sum_error()


def test_layers_before_the_first_removal_are_not_looked_at() -> None:
    refitted, _ = cut(build(), {"second": [0, 3]})
    assert set(actions(refitted)) == {"last"}


def test_refitting_comes_closer_than_leaving_the_layers_alone() -> None:
    expected = outputs(build())
    errors: list[float] = []
    for on in (True, False):
        model = build()
        result = Prune(refit=on).run(model, context(model, samples()))
        assert (result.metrics["refitted"] == 2) == on
        errors.append(float(np.square(outputs(model) - expected).mean()))
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("count", [2, 3, 7, 40])
def test_held_out_samples_never_come_out_worse(count: int) -> None:
    refitted, _ = cut(build(), {"first": [0, 1], "second": [2]}, samples(count))
    for change in refitted.changes:
        assert not change.done or change.details["error_after"] < change.details["error_before"]


def test_an_open_batch_is_not_needed() -> None:
    closed = Dataset("one by one", None, samples(40).read, stacked=False)
    refitted, _ = cut(build(), {"first": [0, 1]}, closed)
    assert "refitted" in actions(refitted)["second"]
    assert not actions(refitted)["second"].startswith("skipped")


def test_without_data_nothing_is_refitted() -> None:
    model = build()
    assert Prune().run(model, context(model)).metrics["refitted"] == 0


def test_what_refitting_did_is_reported_layer_by_layer() -> None:
    model = build()
    result = Prune(ratio=0.4, criterion="l2", scope="uniform").run(model, context(model, samples()))
    found: list[Change] = [change for change in result.changes if change.action.startswith("refitted: output error ")]
    assert [change.site for change in found] == ["second", "last"]
    before, after = (np.mean([change.details[f"error_{when}"] for change in found]) for when in ("before", "after"))
    assert result.metrics["refit_error_before"] == pytest.approx(before, abs=1e-5)
    assert result.metrics["refit_error_after"] == pytest.approx(after, abs=1e-5)


def test_the_same_data_gives_the_same_bytes() -> None:
    digests: list[bytes] = []
    for _ in range(2):
        model = build()
        Prune().run(model, context(model, samples()))
        digests.append(model_bytes(model))
    assert digests[0] == digests[1]


def test_refitting_keeps_the_contract_of_passes() -> None:
    assert check_pass(Prune(), build(), calibration=samples()).modified


@pytest.mark.parametrize(
    ("body", "shapes", "reason"),
    [
        (
            "[first] a = Conv(x, w1) [second] b = Conv(a, w2) c = Conv(b, w2) " + TAIL,
            {"w1": (6, 3, 1, 1), "w2": (6, 6, 1, 1), "head": (5, 6)},
            "others read its weight",
        ),
        (
            '[first] a = Conv(x, w1) [second] c = ConvTranspose<auto_pad="VALID">(a, w2) ' + TAIL,
            {"w1": (6, 3, 1, 1), "w2": (6, 4, 1, 1), "head": (5, 4)},
            "its padding follows from the size of its output",
        ),
        (
            "[first] a = Conv(x, w1) v = Abs(w2) [second] c = Conv(a, v) " + TAIL,
            {"w1": (6, 3, 1, 1), "w2": (4, 6, 1, 1), "head": (5, 4)},
            "its weight is computed",
        ),
        (
            "[first] a = Conv(x, w1) v = Abs(b2) [second] c = Conv(a, w2, v) " + TAIL,
            {"w1": (6, 3, 1, 1), "w2": (4, 6, 1, 1), "b2": (4,), "head": (5, 4)},
            "its bias is computed, or differs between rows",
        ),
    ],
)
def test_layers_that_cannot_be_refitted_say_why(body: str, shapes: Shapes, reason: str) -> None:
    model = build(body, shapes)
    groups = context(model).fact(CHANNEL_GROUPS)
    assert groups.groups[0].pin is None, groups.groups[0].pin
    refitted, _ = cut(model, {"first": [0]})
    assert f", as {reason}: " in actions(refitted)["second"] or actions(refitted)["second"].endswith(f": {reason}")


def channel_moments(model: ir.Model, name: str) -> np.ndarray:
    """Mean and variance of each channel on the samples to refit on."""
    feed = {"x": np.concatenate([feed["x"] for feed in samples().feeds()])}
    found = Reference(expose(model, [name])).run(feed)[name]
    return np.stack([found.mean(axis=(0, 2, 3)), found.var(axis=(0, 2, 3))])


def test_a_batch_norm_brings_back_the_spread_where_a_shared_weight_must_stay() -> None:
    body = (
        "[first] a = Conv(x, w1, b1) r = Relu(a) [second] b = Conv(r, w2) n = BatchNormalization(b, s, t, m, v) "
        "[other] e = Conv(r, w2) g = Sub(n, e) c = Relu(g) " + TAIL
    )
    shapes: Shapes = {"w1": (6, 3, 1, 1), "b1": (6,), "w2": (4, 6, 1, 1), "head": (5, 4)}
    model = build(body, {**shapes, "s": (4,), "t": (4,), "m": (4,), "v": (4,)})
    model.graph.initializers["v"].const_value = ir.tensor(np.full(4, 2, dtype=np.float32), name="v")
    refitted, whole = cut(model, {"first": [0, 3]})
    assert actions(refitted)["second"].startswith("restated mean and variance of its batch norm, as others read")
    np.testing.assert_allclose(channel_moments(model, "n"), channel_moments(whole, "n"), rtol=1e-3, atol=1e-4)


def test_a_bias_takes_back_the_mean_error_of_a_weight_that_is_computed() -> None:
    body = "[first] a = Conv(x, w1, b1) r = Relu(a) v = Abs(w2) [second] b = Conv(r, v, b2) c = Relu(b) " + TAIL
    shapes: Shapes = {"w1": (6, 3, 1, 1), "b1": (6,), "w2": (4, 6, 1, 1), "b2": (4,), "head": (5, 4)}
    model = build(body, shapes)
    refitted, whole = cut(model, {"first": [0, 3]})
    assert actions(refitted)["second"].startswith("restated its bias, as its weight is computed")
    np.testing.assert_allclose(channel_moments(model, "b")[0], channel_moments(whole, "b")[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("carriers", "shape"),
    [
        ("v = Transpose<perm=[1,0]>(w2)", (5, 6)),
        ("u = Identity(w2) v = Transpose(u)", (5, 6)),
        ("s = Constant<value_ints=[0, 5]>() v = Reshape(w2, s)", (6, 1, 5)),
    ],
)
def test_a_weight_is_refitted_where_it_is_stored(carriers: str, shape: tuple[int, ...]) -> None:
    body = f"[first] a = Conv(x, w1, b1) p = GlobalAveragePool(a) f = Flatten(p) {carriers} [last] y = MatMul(f, v)"
    model = build(body, {"w1": (6, 3, 3, 3), "b1": (6,), "w2": shape})
    copy_channel(model, 5, 2, "w1", "b1")
    refitted, whole = cut(model, {"first": [5]})
    assert actions(refitted)["last"].startswith("refitted: ")
    assert relative(model, whole) < 1e-4


def test_activations_that_are_not_finite_are_left_alone() -> None:
    def read() -> Iterator[Feed]:
        for feed in samples(20).feeds():
            feed["x"][0, 0, 0, 0] = np.inf
            yield feed

    refitted, _ = cut(build(), {"first": [0]}, Dataset("infinite", None, read, stacked=True))
    assert set(actions(refitted).values()) == {"skipped: not refitted: what goes through it is not finite"}


def pruned_digits(fixtures: Path, name: str, *, target: Target, fold: bool = True) -> tuple[PassResult, float]:
    """Prune a fixture; returns top-1 too, in percent."""
    path = fixtures / name / "model.onnx"
    data, model = np.load(path.with_name("eval.npz")), load_model(path)
    calibration = open_calibration(str(path.with_name("calib.npz")), input_specs(model), ShapeBinding())
    ctx = Context(model, target, calibration=calibration)
    if fold:
        Fold().run(model, ctx)
        ctx.drop_facts()
    result = Prune(ratio=0.3).run(model, ctx)
    session = Reference(model)
    feed = {session.inputs[0]: data[session.inputs[0]]}
    return result, 100 * float((session.run(feed)[session.outputs[0]].argmax(axis=1) == data["labels"]).mean())


@pytest.mark.parametrize(("round_to", "fold"), [(1, True), (8, True), (1, False)])
def test_digits_are_read_as_well_as_before(fixtures: Path, round_to: int, fold: bool) -> None:
    result, top1 = pruned_digits(fixtures, "digits_cnn", target=Target(name="any", round_to=round_to), fold=fold)
    assert result.metrics["achieved"] == pytest.approx(0.3, abs=0.02)
    assert top1 > 98.83 - 2


def test_a_transformer_keeps_reading_digits(fixtures: Path) -> None:
    result, top1 = pruned_digits(fixtures, "digits_transformer", target=Target(name="ort"))
    assert result.metrics["refitted"]
    assert top1 > 97.67 - 3
