"""Plugins: real packages, installed with pip and used through the command line; broken ones give one clear line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Install = Callable[..., dict[str, str]]


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


def graphopt(*arguments: object, env: dict[str, str], cwd: Path | None = None) -> Ran:
    command = [sys.executable, "-m", "graphopt", *map(str, arguments)]
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, check=False)
    return Ran(done.returncode, done.stdout, done.stderr)


def python(code: str, env: dict[str, str]) -> Any:
    """Run code in a process of its own; returns what it assigns to `result`."""
    program = f"import json\nfrom graphopt.plugins import load_plugins\n{code}\nprint(json.dumps(result))"
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def recording(path: Path, fixtures: Path) -> Path:
    """Write real digits the way the Acme Cam 1 records them."""
    with np.load(fixtures / "digits_cnn" / "calib.npz") as npz:
        frames = (npz["image"] * 255).round().astype(np.uint8)
    path.write_bytes(np.array(frames.shape[1:], "<u2").tobytes() + frames.tobytes())
    return path


# ---------------------------------------------------------------- a plugin that works


def test_an_installed_plugin_is_listed(plugins: Install) -> None:
    ran = graphopt("list", "--json", env=plugins("acme_graphopt"))
    assert ran.code == 0, ran.err
    listed = json.loads(ran.out)
    assert "acme-clip-weights" in listed["passes"]
    assert "acme:cam1" in listed["targets"]
    assert listed["criteria"]["acme-peak"].startswith("Largest magnitude among the weights")
    assert "wanda" in listed["criteria"]
    assert "acme-cam1" in listed["recipes"]
    names = {plugin["name"]: plugin["version"] for plugin in listed["plugins"]}
    assert names["acme-graphopt"] == "1.2.0"
    assert "graphopt" in names


def test_its_pass_target_and_reader_work_through_the_command(plugins: Install, fixtures: Path, tmp_path: Path) -> None:
    film = recording(tmp_path / "digits.acme", fixtures)
    arguments = ("--passes", "acme-clip-weights{sigmas=3}", "--target", "acme", "--calibration", f"acme:{film}#image")
    model = fixtures / "digits_cnn" / "model.onnx"
    ran = graphopt(model, *arguments, "-o", "out", "--json", env=plugins("acme_graphopt"), cwd=tmp_path)
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    assert report["pipeline"] == "acme-clip-weights{sigmas=3.0}"
    assert report["target"] == "acme:cam1"
    changes = report["steps"][0]["changes"]
    done = [change for change in changes if change["done"]]
    assert done
    assert all(change["action"].startswith("clipped ") for change in done)
    assert sum(change["details"]["clipped"] for change in done) > 100
    assert (tmp_path / "out" / "model.onnx").is_file()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert "acme-graphopt" in json.dumps(manifest), "a bundle must say which plugins took part"


def test_its_options_are_checked_like_those_of_built_in_passes(
    plugins: Install, fixtures: Path, tmp_path: Path
) -> None:
    model = fixtures / "digits_cnn" / "model.onnx"
    text = "acme-clip-weights{sigma=3}"
    ran = graphopt(model, "--passes", text, "-o", "out", env=plugins("acme_graphopt"), cwd=tmp_path)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.count("\n") == 1
    assert "acme-clip-weights.sigma: no such option; did you mean 'sigmas'?" in ran.err
    assert not (tmp_path / "out").exists()


def test_a_damaged_recording_is_one_line(plugins: Install, fixtures: Path, tmp_path: Path) -> None:
    (tmp_path / "short.acme").write_bytes(b"\x01\x00\x08\x00\x08\x00" + bytes(63))
    arguments = ("--passes", "acme-clip-weights", "--calibration", "acme:short.acme#image")
    ran = graphopt(fixtures / "digits_cnn" / "model.onnx", *arguments, env=plugins("acme_graphopt"), cwd=tmp_path)
    assert ran.code == 2
    assert "acme:short.acme#image: not a recording, or cut short; record it again" in ran.err
    assert ran.err.count("\n") == 1


def test_its_pass_keeps_the_contract(plugins: Install, fixtures: Path) -> None:
    code = f"""
from acme_graphopt.clip_weights import ClipWeights
from graphopt.testing import check_pass
result = {{}}
for name in ("digits_cnn", "digits_transformer"):
    for sigmas in (1.5, 100.0):
        done = check_pass(ClipWeights(sigmas=sigmas), {str(fixtures)!r} + "/" + name + "/model.onnx")
        result[f"{{name}} {{sigmas:g}}"] = [done.modified, len(done.changes)]
"""
    result = python(code, plugins("acme_graphopt"))
    assert [modified for modified, _ in result.values()] == [True, False, True, False]
    assert all(sites for _, sites in result.values())


def test_its_criterion_decides_what_is_pruned(plugins: Install, fixtures: Path, tmp_path: Path) -> None:
    model, env = fixtures / "digits_cnn" / "model.onnx", plugins("acme_graphopt")
    steps = {}
    for name in ("acme-peak", "l2"):
        step = f"prune{{criterion={name}}}"
        ran = graphopt(model, "--passes", step, "-o", name, "--json", env=env, cwd=tmp_path)
        assert ran.code == 0, ran.err
        report = json.loads(ran.out)
        assert report["pipeline"] == step
        steps[name] = (tmp_path / name / "model.onnx").read_bytes()
        assert any(change["action"].startswith("removed ") for change in report["steps"][0]["changes"])
    assert steps["acme-peak"] != steps["l2"]


def test_a_misspelled_criterion_names_the_nearest(plugins: Install, fixtures: Path, tmp_path: Path) -> None:
    model = fixtures / "digits_cnn" / "model.onnx"
    ran = graphopt(model, "--passes", "prune{criterion=acme-peek}", env=plugins("acme_graphopt"), cwd=tmp_path)
    assert (ran.code, ran.out) == (2, "")
    assert "prune.criterion: no criterion called 'acme-peek'; did you mean 'acme-peak'?" in ran.err


def test_its_criterion_keeps_the_contract(plugins: Install, fixtures: Path) -> None:
    code = f"""
from acme_graphopt.peak import Peak
from graphopt.testing import check_criterion, check_pass
from graphopt_passes.prune import Prune
model = {str(fixtures)!r} + "/digits_cnn/model.onnx"
scores = check_criterion(Peak(), model)
done = check_pass(Prune(criterion="acme-peak"), model, criteria=[Peak()])
result = [[round(float(s.mean()), 6) for s in scores], done.modified]
"""
    means, modified = python(code, plugins("acme_graphopt"))
    assert means
    assert set(means) == {1.0}
    assert modified


def test_its_recipe_is_found_by_name(plugins: Install) -> None:
    code = """
from graphopt.recipe import load_recipe
from graphopt.targets import Target
registry = load_plugins()
target = registry.targets.resolve("acme")
result = {
    "recipe": load_recipe("acme-cam1", registry).pipeline,
    "default": registry.default_pipeline(target),
    "default for ort": registry.default_pipeline(Target(name="ort")),
}
"""
    result = python(code, plugins("acme_graphopt"))
    assert result["recipe"].startswith("acme-clip-weights{sigmas=3.5},quant")
    assert result["default"] == "fold,acme-clip-weights,quant"
    assert result["default for ort"] is None


SELECTIONS = """
import os
def names(**options):
    return [f"{p.name}:{p.entry_point}" for p in load_plugins(**options).plugins]
without = names(disable=["Acme_Graphopt", "broken-graphopt"])
chosen = names(only=["acme-graphopt"])
os.environ["GRAPHOPT_PLUGINS"] = "none"
hermetic = names()
os.environ["GRAPHOPT_PLUGINS"] = "acme-graphopt"
named = names()
result = {"without": without, "chosen": chosen, "hermetic": hermetic, "named": named}
"""


@pytest.mark.parametrize("order", [("acme_graphopt", "broken_graphopt"), ("broken_graphopt", "acme_graphopt")])
def test_plugins_can_be_chosen_and_left_out_and_load_in_the_order_of_their_names(
    plugins: Install, order: Sequence[str]
) -> None:
    built_in = ["graphopt:backends", "graphopt:passes"]
    acme = ["acme-graphopt:camera", "acme-graphopt:clip-weights", "acme-graphopt:peak"]
    result = python(SELECTIONS, plugins(*order))
    assert result == {"without": built_in, "chosen": acme + built_in, "hermetic": built_in, "named": acme + built_in}


# ---------------------------------------------------------------- plugins that do not

BROKEN = {
    "broken_graphopt": "plugin broken-graphopt: fails on import: ModuleNotFoundError: No module named "
    "'a_module_that_is_not_installed'; disable it with --no-plugin broken-graphopt",
    "clash_graphopt": "pass fold: claimed by both clash-graphopt and graphopt; "
    "disable it with --no-plugin clash-graphopt",
    "misspelled_graphopt": "plugin misspelled-graphopt: implements the unknown hook 'graphopt_passses' "
    "(did you mean 'graphopt_passes'?); disable it with --no-plugin misspelled-graphopt",
    "argument_graphopt": "plugin argument-graphopt: graphopt_calibration takes the argument 'url', which the hook "
    "does not have (did you mean 'uri'?); disable it with --no-plugin argument-graphopt",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_one_line_and_exit_code_3(
    plugins: Install, fixtures: Path, tmp_path: Path, name: str
) -> None:
    model = fixtures / "digits_cnn" / "model.onnx"
    ran = graphopt(model, "--passes", "fold", "-o", "out", env=plugins(name), cwd=tmp_path)
    assert (ran.code, ran.out) == (3, "")
    assert BROKEN[name] in ran.err
    assert ran.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_way_out_that_a_broken_plugin_names_works(plugins: Install) -> None:
    arguments = [word for name in BROKEN for word in ("--no-plugin", name.replace("_", "-"))]
    ran = graphopt("list", "--json", *arguments, env=plugins(*BROKEN))
    assert ran.code == 0, ran.err
    assert {plugin["name"] for plugin in json.loads(ran.out)["plugins"]} == {"graphopt"}


def test_a_broken_plugin_does_not_keep_help_and_version_away(plugins: Install) -> None:
    env = plugins("broken_graphopt")
    assert graphopt("--help", env=env).code == 0
    assert graphopt("--version", env=env).code == 0


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (("--no-plugin", "acme"), {}, "--no-plugin: no installed plugin is called 'acme'; known: acme-graphopt"),
        (("--no-plugin", "graphopt"), {}, "--no-plugin graphopt: what graphopt itself brings is always loaded"),
        ((), {"GRAPHOPT_PLUGINS": "acme-grapopt"}, "GRAPHOPT_PLUGINS: no installed plugin is called 'acme-grapopt'"),
    ],
)  # fmt: skip
def test_a_plugin_that_is_not_there_cannot_be_named(
    plugins: Install, arguments: Sequence[str], environment: dict[str, str], message: str
) -> None:
    ran = graphopt("list", *arguments, env={**plugins("acme_graphopt"), **environment})
    assert ran.code == 2
    assert message in ran.err
    assert ran.err.count("\n") == 1
