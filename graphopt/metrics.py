"""Metrics: how a model's outputs are scored against labels or reference outputs."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.errors import DataError, GraphoptError, nearest
from graphopt.reference import Feed

if TYPE_CHECKING:
    from graphopt.calibration import Dataset

__all__ = ["Metric", "Score", "metric", "open_function"]

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Score:
    """A metric's value on the user's labelled data.

    Attributes:
        metric: Name of the metric.
        value: Percent for top1 and top5; the metric's own unit otherwise.
        samples: Number of samples scored.
        higher_is_better: False for perplexity and errors.
    """

    metric: str
    value: float
    samples: int
    higher_is_better: bool = True

    def drop_from(self, before: Score) -> float:
        """Loss against `before`: points where higher is better, else relative percent. Negative: a gain."""
        if self.higher_is_better:
            return before.value - self.value
        return 100 * (self.value - before.value) / before.value if before.value else float(self.value > 0) * 100


@dataclass(frozen=True)
class Metric:
    """How outputs are scored: `score(outputs, dataset)` on all outputs, stacked on the first axis."""

    name: str
    score: Callable[[Feed, Dataset], float]
    higher_is_better: bool = True
    digest: str | None = ""


def metric(name: str | None, dataset: Dataset) -> Metric:
    """Find a metric by name, or the one that fits the data: top1 for labels, mse for references.

    Raises:
        DataError: There is no such metric, or it needs what the data lacks.
    """
    name = name or ("top1" if dataset.labels is not None else "mse")
    if ":" in name:
        function, digest = open_function(name, "--metric")
        return Metric(name, _guarded(function, name), getattr(function, "higher_is_better", True), digest)
    if name not in _METRICS:
        raise DataError(f"--metric {name}", "no such metric", nearest(name, _METRICS))
    if name == "mse" and not dataset.references:
        raise DataError("--metric mse", "needs reference.<output> arrays in the evaluation data")
    if name != "mse" and dataset.labels is None:
        raise DataError(f"--metric {name}", "needs labels in the evaluation data")
    return _METRICS[name]


def open_function(text: str, subject: str) -> tuple[Callable[..., Any], str | None]:
    """Import `module:function`; returns it with the sha256 of its module's source (None if there is no source).

    Raises:
        DataError: The module or the function cannot be found.
    """
    module_name, _, function_name = text.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except Exception as e:  # the module is the user's: importing it can raise anything
        fact = f"module {module_name!r} cannot be imported: {type(e).__name__}: {e}"
        raise DataError(f"{subject} {text}", fact, "run where it is importable") from e
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [name for name, _ in inspect.getmembers(module, callable) if not name.startswith("_")]
        raise DataError(
            f"{subject} {text}", f"the module has no function {function_name!r}", nearest(function_name, names)
        )
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):
        return function, None
    return function, hashlib.sha256(source.encode()).hexdigest()


def _guarded(function: Callable[..., Any], name: str) -> Callable[[Feed, Dataset], float]:
    def score(outputs: Feed, dataset: Dataset) -> float:
        try:
            return float(function(outputs, dataset))
        except GraphoptError:
            raise
        except Exception as e:  # the function is the user's: it can raise anything
            raise DataError(f"--metric {name}", f"raises {type(e).__name__}: {e}") from e

    return score


def _labels(outputs: Feed, dataset: Dataset) -> tuple[Array, Array]:
    """Scores of the first output, float64 `[..., classes]`, and labels `[...]`; negative labels are left out."""
    scores, labels = np.asarray(next(iter(outputs.values()))), np.asarray(dataset.labels)
    if labels.dtype.kind not in "iu":
        raise DataError(dataset.origin, f"labels are {labels.dtype}", "give the number of each class")
    if scores.ndim == 0 or scores.shape[:-1] != labels.shape:
        fact = f"labels have shape {labels.shape}, the first output has {scores.shape}"
        raise DataError(dataset.origin, fact, "one label for each row of the output")
    if scores.dtype.kind not in "fiub":
        raise DataError(dataset.origin, f"the first output is {scores.dtype}, which has no classes", "give --metric")
    if not (labels >= 0).any():
        raise DataError(dataset.origin, "labels are all negative, which leaves nothing to score")
    if labels.max() >= scores.shape[-1]:
        fact = f"a label is {labels.max()}, the first output has {scores.shape[-1]} classes"
        raise DataError(dataset.origin, fact, "classes are counted from 0")
    return scores.astype(np.float64), labels


def _topk(k: int) -> Callable[[Feed, Dataset], float]:
    def score(outputs: Feed, dataset: Dataset) -> float:
        scores, labels = _labels(outputs, dataset)
        best = np.argsort(-scores, axis=-1, kind="stable")[..., :k]
        return 100 * float((best == labels[..., None]).any(-1)[labels >= 0].mean())

    return score


def _perplexity(outputs: Feed, dataset: Dataset) -> float:
    logits, labels = _labels(outputs, dataset)
    logits = logits - logits.max(-1, keepdims=True)
    picked = np.take_along_axis(logits, labels.clip(0).astype(np.int64)[..., None], -1)[..., 0]
    return float(np.exp((np.log(np.exp(logits).sum(-1)) - picked)[labels >= 0].mean()))


def _mse(outputs: Feed, dataset: Dataset) -> float:
    errors: list[float] = []
    for name, expected in dataset.references.items():
        got = np.asarray(outputs[name])
        if got.size != expected.size:
            fact = f"reference.{name} has shape {expected.shape}, the output has {got.shape}"
            raise DataError(dataset.origin, fact, "one entry for each sample")
        errors.append(float(np.square(got.reshape(expected.shape) - expected.astype(np.float64)).mean()))
    return float(np.mean(errors))


_METRICS = {
    "top1": Metric("top1", _topk(1)),
    "top5": Metric("top5", _topk(5)),
    "perplexity": Metric("perplexity", _perplexity, higher_is_better=False),
    "mse": Metric("mse", _mse, higher_is_better=False),
}
