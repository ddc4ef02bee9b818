"""Metrics: the figures are right, and data that cannot be scored is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt.calibration import Dataset
from graphopt.errors import DataError
from graphopt.metrics import Score, metric

SCORES = np.array([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3], [0.2, 0.2, 0.6], [0.9, 0.1, 0.0]], np.float32)


def dataset(labels: Any = None, **references: Any) -> Dataset:
    arrays = {name: np.asarray(array) for name, array in references.items()}
    return Dataset(
        "eval.npz", None, lambda: iter(()), labels=None if labels is None else np.asarray(labels), references=arrays
    )


def score(name: str | None, data: Dataset, scores: Any = SCORES) -> float:
    return metric(name, data).score({"scores": np.asarray(scores)}, data)


def test_top1_is_the_percentage_of_rows_whose_greatest_score_is_the_label() -> None:
    assert score("top1", dataset([1, 0, 0, 0])) == 75
    assert score(None, dataset([1, 0, 2, 0])) == 100


def test_negative_labels_are_left_out() -> None:
    assert score("top1", dataset([1, -100, 0, -1])) == 50


def test_top5_takes_the_five_greatest() -> None:
    scores = np.arange(10, dtype=np.float32)[None].repeat(2, 0)
    assert score("top5", dataset([5, 4]), scores) == 50


def test_integer_scores_are_ranked_without_overflow() -> None:
    assert score("top1", dataset([1]), np.array([[-128, 127, 0]], np.int8)) == 100
    assert score("top1", dataset([2]), np.array([[0, 1, 255]], np.uint8)) == 100


def test_perplexity_of_a_uniform_guess_is_the_number_of_classes() -> None:
    assert score("perplexity", dataset([[1, 2], [0, 3]]), np.zeros((2, 2, 4), np.float32)) == pytest.approx(4)


def test_perplexity_stands_large_logits() -> None:
    assert score("perplexity", dataset([0]), np.array([[1e4, -1e4]])) == pytest.approx(1)


def test_mse_is_the_mean_over_references() -> None:
    data = dataset(None, scores=SCORES + 1)
    assert score(None, data) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("top2", dataset([0]), "--metric top2: no such metric; did you mean 'top5'?"),
        ("mse", dataset([0]), "--metric mse: needs reference.<output> arrays in the evaluation data"),
        ("top5", dataset(None, scores=SCORES), "--metric top5: needs labels in the evaluation data"),
    ],
)
def test_a_metric_that_does_not_fit_the_data_is_refused(name: str, data: Dataset, message: str) -> None:
    with pytest.raises(DataError) as caught:
        metric(name, data)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "data", "scores", "message"),
    [
        ("top1", dataset([0, 1]), SCORES, "labels have shape (2,), the first output has (4, 3)"),
        ("top1", dataset([0.5, 1, 2, 0]), SCORES, "labels are float64; give the number of each class"),
        (
            "top1",
            dataset([0, 1, 2, 3]),
            SCORES,
            "a label is 3, the first output has 3 classes; classes are counted from 0",
        ),
        ("perplexity", dataset([0, 1, 2, 3]), SCORES, "a label is 3, the first output has 3 classes"),
        ("top1", dataset([-1, -1, -1, -1]), SCORES, "labels are all negative"),
        ("top1", dataset([0]), np.array([["a"]], dtype=object), "the first output is object, which has no classes"),
        ("mse", dataset(None, scores=np.zeros(5)), SCORES, "reference.scores has shape (5,), the output has (4, 3)"),
    ],
)
def test_outputs_that_cannot_be_scored_are_refused(name: str, data: Dataset, scores: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        score(name, data, scores)
    assert str(caught.value).startswith(f"eval.npz: {message}")


def test_a_metric_of_the_users_own_is_called_and_guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_metric.py").write_text(
        "def worst(outputs, dataset):\n    return abs(outputs['scores']).max()\nworst.higher_is_better = False\n"
        "def broken(outputs, dataset):\n    return 1 / 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    data = dataset()
    worst = metric("users_metric:worst", data)
    assert (worst.score({"scores": SCORES}, data), worst.higher_is_better) == (pytest.approx(0.9), False)
    assert worst.digest
    with pytest.raises(DataError, match="--metric users_metric:broken: raises ZeroDivisionError: division by zero"):
        score("users_metric:broken", data)
    sys.modules.pop("users_metric")


def test_a_drop_is_points_where_higher_is_better_and_percent_elsewhere() -> None:
    assert Score("top1", 90.0, 10).drop_from(Score("top1", 91.5, 10)) == pytest.approx(1.5)
    assert Score("mse", 1.1, 10, higher_is_better=False).drop_from(Score("mse", 1.0, 10)) == pytest.approx(10)
    assert Score("mse", 0.1, 10, higher_is_better=False).drop_from(Score("mse", 0.0, 10)) == 100
