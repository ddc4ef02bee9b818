"""From a model to a bundle, in one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphopt
from graphopt.bundle import file_digests, read_manifest
from graphopt.errors import ExitCode, GraphoptError, ModelError
from graphopt.model_io import load_model
from graphopt.recipe import Limits

Compile = Callable[..., graphopt.Result]


@pytest.fixture(scope="module")
def data(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and some of its data, so that a run takes a second."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "model.onnx").write_bytes((fixtures / "digits_cnn" / "model.onnx").read_bytes())
    for name, count in (("calib.npz", 48), ("eval.npz", 100)):
        with np.load(fixtures / "digits_cnn" / name) as npz:
            np.savez(folder / name, **{key: npz[key][:count] for key in npz.files})
    return folder


@pytest.fixture
def digits(data: Path, tmp_path: Path) -> Compile:
    """Optimize the digits CNN, its data given, into tmp_path/out."""
    folder = data

    def compile_digits(passes: str = "fold,quant", **options: object) -> graphopt.Result:
        given = {
            "out": tmp_path / "out",
            "calibration": folder / "calib.npz",
            "evaluation": folder / "eval.npz",
            **options,
        }
        return graphopt.optimize(folder / "model.onnx", passes, **given)

    return compile_digits


def test_a_bundle_holds_what_the_manifest_says(digits: Compile) -> None:
    result = digits()
    manifest = read_manifest(result.path)
    assert manifest is not None
    assert dict(manifest.files) == file_digests(result.path)
    assert set(manifest.files) == {"model.onnx", "report.html", "report.json"}
    assert (manifest.target, manifest.pipeline, manifest.model) == ("ort", "fold,quant", "model.onnx")


def test_the_report_counts_and_scores(digits: Compile) -> None:
    report = digits().report
    assert report.verdict == "ok"
    assert report.after.file_bytes < 0.4 * report.before.file_bytes
    assert report.accuracy is not None
    assert report.accuracy.samples == 100
    assert report.accuracy.before >= 97
    assert report.accuracy.drop <= 1.0
    assert report.fidelity.inputs == "evaluation data"
    assert report.fidelity.outputs[0].sqnr_db > 20
    assert [step.name for step in report.steps] == ["fold", "quant"]
    assert all(layer.notes or layer.after is None for layer in report.layers), "every layer ends in the report"


def test_two_runs_give_the_same_bytes(digits: Compile, tmp_path: Path) -> None:
    first, second = digits(out=tmp_path / "a"), digits(out=tmp_path / "b")
    assert file_digests(first.path) == file_digests(second.path)
    a, b = (path / "manifest.json" for path in (first.path, second.path))
    assert a.read_bytes() == b.read_bytes()


def test_a_second_run_is_up_to_date_until_something_changes(digits: Compile) -> None:
    assert not digits().up_to_date
    assert digits().up_to_date
    assert not digits(force=True).up_to_date
    assert not digits(seed=1).up_to_date
    assert not digits("fold").up_to_date
    assert not digits("fold", calibration=None).up_to_date


def test_data_without_a_digest_is_never_taken_from_the_cache(digits: Compile, fixtures: Path) -> None:
    from graphopt.calibration import Dataset

    images = np.load(fixtures / "digits_cnn" / "calib.npz")["image"]
    data = Dataset("stream", None, lambda: ({"image": images[i : i + 1]} for i in range(8)))
    assert not digits(calibration=data).up_to_date
    assert not digits(calibration=data).up_to_date


def test_arrays_can_be_given_in_place_of_files(digits: Compile, fixtures: Path) -> None:
    with np.load(fixtures / "digits_cnn" / "calib.npz") as npz:
        arrays = {"image": npz["image"]}
    result = digits(calibration=arrays)
    assert result.report.accuracy is not None
    assert digits(calibration=arrays).up_to_date


def test_a_model_that_no_step_changes_is_copied_byte_for_byte(digits: Compile, fixtures: Path, tmp_path: Path) -> None:
    digits("fold")
    once = tmp_path / "once.onnx"
    once.write_bytes((tmp_path / "out" / "model.onnx").read_bytes())
    result = graphopt.optimize(once, "fold", out=tmp_path / "twice")
    assert (result.path / "model.onnx").read_bytes() == once.read_bytes()
    assert any("no step changed anything" in note for note in result.report.notes)


def test_weight_files_of_a_model_that_no_step_changes_are_copied_with_it(data: Path, tmp_path: Path) -> None:
    source = tmp_path / "in" / "m.onnx"
    source.parent.mkdir()
    graphopt.optimize(data / "model.onnx", "fold", out=tmp_path / "folded")
    model = onnx.load(tmp_path / "folded" / "model.onnx")
    onnx.save(model, source, save_as_external_data=True, location="weights.bin", size_threshold=0)
    result = graphopt.optimize(source, "fold", out=tmp_path / "out")
    assert (result.path / "model.onnx").read_bytes() == source.read_bytes()
    assert (result.path / "weights.bin").read_bytes() == (source.parent / "weights.bin").read_bytes()


def test_a_missed_size_gives_a_usable_bundle_a_verdict_and_code_4(digits: Compile) -> None:
    result = digits("fold", limits=Limits(max_size=0.1))
    assert result.exit_code == ExitCode.LIMIT_MISSED
    assert result.report.verdict.startswith("--max-size 0.1 x missed")
    load_model(result.path / "model.onnx")
    again = digits("fold", limits=Limits(max_size=0.1))
    assert again.up_to_date
    assert again.exit_code == ExitCode.LIMIT_MISSED


def test_a_missed_drop_ships_the_best_model_that_keeps_it(digits: Compile) -> None:
    result = digits("fold,prune{ratio=0.8},quant", limits=Limits(max_drop=1.0))
    assert result.exit_code == ExitCode.LIMIT_MISSED
    assert "--max-drop 1 points missed" in result.report.verdict
    assert "written: the model after fold" in result.report.verdict
    assert result.report.accuracy is not None
    assert result.report.accuracy.drop <= 1.0
    assert [step.name for step in result.report.steps] == ["fold"]


def test_limits_that_hold_are_reported_as_met(digits: Compile) -> None:
    result = digits(limits=Limits(max_drop=2.0, max_size=0.5, min_sqnr=10.0, time_limit="10m"))
    assert result.exit_code == ExitCode.OK
    assert [limit.met for limit in result.report.limits] == [True] * 4


def test_a_missed_sqnr_is_a_missed_limit(digits: Compile) -> None:
    result = digits(limits=Limits(min_sqnr=90.0))
    assert result.exit_code == ExitCode.LIMIT_MISSED
    assert "--min-sqnr 90 dB missed" in result.report.verdict


def test_the_time_limit_leaves_out_steps_and_says_which(digits: Compile) -> None:
    result = digits("fold,quant", limits=Limits(time_limit="0.0001s"))
    assert result.exit_code == ExitCode.LIMIT_MISSED
    assert any("fold, quant left out" in note for note in result.report.notes)
    assert result.report.after.file_bytes == result.report.before.file_bytes


def test_loading_a_bundle_runs_it(digits: Compile, fixtures: Path) -> None:
    result = digits()
    bundle = graphopt.load(result.path)
    with np.load(fixtures / "digits_cnn" / "eval.npz") as npz:
        images, labels = npz["image"][:50], npz["labels"][:50]
    hits = [bundle({"image": images[i : i + 1]})["logits"].argmax() == labels[i] for i in range(50)]
    assert bundle.how == "executed"
    assert np.mean(hits) > 0.9


def test_without_data_the_user_is_told_what_data_would_add(digits: Compile) -> None:
    report = digits("fold,quant", calibration=None, evaluation=None).report
    assert any(note.startswith("no --calibration: ") for note in report.notes)
    assert report.fidelity.inputs == "random inputs"


def test_what_a_pass_wants_to_be_seen_is_among_the_notes(digits: Compile) -> None:
    report = digits("prune{round_to=1000}", calibration=None, evaluation=None).report
    assert any(note.startswith("prune: at most 0.00 of the macs can be removed") for note in report.notes)


def test_an_unknown_operator_is_said_and_the_rest_is_done(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17, "acme" : 1]>
    custom (float[N,4] x) => (float[N,4] y)
    <float[4] one = {1,1,1,1}, float[4] two = {2,2,2,2}>
    {
      c = Add(one, two)
      h = acme.Sharpen(x)
      y = Mul(h, c)
    }
    """
    ir.save(ir.from_onnx_text(text), tmp_path / "custom.onnx")
    report = graphopt.optimize(tmp_path / "custom.onnx", "fold", out=tmp_path / "out").report
    assert report.fidelity.not_run is not None
    assert report.fidelity.not_run.startswith("not run: unknown operator")
    assert "Sharpen" in report.fidelity.not_run
    assert any("equal outputs are promised but were not checked" in note for note in report.notes)


def test_infinite_masks_pass_and_nan_weights_do_not(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    masked (float[N,2] x) => (float[N,2] y)
    <float[2] mask = {0, -inf}, float[2] zero = {0, 0}>
    { h = Add(x, mask) s = Softmax(h) y = Add(s, zero) }
    """.replace("-inf", "0")
    model = ir.to_proto(ir.from_onnx_text(text))
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.float32([0, -np.inf]), "mask"))
    onnx.save(model, tmp_path / "m.onnx")
    assert graphopt.optimize(tmp_path / "m.onnx", "fold", out=tmp_path / "out").exit_code == 0
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.float32([0, np.nan]), "mask"))
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="holds NaN"):
        graphopt.optimize(tmp_path / "m.onnx", "fold", out=tmp_path / "out")


def test_every_figure_of_the_report_follows_from_the_input(digits: Compile) -> None:
    text = (digits().path / "report.json").read_text("utf8")
    for word in ("seconds", "median", "elapsed", "2026", "date"):
        assert word not in text, f"{word} is a clock's word"
    assert json.loads(text)["schema"] == 1


def test_an_error_is_a_graphopt_error_with_a_code() -> None:
    with pytest.raises(GraphoptError) as caught:
        graphopt.optimize("absent.onnx", "fold")
    assert caught.value.exit_code == ExitCode.USAGE
