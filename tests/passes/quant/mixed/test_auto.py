"""`bits=auto`: a form for every layer within a budget."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from passes.quant.mixed.models import bound, branches, quantize, samples

from graphopt.calibration import open_calibration
from graphopt.errors import OptionError
from graphopt.model_io import ShapeBinding, input_specs, load_model, model_bytes
from graphopt.pass_base import Change, Context, PassResult
from graphopt.reference import Reference
from graphopt.runner import run_pass
from graphopt.targets import IntegerRules, Target
from graphopt_passes.quant import Quant
from graphopt_passes.quant.audit import output_quality, sample_feeds

BYTES = 4 * 64 * 64 * 4


def bits(result: PassResult) -> dict[str, object]:
    return {
        change.site: change.details.get("bits")
        for change in result.changes
        if change.done and change.details.get("bits")
    }


def made(result: PassResult, name: str) -> Change:
    return next(c for c in result.changes if c.site == name and any(k.endswith("_layer_db") for k in c.details))


def kinds(model: ir.Model) -> set[str]:
    return {node.op_type for node in model.graph}


def test_few_bits_go_where_they_do_not_hurt() -> None:
    result = quantize(branches(), bits="auto", size=0.24)
    found = bits(result)
    assert found["quiet"] == found["quiet2"] == 4
    assert 8 in found.values()
    assert result.metrics["size"] <= 0.24  # type: ignore[operator]


@pytest.mark.parametrize("mode", ["auto", "static", "dynamic", "weight"])
def test_integers_of_8_bits_and_blocks_of_4_stand_in_one_model_that_runs(mode: str) -> None:
    model, before = branches(), branches()
    result = quantize(model, bits="auto", size=0.24, mode=mode)
    assert set(bits(result).values()) == {8, 4}
    assert "DequantizeLinear" in kinds(model)
    assert ("QuantizeLinear" in kinds(model)) == (mode in ("auto", "static"))
    assert ("MatMulInteger" in kinds(model)) == (mode == "dynamic")
    ctx = bound(before)
    levels = output_quality(Reference(before), Reference(model), list(samples(count=4).feeds()), ctx)
    assert levels["y"] > 20


def test_every_layer_carries_its_row_of_the_table() -> None:
    result = quantize(branches(), bits="auto", size=0.24)
    for name in ("loud", "loud2", "quiet", "quiet2"):
        details = made(result, name).details
        assert {"int8_layer_db", "int8_output_db", "int4_g32_layer_db", "int4_g32_output_db"} <= set(details)
        assert details["int4_g32_output_db"] < details["int8_output_db"]  # type: ignore[operator]
    loud, quiet = (made(result, name).details["int4_g32_output_db"] for name in ("loud", "quiet"))
    assert quiet > loud + 20  # type: ignore[operator]
    assert result.metrics["judged_by"] == "outputs"


def test_what_is_predicted_is_what_the_outputs_lose() -> None:
    metrics = quantize(branches(), bits="auto", size=0.2, mode="weight", algorithm="rtn").metrics
    assert metrics["output_sqnr_db"] == pytest.approx(metrics["predicted_sqnr_db"], abs=1.5)


@pytest.mark.parametrize("sqnr", [20.0, 30.0, 40.0])
def test_without_a_size_the_model_is_as_small_as_the_noise_allows(sqnr: float) -> None:
    result = quantize(branches(), bits="auto", size=None, min_output_sqnr=sqnr, mode="weight")
    assert result.metrics["output_sqnr_db"] >= sqnr  # type: ignore[operator]
    tighter = quantize(branches(), bits="auto", size=None, min_output_sqnr=sqnr + 6, mode="weight")
    assert tighter.metrics["size"] >= result.metrics["size"]  # type: ignore[operator]


def test_noise_beats_size_and_the_user_is_told() -> None:
    result = quantize(branches(), bits="auto", size=0.15, min_output_sqnr=40.0, mode="weight")
    assert result.metrics["output_sqnr_db"] >= 40  # type: ignore[operator]
    assert len(result.notes) == 1
    assert result.notes[0].startswith("size 0.15 is out of reach, it is 0.")
    assert result.notes[0].endswith("the outputs would fall below min_output_sqnr=40")


def test_a_size_that_nothing_reaches_gives_the_smallest_and_a_note() -> None:
    result = quantize(branches(), bits="auto", size=0.05, min_output_sqnr=0.0)
    assert set(bits(result).values()) == {4}
    assert result.notes == (f"size 0.05 is out of reach, it is {result.metrics['size']:.3g}",)


def test_a_size_of_one_leaves_everything_in_float_and_says_why() -> None:
    model = branches()
    before = model_bytes(model)
    result = quantize(model, bits="auto", size=1.0)
    assert not result.modified
    assert model_bytes(model) == before
    assert made(result, "loud").action == "skipped: float is worth its bytes here"


def test_without_data_weights_speak_for_themselves() -> None:
    result = quantize(branches(), data=False, bits="auto", size=0.24)
    assert result.metrics["judged_by"] == "layers"
    assert set(bits(result).values()) == {8, 4}
    assert "int4_g32_output_db" not in made(result, "loud").details


def test_a_kept_opset_has_no_blocks_but_8_bits() -> None:
    model = branches(opset=17)
    ctx = bound(model)
    ctx.keep_opset = True
    result = run_pass(Quant(bits="auto", size=0.2), ctx).result
    assert set(bits(result).values()) == {8}
    assert result.notes[0].endswith("blocks of 4 bits need opset 21, this is 17")


def test_layers_named_by_skip_stay_as_they_are() -> None:
    found = bits(quantize(branches(), bits="auto", size=0.2, skip=("quiet*",)))
    assert set(found) == {"loud", "loud2"}


def test_the_same_bytes_come_out_twice() -> None:
    first, second = branches(), branches()
    quantize(first, bits="auto", size=0.22)
    quantize(second, bits="auto", size=0.22)
    assert model_bytes(first) == model_bytes(second)


def test_at_equal_size_it_is_better_than_4_bits_everywhere() -> None:
    uniform, mixed = branches(), branches()
    quantize(uniform, bits=4, group_size=16, algorithm="rtn")
    quantize(mixed, bits="auto", size=0.21, mode="weight", algorithm="rtn")
    assert len(model_bytes(mixed)) <= len(model_bytes(uniform))
    ctx, feeds = bound(branches()), list(samples(count=4).feeds())
    one, other = (output_quality(Reference(branches()), Reference(m), feeds, ctx)["y"] for m in (uniform, mixed))
    assert other > one + 1


def test_at_equal_error_it_is_smaller_than_8_bits_everywhere() -> None:
    uniform = branches()
    level = quantize(uniform, mode="dynamic").metrics["output_sqnr_db"]
    mixed = branches()
    result = quantize(mixed, bits="auto", size=None, min_output_sqnr=level - 0.1, mode="dynamic")  # type: ignore[operator]
    assert result.metrics["output_sqnr_db"] >= level - 0.1  # type: ignore[operator]
    assert len(model_bytes(mixed)) < len(model_bytes(uniform))


def test_targets_with_static_integers_only_refuse_it() -> None:
    npu = Target(name="npu", integers=IntegerRules(static_only=True))
    model = branches()
    with pytest.raises(OptionError, match="does not run on npu"):
        Quant(bits="auto").requires(model, bound(model, target=npu))


@pytest.mark.parametrize("options", [{"size": 0.5}, {"bits": 4, "size": None}])
def test_a_size_belongs_to_bits_chosen_layer_by_layer(options: dict[str, object]) -> None:
    model = branches()
    with pytest.raises(OptionError, match=r"quant\.size: belongs to bits chosen layer by layer"):
        Quant(**options).requires(model, bound(model))  # type: ignore[arg-type]


def test_on_a_language_model_it_beats_4_bits_of_equal_size(zoo: Callable[..., Path]) -> None:
    folder = zoo("stories260k", samples=8, limit=8)
    original = load_model(folder / "model.onnx")
    data = open_calibration(folder / "calib.npz", input_specs(original), ShapeBinding())
    first = next(data.feeds(1))
    binding = ShapeBinding({name: array.shape for name, array in first.items()})
    models: list[ir.Model] = []
    for options in ({"bits": 4, "group_size": 16}, {"bits": "auto", "size": 0.195, "mode": "weight"}):
        model = load_model(folder / "model.onnx")
        run_pass(
            Quant(algorithm="rtn", **options), Context(model, Target(name="ort"), calibration=data, binding=binding)
        )  # type: ignore[arg-type]
        models.append(model)
    uniform, mixed = models
    assert len(model_bytes(mixed)) <= len(model_bytes(uniform))
    ctx = Context(original, Target(name="ort"), calibration=data)
    feeds = sample_feeds(ctx, 4)
    levels = [min(output_quality(Reference(original), Reference(m), feeds, ctx).values()) for m in models]
    assert levels[1] > levels[0] + 1
    assert np.isfinite(levels).all()
