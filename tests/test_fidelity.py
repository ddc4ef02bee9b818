"""Distances between the outputs of two models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from graphopt.errors import ModelError
from graphopt.fidelity import compare, run_apart
from graphopt.reference import Reference
from graphopt.session import FeedFolder


def test_equal_outputs_have_infinite_sqnr_and_full_agreement() -> None:
    feed = {"y": np.arange(6, dtype=np.float32).reshape(2, 3)}
    (d,) = compare([feed], [feed])
    assert (d.max_abs, d.sqnr_db, d.cosine, d.top1_agreement, d.nan) == (0, float("inf"), 1, 100, False)


def test_distances_follow_their_definitions_over_all_runs() -> None:
    rng = np.random.default_rng(0)
    a = [{"y": rng.standard_normal((1, 5)).astype(np.float32)} for _ in range(7)]
    b = [{"y": feed["y"] + np.float32(0.1) * rng.standard_normal((1, 5)).astype(np.float32)} for feed in a]
    (d,) = compare(a, b)
    x, y = np.concatenate([f["y"] for f in a]).astype(float), np.concatenate([f["y"] for f in b]).astype(float)
    assert d.max_abs == pytest.approx(np.abs(x - y).max())
    assert d.mean_abs == pytest.approx(np.abs(x - y).mean())
    assert d.sqnr_db == pytest.approx(10 * np.log10((x**2).sum() / ((x - y) ** 2).sum()))
    assert d.cosine == pytest.approx((x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum()))
    assert d.top1_agreement == pytest.approx(100 * (x.argmax(-1) == y.argmax(-1)).mean())
    assert (d.reference_min, d.reference_max) == pytest.approx((x.min(), x.max()))


def test_new_nan_is_reported_and_does_not_spoil_the_rest() -> None:
    a = {"y": np.float32([[1, 2, np.inf]])}
    b = {"y": np.float32([[np.nan, 2.5, np.inf]])}
    (d,) = compare([a], [b])
    assert d.nan
    assert d.max_abs == 0.5


def test_a_changed_shape_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"output 'y' has shape \(2,\), was \(1,\)"):
        compare([{"y": np.float32([1])}], [{"y": np.float32([1, 2])}])


def test_a_model_runs_the_same_apart_as_in_this_process(fixtures: Path) -> None:
    model = fixtures / "digits_cnn" / "model.onnx"
    with np.load(fixtures / "digits_cnn" / "calib.npz") as npz:
        feeds = [{"image": npz["image"][i : i + 1]} for i in range(3)]
    with FeedFolder.temporary(feeds) as inputs, FeedFolder.temporary() as outputs:
        run_apart(model, inputs, outputs)
        apart = list(outputs)
    here = Reference(model)
    for feed, got in zip(feeds, apart, strict=True):
        np.testing.assert_array_equal(here.run(feed)["logits"], got["logits"])


def test_a_model_that_does_not_run_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_text("no model")
    with FeedFolder.temporary([{"x": np.float32([1])}]) as inputs, FeedFolder.temporary() as outputs:
        with pytest.raises(ModelError, match="ONNX Runtime cannot load it") as caught:
            run_apart(tmp_path / "bad.onnx", inputs, outputs)
        assert len(str(caught.value).splitlines()) == 1
