"""The command as a person and a build system use it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest

from graphopt.cli.main import _run


@pytest.fixture
def model(fixtures: Path) -> str:
    return str(fixtures / "digits_cnn" / "model.onnx")


def test_dry_run_resolves_everything_and_writes_nothing(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _run([model, "--passes", "fold,prune{ratio=0.5}", "--target", "arm", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["target"] == "arm:cortex-a76"
    assert plan["passes"] == ["fold", "prune{ratio=0.5}"]
    assert plan["out"] == "model.arm"
    assert list(tmp_path.iterdir()) == []


def test_json_prints_the_report_and_nothing_else_on_stdout(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run([model, "--passes", "fold", "-o", str(tmp_path / "out"), "--json"]) == 0
    assert capsys.readouterr().out == (tmp_path / "out" / "report.json").read_text("utf8")


def test_quiet_prints_nothing(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run([model, "--passes", "fold", "-o", str(tmp_path / "out"), "-q"]) == 0
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")


def test_a_second_run_says_up_to_date(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [model, "--passes", "fold", "-o", str(tmp_path / "out")]
    assert _run(command) == 0
    assert "up to date" not in capsys.readouterr().out
    assert _run(command) == 0
    assert "is up to date" in capsys.readouterr().out


def test_up_to_date_does_not_depend_on_the_process(model: str, tmp_path: Path) -> None:
    words = [model, "--passes", "fold", "-o", str(tmp_path / "out")]
    assert _run([*words, "-q"]) == 0
    answers: set[str] = set()
    for seed in ("1", "2"):
        command = [sys.executable, "-m", "graphopt", *words, "--dry-run", "--json"]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        answers.add(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
    assert len(answers) == 1
    assert json.loads(answers.pop())["up_to_date"] is True


def test_the_depfile_names_what_the_bundle_is_made_from(model: str, fixtures: Path, tmp_path: Path) -> None:
    calibration = str(fixtures / "digits_cnn" / "calib.npz")
    options = ["-o", str(tmp_path / "out"), "--calibration", calibration, "--depfile", str(tmp_path / "deps.d")]
    assert _run([model, "--passes", "fold", *options]) == 0
    assert (tmp_path / "deps.d").read_text() == f"{tmp_path}/out/manifest.json: {model} {calibration}\n"


def test_a_missed_limit_is_exit_code_4_and_a_verdict(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run([model, "--passes", "fold", "-o", str(tmp_path / "out"), "--max-size", "0.5"]) == 4
    assert "--max-size" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.onnx").is_file()


def test_list_names_passes_targets_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"fold", "prune", "quant"} <= set(found["passes"])
    assert {"ort", "x86:native", "arm:cortex-a76"} <= set(found["targets"])
    assert {"ort", "x86", "arm", "npu"} == set(found["backends"])
    assert {"int8", "small"} <= set(found["recipes"])
    assert _run(["list"]) == 0
    assert all(text for text in found["passes"].values()), "every pass says what the user gets"


@pytest.mark.parametrize("name", ["fold", "prune", "quant"])
def test_explain_shows_every_option_of_a_pass(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from graphopt.options import specs
    from graphopt.plugins import load_plugins

    assert _run(["explain", name]) == 0
    said = capsys.readouterr().out
    assert all(f"{spec.name}=" in said and spec.help in said for spec in specs(load_plugins().passes[name]))


def test_explain_shows_a_target_and_hints_at_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["explain", "arm"]) == 0
    said = capsys.readouterr().out
    assert "cortex-a76" in said
    assert "ConvTranspose 1 of input 1" in said
    assert _run(["explain", "qant"]) == 2
    assert "did you mean 'quant'?" in capsys.readouterr().err


def test_inspect_shows_layers_and_what_passes_could_do(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["inspect", model, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["operators"]["Conv"] == 7
    assert found["passes"]["fold"]["would_change"] > 0
    assert set(found["passes"]) >= {"fold", "prune", "quant"}
    assert _run(["inspect", model]) == 0


def test_extract_cuts_a_part_out(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = onnx.load(model).graph
    relu = next(node for node in graph.node if node.op_type == "Relu")
    out = tmp_path / "part.onnx"
    words = ["extract", model, "--inputs", graph.input[0].name, "--outputs", relu.output[0], "-o", str(out)]
    assert _run(words) == 0
    part = onnx.load(out).graph
    assert [o.name for o in part.output] == [relu.output[0]]
    assert len(part.node) < len(graph.node)
    assert _run(["extract", model, "--inputs", "image", "--outputs", "logit", "-o", str(out)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_doctor_says_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"arm", "npu", "ort", "x86"}
    assert all(entry["ok"] or entry["hint"] for entries in found.values() for entry in entries)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["completion", shell]) == 0
    assert "_GRAPHOPT_COMPLETE" in capsys.readouterr().out


def test_a_bug_shows_its_traceback_and_exits_with_70(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def explode(*args: object, **kwargs: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr("graphopt.compile.resolve.resolve", explode)
    assert _run([model, "--passes", "fold"]) == 70
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "this is a bug in graphopt" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing_half_written(model: str, tmp_path: Path, number: int) -> None:
    slow = tmp_path / "slow_data.py"
    slow.write_text(
        "import time, numpy as np\n"
        "def feeds():\n"
        "    for i in range(10000):\n"
        "        if i == 2: open('started', 'w').close()\n"
        "        if i >= 2: time.sleep(0.1)\n"
        "        yield {'image': np.zeros((1, 1, 8, 8), np.float32)}\n"
    )
    command = [sys.executable, "-m", "graphopt", model, "--passes", "fold", "--calibration", "slow_data:feeds"]
    process = subprocess.Popen(
        [*command, "-o", "out"], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ
    )
    for _ in range(600):
        if (tmp_path / "started").exists():
            break
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode().splitlines()[-1] == "graphopt: interrupted; nothing was written"
    assert "Traceback" not in err.decode()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == ["slow_data.py", "started"]


def test_an_interrupt_that_a_library_reports_as_an_import_error_is_one(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ImportError("initialization failed") from KeyboardInterrupt()

    monkeypatch.setattr("graphopt_passes.fold.Fold.run", fails)
    assert _run([model, "--passes", "fold", "-o", str(tmp_path / "out"), "-q"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "graphopt: interrupted; nothing was written"
