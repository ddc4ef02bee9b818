"""What all tests share: the model zoo, where there is one, and small models written as ONNX text."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

FIXTURES = Path(__file__).parent.parent / "fixtures"


@pytest.fixture(scope="session")
def fixtures() -> Path:
    return FIXTURES


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Export a case of the zoo named by GRAPHOPT_ZOO; the folder holds model.onnx, calib.npz and eval.npz."""
    folder = os.environ.get("GRAPHOPT_ZOO")
    if not folder:
        pytest.skip("GRAPHOPT_ZOO is not set")
    script = Path(folder) / "zoo.py"
    spec = importlib.util.spec_from_file_location("zoo", script)
    assert spec and spec.loader
    module = sys.modules["zoo"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    root = tmp_path_factory.mktemp("zoo")

    def export(case: str, samples: int = 64, limit: int = 200) -> Path:
        target = root / f"{case}-{samples}-{limit}"
        if not target.exists():
            module.export(case, target, samples=samples, limit=limit)
        return target

    return export


@pytest.fixture(scope="session")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, str]]:
    """Install packages of tests/plugins with pip, each once; returns the environment in which they are found.

    Nothing reaches the test run's own environment: each package lies in a folder that `PYTHONPATH` names.
    """
    root = tmp_path_factory.mktemp("plugins")

    def install(*names: str) -> dict[str, str]:
        for name in names:
            if not (root / name).exists():
                command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
                command += ["--no-index", "--disable-pip-version-check", "--target", str(root / name)]
                source = Path(__file__).parent / "plugins" / name
                done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
                assert done.returncode == 0, done.stderr
        kept = {key: value for key, value in os.environ.items() if key != "GRAPHOPT_PLUGINS"}
        return {**kept, "PYTHONPATH": os.pathsep.join(str(root / name) for name in names)}

    return install
