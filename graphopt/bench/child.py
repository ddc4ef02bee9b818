"""The child's side: loads one subject, runs it when asked, and says what it took.

Answers leave through a copy of stdout; stdout itself is turned into stderr, because compilers and runtimes print.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from graphopt.backend_base import Backend, Obtained, Profile, Runnable
from graphopt.bench.process import Job
from graphopt.errors import BackendError, GraphoptError
from graphopt.fidelity import FeedFolder
from graphopt.records import from_text, to_text
from graphopt.reference import Feed, Reference
from graphopt.targets import Target

__all__ = ["main", "peak_memory_mb"]

_LEAST_RUNS = 3


@dataclass(frozen=True)
class _Engine:
    """A loaded subject: `run` for the clock, `run_all` for the outputs; an emulator has no `run`."""

    how: Obtained
    run: Runnable | None
    run_all: Callable[[list[Feed]], Iterator[Feed]]
    profile: Callable[[Feed, int], Profile] | None = None


def main(argument: str, requests: TextIO, answers: TextIO) -> None:
    """Serve requests until there are no more of them."""
    job = from_text(Job, argument)
    try:
        if not job.backend:
            import_module("onnxruntime")  # the library is not the model's memory
        base = peak_memory_mb()
        engine = _load(job)
        _send(answers, {"how": engine.how, "base_mb": base})
        feeds = list(FeedFolder(Path(job.feeds)))
        for line in requests:
            _send(answers, _serve(json.loads(line), job, engine, feeds))
    except GraphoptError as e:
        _send(answers, {"error": e.fact})


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far.

    Read from /proc where there is one: `getrusage` counts what the parent held when it started this process.
    """
    try:
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM"))


def _load(job: Job) -> _Engine:
    if not job.backend:
        model = Reference(Path(job.path), threads=job.threads, extensions=job.extensions)
        return _Engine("executed", model.run, lambda feeds: (model.run(feed) for feed in feeds))
    backend, target = _backend(job)
    how = backend.how(target)
    folder = Path(job.path)
    if how == "executed":
        run = backend.load(folder, target, job.threads)

        def profile(feed: Feed, runs: int) -> Profile:
            return backend.profile(folder, target, feed, job.threads, runs)

        return _Engine(how, run, lambda feeds: (run(feed) for feed in feeds), profile)
    return _Engine(how, None, lambda feeds: iter(backend.run_all(folder, target, feeds, job.threads)))


def _backend(job: Job) -> tuple[Backend, Target]:
    from graphopt.plugins import load_plugins

    registry = load_plugins(disable=job.disable)
    target = registry.targets.resolve(job.target)
    if job.backend not in registry.backends:
        raise BackendError(job.name, f"no plugin brings the backend {job.backend!r}")
    return registry.backends[job.backend], target


def _serve(request: dict[str, Any], job: Job, engine: _Engine, feeds: list[Feed]) -> dict[str, Any]:
    if request["do"] == "outputs":
        folder = FeedFolder(Path(job.outputs))
        for i, outputs in enumerate(engine.run_all(feeds)):
            folder.write(i, outputs)
        return {}
    if request["do"] == "round" and engine.run is not None:
        return {"times": _round(engine.run, feeds, request["warmup"], request["repeats"], request["seconds"])}
    if request["do"] == "profile":
        return {"profile": to_text(engine.profile(feeds[0], request["runs"]) if engine.profile else Profile())}
    if request["do"] == "end":
        return {"peak_mb": peak_memory_mb()}
    raise BackendError(job.name, f"{engine.how}: cannot be timed")


def _round(run: Runnable, feeds: list[Feed], warmup: int, repeats: int, seconds: float) -> list[int]:
    """Run and time; cycles through the feeds, and ends early when `seconds` are over."""
    end = time.perf_counter() + seconds
    for i in range(warmup):
        run(feeds[i % len(feeds)])
        if time.perf_counter() > end:
            break
    times: list[int] = []
    for i in range(repeats):
        feed = feeds[i % len(feeds)]
        start = time.perf_counter_ns()
        run(feed)
        times.append(time.perf_counter_ns() - start)
        if len(times) >= _LEAST_RUNS and time.perf_counter() > end:
            break
    return times


def _send(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends its children
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as private:
        os.dup2(2, 1)
        main(sys.argv[1], sys.stdin, private)
