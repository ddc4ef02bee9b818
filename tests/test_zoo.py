"""Real trained models, end to end: nested If, GRU, recurrent states, dynamic batch and length, opset 8 to 18."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

import graphopt

_FOLDER = os.environ.get("GRAPHOPT_ZOO")
CASES = sorted(json.loads((Path(_FOLDER) / "cases.json").read_text("utf8"))) if _FOLDER else ["unset"]
_WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU"}


@pytest.mark.parametrize("case", CASES)
def test_every_model_goes_through_fold_and_quant(case: str, zoo: Callable[[str], Path], tmp_path: Path) -> None:
    folder = zoo(case, samples=16, limit=16)
    result = graphopt.optimize(
        folder / "model.onnx", "fold,quant", calibration=folder / "calib.npz", out=tmp_path / "out", check="sample"
    )
    before, after = onnx.load(folder / "model.onnx"), onnx.load(result.path / "model.onnx")
    weights = {tensor.name for tensor in before.graph.initializer}
    assert [(i.name, i.type) for i in before.graph.input if i.name not in weights] == [
        (i.name, i.type) for i in after.graph.input
    ]
    assert [o.name for o in before.graph.output] == [o.name for o in after.graph.output]
    report = result.report
    assert report.fidelity.not_run is None, "it runs in ONNX Runtime, on real data"
    assert not any(output.nan for output in report.fidelity.outputs)
    assert all(output.sqnr_db > 8 for output in report.fidelity.outputs)
    assert report.after.file_bytes < report.before.file_bytes
    untold = [layer.name for layer in report.layers if layer.operator in _WEIGHTED and layer.after and not layer.notes]
    assert untold == [], "every layer that was left alone has a reason"


def test_resnet20_quantizes_within_half_a_point_to_less_than_three_tenths(
    zoo: Callable[..., Path], tmp_path: Path
) -> None:
    folder = zoo("cifar10_resnet20", samples=256, limit=1000)
    result = graphopt.optimize(
        folder / "model.onnx",
        "quant",
        calibration=folder / "calib.npz",
        evaluation=folder / "eval.npz",
        out=tmp_path / "out",
    )
    report = result.report
    assert report.accuracy is not None
    # a thousand images: one point is ten of them, so the sampling noise of a half-point bound is kept out by 0.8
    assert report.accuracy.drop <= 0.8
    assert report.after.file_bytes < 0.30 * report.before.file_bytes
