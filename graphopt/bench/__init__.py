"""Benchmarks: latency, memory and size of models and bundles on this machine.

Every subject runs in a child process of its own. The rounds of all subjects are interleaved, so that a machine that
gets slower or faster hits all of them alike, and the median of the rounds' medians is what counts. What runs in an
emulator is run once, for agreement, and never timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from graphopt.backend_base import Obtained, Profile
from graphopt.bench.breakdown import breakdown
from graphopt.bench.machine import this_machine
from graphopt.bench.process import Child, Job
from graphopt.calibration import Dataset
from graphopt.errors import BackendError, UsageError
from graphopt.fidelity import FeedFolder, compare, free_memory, needed_memory
from graphopt.measured import Breakdown, Measured, Measurement, Side, Times
from graphopt.model_io import ShapeBinding, input_specs, load_model, model_files
from graphopt.records import from_text
from graphopt.reference import Feed, random_feed

__all__ = ["ONNX_RUNTIME", "Plan", "Subject", "bench", "bundle_subjects", "feeds_for", "this_machine"]

ONNX_RUNTIME = "onnxruntime"
_MODEL = "model.onnx"
_BESIDE = ("*.weights", "model.part*.so", "model.part*.onnx*", "runtime/*.so")
"""What a bundle needs beside its kernel: weights, further parts and a runtime, where it has them."""


@dataclass(frozen=True)
class Subject:
    """One thing to measure.

    Attributes:
        name: How tables call it.
        path: A model file; for a backend the bundle's folder.
        side: Whether it is the original or the result.
        engine: `onnxruntime`, or the name of a backend.
        target: What the bundle was made for; only for a backend.
        files: What is deployed, relative to the bundle; empty: the model with its weight files.
    """

    name: str
    path: Path
    side: Side = "original"
    engine: str = ONNX_RUNTIME
    target: str = ""
    files: tuple[str, ...] = ()

    @property
    def model(self) -> Path:
        """The ONNX file behind it."""
        return self.path if self.engine == ONNX_RUNTIME else self.path / _MODEL

    def deployed_bytes(self) -> int:
        """Bytes of what is deployed."""
        files = [self.path / name for name in self.files] or model_files(self.model)
        return sum(file.stat().st_size for file in files)


@dataclass(frozen=True)
class Plan:
    """How often to run.

    Attributes:
        threads: Threads to measure with, one row each.
        warmup: Runs of a round before the clock starts.
        repeats: Timed runs of a round.
        rounds: Rounds.
        round_seconds: A round ends early, after three timed runs, when it has taken as long as this.
    """

    threads: tuple[int, ...] = (1,)
    warmup: int = 3
    repeats: int = 20
    rounds: int = 5
    round_seconds: float = 5.0

    def __post_init__(self) -> None:
        for name, least in (("warmup", 0), ("repeats", 1), ("rounds", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name}", f"{getattr(self, name)} is too small", f"give at least {least}")
        if not self.threads or min(self.threads) < 1:
            raise UsageError("--threads", f"{self.threads} are not thread counts", "give at least 1")


def bench(
    subjects: Sequence[Subject],
    feeds: Iterable[Feed],
    plan: Plan | None = None,
    *,
    extensions: Sequence[str] = (),
    disable: Sequence[str] = (),
) -> Measured:
    """Measure subjects side by side.

    Args:
        subjects: What to measure; rows come back in this order, for each number of threads in turn.
        feeds: Inputs; the runs cycle through them.
        plan: How often to run.
        extensions: Libraries with custom operators for ONNX Runtime.
        disable: Plugins to leave out.

    Raises:
        UsageError: There are no feeds.
    """
    plan = plan or Plan()
    rows: list[Measurement] = []
    breakdowns: list[Breakdown] = []
    with FeedFolder.temporary(feeds) as inputs:
        if not len(inputs):
            raise UsageError("bench", "there are no inputs to run", "give --calibration, or a model with inputs")
        for threads in plan.threads:
            with ExitStack() as stack:
                sessions = [
                    _Session(subject, threads, inputs, stack.enter_context(FeedFolder.temporary()), extensions, disable)
                    for subject in subjects
                ]
                for group in _groups(sessions):
                    _run_group(group, plan)
                rows += [session.row(plan, len(inputs), _distance(session, sessions)) for session in sessions]
            if threads == plan.threads[0]:
                breakdowns += [session.breakdown for session in sessions if session.breakdown is not None]
    return Measured(tuple(rows), this_machine(), breakdowns=tuple(breakdowns))


def bundle_subjects(folder: Path, target: str, backend: str | None, kernel: str | None) -> tuple[Subject, ...]:
    """What there is to measure in a bundle: its model in ONNX Runtime, and what was compiled.

    Args:
        folder: The bundle.
        target: What it was made for, as resolved.
        backend: Name of the backend that compiled it; None where nothing was compiled.
        kernel: The file the target runs; None where the ONNX model itself ships.
    """
    model = Subject(folder.name, folder / _MODEL, "result")
    if backend is None or kernel is None:
        return (model,)
    beside = {path.relative_to(folder).as_posix() for pattern in _BESIDE for path in folder.glob(pattern)}
    return model, Subject(folder.name, folder, "result", backend, target, tuple(sorted({kernel, *beside})))


def feeds_for(model: Path, dataset: Dataset | None, binding: ShapeBinding, samples: int = 8) -> tuple[Feed, ...]:
    """Inputs to measure with: the first of the user's samples, or random ones.

    Raises:
        ModelError: The model cannot be read.
        UsageError: The model takes text and there is no data.
    """
    if dataset is not None:
        return tuple(dataset.feeds(samples))
    rng, specs = np.random.default_rng(0), input_specs(load_model(model))
    return tuple(random_feed(specs, binding, rng) for _ in range(samples))


class _Session:
    """One row in the making."""

    def __init__(
        self,
        subject: Subject,
        threads: int,
        inputs: FeedFolder,
        outputs: FeedFolder,
        extensions: Sequence[str],
        disable: Sequence[str],
    ) -> None:
        self.subject, self.threads, self.outputs = subject, threads, outputs
        self.job = Job(
            name=subject.name,
            path=str(subject.path),
            backend="" if subject.engine == ONNX_RUNTIME else subject.engine,
            target=subject.target,
            threads=threads,
            feeds=str(inputs.folder),
            outputs=str(outputs.folder),
            extensions=tuple(extensions),
            disable=tuple(disable),
        )
        self.how: Obtained = "compiled only"
        self.base_mb = self.peak_mb = 0.0
        self.rounds: list[list[int]] = []
        self.failure: str | None = None
        self.breakdown: Breakdown | None = None

    def row(self, plan: Plan, samples: int, distance: float | None) -> Measurement:
        """The finished row."""
        timed = self.how == "executed" and self.failure is None
        return Measurement(
            engine=self.subject.engine,
            subject=self.subject.name,
            side=self.subject.side,
            how=self.how,
            threads=self.threads,
            file_bytes=self.subject.deployed_bytes(),
            samples=samples,
            warmup=plan.warmup if timed else 0,
            repeats=min(map(len, self.rounds)) if timed else 0,
            rounds=len(self.rounds) if timed else 0,
            times=_times(self.rounds) if timed else None,
            peak_memory_mb=self.peak_mb if timed else None,
            base_memory_mb=self.base_mb if timed else None,
            agrees=distance,
            not_run=self.failure,
        )


def _run_group(group: Sequence[_Session], plan: Plan) -> None:
    """Run sessions together, one round of each in turn; a session that fails says so in its row."""
    with ExitStack() as stack:
        running: list[tuple[_Session, Child]] = []
        for session in group:
            child = stack.enter_context(Child(session.job))
            if _try(session, lambda s=session, c=child: _start(s, c)):
                running.append((session, child))
        for _ in range(plan.rounds):
            for session, child in running:
                if session.how == "executed" and session.failure is None:
                    _try(session, lambda s=session, c=child: _round(s, c, plan))
        for session, child in running:
            if session.failure is None:
                _try(session, lambda s=session, c=child: _finish(s, c, plan))


def _try(session: _Session, act: Callable[[], None]) -> bool:
    try:
        act()
    except BackendError as e:
        session.failure = f"not run: {e.fact}"
        return False
    return True


def _start(session: _Session, child: Child) -> None:
    """Load it and, unless it cannot run here, take its outputs."""
    loaded = child.answer()
    session.how, session.base_mb = loaded["how"], loaded["base_mb"]
    if session.how not in ("executed", "emulated"):
        session.failure = f"{session.how}: this machine cannot run it"
        return
    child.ask("outputs")
    child.answer()


def _round(session: _Session, child: Child, plan: Plan) -> None:
    child.ask("round", warmup=plan.warmup, repeats=plan.repeats, seconds=plan.round_seconds)
    session.rounds.append(child.answer()["times"])


def _finish(session: _Session, child: Child, plan: Plan) -> None:
    child.ask("end")
    session.peak_mb = child.answer()["peak_mb"]
    if session.subject.engine != ONNX_RUNTIME and session.how == "executed":
        child.ask("profile", runs=plan.repeats)
        profile = from_text(Profile, child.answer()["profile"])
        if profile.steps:
            session.breakdown = breakdown(profile, session.subject.name, session.subject.engine, session.threads)


def _distance(session: _Session, others: Iterable[_Session]) -> float | None:
    """Largest difference of a backend's outputs from the same bundle's model in ONNX Runtime."""
    if session.subject.engine == ONNX_RUNTIME or session.failure is not None:
        return None
    for other in others:
        same = other.subject.engine == ONNX_RUNTIME and other.subject.model == session.subject.model
        if same and other.failure is None:
            return max((output.max_abs for output in compare(other.outputs, session.outputs)), default=0.0)
    return None


def _groups(sessions: Sequence[_Session]) -> Iterator[Sequence[_Session]]:
    """All together if they fit into half of free memory, else one after the other."""
    needed = sum(needed_memory(session.subject.deployed_bytes()) for session in sessions)
    if needed <= free_memory() // 2:
        yield sessions
    else:
        yield from ([session] for session in sessions)


def _times(rounds: Sequence[Sequence[int]]) -> Times:
    """Nanoseconds of all rounds as milliseconds."""
    runs = sorted(time / 1e6 for times in rounds for time in times)
    low, _, high = statistics.quantiles(runs, n=4, method="inclusive") if len(runs) > 1 else runs * 3
    median = statistics.median(statistics.median(times) / 1e6 for times in rounds)
    return Times(median, runs[0], low, high, runs[-1])
