"""What the pass promises of weights in blocks: options, data, shared facts, files, determinism."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from passes.quant.blockwise.block_models import ORT, on_grid, optimized, quantize
from rewritten_models import actions, data, kinds, sqnr
from text_models import build

from graphopt.calibration import open_calibration
from graphopt.errors import ExitCode, GraphoptError, OptionError
from graphopt.model_io import ShapeBinding, input_specs, load_model, model_bytes, save_model
from graphopt.pass_base import Context
from graphopt.runner import run_pass
from graphopt.targets import IntegerRules, Target
from graphopt.testing import check_pass
from graphopt_passes.quant import Quant

MLP = """
g (float[B,96] x) => (float[B,20] y) {
  [up] a = MatMul(x, w1)
  [bias] b = Add(a, b1)
  [norm] n = LayerNormalization(b, gain, shift)
  [left] c = MatMul(n, w2)
  [right] d = MatMul(n, w3)
  [gate] e = Mul(c, d)
  [down] y = Gemm<transB = 1>(e, w4, b4)
}"""
MLP_WEIGHTS = {
    "w1": (96, 80), "b1": (80,), "gain": (80,), "shift": (80,), "w2": (80, 64), "w3": (80, 64), "w4": (20, 64),
    "b4": (20,),
}  # fmt: skip


def mlp() -> ir.Model:
    return build(MLP, **MLP_WEIGHTS)


def details(algorithm: str, **options: object) -> dict[str, float]:
    result = quantize(mlp(), calibrated=True, algorithm=algorithm, **options)
    return {change.site: float(change.details["layer_sqnr_db"]) for change in result.changes if change.done}


# ---------------------------------------------------------------- algorithms


@pytest.mark.parametrize("algorithm", ["gptq", "awq", "auto"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_algorithms_that_use_data_beat_the_nearest_codes_in_every_layer(algorithm: str, symmetric: bool) -> None:
    nearest, found = (details(name, symmetric=symmetric) for name in ("rtn", algorithm))
    assert found.keys() == nearest.keys() == {"up", "left", "right", "down"}
    for layer, level in found.items():
        assert level > nearest[layer] + 0.3, layer


@pytest.mark.parametrize("algorithm", ["hqq", "auto"])
def test_algorithms_without_data_beat_the_nearest_codes(algorithm: str) -> None:
    levels = {}
    for name in ("rtn", algorithm):
        result = quantize(mlp(), algorithm=name)
        levels[name] = sum(float(c.details["weight_sqnr_db"]) for c in result.changes if c.done)
    assert levels[algorithm] > levels["rtn"]


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("group", [0, 16, 128])
def test_gptq_takes_any_group_and_order(act_order: bool, group: int) -> None:
    before, after = mlp(), mlp()
    result = quantize(after, calibrated=True, algorithm="gptq", act_order=act_order, group_size=group)
    assert all("gptq" in action for site, action in actions(result).items() if site in ("up", "left", "right", "down"))
    assert sqnr(before, after) > 12


def test_scales_go_into_the_norm_before_or_into_a_product_of_their_own() -> None:
    before, after = mlp(), mlp()
    result = quantize(after, calibrated=True, algorithm="awq")
    told = actions(result)
    assert "scales in norm" in told["left"] and "scales in norm" in told["right"]
    assert "scales in a Mul of its own" in told["up"]
    assert kinds(after)["Mul"] == kinds(before)["Mul"] + sum("Mul of its own" in action for action in told.values())
    assert sqnr(before, after) > 15


def test_two_bits_cost_more_than_four_and_eight_the_least() -> None:
    levels = []
    for options in ({"bits": 2}, {"bits": 4}, {"bits": 8, "mode": "weight", "group_size": 32}):
        model = mlp()
        quantize(model, **options)
        levels.append(sqnr(mlp(), model))
    assert levels[0] + 8 < levels[1] < levels[2] - 8


def test_convolutions_use_data_for_each_of_their_groups() -> None:
    text = "g (float[B,8,10,10] x) => (float[B,32,H,W] y) { [it] y = Conv<group = 2, pads = [1,1,1,1]>(x, w) }"
    levels = {}
    for algorithm in ("rtn", "gptq"):
        model = build(text, w=(32, 4, 3, 3))
        (change,) = quantize(model, calibrated=True, algorithm=algorithm).changes
        levels[algorithm] = float(change.details["layer_sqnr_db"])
    assert levels["gptq"] > levels["rtn"] + 0.4


def test_rounding_is_the_same_every_time() -> None:
    first, second = mlp(), mlp()
    for model in (first, second):
        quantize(model, calibrated=True)
    assert model_bytes(first) == model_bytes(second)


# ---------------------------------------------------------------- options


@pytest.mark.parametrize("algorithm", ["gptq", "awq"])
def test_algorithms_that_need_data_refuse_to_run_without(algorithm: str) -> None:
    with pytest.raises(OptionError, match="needs calibration data; give --calibration") as caught:
        quantize(mlp(), algorithm=algorithm)
    assert caught.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 8, "group_size": 32}, "quant.group_size: belongs to weights stored in blocks"),
        ({"bits": 8, "symmetric": True}, "quant.symmetric: belongs to weights stored in blocks"),
        ({"bits": 8, "mode": "dynamic", "algorithm": "rtn"}, "quant.algorithm: belongs to weights stored in blocks"),
        ({"group_size": 4}, "quant.group_size: 4 weights would share a scale as large as they are; use 8 at least"),
        ({"mode": "static"}, "4 bits store weights only"),
        ({"only": ("nothing",)}, "matches no layer"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(GraphoptError, match=message):
        quantize(mlp(), **options)


def test_targets_with_static_integers_only_refuse_blocks() -> None:
    model = mlp()
    target = Target(name="npu", integers=IntegerRules(static_only=True))
    with pytest.raises(OptionError, match="4 does not run on npu"):
        run_pass(Quant(bits=4), Context(model, target, calibration=data(model)))


def test_weights_in_eight_bits_have_blocks_only_if_asked() -> None:
    plain, blocks = mlp(), mlp()
    quantize(plain, bits=8, mode="weight")
    quantize(blocks, bits=8, mode="weight", group_size=32)
    assert plain.opset_imports[""] == 17 and blocks.opset_imports[""] == 21


def test_named_layers_stay_float() -> None:
    model = mlp()
    told = actions(quantize(model, skip=("down",)))
    assert told["down"] == "skipped: named by skip" and "w4" in model.graph.initializers
    assert actions(quantize(mlp(), only=("down",)))["up"] == "skipped: not named by only"


def test_an_opset_that_must_stay_leaves_the_model_alone() -> None:
    model = mlp()
    before = model_bytes(model)
    result = quantize(model, keep=True)
    assert not result.modified and model_bytes(model) == before
    assert sum("opset 17 is kept, 21 would be needed" in change.action for change in result.changes) == 4


def test_weights_that_scales_would_outweigh_stay_float() -> None:
    model = build("g (float[B,6] x) => (float[B,4] y) { [it] y = MatMul(x, w) }", w=(6, 4))
    result = quantize(model)
    assert not result.modified and "so few that scales would cost more" in result.changes[0].action


def test_a_weight_that_something_else_reads_stays_float() -> None:
    model = build("g (float[B,64] x) => (float[B,64] y, float[64,64] z) { y = MatMul(x, w) z = Neg(w) }", w=(64, 64))
    result = quantize(model)
    assert not result.modified and "shared with" in actions(result)["y"]


def test_what_is_in_blocks_already_is_left_alone() -> None:
    model = mlp()
    quantize(model)
    before = model_bytes(model)
    result = quantize(model)
    assert not result.modified and model_bytes(model) == before
    assert sum("already quantized" in change.action for change in result.changes) == 4


def test_the_pass_keeps_its_contract() -> None:
    check_pass(Quant(bits=4), mlp())


def test_names_and_notes_of_looked_up_rows_stay() -> None:
    model = build("g (int64[T] ids) => (float[T,64] y) { [look] y = Gather(table, ids) }", table=(200, 64))
    model.graph[0].metadata_props["from"] = "here"
    quantize(model)
    last = model.graph.outputs[0].producer()
    assert last is not None and last.name == "look" and last.metadata_props["from"] == "here"


# ---------------------------------------------------------------- files and real models


def test_weights_in_files_are_read_one_by_one(tmp_path: Path) -> None:
    save_model(build(MLP, **{**MLP_WEIGHTS, "w1": on_grid(96, 80, axis=0)}), tmp_path / "model.onnx", embed_limit=0)
    model = load_model(tmp_path / "model.onnx")
    assert isinstance(model.graph.initializers["w1"].const_value, ir.ExternalTensor)
    before = load_model(tmp_path / "model.onnx")
    quantize(model, algorithm="rtn")
    assert not any(isinstance(v.const_value, ir.ExternalTensor) and v.const_value.size > 99 for v in held(model))
    save_model(model, tmp_path / "small.onnx", embed_limit=0)
    again = load_model(tmp_path / "small.onnx")
    assert sqnr(before, again) > 15 and sqnr(model, again) > 100
    assert optimized(again, tmp_path)["MatMulNBits"] == 4


def held(model: ir.Model) -> list[ir.Value]:
    return [value for graph in model.graphs() for value in graph.initializers.values()]


def test_batch_norms_are_folded_before_weights_are_rounded() -> None:
    text = """
    g (float[B,8,6,6] x) => (float[B,16,6,6] y) {
      a = Conv<pads = [1,1,1,1]>(x, w) y = BatchNormalization(a, s, b, m, v)
    }"""
    variance = np.full(16, 0.5, np.float32)
    model = build(text, w=(16, 8, 3, 3), s=(16,), b=(16,), m=(16,), v=variance)
    quantize(model)
    assert not kinds(model)["BatchNormalization"]


def test_a_language_model_keeps_its_perplexity(zoo: Callable[..., Path], tmp_path: Path) -> None:
    import zoo as cases

    folder = zoo("stories260k", 32, 1000)
    perplexity = {}
    for algorithm in ("rtn", "auto"):
        model = load_model(folder / "model.onnx")
        calibration = open_calibration(folder / "calib.npz", input_specs(model), ShapeBinding())
        run_pass(Quant(bits=4, algorithm=algorithm), Context(model, ORT, calibration=calibration))
        save_model(model, tmp_path / "small.onnx")
        perplexity[algorithm] = cases.score("stories260k", tmp_path / "small.onnx")["value"]
    assert perplexity["auto"] <= 3.52 < perplexity["rtn"]


@pytest.mark.parametrize("case", ["silero_vad_op15", "gtcrn_simple", "tiny_kws"])
def test_models_of_the_zoo_run_in_blocks(zoo: Callable[..., Path], case: str) -> None:
    folder = zoo(case, 8, 8)
    model = load_model(folder / "model.onnx")
    calibration = open_calibration(folder / "calib.npz", input_specs(model), ShapeBinding())
    result = run_pass(Quant(bits=4), Context(model, ORT, calibration=calibration)).result
    assert result.modified and result.metrics["output_sqnr_db"] > 0
