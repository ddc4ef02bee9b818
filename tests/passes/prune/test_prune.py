from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.analyses import CHANNEL_GROUPS, COST
from graphopt.errors import ExitCode, OptionError
from graphopt.model_io import ShapeBinding, input_specs, load_model, model_bytes, save_model
from graphopt.options import build as build_options
from graphopt.pass_base import Context, PassResult
from graphopt.pipeline_text import parse_pipeline
from graphopt.reference import Feed, Reference, random_feed
from graphopt.targets import Target
from graphopt.testing import check_pass
from graphopt_passes.prune import Prune

Shape = tuple[int, ...]
IMAGE = "(float[N,3,8,8] x) => (float[N,5] y)"


def build(signature: str, body: str, weights: dict[str, Shape], opset: int = 17, seed: int = 0) -> ir.Model:
    rng = np.random.default_rng(seed)
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in weights.items()}
    tensors = [ir.tensor(np.abs(a) if name.startswith("var") else a, name=name) for name, a in arrays.items()]
    declared = ", ".join(f"float[{','.join(map(str, shape))}] {name}" for name, shape in weights.items())
    text = f'<ir_version: 8, opset_import: ["" : {opset}]>\nmain {signature} <{declared}> {{\n{body}\n}}'
    return ir.from_onnx_text(text, initializers=tensors)


def context(model: ir.Model, **fields: object) -> Context:
    return Context(model, **{"target": Target(name="ort"), **fields})  # type: ignore[arg-type]


def prune(model: ir.Model, ctx: Context | None = None, **options: object) -> PassResult:
    step, ctx = Prune(**options), ctx or context(model)  # type: ignore[arg-type]
    step.requires(model, ctx)
    return step.run(model, ctx)


def feeds(model: ir.Model, count: int = 4) -> list[Feed]:
    rng = np.random.default_rng(1)
    binding = ShapeBinding(dims={"N": 2})
    return [random_feed(input_specs(model), binding, rng) for _ in range(count)]


GOLDEN = """
    [first] a = Conv<pads=[1,1,1,1]>(x, w1, b1) r = Relu(a)
    [branch] c = Conv(r, w2) s = Add(c, r)
    [depth] d = Conv<group=8>(s, w3) p = GlobalAveragePool(d) f = Flatten(p)
    [last] y = Gemm<transB=1>(f, head)
"""
GOLDEN_WEIGHTS: dict[str, Shape] = {
    "w1": (8, 3, 3, 3), "b1": (8,), "w2": (8, 8, 1, 1), "w3": (8, 1, 3, 3), "head": (5, 8)
}  # fmt: skip


def golden() -> ir.Model:
    return build(IMAGE, GOLDEN, GOLDEN_WEIGHTS)


GOLDEN_FILES = Path(__file__).parents[3] / "fixtures" / "golden"


@pytest.mark.parametrize("before", sorted(GOLDEN_FILES.glob("prune_*.before.onnxtxt")), ids=lambda path: path.stem)
def test_prune_writes_the_golden_text(before: Path) -> None:
    model = ir.from_onnx_text(before.read_text("utf8"))
    prune(model, ratio=0.4)
    after = before.with_name(before.name.replace(".before.", ".after."))
    assert ir.to_onnx_text(model) + "\n" == after.read_text("utf8")


@pytest.mark.parametrize("options", [{}, {"ratio": 0.6, "scope": "global", "criterion": "random"}, {"ratio": 0.0}])
def test_prune_keeps_the_contract_of_passes(options: dict[str, object]) -> None:
    assert check_pass(Prune(**options), golden()).modified == (options.get("ratio") != 0)  # type: ignore[arg-type]


def test_the_ratio_is_met_and_every_group_is_reported() -> None:
    model = golden()
    before = context(model).fact(COST).macs
    result = prune(model, ratio=0.4)
    assert result.modified
    assert result.preserved == frozenset()
    assert result.metrics["macs_before"] == before
    assert result.metrics["macs_after"] == context(model).fact(COST).macs
    done, refused = result.changes
    assert done.site == "first"
    assert done.action == "removed 3 of 8 channels"
    assert (done.details["channels_before"], done.details["channels_after"], done.details["layers"]) == (8, 5, 3)
    assert (refused.site, refused.action, refused.done) == ("last", "skipped: reaches graph output 'y'", False)


def test_the_weakest_channels_go() -> None:
    model = golden()
    for name in ("w1", "w2", "w3"):
        value = model.graph.initializers[name]
        array = value.const_value.numpy().copy()
        array[[2, 5]] *= 1e-3
        value.const_value = ir.tensor(array, name=name)
    kept = np.delete(model.graph.initializers["w1"].const_value.numpy(), [2, 5], axis=0)
    prune(model, ratio=0.29)
    np.testing.assert_array_equal(model.graph.initializers["w1"].const_value.numpy(), kept)


@pytest.mark.parametrize("of", ["macs", "params", "bytes"])
@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_any_amount_is_met_within_two_percent(of: str, scope: str, ratio: float) -> None:
    body = """
        [a] a = Conv(x, w1) ra = Relu(a) [b] b = Conv(ra, w2) rb = Relu(b) [c] c = Conv(rb, w3)
        p = GlobalAveragePool(c) f = Flatten(p) y = Gemm<transB=1>(f, head)
    """
    weights = {"w1": (32, 3, 3, 3), "w2": (48, 32, 3, 3), "w3": (64, 48, 3, 3), "head": (5, 64)}
    result = prune(build(IMAGE, body, weights), ratio=ratio, of=of, scope=scope)
    assert result.metrics["achieved"] == pytest.approx(ratio, abs=0.02)


def test_the_layers_of_a_group_keep_an_eighth_of_their_channels() -> None:
    result = prune(golden(), ratio=0.99)
    assert result.changes[0].details["channels_after"] == 1
    assert float(result.metrics["achieved"]) < 0.99


@pytest.mark.parametrize(("round_to", "kept"), [(4, 4), (3, 6), (1, 5)])
def test_kept_channels_are_multiples_of_round_to(round_to: int, kept: int) -> None:
    assert prune(golden(), ratio=0.4, round_to=round_to).changes[0].details["channels_after"] == kept


def test_the_target_rounds_but_never_so_coarsely_that_small_layers_stay() -> None:
    model = golden()
    ctx = context(model, target=Target(name="npu", round_to=16))
    assert prune(model, ctx, ratio=0.4).changes[0].details["channels_after"] in (4, 6)


def test_nothing_to_remove_is_no_modification() -> None:
    for options in ({"ratio": 0.0}, {"skip": ("*",)}):
        model = golden()
        before = model_bytes(model)
        result = prune(model, **options)
        assert not result.modified
        assert model_bytes(model) == before
        assert not any(change.done for change in result.changes)
        assert result.metrics["achieved"] == 0


def test_only_and_skip_name_layers_or_operators() -> None:
    body = "[a] a = Conv(x, w1) f = Flatten(a) [b] b = Gemm(f, w2) r = Relu(b) [c] y = Gemm(r, w3)"
    weights = {"w1": (8, 3, 7, 7), "w2": (32, 16), "w3": (16, 5)}
    for options in ({"only": ("a",)}, {"only": ("Conv",)}, {"skip": ("b",)}, {"skip": ("Ge*",)}):
        done = [change.site for change in prune(build(IMAGE, body, weights), **options).changes if change.done]
        assert done == ["a"], options
    skipped = prune(build(IMAGE, body, weights), skip=("b",)).changes[1]
    assert skipped.action == "skipped: prune.skip names 'b'"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": ("Cnov",)}, r"prune.only: 'Cnov' fits no layer that makes channels; did you mean 'Conv'\?"),
        ({"skip": ("nothing*",)}, "prune.skip: 'nothing[*]' fits no layer that makes channels; known: "),
        ({"criterion": "taylor"}, "prune.criterion: taylor needs gradients, not available yet; use l2"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        prune(golden(), **options)
    assert caught.value.exit_code == ExitCode.USAGE


def test_the_step_prints_what_it_was_parsed_from() -> None:
    text = "prune{ratio=0.5 criterion=l1 only=Conv,Gemm}"
    (step,) = parse_pipeline(text)
    assert str(build_options(Prune, dict(step.options), "prune")) == text


@pytest.mark.parametrize("criterion", ["l1", "l2", "bn-scale", "random"])
def test_the_same_input_gives_the_same_bytes(criterion: str) -> None:
    digests = []
    for _ in range(2):
        model = golden()
        prune(model, context(model, rng=np.random.default_rng(7)), criterion=criterion)
        digests.append(model_bytes(model))
    assert digests[0] == digests[1]


def test_the_bytes_do_not_depend_on_hash_randomisation() -> None:
    script = (
        "import sys, hashlib\nfrom graphopt.model_io import load_model, model_bytes\n"
        "from graphopt.pass_base import Context\nfrom graphopt.targets import Target\n"
        "from graphopt_passes.prune import Prune\nm = load_model(sys.argv[1])\n"
        "Prune().run(m, Context(m, Target(name='ort')))\n"
        "sys.stdout.write(hashlib.sha256(model_bytes(m)).hexdigest())"
    )
    model = Path(__file__).parents[3] / "fixtures" / "digits_cnn" / "model.onnx"
    digests = {
        subprocess.run(
            [sys.executable, "-c", script, str(model)], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_names_and_metadata_survive_and_shapes_are_brought_up_to_date() -> None:
    model = golden()
    node = next(node for node in model.graph if node.name == "first")
    node.metadata_props["owner"] = "test"
    node.outputs[0].shape = ir.Shape(["N", 8, 8, 8])
    model.graph.initializers["w1"].const_value.metadata_props["layout"] = "OIHW"
    names = [node.name for node in model.graph], list(model.graph.initializers)
    prune(model, ratio=0.4)
    assert ([node.name for node in model.graph], list(model.graph.initializers)) == names
    assert node.metadata_props["owner"] == "test"
    assert node.outputs[0].shape == ir.Shape(["N", 5, 8, 8])
    assert model.graph.initializers["w1"].shape == ir.Shape([5, 3, 3, 3])
    assert model.graph.initializers["w1"].const_value.metadata_props["layout"] == "OIHW"


def test_weights_in_a_file_are_sliced_when_they_are_written(tmp_path: Path) -> None:
    model = golden()
    save_model(model, tmp_path / "model.onnx", embed_limit=0)
    expected = golden()
    prune(expected)
    external = load_model(tmp_path / "model.onnx")
    prune(external)
    assert isinstance(external.graph.initializers["w1"].const_value, (ir.LazyTensor, ir.ExternalTensor, ir.Tensor))
    files = save_model(external, tmp_path / "pruned.onnx", embed_limit=0)
    for feed in feeds(expected, 1):
        np.testing.assert_allclose(Reference(files[0]).run(feed)["y"], Reference(expected).run(feed)["y"], atol=1e-6)


def interface(session: Reference) -> list[tuple[str, object, str]]:
    return [(v.name, v.shape, v.type) for v in (*session.session.get_inputs(), *session.session.get_outputs())]


def test_digits_are_still_read_after_pruning(fixtures: Path) -> None:
    path = fixtures / "digits_cnn" / "model.onnx"
    data = np.load(path.with_name("eval.npz"))
    model = load_model(path)
    result = prune(model, ratio=0.3)
    assert result.metrics["achieved"] == pytest.approx(0.3, abs=0.02)
    assert (result.metrics["criterion"], result.metrics["scope"]) == ("l2", "uniform")
    original, pruned = Reference(path), Reference(model)
    assert interface(original) == interface(pruned)
    hits = pruned.run({"image": data["image"]})[pruned.outputs[0]].argmax(axis=1) == data["labels"]
    assert hits.mean() > 0.5, "far above one in ten, without any training after"


MUST = (
    "cifar10_resnet20", "tiny_resnet8", "mobilenet_v1_025", "mobilenet_v2", "tiny_kws", "ultraface_rfb320", "yunet_n320"
)  # fmt: skip
MAY = (
    "basic_pitch", "cifar10_resnet56", "gtcrn_simple", "magika_v3_3", "minilm", "mnist_cntk", "silero_vad_op15",
    "silero_vad_op18", "stories260k",
)  # fmt: skip


@pytest.mark.parametrize("case", [*MUST, *MAY])
def test_real_models_run_after_pruning_and_every_layer_is_accounted_for(case: str, zoo: Callable[[str], Path]) -> None:
    folder = zoo(case)
    model = load_model(folder / "model.onnx")
    result = prune(model, ratio=0.3)
    groups = context(load_model(folder / "model.onnx")).fact(CHANNEL_GROUPS)
    assert len(result.changes) == len(groups.groups) + len(groups.elsewhere)
    assert all(change.done or change.action.startswith("skipped: ") for change in result.changes)
    if case in MUST:
        assert result.metrics["achieved"] == pytest.approx(0.3, abs=0.02)
    elif not result.modified:
        assert model_bytes(model) == model_bytes(load_model(folder / "model.onnx"))
    original, pruned = Reference(folder / "model.onnx"), Reference(model)
    assert interface(original) == interface(pruned)
    data = np.load(folder / "calib.npz")
    ranks = {spec.name: spec.rank for spec in input_specs(model)}
    arrays = {name: data[name] for name in original.inputs}
    feed = {name: a[:1] if a.ndim == ranks[name] else np.asarray(a[0]) for name, a in arrays.items()}
    for name, wanted in original.run(feed).items():
        assert pruned.run(feed)[name].shape == wanted.shape
