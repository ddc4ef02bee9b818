"""The recipe `deep-compression` as a user runs it: sparse weights, codebooks, and one small file."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import numpy as np
import onnx
import pytest
from rich.console import Console

import graphopt
from graphopt.cli.main import _run
from graphopt.errors import UsageError
from graphopt.pack import unpack
from graphopt.reference import Reference
from graphopt.report.terminal import render

RECIPE = "deep-compression"


@pytest.fixture(scope="module")
def bundle(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> graphopt.Result:
    source, out = fixtures / "digits_cnn", tmp_path_factory.mktemp("deep") / "out"
    data = {"calibration": source / "calib.npz", "evaluation": source / "eval.npz"}
    return graphopt.optimize(source / "model.onnx", recipe=RECIPE, out=out, threads=1, **data)


def test_the_packed_file_is_a_twelfth_and_not_half_a_point_is_lost(bundle: graphopt.Result) -> None:
    report, packed = bundle.report, bundle.path / "model.gopt"
    assert packed.stat().st_size < report.before.file_bytes / 12
    assert report.accuracy is not None
    assert report.accuracy.drop < 0.5


def test_the_packed_file_gives_the_model_back_to_the_byte(bundle: graphopt.Result, tmp_path: Path) -> None:
    unpack(bundle.path / "model.gopt", tmp_path)
    assert (tmp_path / "model.onnx").read_bytes() == (bundle.path / "model.onnx").read_bytes()


def test_weights_are_sparse_and_shared(bundle: graphopt.Result) -> None:
    (prune,) = (step for step in bundle.report.steps if step.name == "prune")
    assert prune.metrics["sparsity"] == pytest.approx(0.6, abs=1e-3)
    zeros = codes = 0
    initializers = {
        t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(bundle.path / "model.onnx").graph.initializer
    }
    for name, array in initializers.items():
        if name.endswith("_codes"):
            table = next(a for n, a in initializers.items() if n.startswith(name[:-6]) and a.dtype == np.float32)
            used = table.reshape(-1)[array.astype(np.int64)]
            zeros, codes = zeros + int((used == 0).sum()), codes + used.size
    assert zeros / codes > 0.59


def test_the_report_says_how_small_the_packed_file_is_and_how_to_make_it_again(bundle: graphopt.Result) -> None:
    console = Console(width=80, file=StringIO())
    with console.capture() as printed:
        render(bundle.report, None, console)
    row = next(line for line in printed.get().splitlines() if line.startswith("packed file"))
    assert row.split()[2:4] == ["455", "kB"]
    assert bundle.report.command.endswith("--pack")
    assert ">packed " in (bundle.path / "report.html").read_text("utf8")


def test_without_samples_magnitudes_decide_and_digits_are_still_read(
    fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    source = fixtures / "digits_cnn"
    assert _run([str(source / "model.onnx"), "--recipe", RECIPE, "-o", "out"]) == 0
    printed = capsys.readouterr().out
    assert "packed file" in printed
    assert "prune{ratio=0.4 pattern=unstructured}" in printed
    with np.load(source / "eval.npz") as data:
        (scores,) = Reference(Path("out/model.onnx")).run({"image": data["image"]}).values()
        assert (scores.argmax(axis=1) == data["labels"]).mean() > 0.95


def test_channels_can_go_before_weights_are_shared_and_packed(fixtures: Path, tmp_path: Path) -> None:
    source = fixtures / "digits_cnn"
    data = {"calibration": source / "calib.npz", "evaluation": source / "eval.npz"}
    passes = "fold,prune{ratio=0.4 of=params},share"
    result = graphopt.optimize(source / "model.onnx", passes, out=tmp_path / "out", pack=True, threads=1, **data)
    assert (tmp_path / "out" / "model.gopt").stat().st_size < result.report.before.file_bytes / 10
    assert result.report.accuracy is not None
    assert result.report.accuracy.drop < 1


def test_a_recipe_that_packs_needs_the_coder(fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.pack.writer.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs the package constriction"):
        graphopt.optimize(fixtures / "digits_cnn" / "model.onnx", recipe=RECIPE, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
