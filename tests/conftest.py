"""What all tests share: the model zoo, where there is one, and small models written as ONNX text."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

FIXTURES = Path(__file__).parent.parent / "fixtures"


@pytest.fixture(scope="session")
def fixtures() -> Path:
    return FIXTURES


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
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

    def export(case: str) -> Path:
        target = root / case
        if not target.exists():
            module.export(case, target, samples=64, limit=200)
        return target

    return export
