"""The versions of TVM that the project allows must work: 0.1.15 of its ffi crashes on every expression it saves."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = Path(__file__).parent.parent.parent / "pyproject.toml"


def _requirement(name: str) -> Requirement:
    lines = tomllib.loads(PROJECT.read_text("utf8"))["project"]["dependencies"]
    return next(r for r in map(Requirement, lines) if r.name == name)


def test_installed_tvm_saves_an_expression_without_crashing() -> None:
    code = "import tvm; print(len(tvm.ir.save_json(tvm.tirx.const(1.0, 'float32'))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert int(done.stdout) > 0


def test_requirement_excludes_the_crashing_ffi() -> None:
    allowed = _requirement("apache-tvm-ffi").specifier
    assert not any(allowed.contains(v, prereleases=True) for v in ("0.1.15", "0.1.15.post1", "0.1.15.post2"))
    assert allowed.contains("0.1.14.post1")


def test_importer_still_has_the_table_that_is_asked_for_supported_operators() -> None:
    from graphopt_backends._import import _importer_names

    assert {"Conv", "MatMul", "QuantizeLinear"} <= _importer_names()
    assert "LSTM" not in _importer_names()
