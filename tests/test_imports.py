"""What starting costs: help, version and completion load neither plugins nor anything heavy."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

HEAVY = ["onnx", "onnx_ir", "numpy", "tvm", "onnxruntime", "torch", "onnx_graphsurgeon", "pluggy"]
PLUGINS = ["graphopt_passes", "graphopt_backends", "graphopt.plugins"]

PROGRAM = """
import json, sys
sys.argv = ["graphopt", *{arguments!r}]
try:
    {statement}
except SystemExit as e:
    assert not e.code, e.code
print("LOADED", json.dumps(sorted(set(sys.modules) & set({watched!r}))))
"""


def loaded(statement: str, arguments: list[str]) -> str:
    program = PROGRAM.format(statement=statement, arguments=arguments, watched=HEAVY + PLUGINS)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.rpartition("LOADED ")[2].strip()


MAIN = "from graphopt.cli import main; main()"


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded("import graphopt", []) == "[]"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["-h"], ["--version"], ["bench", "--help"], ["list", "--help"], ["doctor", "--help"]]
)
def test_help_and_version_load_nothing_heavy(arguments: list[str]) -> None:
    assert loaded(MAIN, arguments) == "[]"


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("graphopt --pas", "--passes"),
        ("graphopt model.onnx --rec", "--recipe"),
        ("graphopt be", "bench"),
        ("graphopt bench --", "--threads"),
    ],
)
def test_completion_loads_nothing_heavy(words: str, offered: str) -> None:
    environment = {"_GRAPHOPT_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    program = PROGRAM.format(statement=MAIN, arguments=[], watched=HEAVY + PLUGINS)
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
    assert f"plain,{offered}" in done.stdout
    assert done.stdout.endswith("LOADED []\n")


def test_loading_the_plugins_imports_neither_compilers_nor_runtimes() -> None:
    names = loaded("from graphopt.plugins import load_plugins; load_plugins(only=())", [])
    assert "graphopt_passes" in names
    assert "graphopt_backends" in names
    assert not [heavy for heavy in ("tvm", "onnxruntime", "torch", "onnx_graphsurgeon") if f'"{heavy}"' in names]
