"""`pack`, `unpack` and `--pack` as a person and a build system use them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graphopt.cli.main import _run


@pytest.fixture
def model(fixtures: Path) -> str:
    return str(fixtures / "digits_cnn" / "model.onnx")


def test_a_model_goes_there_and_back(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _run(["pack", model]) == 0
    assert "coding" in capsys.readouterr().out
    assert _run(["unpack", "model.gopt"]) == 0
    assert capsys.readouterr().out == "model/model.onnx\n"
    assert (tmp_path / "model" / "model.onnx").read_bytes() == Path(model).read_bytes()


def test_without_the_native_library_it_unpacks_and_says_so(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _run(["pack", model, "-o", str(tmp_path / "small.gopt")]) == 0
    monkeypatch.setattr("graphopt.pack.decoder.native_coding", None)
    assert _run(["unpack", str(tmp_path / "small.gopt"), "-o", str(tmp_path / "out")]) == 0
    assert "without the package constriction this takes longer" in capsys.readouterr().err
    assert (tmp_path / "out" / "model.onnx").read_bytes() == Path(model).read_bytes()


def test_json_tells_every_tensor(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "small.gopt"
    assert _run(["pack", model, "-o", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["packed"] == out.stat().st_size
    assert report["packed"] == report["graph_packed"] + sum(row["packed"] for row in report["tensors"])
    assert _run(["unpack", str(out), "-o", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"][0]["bytes"] == Path(model).stat().st_size


def test_compile_packs_and_a_bundle_is_packed(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _run([model, "--passes", "fold", "--pack", "-q"]) == 0
    inside = tmp_path / "model.ort" / "model.gopt"
    assert _run(["pack", "model.ort", "--json"]) == 0
    assert (tmp_path / "model.ort.gopt").read_bytes() == inside.read_bytes()
    manifest = json.loads((tmp_path / "model.ort" / "manifest.json").read_text())
    assert "model.gopt" in manifest["files"]
    assert _run(["unpack", str(inside), "-o", "out"]) == 0
    assert (tmp_path / "out" / "model.onnx").read_bytes() == (tmp_path / "model.ort" / "model.onnx").read_bytes()


@pytest.mark.parametrize("verb", [[], ["inspect"]])
def test_a_packed_model_is_no_model_before_it_is_unpacked(
    verb: list[str], model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _run(["pack", model, "-o", "small.gopt"]) == 0
    assert _run([*verb, "small.gopt"]) == 2
    assert "small.gopt: is a packed model; unpack it first: graphopt unpack small.gopt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pack", "missing.onnx"], "does not exist"),
        (["pack", "MODEL", "-o", "taken.txt"], "exists and is no packed model"),
        (["pack", "MODEL", "-o", "."], "is a folder, not a file"),
        (["pack", "MODEL", "-o", "MODEL"], "is the input"),
        (["unpack", "missing.gopt"], "no such file"),
        (["unpack", "taken.txt"], "is not a packed model"),
        (["unpack", "taken.txt", "-o", "full"], "exists and is not empty"),
        (["unpack", "taken.txt", "-o", "taken.txt"], "is a file, not a folder"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(
    words: list[str],
    said: str,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.txt").write_text("something of somebody")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert _run([model if word == "MODEL" else word for word in words]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert (tmp_path / "taken.txt").read_text() == "something of somebody"
