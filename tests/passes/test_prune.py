from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphopt.analyses import CHANNEL_GROUPS, COST, ChannelGroup
from graphopt.errors import ExitCode, OptionError, PassError
from graphopt.model_io import ShapeBinding, input_specs, load_model, model_bytes, save_model
from graphopt.options import build as build_options
from graphopt.pass_base import Context, PassResult
from graphopt.pipeline_text import parse_pipeline
from graphopt.reference import Feed, Reference, random_feed
from graphopt.targets import Target
from graphopt.testing import check_pass
from graphopt_passes._prune_removal import remove
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


def zero(model: ir.Model, group: ChannelGroup, units: Sequence[int]) -> None:
    """Set everything that belongs to some units to zero: a channel that is zero and that nobody reads."""
    for place in group.places:
        value = model.graph.initializers.get(place.value)
        if place.constant and value is not None and value.const_value is not None:
            array = value.const_value.numpy().copy()
            np.moveaxis(array, place.axis, 0)[place.positions[list(units)].reshape(-1)] = 0
            value.const_value = ir.tensor(array, name=place.value)


def assert_removal_is_exact(model: ir.Model, removals: list[tuple[ChannelGroup, list[int]]]) -> None:
    for group, units in removals:
        zero(model, group, units)
    expected = [Reference(model).run(feed) for feed in feeds(model)]
    remove(model, context(model).fact(CHANNEL_GROUPS), removals)
    session = Reference(model)
    for feed, outputs in zip(feeds(model), expected, strict=True):
        for name, wanted in outputs.items():
            scale = max(1.0, float(np.abs(wanted).max()))
            np.testing.assert_allclose(session.run(feed)[name], wanted, atol=1e-5 * scale)


def parameters(model: ir.Model) -> int:
    return sum(value.const_value.size for name, value in model.graph.initializers.items() if name[0] == "w")


class Drawing:
    """Writes a random network block by block; every block takes and gives `[N, channels, 8, 8]`."""

    def __init__(self, pick: Callable[[Sequence], object]) -> None:
        self.pick, self.lines, self.weights = pick, list[str](), dict[str, Shape]()
        self.channels = self.pick([2, 3, 5, 4])
        self.current = self.conv("x", 3, self.channels)

    def weight(self, *shape: int, stem: str = "w") -> str:
        name = f"{stem}{len(self.weights)}"
        self.weights[name] = shape
        return name

    def value(self, text: str) -> str:
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {text}")
        return name

    def conv(self, source: str, inside: int, outside: int, group: int = 1) -> str:
        size = self.pick([1, 3])
        weight = self.weight(outside, inside // group, size, size)
        pad = size // 2
        return self.value(
            f"Conv<pads=[{pad},{pad},{pad},{pad}],group={group}>({source}, {weight}, {self.weight(outside)})"
        )

    def plain(self) -> None:
        channels = self.pick([2, 3, 4, 6])
        self.current, self.channels = self.conv(self.current, self.channels, channels), channels

    def norm(self) -> None:
        parameters = [self.weight(self.channels, stem=stem) for stem in ("w", "w", "w", "var")]
        self.current = self.value(f"BatchNormalization({self.current}, {', '.join(parameters)})")

    def activation(self) -> None:
        form = self.pick(["Relu", "Sigmoid", "HardSwish", "LeakyRelu", "PRelu"])
        slope = f", {self.weight(self.channels, 1, 1)}" if form == "PRelu" else ""
        self.current = self.value(f"{form}({self.current}{slope})")

    def residual(self) -> None:
        branch = self.conv(self.value(f"Relu({self.current})"), self.channels, self.channels)
        operator = self.pick(["Mul", "Sub", "Max", "Add"])
        self.current = self.value(f"{operator}({branch}, {self.current})")

    def depthwise(self) -> None:
        multiplier = self.pick([1, 2])
        self.current = self.conv(self.current, self.channels, self.channels * multiplier, group=self.channels)
        self.channels *= multiplier

    def grouped(self) -> None:
        if self.channels % 2 == 0:
            self.current = self.conv(self.current, self.channels, 4, group=2)
            self.channels = 4

    def concat(self) -> None:
        other = self.pick([1, 2, 4])
        branch = self.conv(self.current, self.channels, other)
        self.current = self.value(f"Concat<axis=1>({self.current}, {branch})")
        self.channels += other

    def split(self) -> None:
        if self.channels % 2 == 0:
            self.lines.append(f"a{len(self.lines)}, b{len(self.lines)} = Split<axis=1>({self.current})")
            number = len(self.lines) - 1
            self.current = self.value(f"Mul(a{number}, b{number})")
            self.channels //= 2

    def excite(self) -> None:
        pooled = self.value(f"GlobalAveragePool({self.current})")
        gate = self.value(f"HardSigmoid({self.conv(pooled, self.channels, self.channels)})")
        self.current = self.value(f"Mul({self.current}, {gate})")

    def padded(self) -> None:
        pads = self.value("Constant<value_ints=[0,1,0,0,0,2,0,0]>()")
        self.current, self.channels = self.value(f"Pad({self.current}, {pads})"), self.channels + 3

    def turned(self) -> None:
        last = self.value(f"Transpose<perm=[0,2,3,1]>({self.current})")
        mixed = self.value(f"MatMul({last}, {self.weight(self.channels, 4)})")
        self.current, self.channels = self.value(f"Transpose<perm=[0,3,1,2]>({mixed})"), 4

    def upsampled(self) -> None:
        pooled = self.value(f"MaxPool<kernel_shape=[2,2],strides=[2,2]>({self.current})")
        deconv = self.weight(self.channels, 3, 2, 2)
        self.current = self.value(f"ConvTranspose<strides=[2,2]>({pooled}, {deconv}, {self.weight(3)})")
        self.channels = 3

    def finish(self) -> ir.Model:
        head = self.pick(["pool", "reshape", "mean", "flatten"])
        columns = self.channels
        if head == "pool":
            flat = self.value(f"Flatten({self.value(f'GlobalAveragePool({self.current})')})")
        elif head == "mean":
            flat = self.value(f"ReduceMean<axes=[2,3],keepdims=0>({self.current})")
        else:
            small = self.value(f"AveragePool<kernel_shape=[4,4],strides=[4,4]>({self.current})")
            columns = 4 * self.channels
            shape = self.value(f"Constant<value_ints=[-1,{columns}]>()")
            flat = self.value(f"Flatten({small})" if head == "flatten" else f"Reshape({small}, {shape})")
        self.lines.append(f"y = Gemm({flat}, {self.weight(columns, 5)}, {self.weight(5)})")
        return build(IMAGE, "\n".join(self.lines), self.weights)


BLOCKS = (
    "plain", "norm", "activation", "residual", "depthwise", "grouped", "concat", "split", "excite", "padded", "turned",
    "upsampled",
)  # fmt: skip


@st.composite
def networks(draw: st.DrawFn) -> ir.Model:
    drawing = Drawing(lambda options: draw(st.sampled_from(options)))
    for name in draw(st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=6)):
        getattr(drawing, name)()
    return drawing.finish()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(networks(), st.data())
def test_removing_channels_that_are_zero_changes_no_output(model: ir.Model, data: st.DataObject) -> None:
    free = [group for group in context(model).fact(CHANNEL_GROUPS).free if group.units > 1]
    removals = [
        (group, sorted(data.draw(st.sets(st.integers(0, group.units - 1), max_size=group.units - 1)))) for group in free
    ]
    before = parameters(model)
    assert_removal_is_exact(model, removals)
    assert (parameters(model) < before) == any(units for _, units in removals)


@pytest.mark.parametrize("block", BLOCKS)
def test_each_coupling_is_exact_by_itself(block: str) -> None:
    drawing = Drawing(lambda options: options[-1])
    drawing.current, drawing.channels = drawing.conv(drawing.current, drawing.channels, 4), 4
    getattr(drawing, block)()
    model = drawing.finish()
    groups = context(model).fact(CHANNEL_GROUPS).free
    assert groups
    assert_removal_is_exact(model, [(group, [group.units - 1]) for group in groups if group.units > 1])


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


GOLDEN_FILES = Path(__file__).parents[2] / "fixtures" / "golden"


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


def test_a_pinned_group_cannot_be_removed_from() -> None:
    model = golden()
    groups = context(model).fact(CHANNEL_GROUPS)
    with pytest.raises(PassError, match="prune: last: reaches graph output 'y'"):
        remove(model, groups, [(groups.groups[-1], [0])])


def test_an_axis_is_never_emptied() -> None:
    model = golden()
    groups = context(model).fact(CHANNEL_GROUPS)
    with pytest.raises(PassError, match="axis 1 of 'a' would be left empty"):
        remove(model, groups, [(groups.groups[0], range(8))])


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
    model = Path(__file__).parents[2] / "fixtures" / "digits_cnn" / "model.onnx"
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


def test_a_stated_size_that_others_use_is_not_changed_for_them() -> None:
    body = """
        to = Constant<value_ints=[-1,8]>()
        [conv] a = Conv(x, w1) f = Reshape(a, to) z = Gemm<transB=1>(f, head)
        b = Conv(x, w2) g = Reshape(b, to) k = ReduceSum<keepdims=1>(g, one) y = Add(z, k)
    """
    weights = {"w1": (2, 3, 7, 7), "w2": (2, 3, 7, 7), "head": (5, 8)}
    model = build(
        IMAGE, body.replace("one)", "ones)").replace("to =", "ones = Constant<value_ints=[1]>() to ="), weights
    )
    groups = context(model).fact(CHANNEL_GROUPS)
    assert [group.name for group in groups.free] == ["conv"]
    assert_removal_is_exact(model, [(groups.free[0], [1])])


def interface(session: Reference) -> list[tuple[str, object, str]]:
    return [(v.name, v.shape, v.type) for v in (*session.session.get_inputs(), *session.session.get_outputs())]


def test_digits_are_still_read_after_pruning(fixtures: Path) -> None:
    path = fixtures / "digits_cnn" / "model.onnx"
    data = np.load(path.with_name("eval.npz"))
    model = load_model(path)
    result = prune(model, ratio=0.3)
    assert result.metrics["achieved"] == pytest.approx(0.3, abs=0.02)
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
