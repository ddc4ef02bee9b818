"""Compiled networks beside ONNX Runtime: GRAPHOPT_ZOO=... python benchmarks/networks.py [NETWORK ...] [--forms FORMS].

Every network is compiled for this machine's CPU and run by its library and by ONNX Runtime: the float model, the QDQ
model that `quant` makes of it (the same file for both), and a decoder with blockwise INT4 weights. One process for each
row; both engines in it, with the same threads, bound to the same cores; rounds in turn; ONNX Runtime called the cheap
way (bound values, no run options). `ORT / ours` above 1 means that the library is faster. About an hour on two idle
cores; `--quick` a third of it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import tables
from quant_llama import Llama, make_llama
from zoo_quant import load_zoo

import graphopt
from graphopt.backend_base import BuildOptions
from graphopt.errors import GraphoptError
from graphopt.model_io import ShapeBinding, load_model
from graphopt.plugins import load_plugins
from graphopt_backends._plan import read_plan

_FORMS = ("float", "int8", "int4")
_ZOO = {
    "resnet20": "cifar10_resnet20", "mobilenet_v2": "mobilenet_v2", "kws": "tiny_kws", "ultraface": "ultraface_rfb320",
    "yunet": "yunet_n320", "minilm": "minilm", "silero": "silero_vad_op18", "gtcrn": "gtcrn_simple",
}  # fmt: skip
_TORCH = {"resnet50": "resnet50", "bert_base": "bert_base"}
_NETWORKS = (
    "resnet20",
    "resnet50",
    "mobilenet_v2",
    "bert_base",
    "minilm",
    "kws",
    "ultraface",
    "yunet",
    "silero",
    "gtcrn",
)
_TOKENS = 128
_DECODER = Llama(layers=8, hidden=768, inner=2048, heads=12, key_heads=12)


@dataclass(frozen=True)
class Job:
    """One row: a model, its library, perhaps that of the float model, and a feed."""

    model: str
    compiled: str
    weights: str | None
    other: str | None
    other_weights: str | None
    feed: str
    threads: int
    rounds: int
    seconds: float


def main() -> None:
    """Compile, run and write the table."""
    if len(sys.argv) == 3 and sys.argv[1] == "--job":
        print(json.dumps(_measure(Job(**json.loads(sys.argv[2])))))
        return
    options = _options()
    rows: list[tuple[object, ...]] = []
    ratios: dict[tuple[str, int], list[float]] = {}
    options.cache.mkdir(parents=True, exist_ok=True)
    for form in options.forms:
        for name in ("decoder",) if form == "int4" else options.networks:
            for row in _rows(name, form, options):
                rows.append(row)
                print(*row, flush=True)
                if row[5] != "":
                    ratios.setdefault((form, int(str(row[2]))), []).append(float(str(row[5])))
    for (form, threads), found in sorted(ratios.items()):
        mean = math.exp(statistics.fmean(map(math.log, found)))
        rows.append(("geometric mean", form, threads, "", "", f"{mean:.2f}", f"least {min(found):.2f}", "", "", ""))
    head = (
        "network", "form", "threads", "ORT ms", "ours ms", "ORT / ours", "float / ours", "max diff", "ORT's own",
        "remarks",
    )  # fmt: skip
    notes = (
        f"Batch 1, target `{options.target}`; medians of {options.rounds} interleaved rounds of {options.seconds:g} s. "
        "INT8: the same QDQ model in both. `float / ours`: our library of the float model against that of the "
        "quantized one. `max diff`: largest difference of outputs, over the largest output; `ORT's own`: that of ONNX "
        "Runtime with its optimizations from itself without them, which rounds between layers where the model says so."
    )
    tables.write(options.name, "Compiled networks beside ONNX Runtime", head, rows, notes)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=", ".join(_NETWORKS))
    parser.add_argument("--forms", default=",".join(_FORMS))
    parser.add_argument("--target", default="x86")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.3, help="of a round")
    parser.add_argument("--name", default="networks")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "graphopt-networks")
    options = parser.parse_args()
    options.forms = options.forms.split(",")
    options.threads = [int(text) for text in options.threads.split(",")]
    options.networks = options.networks or list(_NETWORKS)
    options.rounds = options.rounds or (5 if options.quick else 15)
    return options


def _rows(name: str, form: str, options: argparse.Namespace) -> list[tuple[object, ...]]:
    try:
        source, feed, data = _SOURCES.get(name, _zoo)(name, options.cache)
        binding = ShapeBinding(shapes={key: array.shape for key, array in feed.items()})
        built, model = _built(name, form, source, data, binding, options)
        other = _built(name, "float", source, data, binding, options)[0] if form == "int8" else None
    except GraphoptError as e:
        return [(name, form, *[""] * 7, str(e)[:160])]
    path = options.cache / f"{name}-feed.npz"
    np.savez(path, **feed)
    rows: list[tuple[object, ...]] = []
    for threads in options.threads:
        job = Job(
            str(model), *built, *(other or (None, None)), str(path), threads, options.rounds, options.seconds
        )  # fmt: skip
        command = [sys.executable, __file__, "--job", json.dumps(asdict(job))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            rows.append((name, form, threads, *[""] * 6, (done.stderr.strip().splitlines() or ["died"])[-1][:160]))
            continue
        got = json.loads(done.stdout.splitlines()[-1])
        gain = f"{got['float'] / got['ours']:.2f}" if "float" in got else ""
        times = (f"{1e3 * got['onnxruntime']:.3f}", f"{1e3 * got['ours']:.3f}")
        errors = (f"{got['error']:.1e}", f"{got['own error']:.1e}")
        rows.append((name, form, threads, *times, f"{got['onnxruntime'] / got['ours']:.3f}", gain, *errors, ""))
    return rows


def _built(
    name: str, form: str, source: Path, data: Path | None, binding: ShapeBinding, options: argparse.Namespace
) -> tuple[tuple[str, str | None], Path]:
    """A library with its weights, and the model that it was made of."""
    model, folder = source, options.cache / f"{name}-{form}"
    registry = load_plugins()
    target = registry.targets.resolve(options.target)
    if form != "float":
        passes = "quant{bits=4 group_size=32 algorithm=rtn}" if form == "int4" else "fold,quant"
        model = options.cache / f"{name}-{form}.onnx" / "model.onnx"
        if not model.is_file():
            calibration = data if form == "int8" else None
            graphopt.optimize(
                source, passes, "ort", calibration=calibration, out=model.parent, check="none", overwrite=True
            )
    folder.mkdir(exist_ok=True)
    cache = Path.home() / ".cache" / "graphopt"
    registry.backends["x86"].build(load_model(model), target, folder, BuildOptions(binding=binding, cache=cache))
    parts = read_plan(folder).parts
    if [part.engine for part in parts] != ["kernels"]:
        raise GraphoptError(name, f"compiles in parts: {', '.join(part.engine for part in parts)}")
    return (str(folder / parts[0].file), str(folder / parts[0].weights) if parts[0].weights else None), model


Source = Callable[[str, Path], tuple[Path, dict[str, np.ndarray], Path | None]]
"""From a name and a cache to a model, a feed, and calibration data."""


def _zoo(name: str, cache: Path) -> tuple[Path, dict[str, np.ndarray], Path | None]:
    folder = cache / name
    if not (folder / "model.onnx").is_file():
        load_zoo().export(_ZOO[name], str(folder), limit=8)
    source = folder / "model.onnx"
    registry = load_plugins()
    from graphopt.calibration import open_calibration
    from graphopt.model_io import input_specs

    specs = input_specs(load_model(source))
    dataset = open_calibration(str(folder / "calib.npz"), specs, ShapeBinding(), registry.calibration)
    feed = {key: np.asarray(array) for key, array in next(iter(dataset.feeds(1))).items()}
    if name == "minilm":
        feed = {key: np.resize(array, (1, _TOKENS)) for key, array in feed.items()}
    return source, feed, folder / "calib.npz"


def _torch(name: str, cache: Path) -> tuple[Path, dict[str, np.ndarray], Path | None]:
    source = architectures.export(_TORCH[name], "script", Path(tempfile.gettempdir()) / "graphopt-architectures")
    data, rng = cache / f"{name}.npz", np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for i, spec in enumerate(_specs(source)):
        shape = tuple(
            size if isinstance(size, int) else 1 if axis == 0 else _TOKENS for axis, size in enumerate(spec.shape)
        )
        if spec.dtype.numpy().kind == "f":
            arrays[spec.name] = rng.standard_normal((16, *shape[1:])).astype(np.float32)
        else:
            arrays[spec.name] = (
                rng.integers(0, 3000, (16, *shape[1:])) if i == 0 else np.ones((16, *shape[1:]), np.int64)
            )
    np.savez(data, **arrays)
    return source, {key: array[:1] for key, array in arrays.items()}, data


def _specs(source: Path) -> Sequence[Any]:
    from graphopt.model_io import input_specs

    return input_specs(load_model(source))


def _decoder(name: str, cache: Path) -> tuple[Path, dict[str, np.ndarray], Path | None]:
    """One token through a decoder of about 100 million parameters."""
    source = cache / name / "model.onnx"
    if not source.is_file():
        source.parent.mkdir(parents=True, exist_ok=True)
        make_llama(source, _DECODER)
    return source, {"input_ids": np.array([[17]], np.int64)}, None


_SOURCES: dict[str, Source] = {**dict.fromkeys(_TORCH, _torch), "decoder": _decoder}


def _measure(job: Job) -> dict[str, float]:
    """In a process of its own: seconds of both, and the largest relative difference of outputs."""
    import onnxruntime as ort

    from graphopt_backends._engine import Engine

    with np.load(job.feed) as data:
        feed = {key: data[key] for key in data}
    cores = sorted(os.sched_getaffinity(0))
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = job.threads, 3
    if job.threads > 1:
        affinities = ";".join(str(core + 1) for core in cores[1 : job.threads])
        options.add_session_config_entry("session.intra_op_thread_affinities", affinities)
    session = ort.InferenceSession(job.model, options, providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_inputs()]
    expected = session.run(None, {key: feed[key] for key in names})
    binding, held = session.io_binding(), list[Any]()
    for key in names:
        held.append(ort.OrtValue.ortvalue_from_numpy(feed[key]))
        binding.bind_ortvalue_input(key, held[-1])
    for port, array in zip(session.get_outputs(), expected, strict=True):
        held.append(ort.OrtValue.ortvalue_from_numpy(np.zeros_like(array)))
        binding.bind_ortvalue_output(port.name, held[-1])
    engine = Engine(Path(job.compiled), Path(job.weights) if job.weights else None, job.threads)
    outputs, ours = engine.bound([feed[key] for key in names])
    subjects: dict[str, Callable[[], object]] = {
        "onnxruntime": lambda: session.run_with_iobinding(binding),
        "ours": ours,
    }
    if job.other:
        second = Engine(Path(job.other), Path(job.other_weights) if job.other_weights else None, job.threads)
        subjects["float"] = second.bound([feed[key] for key in names])[1]
    os.sched_setaffinity(0, {cores[0]})
    ours()
    error = _difference(outputs, expected)
    times: dict[str, list[float]] = {key: [] for key in subjects}
    for _ in range(job.rounds):
        for key, run in subjects.items():
            times[key].append(_round(run, job.seconds))
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain = ort.InferenceSession(job.model, options, providers=["CPUExecutionProvider"])
    errors = {"error": error, "own error": _difference(expected, plain.run(None, {key: feed[key] for key in names}))}
    return {key: statistics.median(found) for key, found in times.items()} | errors


def _difference(arrays: Sequence[Any], expected: Sequence[Any]) -> float:
    """The largest of all elements, over the largest of its array."""
    return max(
        float(np.abs(a.astype(np.float64) - b).max(initial=0) / max(np.abs(b).max(initial=0), 1e-12))
        for a, b in zip(arrays, expected, strict=True)
    )


def _round(run: Callable[[], object], seconds: float) -> float:
    time.sleep(0.02)  # threads of the other engine go to sleep
    begun, warm = time.perf_counter(), 0
    while warm < 3 or time.perf_counter() - begun < seconds / 5:
        run()
        warm += 1
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


if __name__ == "__main__":
    main()
