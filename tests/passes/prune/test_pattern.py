from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.calibration import Dataset, open_calibration
from graphopt.errors import OptionError
from graphopt.model_io import ShapeBinding, input_specs, load_model, model_bytes
from graphopt.options import build
from graphopt.pass_base import Context, PassResult
from graphopt.pipeline_text import parse_pipeline
from graphopt.reference import Feed, Reference
from graphopt.targets import Target
from graphopt.testing import check_pass
from graphopt_passes.prune import Prune
from graphopt_passes.prune.pattern.densities import spread
from graphopt_passes.prune.pattern.sites import find_sites
from graphopt_passes.prune.pattern.sparsity import Sparsity

Shapes = dict[str, tuple[int, ...]]

BODY = """
    [first] a = Conv<pads=[1,1,1,1]>(x, w1, b1) r = Relu(a)
    [second] c = Conv<pads=[1,1,1,1], group=2>(r, w2) s = Relu(c)
    [deep] d = Conv<group=8>(s, w3) p = GlobalAveragePool(d) f = Flatten(p)
    [inner] m = MatMul(f, wm) n = Add(m, bm) h = Relu(n)
    [last] y = Gemm<transB=1, alpha=0.5>(h, head, bias)
"""
SHAPES: Shapes = {
    "w1": (8, 4, 3, 3),
    "b1": (8,),
    "w2": (8, 4, 3, 3),
    "w3": (8, 1, 3, 3),
    "wm": (8, 12),
    "bm": (12,),
    "head": (5, 12),
    "bias": (5,),
}
PLAIN = "[one] a = Conv<pads=[1,1,1,1]>(x, w1) p = GlobalAveragePool(a) f = Flatten(p) [last] y = MatMul(f, wm)"
PLAIN_SHAPES: Shapes = {"w1": (8, 4, 3, 3), "wm": (8, 5)}


def build_model(body: str = BODY, shapes: Shapes = SHAPES, seed: int = 0) -> ir.Model:
    rng = np.random.default_rng(seed)
    tensors = [ir.tensor(rng.standard_normal(s).astype(np.float32), name=name) for name, s in shapes.items()]
    declared = ", ".join(f"float[{','.join(map(str, s))}] {name}" for name, s in shapes.items())
    text = f'<ir_version: 8, opset_import: ["" : 17]> main (float[N,4,6,6] x) => (float[N,5] y) <{declared}> {{{body}}}'
    return ir.from_onnx_text(text, initializers=tensors)


def samples(count: int = 40, seed: int = 2, scale: float = 1.0) -> Dataset:
    mixing = np.random.default_rng(9).standard_normal((4, 4))

    def read() -> Iterator[Feed]:
        rng = np.random.default_rng(seed)
        for _ in range(count):
            noise = rng.standard_normal((1, 6, 6, 4)) @ mixing + 1.0
            yield {"x": (scale * noise.transpose(0, 3, 1, 2)).astype(np.float32)}

    return Dataset("random", None, read, stacked=True)


def run(model: ir.Model, data: Dataset | None = None, **options: object) -> PassResult:
    ctx = Context(model, Target(name="ort"), calibration=data)
    step = Sparsity(**{"pattern": "unstructured", "ratio": 0.3, "default_ratio": 0.3} | options)
    step.requires(model, ctx)
    return step.run(model, ctx)


def outputs(model: ir.Model, count: int = 8) -> np.ndarray:
    session = Reference(model)
    return np.concatenate([session.run(feed)["y"] for feed in samples(count, seed=3).feeds()])


def distance(model: ir.Model, whole: ir.Model) -> float:
    expected = outputs(whole, 64)
    return float(np.linalg.norm(outputs(model, 64) - expected) / np.linalg.norm(expected - expected.mean(axis=0)))


def weight(model: ir.Model, name: str) -> np.ndarray:
    return model.graph.initializers[name].const_value.numpy()


def fill(model: ir.Model, name: str, array: np.ndarray) -> None:
    model.graph.initializers[name].const_value = ir.tensor(array.astype(np.float32), name=name)


def actions(result: PassResult) -> dict[str, str]:
    return {change.site: change.action for change in result.changes}


def fullest_run(rows: np.ndarray, of: int) -> int:
    """Most non-zeros in a run of neighbours on the last axis."""
    return int(np.count_nonzero(rows.reshape(*rows.shape[:-1], -1, of), axis=-1).max())


@pytest.mark.parametrize("data", [None, samples()], ids=["weights", "samples"])
@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 4), (1, 2)])
def test_runs_of_input_channels_keep_no_more_than_they_may(data: Dataset | None, keep: int, of: int) -> None:
    model = build_model()
    run(model, data, pattern=f"{keep}:{of}")
    for name in ("w1", "w2"):
        assert fullest_run(weight(model, name).transpose(0, 2, 3, 1), of) == keep
    assert fullest_run(weight(model, "wm").T, of) == keep
    assert fullest_run(weight(model, "head"), of) == keep


def test_layers_whose_inputs_make_no_full_runs_are_skipped_with_a_reason() -> None:
    model = build_model()
    before = weight(model, "w3")
    result = run(model, pattern="2:4")
    assert actions(result)["deep"] == "skipped: its outputs read 1 input channels, no multiple of 4"
    np.testing.assert_array_equal(weight(model, "w3"), before)


@pytest.mark.parametrize("criterion", ["l1", "l2", "wanda", "obs"])
@pytest.mark.parametrize("refit", [False, True])
def test_every_criterion_reaches_the_ratio_in_every_layer(criterion: str, refit: bool) -> None:
    model = build_model()
    result = run(model, samples(), ratio=0.5, criterion=criterion, refit=refit, scope="uniform")
    for name in ("w1", "w2", "w3", "wm", "head"):
        zeros = np.count_nonzero(weight(model, name) == 0)
        assert zeros == pytest.approx(weight(model, name).size / 2, abs=2)
    assert result.metrics["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert np.isfinite(outputs(model)).all()


def test_re_solved_layers_come_closer_than_zeroed_ones() -> None:
    whole, found = build_model(), dict[str, float]()
    for name, options in {
        "plain": {"criterion": "l2", "refit": False},
        "sweep": {"criterion": "obs", "refit": False},
        "full": {"criterion": "obs"},
    }.items():
        model = build_model()
        run(model, samples(64), ratio=0.5, **options)
        found[name] = distance(model, whole)
    assert found["full"] < found["sweep"] < found["plain"]


def test_biases_make_up_for_the_mean() -> None:
    whole, bare, moved = (build_model(PLAIN, PLAIN_SHAPES) for _ in range(3))
    run(bare, None, ratio=0.5, only=("one",))
    run(moved, samples(64, seed=3), ratio=0.5, only=("one",), criterion="l2", refit=False)
    np.testing.assert_array_equal(weight(bare, "w1"), weight(moved, "w1"))
    wanted = outputs(whole, 64).mean(axis=0)
    misses = [np.abs(outputs(model, 64).mean(axis=0) - wanted).max() for model in (bare, moved)]
    assert misses[1] < 0.05 * misses[0]


def test_reported_errors_are_those_of_the_layer() -> None:
    whole, model = build_model(PLAIN, PLAIN_SHAPES), build_model(PLAIN, PLAIN_SHAPES)
    result = run(model, samples(64, seed=3), ratio=0.5, only=("last",), criterion="obs", refit=False)
    (change,) = (change for change in result.changes if change.site == "last")
    assert distance(model, whole) == pytest.approx(change.details["error_after"], rel=0.01)
    assert change.details["zeros"] == 20


@pytest.mark.parametrize("data", [None, samples()], ids=["weights", "samples"])
@pytest.mark.parametrize("options", [{"pattern": "2:4"}, {"ratio": 0.5}, {"ratio": 0.5, "criterion": "l2"}])
def test_weights_that_are_sparse_already_stay_as_they_are(data: Dataset | None, options: dict[str, object]) -> None:
    model = build_model()
    for name in ("w1", "w2", "w3", "wm", "head"):
        array = weight(model, name).copy()
        if name in ("wm", "w3"):
            array[::2] = 0
        else:
            array[:, ::2] = 0
        fill(model, name, array)
    before = model_bytes(model)
    result = run(model, data, **options)
    assert not result.modified
    assert model_bytes(model) == before
    assert all(action.startswith("skipped: ") for action in actions(result).values())
    assert actions(result)["first"] == "skipped: it is as sparse already"


def test_zeros_of_a_sparse_layer_stay_when_the_layer_before_it_changes() -> None:
    model = build_model()
    array = weight(model, "head").copy()
    array[:, ::2] = 0
    fill(model, "head", array)
    run(model, samples(64), ratio=0.5, scope="uniform")
    assert not weight(model, "head")[:, ::2].any()
    assert weight(model, "head")[:, 1::2].all()


@settings(deadline=None, max_examples=15)
@given(of=st.sampled_from([2, 4, 8]), keep=st.integers(1, 7), groups=st.sampled_from([1, 2]), seed=st.integers(0, 99))
def test_any_pattern_holds_for_any_grouping(of: int, keep: int, groups: int, seed: int) -> None:
    keep = min(keep, of - 1)
    body = f"[grouped] a = Conv<group={groups}>(x, w1) p = GlobalAveragePool(a) f = Flatten(p) y = MatMul(f, wm)"
    model = build_model(body, {"w1": (16, 4 // groups, 2, 3), "wm": (16, 5)}, seed)
    result = run(model, pattern=f"{keep}:{of}")
    if (4 // groups) % of:
        assert actions(result)["grouped"].startswith("skipped: ")
    else:
        assert fullest_run(weight(model, "w1").transpose(0, 2, 3, 1), of) == keep
    assert fullest_run(weight(model, "wm").T, of) == keep
    assert np.isfinite(outputs(model)).all()


def test_recurrent_layers_are_sparse_by_magnitude_in_both_weights() -> None:
    shapes: Shapes = {"w": (2, 32, 4), "r": (2, 32, 8), "head": (16, 5)}
    body = """
        t = Transpose<perm=[2,0,1,3]>(x) q = ReduceMean<axes=[3], keepdims=0>(t)
        [memory] o, state = LSTM<hidden_size=8, direction="bidirectional">(q, w, r)
        last = Transpose<perm=[1,0,2]>(state) flat = Flatten(last) [out] y = MatMul(flat, head)
    """
    for data in (None, samples()):
        model = build_model(body, shapes)
        result = run(model, data, pattern="2:4")
        assert fullest_run(weight(model, "w"), 4) == 2
        assert fullest_run(weight(model, "r"), 4) == 2
        assert "memory[W]" in actions(result)
        assert "memory[R]" in actions(result)
        assert np.isfinite(outputs(model)).all()


def test_a_weight_behind_a_transpose_is_sparse_along_its_inputs() -> None:
    body = (
        "p = GlobalAveragePool(x) f = Flatten(p) t = Transpose<perm=[1,0]>(w) i = Identity(t) [last] y = MatMul(f, i)"
    )
    model = build_model(body, {"w": (5, 4)})
    result = run(model, samples(), pattern="2:4")
    assert fullest_run(weight(model, "w"), 4) == 2
    assert "behind Transpose" in actions(result)["last"]


def test_a_weight_that_two_layers_read_alike_is_sparse_for_both() -> None:
    body = """
        [one] a = Conv<pads=[1,1,1,1]>(x, w) [two] b = Conv<pads=[1,1,1,1]>(a, w)
        p = GlobalAveragePool(b) f = Flatten(p) [last] y = MatMul(f, head)
    """
    model = build_model(body, {"w": (4, 4, 3, 3), "head": (4, 5)})
    result = run(model, samples(), pattern="2:4")
    assert fullest_run(weight(model, "w").transpose(0, 2, 3, 1), 4) == 2
    assert "2 layers share its weight" in actions(result)["one"]


def test_a_weight_that_others_read_otherwise_is_left_alone() -> None:
    body = (
        "p = GlobalAveragePool(x) f = Flatten(p) [last] g = Gemm(f, w) n = Add(g, b) h = MatMul(n, w) y = MatMul(h, u)"
    )
    model = build_model(body, {"w": (4, 4), "b": (4,), "u": (4, 5)})
    model.graph.node("last").attributes["transB"] = ir.AttrInt64("transB", 1)
    result = run(model, pattern="2:4")
    assert actions(result)["last"] == "skipped: its weight is shared with others, which read it otherwise"


def test_weights_on_the_left_transposed_convolutions_and_stacks_are_sparse_too() -> None:
    body = """
        [up] a = ConvTranspose(x, wt) [left] b = MatMul(wl, a) [stack] c = MatMul(b, ws)
        p = ReduceMean<axes=[2], keepdims=0>(c) flat = Flatten(p) [last] y = Gemm(flat, head)
    """
    shapes: Shapes = {"wt": (4, 2, 3, 3), "wl": (2, 8, 8), "ws": (2, 8, 8), "head": (16, 5)}
    model = build_model(body, shapes)
    run(model, samples(), pattern="1:4")
    assert fullest_run(weight(model, "wt").transpose(1, 2, 3, 0), 4) == 1
    assert fullest_run(weight(model, "wl"), 4) == 1
    assert fullest_run(weight(model, "ws").transpose(0, 2, 1), 4) == 1
    assert np.isfinite(outputs(model)).all()


def test_layers_in_subgraphs_are_judged_by_magnitude() -> None:
    body = """
        p = GlobalAveragePool(x) f = Flatten(p) s = ReduceSum<keepdims=0>(f) z = Cast<to=9>(s)
        y = If<then_branch = left () => (float[N,5] l) { [inner] l = MatMul(f, w) },
               else_branch = right () => (float[N,5] r) { [other] r = MatMul(f, v) }>(z)
    """
    model = build_model(body, {"w": (4, 5), "v": (4, 5)})
    result = run(model, samples(), pattern="2:4")
    assert fullest_run(weight(model, "w").T, 4) == 2
    assert "it is in a subgraph" in actions(result)["inner"]


def test_only_and_skip_choose_layers_by_name_and_operator() -> None:
    model = build_model()
    result = run(model, ratio=0.5, only=("Conv", "last"), skip=("sec*",))
    done = {change.site for change in result.changes if change.done}
    assert done == {"first", "deep", "last"}
    assert actions(result)["inner"] == "skipped: not in prune.only"
    assert actions(result)["second"] == "skipped: prune.skip names 'second'"


def test_a_global_scope_takes_more_where_weights_matter_less() -> None:
    model = build_model()
    fill(model, "head", weight(model, "head") * np.where(np.arange(12) % 3, 1e-3, 1.0))
    result = run(model, ratio=0.4, scope="global")
    sparsity = {change.site: change.details["sparsity"] for change in result.changes}
    assert result.metrics["sparsity"] == pytest.approx(0.4, abs=1e-3)
    assert sparsity["last"] == max(sparsity.values())
    sites, _ = find_sites(model, Context(model, Target(name="ort")))
    assert spread(sites, 0.0) == [0] * 5
    assert spread([], 0.5) == []


def test_a_report_counts_zeros_and_what_compression_makes_of_them() -> None:
    model = build_model()
    result = run(model, pattern="2:4")
    metrics = result.metrics
    counted = [weight(model, name) for name in ("w1", "w2", "wm", "head")]
    assert metrics["weights"] == sum(array.size for array in counted)
    assert metrics["zeros_after"] == sum(int(np.count_nonzero(array == 0)) for array in counted)
    assert metrics["zeros_before"] == 0
    assert metrics["weight_bytes"] == 4 * metrics["weights"]
    assert metrics["compressed_bytes_after"] < 0.8 * metrics["compressed_bytes_before"]
    assert "sparse kernel" in metrics["note"]


def test_dead_and_infinite_inputs_do_no_harm() -> None:
    body = "z = Mul(x, zero) [dead] a = Conv(z, w1) p = GlobalAveragePool(a) f = Flatten(p) [last] y = MatMul(f, wm)"
    model = build_model(body, {**PLAIN_SHAPES, "zero": ()})
    fill(model, "zero", np.zeros(()))
    for refit in (True, False):
        result = run(model, samples(), ratio=0.5, refit=refit, criterion="obs")
        assert np.isfinite(weight(model, "w1")).all()
        assert np.isfinite(outputs(model)).all()
    model = build_model(PLAIN, PLAIN_SHAPES)
    result = run(model, samples(scale=2e37), ratio=0.5)
    assert "not finite" in actions(result)["one"]
    assert np.isfinite(weight(model, "w1")).all()


def test_a_layer_that_reads_a_constant_is_judged_by_magnitude() -> None:
    body = "p = GlobalAveragePool(x) f = Flatten(p) [fixed] c = MatMul(k, w) s = Add(f, c) [last] y = MatMul(s, u)"
    for refit in (True, False):
        model = build_model(body, {"k": (1, 8), "w": (8, 4), "u": (4, 5)})
        result = run(model, samples(), pattern="2:4", refit=refit)
        assert actions(result)["fixed"].startswith("made sparse by magnitude: ")
        assert fullest_run(weight(model, "w").T, 4) == 2


def test_half_precision_stays_half_precision() -> None:
    model = build_model(PLAIN, PLAIN_SHAPES)
    fill(model, "w1", weight(model, "w1"))
    value = model.graph.initializers["w1"]
    value.const_value = ir.tensor(value.const_value.numpy().astype(np.float16), name="w1")
    ctx = Context(model, Target(name="ort"))
    Sparsity(pattern="2:4", ratio=0.3, default_ratio=0.3).run(model, ctx)
    assert weight(model, "w1").dtype == np.float16
    assert fullest_run(weight(model, "w1").transpose(0, 2, 3, 1), 4) == 2


def test_the_same_input_gives_the_same_bytes() -> None:
    for options in ({"pattern": "2:4"}, {"ratio": 0.5, "refit": False, "criterion": "obs"}, {"scope": "global"}):
        first, second = build_model(), build_model()
        for model in (first, second):
            run(model, samples(), **options)
        assert model_bytes(first) == model_bytes(second)


@pytest.mark.parametrize("text", ["prune{pattern=2:4}", "prune{ratio=0.5 pattern=unstructured}", "prune{pattern=4:8}"])
def test_patterns_print_back_as_they_were_written(text: str) -> None:
    (step,) = parse_pipeline(text)
    assert str(build(Prune, step.values, "prune")) == text


@pytest.mark.parametrize("data", [None, samples()], ids=["weights", "samples"])
@pytest.mark.parametrize("options", [{"pattern": "2:4"}, {"pattern": "unstructured", "ratio": 0.6}])
def test_prune_with_a_pattern_keeps_the_contract_of_a_pass(data: Dataset | None, options: dict[str, object]) -> None:
    result = check_pass(Prune(**options), build_model(), calibration=data)
    assert result.metrics["pattern"] == options["pattern"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"pattern": "3"}, "prune.pattern: '3' is not channels, unstructured or N:M with N less than M"),
        ({"pattern": "4:4"}, "prune.pattern: '4:4' is not channels, unstructured or N:M with N less than M"),
        ({"pattern": "0:4"}, "prune.pattern: '0:4' is not channels, unstructured or N:M with N less than M"),
        ({"pattern": "2:4", "ratio": 0.4}, "prune.ratio: 2:4 makes 0.5 of the weights zero, not 0.4"),
        ({"pattern": "2:4", "scope": "global"}, "prune.scope: 2:4 is the same for every layer"),
        ({"pattern": "2:4", "round_to": 8}, "prune.round_to: pattern=2:4 removes no channels"),
        ({"pattern": "unstructured", "of": "bytes"}, "prune.of: pattern=unstructured removes no channels"),
        ({"pattern": "2:4", "criterion": "bn-scale"}, "prune.criterion: 'bn-scale' does not judge single weights"),
        ({"pattern": "2:4", "criterion": "obs"}, "prune.criterion: obs needs samples"),
        ({"pattern": "2:4", "only": ("firts",)}, "prune.only: 'firts' fits no layer with weights"),
        ({"pattern": "2:4", "criterion": "fpgm"}, "prune.criterion: 'fpgm' does not judge single weights"),
        ({"pattern": "unstructured", "scope": "sensitivity"}, "prune.scope: sensitivity needs samples"),
        ({"pattern": "unstructured", "scope": "search"}, "prune.scope: search spreads channels, not single weights"),
        ({"criterion": "obs"}, "prune.criterion: obs judges single weights, not channels"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, object], text: str) -> None:
    model = build_model()
    with pytest.raises(OptionError) as caught:
        build(Prune, options, "prune").requires(model, Context(model, Target(name="ort")))
    assert str(caught.value).startswith(text)


def test_a_real_network_keeps_its_accuracy_with_half_the_weights_of_its_first_layers(zoo) -> None:
    folder = zoo("cifar10_resnet20")
    scores = dict[str, float]()
    with np.load(folder / "eval.npz") as data:
        images, labels = data["input"][:500], data["labels"][:500]
    for pattern in ("none", "2:4"):
        model = load_model(folder / "model.onnx")
        if pattern != "none":
            calibration = open_calibration(str(folder / "calib.npz"), input_specs(model), ShapeBinding())
            ctx = Context(model, Target(name="ort"), calibration=calibration)
            assert Prune(pattern=pattern, skip=("/layer2*", "/layer3*")).run(model, ctx).modified
        (output,) = Reference(model).run({"input": images}).values()
        scores[pattern] = float((output.argmax(axis=1) == labels).mean())
    assert scores["2:4"] > scores["none"] - 0.03
