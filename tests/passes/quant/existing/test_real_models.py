from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from quantized_models import quantize

from graphopt.analyses.quantized import find_quantized
from graphopt.model_io import input_specs, load_model, model_bytes
from graphopt.reference import Reference
from graphopt_passes.quant.existing import as_floats


@pytest.mark.parametrize("form", [QuantFormat.QDQ, QuantFormat.QOperator])
def test_a_real_quantized_model_is_left_alone_and_quantized_anew(
    form: QuantFormat, zoo: Callable[..., Path], tmp_path: Path
) -> None:
    folder = zoo("tiny_kws", samples=8, limit=200)
    images = np.load(folder / "calib.npz")
    name = input_specs(load_model(folder / "model.onnx"))[0].name

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = ({name: image[None]} for image in images[name])

        def get_next(self) -> Any:
            return next(self.feeds, None)

    quantize_static(folder / "model.onnx", tmp_path / "q.onnx", Reader(), quant_format=form, per_channel=True)
    model, original = load_model(tmp_path / "q.onnx"), load_model(folder / "model.onnx")
    before = model_bytes(model)
    again = quantize(model, data=False)
    assert not again.modified
    assert model_bytes(model) == before
    floats, undone = as_floats(model)
    assert undone.left == ()
    assert not find_quantized(floats)
    labels = np.load(folder / "eval.npz")["labels"]
    scores = {kind: _top1(m, folder, name, labels) for kind, m in (("old", original), ("int", model), ("new", floats))}
    assert abs(scores["new"] - scores["old"]) <= 0.03
    assert abs(scores["new"] - scores["int"]) <= 0.03


def _top1(model: ir.Model, folder: Path, name: str, labels: np.ndarray) -> float:
    session, images = Reference(model), np.load(folder / "eval.npz")[name]
    hits = 0
    for image, label in zip(images, labels, strict=True):
        hits += int(next(iter(session.run({name: image[None]}).values())).argmax() == label)
    return hits / len(labels)
