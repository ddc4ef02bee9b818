"""Trained models: those with attention are reported head by head, those without stay as they are, byte for byte."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from graphopt.calibration import open_calibration
from graphopt.model_io import ShapeBinding, input_specs, load_model, model_bytes
from graphopt.pass_base import Context
from graphopt.report.data import StepReport
from graphopt.report.heads import heads_of, heads_text
from graphopt.targets import Target
from graphopt_passes.sparse_attention import SparseAttention

pytestmark = pytest.mark.skipif("GRAPHOPT_ZOO" not in os.environ, reason="GRAPHOPT_ZOO is not set")


@pytest.mark.parametrize(("case", "layers", "heads"), [("minilm", 6, 12), ("stories260k", 5, 8)])
def test_models_with_attention_are_reported_head_by_head(
    case: str, layers: int, heads: int, zoo: Callable[[str], Path]
) -> None:
    model = load_model(zoo(case) / "model.onnx")
    data = open_calibration(str(zoo(case) / "calib.npz"), input_specs(model), ShapeBinding())
    step = SparseAttention(width=16)
    result = step.run(model, Context(model, Target(name="ort"), calibration=data))
    told = StepReport(str(step), step.name, modified=True, lossy=True, changes=result.changes)
    assert [change.done for change in result.changes] == [True] * layers
    assert len(heads_of(told.done)) == layers * heads
    assert heads_text(told).startswith(f"{layers * heads} heads keep ")


@pytest.mark.parametrize("case", ["tiny_kws", "tiny_resnet8", "magika_v3_3", "mnist_cntk", "silero_vad_op18"])
def test_models_without_attention_stay_as_they_are(case: str, zoo: Callable[[str], Path]) -> None:
    model = load_model(zoo(case) / "model.onnx")
    before = model_bytes(model)
    result = SparseAttention(width=8).run(model, Context(model, Target(name="ort")))
    assert (result.modified, result.changes) == (False, ())
    assert model_bytes(model) == before
