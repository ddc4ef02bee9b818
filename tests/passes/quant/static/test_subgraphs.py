"""Layers inside If, Loop and Scan on static integers: like those of the main graph, as far as data reaches them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from quantized_models import actions, decibels, samples
from small_models import build, context

from graphopt.calibration import Dataset, open_calibration
from graphopt.model_io import ShapeBinding, input_specs, load_model, model_bytes
from graphopt.pass_base import PassResult
from graphopt.reference import Feed, Reference
from graphopt.runner import run_pass
from graphopt.targets import IntegerRules, Target
from graphopt_passes.quant import Quant

Shape = tuple[int, ...]
STATIC = "int8, calibrated ranges"
PLAIN: dict[str, object] = {"equalize": False, "smooth": False, "min_sqnr": -99.0, "min_output_sqnr": -99.0}
SIGNATURE = "(float[4,32] x, bool c) => (float[4,32] y)"
BRANCHES = """[choose] y = If(c) <
  then_branch = yes () => (float[4,32] o) { [one] h = MatMul(x, w)  [two] o = Gemm(h, v, b) },
  else_branch = no () => (float[4,32] o) { h = Neg(x)  [three] o = MatMul(h, w) }
>"""
WEIGHTS: dict[str, Shape] = {"w": (32, 32), "v": (32, 32), "b": (32,)}
LOOP = """yes = Constant<value = bool {1}>()
[turn] y = Loop(n, yes, x) <body = body (int64 i, bool t, float[4,32] s) => (bool u, float[4,32] o) {
  u = Identity(t)  [inner] h = MatMul(s, w)  [bias] k = Add(h, b)  [bound] o = Tanh(k)
}>"""
SCAN = """[turn] last, y = Scan<num_scan_inputs = 1,
  body = body (float[32] s, float[32] r) => (float[32] p, float[32] q) {
  [inner] h = MatMul(r, w)  [bias] k = Add(h, b)  half = Constant<value = float {0.5}>()
  old = Mul(s, half)  p = Add(old, k)  q = Tanh(p)
}>(z, x)"""


def quantize(model: ir.Model, data: Dataset | None = None, **options: object) -> PassResult:
    ctx = context(model, calibration=data or samples(model))
    return run_pass(Quant(**{**PLAIN, **options}), ctx).result  # type: ignore[arg-type]


def loaded(model: ir.Model, folder: Path) -> list[str]:
    """Operators after ONNX Runtime optimized a model, those of subgraphs included."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimized.onnx"), 3
    onnxruntime.InferenceSession(model_bytes(model), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in ir.from_proto(onnx.load(folder / "optimized.onnx")).graph.all_nodes()]


def names_are_unique(model: ir.Model) -> bool:
    made = [value.name for node in model.graph.all_nodes() for value in node.outputs if value.name]
    return len({*made}) == len(made)


def scale(model: ir.Model, name: str, factor: float) -> None:
    value = model.graph.initializers[name]
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(factor), name=name)


def feeds_of(model: ir.Model, **fixed: np.ndarray) -> Dataset:
    """Samples with some inputs fixed."""
    return Dataset("fixed", None, lambda: ({**feed, **fixed} for feed in samples(model).feeds()))


def closeness(before: ir.Model, after: ir.Model, **fixed: np.ndarray) -> float:
    """Signal to noise in dB over all of four random inputs, as ONNX Runtime runs models by default."""
    left, right, signal, noise = Reference(before), Reference(after), 0.0, 0.0
    feeds: list[Feed] = [{**feed, **fixed} for feed in samples(before, 4).feeds()]
    for feed in feeds:
        expected, got = left.run(feed)["y"], right.run(feed)["y"]
        signal, noise = signal + float(np.square(expected).sum()), noise + float(np.square(expected - got).sum())
    return 10 * np.log10(signal / noise)


def test_both_branches_compute_on_integers_and_share_a_weight(tmp_path: Path) -> None:
    model, original = build(SIGNATURE, BRANCHES, WEIGHTS), build(SIGNATURE, BRANCHES, WEIGHTS)
    done = actions(quantize(model))
    assert {done["one"], done["two"], done["three"]} == {STATIC}
    kinds = loaded(model, tmp_path)
    assert (kinds.count("QLinearMatMul"), kinds.count("QGemm"), kinds.count("MatMulIntegerToFloat")) == (1, 1, 1)
    assert names_are_unique(model)
    assert sorted(name for name in model.graph.initializers if name.startswith("w_")) == ["w_q", "w_scale"]
    assert decibels(original, model) > 30
    for taken in (True, False):
        assert closeness(original, model, c=np.array(taken)) > 30


def test_a_branch_without_data_keeps_a_weaker_form() -> None:
    model, original = build(SIGNATURE, BRANCHES, WEIGHTS), build(SIGNATURE, BRANCHES, WEIGHTS)
    done = actions(quantize(model, feeds_of(model, c=np.array(True))))
    assert (done["one"], done["two"]) == (STATIC, STATIC)
    reason = "it stands in a subgraph that no calibration sample runs"
    assert done["three"] == f"int8, input ranges found on every run: {reason}"
    assert closeness(original, model, c=np.array(False)) > 30


def test_a_target_of_static_integers_leaves_a_branch_without_data_in_float() -> None:
    model = build(SIGNATURE, BRANCHES, WEIGHTS)
    target = Target(name="unit", integers=IntegerRules(static_only=True))
    ctx = context(model, calibration=feeds_of(model, c=np.array(True)), target=target)
    done = actions(run_pass(Quant(), ctx).result)
    assert done["three"] == "skipped: it stands in a subgraph that no calibration sample runs"
    assert done["one"] == STATIC


@pytest.mark.parametrize("turns", [1, 5])
def test_a_loop_computes_on_integers(turns: int, tmp_path: Path) -> None:
    signature, weights = "(float[4,32] x, int64 n) => (float[4,32] y)", {"w": (32, 32), "b": (32,)}
    model, original = build(signature, LOOP, weights), build(signature, LOOP, weights)
    for one in (model, original):
        scale(one, "w", 1 / 8)  # small enough that the state does not jump about
    fixed = {"n": np.array(turns)}
    done = actions(quantize(model, feeds_of(model, **fixed)))
    assert done["inner"] == STATIC
    kinds = loaded(model, tmp_path)
    assert "QGemm" in kinds
    assert "DequantizeLinear" not in kinds
    assert closeness(original, model, **fixed) > 30


def test_a_scan_computes_on_integers(tmp_path: Path) -> None:
    signature, weights = "(float[6,32] x, float[32] z) => (float[6,32] y)", {"w": (32, 32), "b": (32,)}
    model, original = build(signature, SCAN, weights), build(signature, SCAN, weights)
    assert actions(quantize(model))["inner"] == STATIC
    assert "QGemm" in loaded(model, tmp_path)
    assert decibels(original, model) > 30


def test_a_loop_whose_shapes_grow_is_told() -> None:
    body = """yes = Constant<value = bool {1}>()
    [turn] y = Loop(n, yes, x) <body = body (int64 i, bool t, float[M,32] s) => (bool u, float[K,32] o) {
      u = Identity(t)  [inner] h = MatMul(s, w)  o = Concat<axis = 0>(s, h)
    }>"""
    model = build("(float[4,32] x, int64 n) => (float[L,32] y)", body, {"w": (32, 32)})
    action = actions(quantize(model))["inner"]
    reason = "inside a Loop, where the shapes of its values may differ from turn to turn"
    assert action == f"int8, input ranges found on every run: {reason}"


IMAGES = """[choose] a = If(c) <
  then_branch = yes () => (float[N,8,6,6] o) {
    [first] p = Conv<pads = [1,1,1,1]>(x, w, b)  q = Relu(p)  [second] s = Conv<pads = [1,1,1,1]>(q, v)
    [sum] t = Add(s, q)  [third] o = Conv(t, u)
  },
  else_branch = no () => (float[N,8,6,6] o) { [small] o = Conv(x, k) }
>
[last] y = Conv(a, v2)"""
KERNELS: dict[str, Shape] = {
    "w": (8, 8, 3, 3), "b": (8,), "v": (8, 8, 3, 3), "u": (8, 8, 1, 1), "k": (8, 8, 1, 1), "v2": (8, 8, 1, 1),
}  # fmt: skip


def test_convolutions_of_a_branch_are_fused_up_to_what_it_hands_out(tmp_path: Path) -> None:
    signature = "(float[N,8,6,6] x, bool c) => (float[N,8,H,W] y)"
    model, original = build(signature, IMAGES, KERNELS), build(signature, IMAGES, KERNELS)
    for one in (model, original):
        scale(one, "k", 200.0)  # both branches hand out numbers of the same size
    done = actions(quantize(model, bias_correction=False))
    assert done["sum"] == "Add on int8"
    kinds = loaded(model, tmp_path)
    assert kinds.count("QLinearConv") == 4  # the last one makes an output
    assert kinds.count("QLinearAdd") == 1
    assert decibels(original, model) > 25


def test_what_a_branch_reads_from_outside_is_rounded_there_and_inside(tmp_path: Path) -> None:
    body = """[before] h = MatMul(x, w)
    [choose] y = If(c) <
      then_branch = yes () => (float[4,32] o) { [one] o = MatMul(h, v) },
      else_branch = no () => (float[4,32] p) { p = Neg(h) }
    >"""
    model, original = build(SIGNATURE, body, WEIGHTS), build(SIGNATURE, body, WEIGHTS)
    done = actions(quantize(model))
    assert (done["before"], done["one"]) == (STATIC, STATIC)
    kinds = loaded(model, tmp_path)
    assert (kinds.count("QLinearMatMul"), kinds.count("MatMulIntegerToFloat")) == (1, 1)
    assert closeness(original, model, c=np.array(True)) > 30


def test_every_calibrator_and_guard_looks_into_branches() -> None:
    model, original = build(SIGNATURE, BRANCHES, WEIGHTS), build(SIGNATURE, BRANCHES, WEIGHTS)
    result = quantize(model, calibrator="auto", min_sqnr=22.0, min_output_sqnr=20.0)
    levels = {change.site: change.details.get("layer_sqnr_db") for change in result.changes if change.done}
    assert all(float(levels[name] or 0) > 30 for name in ("one", "two", "three"))
    strict = build(SIGNATURE, BRANCHES, WEIGHTS)
    assert "would leave" in actions(quantize(strict, min_sqnr=70.0))["one"]
    assert decibels(original, model) > 28


RECURRENT = """[choose] y = If(c) <
  then_branch = yes () => (float[4,1,2,32] o) { [cell] o = KIND<hidden_size = 32>(x, w, r, b) },
  else_branch = no () => (float[4,1,2,32] o) { [other] o = KIND<hidden_size = 32>(x, w, r) }
>"""


@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_recurrent_layers_of_branches_store_their_weights(kind: str, gates: int) -> None:
    weights: dict[str, Shape] = {"w": (1, gates * 32, 16), "r": (1, gates * 32, 32), "b": (1, gates * 64)}
    signature = "(float[4,2,16] x, bool c) => (float[4,1,2,32] y)"
    body = RECURRENT.replace("KIND", kind)
    model, original = build(signature, body, weights), build(signature, body, weights)
    for one in (model, original):
        for name in weights:
            scale(one, name, 1 / 6)
    done = actions(quantize(model))
    reason = f"weights in int8, arithmetic in float: {kind} has no integer form on the target"
    assert (done["cell"], done["other"]) == (reason, reason)
    stored = [value for graph in model.graphs() for value in graph.initializers.values() if value.name != "b"]
    assert sorted(v.name or "" for v in stored if v.dtype == ir.DataType.INT8) == ["r_q", "w_q"]
    assert all(v.const_value.size <= gates * 32 for v in stored if v.dtype == ir.DataType.FLOAT)  # type: ignore[union-attr]
    for taken in (True, False):
        assert closeness(original, model, c=np.array(taken)) > 35


@pytest.mark.parametrize("case", ["silero_vad_op15", "silero_vad_op18"])
def test_a_speech_detector_keeps_its_decisions(case: str, zoo: Callable[..., Path]) -> None:
    folder = zoo(case, samples=64, limit=64)
    model, original = load_model(folder / "model.onnx"), load_model(folder / "model.onnx")
    data = open_calibration(folder / "calib.npz", input_specs(model), ShapeBinding())
    done = actions(run_pass(Quant(), context(model, calibration=data)).result)
    assert sum(action == STATIC for action in done.values()) >= (5 if case == "silero_vad_op18" else 3)
    if case == "silero_vad_op18":  # the branch for 8 kHz, which no sample takes
        assert "no calibration sample runs" in done["node_conv1d_3_2"]
    left, right = Reference(original), Reference(model)
    held = open_calibration(folder / "eval.npz", input_specs(original), ShapeBinding())
    pairs = [(left.run(feed)["output"].item(), right.run(feed)["output"].item()) for feed in held.feeds()]
    assert len(pairs) >= 64
    assert np.mean([(a > 0.5) == (b > 0.5) for a, b in pairs]) > 0.98
