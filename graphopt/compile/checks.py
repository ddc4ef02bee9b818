"""Runs the original and the result on the same data: distance of the outputs, the user's metric, the kernel."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnx_ir as ir

from graphopt.backend_base import Backend
from graphopt.calibration import Dataset, Metric, Score
from graphopt.compile.request import Request
from graphopt.errors import DataError, ModelError, PassError
from graphopt.fidelity import compare, free_memory, needed_memory, run_apart
from graphopt.model_io import input_specs
from graphopt.reference import Feed, Reference, check_runnable, random_feed
from graphopt.report.data import Accuracy, Agreement, Fidelity, Inputs
from graphopt.session import FeedFolder

__all__ = ["Checker", "Checks", "evaluator"]

_AUTO_SAMPLES = 256
_QUICK_SAMPLES = 8
_RANDOM_SAMPLES = 4
_EMULATED_MACS = 4e9  # what an emulator gets through in about a minute
_EXECUTED_MACS = 4e11
_UNKNOWN_OPERATOR = re.compile(r"([\w.]*:?\w+)\(-?\d+\) is not a registered function/op|op_type[:=]\s*(\w+)")


@dataclass(frozen=True)
class Checks:
    """What one candidate scored."""

    fidelity: Fidelity
    accuracy: Accuracy | None


class Checker:
    """Compares candidates with the original; the original runs once, whatever the number of candidates.

    Use as a context manager; feeds and outputs lie in temporary folders until then.
    """

    def __init__(self, request: Request, model: ir.Model, weight_bytes: int) -> None:
        self._request = request
        self._model = model
        self._weights = weight_bytes
        self._stack = ExitStack()
        self.inputs: Inputs = "random inputs"
        self._feeds: FeedFolder | None = None
        self._expected: FeedFolder | None = None
        self._not_run: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def samples(self) -> int:
        """Samples that candidates are compared on."""
        return 0 if self._feeds is None else len(self._feeds)

    def check(self, candidate: Path) -> Checks:
        """Compare a candidate with the original and score both.

        Raises:
            PassError: The original runs in ONNX Runtime and the candidate does not.
            DataError: The metric does not fit the outputs.
        """
        self._prepare()
        feeds, expected = self._feeds, self._expected
        if feeds is None or expected is None:
            return Checks(Fidelity(self.inputs, 0, not_run=self._not_run), None)
        with FeedFolder.temporary() as got:
            try:
                self._run(candidate, feeds, got)
            except ModelError as e:
                raise PassError("result", f"does not run, the original does: {e.fact}", "this is a bug") from e
            count = self._compared(len(feeds))
            distances = compare(islice(expected, count), islice(got, count))
            fidelity = Fidelity(self.inputs, count, distances)
            if self._request.check == "none":
                fidelity = Fidelity(self.inputs, 0, not_run="not checked: --check none")
            return Checks(fidelity, self._accuracy(expected, got))

    def feeds(self, limit: int) -> Iterator[Feed]:
        """The first feeds that candidates are compared on."""
        self._prepare()
        return islice(self._feeds or iter(()), limit)

    def _prepare(self) -> None:
        """Write the feeds and run the original, on first use."""
        if self._feeds is not None or self._not_run is not None:
            return
        request = self._request
        if request.check == "none" and request.evaluation is None:
            self._not_run = "not checked: --check none"
            return
        needed = needed_memory(self._weights)
        if needed > free_memory() / 2:
            self._not_run = f"not checked: needs {needed / 1e9:.0f} GB"
            return
        feeds = self._stack.enter_context(FeedFolder.temporary(self._source()))
        expected = self._stack.enter_context(FeedFolder.temporary())
        try:
            check_runnable(self._model)
            self._run(request.model, feeds, expected)
        except ModelError as e:
            match = _UNKNOWN_OPERATOR.search(e.fact)
            name = (match.group(1) or match.group(2)) if match else None
            self._not_run = f"not run: unknown operator {name}" if name else f"not run: {e.fact}"
            return
        self._feeds, self._expected = feeds, expected

    def _source(self) -> Iterable[Feed]:
        request = self._request
        if request.evaluation is not None:
            self.inputs = "evaluation data"
            return request.evaluation.feeds()
        if request.calibration is not None and not request.calibration.synthetic:
            self.inputs = "calibration data"
            return request.calibration.feeds(self._compared(1 << 62))
        specs, rng = input_specs(self._model), np.random.default_rng(request.seed)
        return (random_feed(specs, request.binding, rng) for _ in range(_RANDOM_SAMPLES))

    def _compared(self, available: int) -> int:
        limits = {"auto": _AUTO_SAMPLES, "sample": _QUICK_SAMPLES, "full": available, "none": available}
        return min(available, limits[self._request.check])

    def _run(self, model: Path, feeds: FeedFolder, outputs: FeedFolder) -> None:
        request = self._request
        run_apart(model, feeds, outputs, threads=request.threads, extensions=request.extensions)

    def _accuracy(self, expected: FeedFolder, got: FeedFolder) -> Accuracy | None:
        data, metric = self._request.evaluation, self._request.metric
        if data is None or metric is None:
            return None
        before, after = _score(metric, expected, data), _score(metric, got, data)
        return Accuracy(
            metric=metric.name,
            before=before.value,
            after=after.value,
            drop=after.drop_from(before),
            samples=after.samples,
            higher_is_better=metric.higher_is_better,
        )


def agreement(
    backend: Backend, folder: Path, request: Request, checker: Checker, macs: int, *, quantized: bool
) -> Agreement | None:
    """Run what was compiled and compare with the bundle's model.onnx in ONNX Runtime; None if there are no feeds.

    The tolerance is a fraction of the largest magnitude of an output: 0.1 % for floats; 5 % where the graph
    quantizes, since a value on a rounding boundary may fall to either side and move everything after it by a step.
    """
    budget = _EMULATED_MACS if backend.how(request.target) == "emulated" else _EXECUTED_MACS
    wanted = checker.samples if request.check == "full" else int(max(_QUICK_SAMPLES, budget / max(macs, 1)))
    feeds = list(checker.feeds(wanted))
    if not feeds:
        return None
    with FeedFolder.temporary(feeds) as inputs, FeedFolder.temporary() as expected:
        run_apart(folder / "model.onnx", inputs, expected, threads=request.threads, extensions=request.extensions)
        distances = compare(expected, backend.run_all(folder, request.target, feeds, request.threads))
    fraction = 0.05 if quantized else 0.001
    scale = max((max(abs(d.reference_min), abs(d.reference_max)) for d in distances), default=0.0)
    worst = max((d.max_abs for d in distances), default=0.0)
    top1 = [d.top1_agreement for d in distances if d.top1_agreement is not None]
    tolerance = fraction * scale + 1e-6
    ok = worst <= tolerance and not any(d.nan for d in distances)
    return Agreement(checker.inputs, len(feeds), worst, tolerance, ok, min(top1) if top1 else None)


def evaluator(request: Request) -> Any:
    """Make the function that scores a model in memory on the user's labelled data."""

    def evaluate(model: ir.Model) -> Score | None:
        data, metric = request.evaluation, request.metric
        if data is None or metric is None:
            return None
        run = Reference(model, threads=request.threads, extensions=request.extensions)
        return _score(metric, (run.run(feed) for feed in data.feeds()), data)

    return evaluate


def _score(metric: Metric, outputs: Iterable[Feed], data: Dataset) -> Score:
    stacked = _stack(outputs, data)
    value = float(metric.score(stacked, data))
    count = len(next(iter(stacked.values()))) if stacked else 0
    return Score(metric.name, value, count, metric.higher_is_better)


def _stack(outputs: Iterable[Feed], data: Dataset) -> Feed:
    parts: dict[str, list[np.ndarray[Any, Any]]] = {}
    for feed in outputs:
        for name, value in feed.items():
            parts.setdefault(name, []).append(value)
    try:
        return {name: (np.concatenate if v[0].ndim else np.stack)(v) for name, v in parts.items()}
    except ValueError as e:
        shapes: Mapping[str, Any] = {name: sorted({x.shape for x in v}) for name, v in parts.items()}
        fact = f"outputs have different shapes from sample to sample: {shapes}"
        raise DataError(data.origin, fact, "pad the samples alike, or score with --metric module:function") from e
