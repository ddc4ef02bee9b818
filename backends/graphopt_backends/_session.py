"""Run the parts of a bundle in this process, or hand the compiled ones to a runner program."""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from graphopt.backend_base import Profile, StepTime
from graphopt.errors import BackendError, DataError, nearest
from graphopt.reference import Feed, Reference
from graphopt_backends._batches import count_batches, cut_batches, joined, lie_one_after_the_other
from graphopt_backends._deploy import RUNNERS
from graphopt_backends._engine import Engine, fresh_name
from graphopt_backends._plan import Part, Plan, read_plan
from graphopt_backends._tensors import read_tensors, write_tensors

__all__ = ["Step", "in_process", "load_steps", "profile_plan", "run_plan", "through_program"]

Array = np.ndarray[Any, np.dtype[Any]]
Step = Callable[[Sequence[Mapping[str, Array]]], Sequence[Feed]]
"""A part ready to run: values by name, one mapping a feed; returns the values it makes."""

_ALIGN = 64
_CPU, _POOLED, _SHARE_CORES = 1, 2, -3
_pool = threading.local()  # threads of the runtime's pool, which is one for each thread of this process


def run_plan(plan: Plan, steps: Sequence[Step], feeds: Sequence[Feed]) -> list[Feed]:
    """Run all parts over all feeds, part by part; a feed may hold several of the batches that were compiled.

    Raises:
        DataError: A feed lacks an input, or has another type or shape than the model was compiled for.
    """
    checked = [_checked(plan, feed) for feed in feeds]
    counts = [count_batches(plan, feed) for feed in checked]
    if len(steps) == 1 and isinstance(steps[0], _Library) and lie_one_after_the_other(plan):
        return [steps[0].run(feed, count) for feed, count in zip(checked, counts, strict=True)]
    values = [piece for feed, count in zip(checked, counts, strict=True) for piece in cut_batches(plan, feed, count)]
    for step in steps:
        for held, made in zip(values, step(values), strict=True):
            held.update(made)
    outputs = iter([{spec.name: held[spec.name] for spec in plan.outputs} for held in values])
    return [joined(plan, list(itertools.islice(outputs, count))) for count in counts]


def in_process(part: Part, folder: Path, threads: int) -> Step:
    """Load a part into this process.

    Raises:
        BackendError: The library cannot be loaded.
    """
    if part.engine == "onnxruntime":
        return _reference_step(part, folder, threads)
    if part.engine == "kernels":
        return _Library(part, _engine(part, folder, threads))
    return _tvm_step(part, folder, threads)


def through_program(part: Part, folder: Path, threads: int, command: Sequence[str]) -> Step:
    """Run a part with the bundle's program for it, started by `command`; ONNX Runtime's run in this process."""
    if part.engine == "onnxruntime":
        return _reference_step(part, folder, threads)
    program = str(folder / RUNNERS[part.engine])

    def step(feeds: Sequence[Mapping[str, Array]]) -> Sequence[Feed]:
        with tempfile.TemporaryDirectory(prefix="graphopt-") as scratch:
            source, result = Path(scratch) / "inputs.tensors", Path(scratch) / "outputs.tensors"
            write_tensors(source, ((name, feed[name]) for feed in feeds for name in part.inputs))
            files = [str(folder / part.file), str(source), str(result)]
            words = [*command, program, *files, "--threads", str(max(threads, 1))]
            if part.weights:
                words += ["--weights", str(folder / part.weights)]
            done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
            if done.returncode:
                lines = done.stderr.strip().splitlines()
                told = lines[-1] if lines else f"exit code {done.returncode}"
                raise BackendError(str(folder / part.file), f"the runner failed: {told[:200]}")
            arrays = [np.array(array) for _, array in read_tensors(result)]
        count = len(part.outputs)
        rows = [arrays[i : i + count] for i in range(0, len(arrays), count)]
        return [dict(zip(part.outputs, row, strict=True)) for row in rows]

    return step


def profile_plan(plan: Plan, folder: Path, feed: Feed, threads: int, runs: int) -> Profile:
    """Time every step of a bundle in this process, over some runs."""
    checked = _checked(plan, feed)
    values = cut_batches(plan, checked, count_batches(plan, checked))[0]
    found: list[StepTime] = []
    peaks: dict[str, float] = {}
    for part in plan.parts:
        if part.engine == "kernels":
            engine = _engine(part, folder, threads)
            inputs = [values[name] for name in part.inputs]
            values |= zip(part.outputs, engine.run(inputs), strict=True)
            for known, seconds in zip(engine.steps, engine.profile(inputs, runs), strict=True):
                figures = seconds, known.operations, known.arithmetic
                found.append(StepTime(part.engine, known.kernel, known.sites, *figures))
            used = {known.arithmetic for known in engine.steps if known.arithmetic}
            peaks |= {kind: engine.peak(kind) for kind in sorted(used - set(peaks))}
        else:
            step = in_process(part, folder, threads)
            values |= step([values])[0]
            begun = time.perf_counter()
            for _ in range(runs):
                step([values])
            found.append(StepTime(part.engine, part.file, "", (time.perf_counter() - begun) / runs))
    return Profile(tuple(found), peaks)


def _checked(plan: Plan, feed: Mapping[str, Any]) -> dict[str, Array]:
    names = [spec.name for spec in plan.inputs]
    for name in feed:
        if name not in names:
            raise DataError(f"input {name!r}", "is none of the compiled model's", nearest(name, names))
    for spec in plan.inputs:
        array = feed.get(spec.name)
        if array is None:
            raise DataError(f"input {spec.name!r}", "is missing from the feed")
        if not isinstance(array, np.ndarray):
            raise DataError(f"input {spec.name!r}", f"is a {type(array).__name__}, not a NumPy array")
        if str(array.dtype) != spec.dtype:
            raise DataError(f"input {spec.name!r}", f"is {array.dtype}, the compiled model takes {spec.dtype}")
    return {spec.name: feed[spec.name] for spec in plan.inputs}


def _reference_step(part: Part, folder: Path, threads: int) -> Step:
    session = Reference(folder / part.file, threads=threads)

    def step(feeds: Sequence[Mapping[str, Array]]) -> Sequence[Feed]:
        return [session.run(feed, part.outputs) for feed in feeds]

    return step


def _engine(part: Part, folder: Path, threads: int) -> Engine:
    return Engine(folder / part.file, folder / part.weights if part.weights else None, threads)


@dataclass(frozen=True)
class _Library:
    """A part that kernels compute."""

    part: Part
    engine: Engine

    def __call__(self, feeds: Sequence[Mapping[str, Array]]) -> Sequence[Feed]:
        return [self.run(feed) for feed in feeds]

    def run(self, feed: Mapping[str, Array], count: int = 1) -> Feed:
        """Run once, or on some batches that lie one after the other."""
        inputs = [feed[name] for name in self.part.inputs]
        made = self.engine.run(inputs) if count == 1 else self.engine.run_batch(inputs, count)
        return dict(zip(self.part.outputs, made, strict=True))


def _tvm_step(part: Part, folder: Path, threads: int) -> Step:
    ffi = _load_runtime()
    path = folder / part.file
    try:
        machine = ffi.load_module(fresh_name(path))["vm_load_executable"]()
        machine["vm_initialization"](_CPU, 0, _POOLED)
        main = machine["main"]
    except Exception as e:  # the runtime raises its own untyped errors
        raise BackendError(str(path), f"cannot be loaded: {str(e).strip().splitlines()[-1][:200]}") from e
    weights = [_lend(ffi, array) for _, array in read_tensors(folder / part.weights)] if part.weights else []

    def run(feed: Mapping[str, Array]) -> Feed:
        if getattr(_pool, "threads", None) != max(threads, 1):
            _configure_pool(ffi, max(threads, 1))
        made = main(*(_lend(ffi, feed[name]) for name in part.inputs), *weights)
        results = [made] if hasattr(made, "__dlpack__") else list(made)
        return {name: np.array(np.from_dlpack(value)) for name, value in zip(part.outputs, results, strict=True)}

    return lambda feeds: [run(feed) for feed in feeds]


def _configure_pool(ffi: Any, threads: int) -> None:
    """Set the size of the runtime's pool.

    Left to itself the runtime takes half of the cores for hyper-threads and pins the calling thread to the first one,
    which whatever else this process runs would inherit. So it is given all cores, for all its threads.
    """
    allowed = os.sched_getaffinity(0)
    try:
        ffi.get_global_func("runtime.config_threadpool")(_SHARE_CORES, threads, [str(core) for core in sorted(allowed)])
    finally:
        os.sched_setaffinity(0, allowed)
    _pool.threads = threads


def _load_runtime() -> Any:
    """Load TVM's runtime without its compiler; where the compiler is loaded, its runtime serves."""
    import tvm_ffi

    if "tvm" not in sys.modules:
        spec = importlib.util.find_spec("tvm")
        if spec is None or not spec.submodule_search_locations:
            raise BackendError("apache-tvm", "not installed", "pip install graphopt")
        library = Path(next(iter(spec.submodule_search_locations))) / "lib" / "libtvm_runtime.so"
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    return tvm_ffi


def _lend(ffi: Any, array: Array) -> Any:
    """Hand an array to the runtime, which wants vectors aligned; a copy is made only where it is not."""
    ready = array
    if not array.flags.c_contiguous or not array.flags.writeable or cast("int", array.ctypes.data) % _ALIGN:
        room = np.empty(array.nbytes + _ALIGN, np.uint8)
        start = -cast("int", room.ctypes.data) % _ALIGN
        ready = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        ready[...] = array
    return ffi.from_dlpack(ready)


def load_steps(folder: Path, make: Callable[[Part], Step]) -> tuple[Plan, list[Step]]:
    """Read the plan of a bundle and make every part ready."""
    plan = read_plan(folder)
    return plan, [make(part) for part in plan.parts]
