"""Which layers take more bits than asked for: those with few weights to an output, and those that drown the outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from passes.quant.blockwise.block_models import ORT
from rewritten_models import actions, data, sqnr
from text_models import build

from graphopt.calibration import Dataset, open_calibration
from graphopt.model_io import ShapeBinding, input_specs, load_model, model_bytes
from graphopt.pass_base import Context, PassResult
from graphopt.reference import Feed
from graphopt.runner import run_pass
from graphopt_passes.quant import Quant

SEPARABLE = """
g (float[1,48,6,6] x) => (float[1,40,6,6] y) {
  [depth] a = Conv<group = 48, pads = [1, 1, 1, 1]>(x, w1)
  [point] y = Conv(a, w2)
}"""
CHAIN = """
g (float[B,64] x) => (float[B,48] y) {
  [first] a = MatMul(x, w1)
  [second] b = MatMul(a, w2)
  [last] y = MatMul(b, w3)
}"""


def run(model: ir.Model, **options: object) -> PassResult:
    calibrated = options.pop("calibrated", True)
    ctx = Context(model, ORT, calibration=data(model) if calibrated else None)
    return run_pass(Quant(**{"bits": 4, **options}), ctx).result  # type: ignore[arg-type]


def chain() -> ir.Model:
    """The second of three layers has a few weights so large that 4 bits lose the others, which carry the signal."""
    model = build(CHAIN, w1=(64, 64), w2=(64, 64), w3=(64, 48))
    value = model.graph.initializers["w2"]
    assert value.const_value is not None
    weight = value.const_value.numpy().copy()
    weight[::8] *= 40
    value.const_value = ir.tensor(weight, name="w2")
    first = model.graph.initializers["w1"]
    assert first.const_value is not None
    weight = first.const_value.numpy().copy()
    weight[:, ::8] *= 1e-4  # what meets the large weights is next to nothing
    first.const_value = ir.tensor(weight, name="w1")
    return model


def bits_of(result: PassResult) -> dict[str, int]:
    return {change.site: int(change.details["bits"]) if change.done else 0 for change in result.changes}


def test_depthwise_kernels_take_8_bits_and_say_why() -> None:
    model = build(SEPARABLE, w1=(48, 1, 3, 3), w2=(40, 48, 1, 1))
    result = run(model, min_output_sqnr=-99.0)
    assert bits_of(result) == {"depth": 8, "point": 4}
    assert "9 weights to an output are too few for 4 bits" in actions(result)["depth"]
    assert (result.metrics["layers_int4"], result.metrics["layers_int8"]) == (1, 1)


def test_narrow_tables_keep_4_bits() -> None:
    model = build("g (int64[B,T] ids) => (float[B,T,D] y) { [look] y = Gather(table, ids) }", table=(300, 20))
    assert bits_of(run(model, min_output_sqnr=-99.0)) == {"look": 4}


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("calibrated", [True, False])
def test_the_layer_that_drowns_an_output_takes_more_bits(calibrated: bool, bits: int) -> None:
    model, algorithm = chain(), "auto" if calibrated else "rtn"
    options = {"calibrated": calibrated, "bits": bits, "algorithm": algorithm}
    loose = run(model.clone(), min_output_sqnr=-99.0, **options)
    assert set(bits_of(loose).values()) == {bits}
    floor = float(loose.metrics["output_sqnr_db"]) + 3
    before = model.clone()
    result = run(model, min_output_sqnr=floor, **options)
    assert float(result.metrics["output_sqnr_db"]) >= floor
    changed = [name for name, number in bits_of(result).items() if number != bits]
    assert changed
    assert all("bits its noise would be" in actions(result)[name] for name in changed)
    assert sqnr(before, model) > 3


def test_without_data_the_report_says_what_outputs_were_judged_on() -> None:
    assert "without calibration data the outputs were judged on random inputs" in run(chain(), calibrated=False).notes
    assert not run(chain()).notes


def test_a_model_that_takes_no_random_input_is_stored_unjudged_and_says_so() -> None:
    text = """
    g (int64[4] n, float[B,64] x) => (float[A,C,D,E] y) {
      a = MatMul(x, w)
      [grow] y = Reshape(a, n)
    }"""
    result = run(build(text, w=(64, 64)), calibrated=False)
    assert result.modified and "output_sqnr_db" not in result.metrics
    assert any("random inputs do not do" in note for note in result.notes)


def test_an_unreachable_floor_leaves_all_in_float_with_the_reason() -> None:
    model = chain()
    before = model_bytes(model)
    result = run(model, min_output_sqnr=300.0)
    assert not result.modified and model_bytes(model) == before
    assert set(bits_of(result).values()) == {0}
    assert all("bits its noise would be" in action for action in actions(result).values())


def test_layers_that_share_a_weight_step_back_together() -> None:
    text = "g (float[B,64] x) => (float[B,64] y) { [one] a = MatMul(x, w)  [two] y = MatMul(a, w) }"
    result = run(build(text, w=(64, 64)), min_output_sqnr=30.0)
    found = bits_of(result)
    assert found["one"] == found["two"] != 4


def test_the_same_bits_are_chosen_again() -> None:
    first, second = chain(), chain()
    run(first, min_output_sqnr=25.0)
    run(second, min_output_sqnr=25.0)
    assert model_bytes(first) == model_bytes(second)


@pytest.mark.parametrize("algorithm", ["rtn", "gptq", "awq", "hqq"])
def test_every_algorithm_reaches_the_floor(algorithm: str) -> None:
    result = run(chain(), algorithm=algorithm, min_output_sqnr=25.0)
    assert result.modified and float(result.metrics["output_sqnr_db"]) >= 25.0


def test_samples_that_one_score_decides_do_not_hide_those_that_change() -> None:
    """The mean of decibels of these class scores is far above the floor, their noise all together is below."""
    text = "g (float[1,64] x) => (float[1,8] y) { [head] a = MatMul(x, w)  y = Softmax(a) }"
    model = build(text, w=(64, 8))
    weight = model.graph.initializers["w"].const_value
    assert weight is not None
    matrix = weight.numpy()

    def feeds() -> Iterator[Feed]:
        rng = np.random.default_rng(0)
        for i in range(8):
            row = rng.standard_normal((1, 64)).astype(np.float32)
            sure = 400 * matrix[:, i % 8 : i % 8 + 1].T  # one score is 1 whatever is rounded
            yield {"x": (row if i < 2 else sure).astype(np.float32)}

    ctx = Context(model, ORT, calibration=Dataset("samples", "0", feeds))
    level = run_pass(Quant(bits=2, algorithm="rtn", min_output_sqnr=-99.0), replace(ctx, model=model.clone()))
    assert float(level.result.metrics["output_sqnr_db"]) < 30  # 60 and more if decibels were averaged


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_mobilenet_of_the_zoo_keeps_its_classes(zoo: Callable[..., Path], calibrated: bool) -> None:
    folder = zoo("mobilenet_v1_025", 16, 8)
    model = load_model(folder / "model.onnx")
    calibration = open_calibration(folder / "calib.npz", input_specs(model), ShapeBinding()) if calibrated else None
    before = model.clone()
    result = run_pass(Quant(bits=4), Context(model, ORT, calibration=calibration)).result
    assert float(result.metrics["output_sqnr_db"]) >= 16
    assert len(model_bytes(model)) < 0.4 * len(model_bytes(before))
