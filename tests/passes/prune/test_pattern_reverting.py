"""Layers with zeros in a pattern are left alone again where the outputs lose too much."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphopt
from graphopt.bundle import file_digests
from graphopt.calibration import Dataset
from graphopt.compile.decisions import Decisions, Reverted, write_decisions
from graphopt.errors import ExitCode, PassError
from graphopt.model_io import model_bytes
from graphopt.pass_base import Context, PassResult
from graphopt.recipe import Limits
from graphopt.reference import Feed, Reference
from graphopt.targets import Target
from graphopt_passes.prune import Prune

BODY = """
    [quiet] a = MatMul(x, w1) b = Mul(a, faint) c = Add(x, b) r = Relu(c)
    [loud] d = MatMul(r, w2) e = Mul(d, strong) f = Add(r, e)
    [plain] g = MatMul(f, w3) h = Add(f, g)
    [last] y = MatMul(h, w4)
"""
NAMES: tuple[str, ...] = ("quiet", "loud", "plain", "last")
WEIGHTS = dict(zip(NAMES, ("w1", "w2", "w3", "w4"), strict=True))
PATTERNS = (Prune(pattern="1:4"), Prune(pattern="unstructured", ratio=0.6))
Compile = Callable[..., graphopt.Result]


def build_model(body: str = BODY) -> ir.Model:
    rng = np.random.default_rng(0)
    arrays = {name: (rng.standard_normal((16, 16)) / 4).astype(np.float32) for name in WEIGHTS.values()}
    arrays |= {"faint": np.array(1e-3, np.float32), "strong": np.array(20, np.float32)}
    arrays = {name: array for name, array in arrays.items() if name in body}
    declared = ", ".join(f"float[{','.join(map(str, a.shape))}] {name}" for name, a in arrays.items())
    text = f'<ir_version: 8, opset_import: ["" : 17]> main (float[N,16] x) => (float[N,16] y) <{declared}> {{{body}}}'
    return ir.from_onnx_text(text, initializers=[ir.tensor(array, name=name) for name, array in arrays.items()])


def feeds(count: int = 32, seed: int = 1) -> list[Feed]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((1, 16)).astype(np.float32)} for _ in range(count)]


def samples() -> Dataset:
    def read() -> Iterator[Feed]:
        return iter(feeds())

    return Dataset("random", None, read, stacked=True)


def context(model: ir.Model, data: Dataset | None) -> Context:
    return Context(model, Target(name="ort"), calibration=data)


def run(step: Prune, data: Dataset | None) -> tuple[ir.Model, PassResult]:
    model = build_model()
    return model, step.run(model, context(model, data))


def weight(model: ir.Model, layer: str) -> np.ndarray:
    tensor = model.graph.initializers[WEIGHTS[layer]].const_value
    assert tensor is not None
    return tensor.numpy()


def zeros(model: ir.Model) -> dict[str, int]:
    return {name: int((weight(model, name) == 0).sum()) for name in NAMES}


def distance(model: ir.Model, seed: int = 5) -> float:
    """Error of the outputs, in parts of their energy."""
    original, found = Reference(build_model()), Reference(model)
    pairs = [(original.run(feed)["y"], found.run(feed)["y"]) for feed in feeds(8, seed)]
    return float(np.mean([np.square(b - a).sum() / np.square(a).sum() for a, b in pairs]))


@pytest.fixture
def compiled(tmp_path: Path) -> Compile:
    ir.save(build_model(), tmp_path / "model.onnx")
    calibration = {"x": np.concatenate([feed["x"] for feed in feeds()])}

    def compile_it(step: Prune, *, data: bool = True, out: str = "out", **options: object) -> graphopt.Result:
        given = {"calibration": calibration if data else None, "force": True, **options}
        return graphopt.optimize(tmp_path / "model.onnx", (step,), out=tmp_path / out, **given)

    return compile_it


def reverted(result: graphopt.Result) -> set[str]:
    return {c.site for step in result.report.steps for c in step.changes if c.action.startswith("skipped: reverted")}


@pytest.mark.parametrize("step", PATTERNS, ids=str)
@pytest.mark.parametrize("data", [None, samples()], ids=["weights", "samples"])
def test_the_layer_that_outputs_hear_most_steps_back_first(step: Prune, data: Dataset | None) -> None:
    model = build_model()
    before = model_bytes(model)
    names = step.revertible(model, NAMES)
    ranked = step.worst_first(model, context(model, data), names, (), feeds(8, seed=5))
    lost = {name: distance(run(step.without([n for n in NAMES if n != name]), data)[0]) for name in NAMES}
    assert sorted(ranked) == sorted(NAMES)
    assert ranked[-1] == "quiet"
    assert lost[ranked[0]] > 0.7 * max(lost.values())
    if data is None:  # what is tried is what is done then
        assert list(ranked) == sorted(NAMES, key=lambda name: -lost[name])
    assert model_bytes(model) == before


@pytest.mark.parametrize("step", PATTERNS, ids=str)
@pytest.mark.parametrize("data", [None, samples()], ids=["weights", "samples"])
def test_layers_that_step_back_stay_and_the_others_lose_what_they_lost(step: Prune, data: Dataset | None) -> None:
    whole, _ = run(step, data)
    lighter = step.without(["loud"]).without(["plain"])
    model, result = run(lighter, data)
    original = build_model()
    for name in ("loud", "plain"):
        np.testing.assert_array_equal(weight(model, name), weight(original, name))
    assert zeros(model) == zeros(whole) | {"loud": 0, "plain": 0}
    assert {change.site for change in result.changes if not change.done} >= {"loud", "plain"}
    assert str(lighter) == str(step)


def test_a_weight_inside_a_subgraph_comes_last_and_steps_back_all_the_same() -> None:
    numbers = ", ".join(f"{number:.3f}" for number in np.random.default_rng(3).uniform(1, 2, 256))
    body = f"""
        s = ReduceSum<keepdims=0>(x) z = Cast<to=9>(s)
        t = If<then_branch = left () => (float[N,16] l) {{
                   w = Constant<value = float[16,16] {{{numbers}}}>() [inner] l = MatMul(x, w) }},
               else_branch = right () => (float[N,16] k) {{ k = Identity(x) }}>(z)
        [last] y = MatMul(t, w4)
    """
    model, step = build_model(body), Prune(pattern="2:4")
    ranked = step.worst_first(model, context(model, samples()), ("inner", "last"), (), feeds(4))
    assert ranked == ("last", "inner")
    result = step.without(["inner"]).run(model, context(model, samples()))
    assert {change.site: change.done for change in result.changes} == {"inner": False, "last": True}


@pytest.mark.parametrize(("step", "data"), [(PATTERNS[0], True), (PATTERNS[1], True), (PATTERNS[1], False)], ids=str)
def test_the_accuracy_loop_keeps_zeros_where_the_limit_allows_them(compiled: Compile, step: Prune, data: bool) -> None:
    whole = compiled(step, data=data, out="whole")
    limit = whole.report.fidelity.outputs[0].sqnr_db + 3
    result = compiled(step, data=data, limits=Limits(min_sqnr=limit))
    assert result.exit_code == ExitCode.OK
    assert result.report.fidelity.outputs[0].sqnr_db >= limit
    assert 0 < len(reverted(result)) < len(NAMES)
    assert "quiet" not in reverted(result)
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(result.path / "model.onnx").graph.initializer}
    assert {name for name, held in WEIGHTS.items() if not (arrays[held] == 0).any()} == reverted(result)
    assert distance(ir.load(result.path / "model.onnx")) < distance(ir.load(whole.path / "model.onnx"))


def test_the_accuracy_loop_gives_the_same_bytes_twice(compiled: Compile) -> None:
    limit = Limits(min_sqnr=20.0)
    first, second = (compiled(PATTERNS[1], limits=limit, out=out) for out in ("a", "b"))
    assert file_digests(first.path) == file_digests(second.path)


def test_decisions_leave_layers_alone_again(compiled: Compile, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    decided = Decisions("prune{pattern=1:4}", reverted=(Reverted(1, ("loud",), "reverted to keep --min-sqnr"),))
    write_decisions(tmp_path / "made", decided)
    result = compiled(Prune(pattern="1:4"), decisions=tmp_path / "made" / "decisions.json")
    assert reverted(result) == {"loud"}


def test_channels_offer_no_layer_and_say_so() -> None:
    step = Prune(ratio=0.5)
    assert step.revertible(build_model(), NAMES) == ()
    with pytest.raises(PassError, match=r"prune\{ratio=0.5\}: cannot leave single sites alone"):
        step.without(["loud"])
