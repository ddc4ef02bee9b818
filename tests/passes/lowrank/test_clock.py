"""`--guard`: layers whose chains take longer than they did stay as they were, and the decision replays."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
from small_models import build

import graphopt
from graphopt.bundle import file_digests
from graphopt.compile import running
from graphopt.measured import Region

PIPELINE = "lowrank{of=params ratio=0.3 max_error=0}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    body = "[a] h = Gemm(x, v) r = Relu(h) [c] y = Gemm(r, w)"
    ir.save(build("(float[N,32] x) => (float[N,32] y)", body, {"v": (32, 32), "w": (32, 32)}), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a clock would say if the chain of the first layer took longer than the layer."""

    def slowed(request: object, before: ir.Model, after: ir.Model) -> tuple[Region, ...]:
        factored = any((node.name or "").startswith("a_factor") for node in after.graph)
        return (Region(("a",), 1.0, 2.0),) if factored else ()

    monkeypatch.setattr(running, "slowed", slowed)
    monkeypatch.setattr(running, "slowdown", lambda request, before, after: 1.0)


def test_a_layer_whose_chain_takes_longer_stays_and_a_replay_gives_the_same_bytes(
    model: Path, tmp_path: Path, clock: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = graphopt.optimize(model, PIPELINE, out=tmp_path / "first", guard=True)
    changes = {change.site: change for change in first.report.steps[-1].changes}
    assert changes["c"].done
    assert changes["a"].action == "skipped: slower than before otherwise"
    monkeypatch.setattr(running, "slowed", None)
    monkeypatch.setattr(running, "slowdown", None)
    again = graphopt.optimize(model, PIPELINE, out=tmp_path / "again", decisions=tmp_path / "first" / "decisions.json")
    assert file_digests(again.path) == file_digests(first.path)
