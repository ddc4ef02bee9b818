"""Single operators beside ONNX Runtime: python benchmarks/kernels.py [--quick] [--types float INT8 4-bit].

The shapes are those of ResNet-50, MobileNetV2, BERT-base (128 tokens) and MiniLM (kernel_shapes.py), in float, INT8
(QDQ) and 4 bits (MatMulNBits), on one thread and on two. Both run the same model and are called the cheap way: ONNX
Runtime with bound inputs and outputs and no run options, ours through its C function. Their rounds are interleaved, in
one process. With one thread the caller is bound to the first core, with two each thread to its own, as either engine
does it. Results are compared before anything is timed.

About a quarter of an hour on two idle cores; `--quick` (every fourth operator, one short round) two minutes.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kernel_shapes
import numpy as np
import onnx_ir as ir
import onnxruntime
import tables
from kernel_shapes import Operator

from graphopt.model_io import ShapeBinding
from graphopt.targets import Isa
from graphopt_backends._engine import Engine
from graphopt_backends._library import compile_network
from graphopt_backends._link import find_linker
from graphopt_backends._lower import lower
from graphopt_backends.network.blockwise import keeps
from graphopt_backends.network.convert import unsupported
from graphopt_backends.x86 import TARGETS

Call = Callable[[], object]

_RUNTIME: Any = onnxruntime
"""Without types, which it has for a part of its functions only."""

_THREADS = (1, 2)
_CORES = {0, 1}
_PAUSE = 0.06  # threads of the engine that ran before go to sleep
_LEAST_CALLS = 7
_GOALS = {"float": 1.15, "INT8": 1.2, "4-bit": 2.0}
_NOTES = """Ratio: time of ONNX Runtime / time of ours, medians of {rounds} interleaved rounds of {seconds} s each. Up \
to 1.05 either way is a tie. GFLOP/s count a multiplication and an addition as two; rows of softmax and normalization \
count elements. The peak is that of one core on registers alone, measured here: {peaks}. With two threads it is \
twice that.

Images: ours reads and writes them with their channels together, which is how it keeps them between layers; ONNX \
Runtime reads and writes planes, and reorders them where its kernels want blocks of channels. So single convolutions \
flatter ours, but for a copy of the result, which is counted; chains (`x4`: four layers in one graph) have either cost \
once for four. ONNX Runtime may use AMX for INT8, \
where the CPU has it; ours uses {device}.
"""


@dataclass(frozen=True)
class Times:
    """Microseconds of a call, of both by threads."""

    theirs: Mapping[int, float]
    ours: Mapping[int, float]

    def ratio(self, threads: int) -> float:
        """Above 1: ours is faster."""
        return self.theirs[threads] / self.ours[threads]


def main() -> None:
    """Time all operators and write the table."""
    options = _options()
    target = next(target for target in TARGETS if target.device == options.device)
    assert target.isa is not None
    rows, measured, peaks = list[Sequence[object]](), dict[str, list[Times]](), dict[str, float]()
    for kind in options.types:
        known = kernel_shapes.operators()[kind]
        chosen = [operator for operator in known if options.only in operator.name][:: 4 if options.quick else 1]
        for operator in chosen:
            with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
                times = _measure(operator, target.isa, Path(folder), options, peaks)
            if isinstance(times, str):
                rows.append((operator.name, kind, operator.networks, *[""] * 7, times))
            else:
                measured.setdefault(kind, []).append(times)
                rows.append((operator.name, kind, operator.networks, *_cells(operator, times, peaks), ""))
            print(*rows[-1], flush=True)
            gc.collect()
    head = (
        "operator", "type", "network", "theirs us, 1 thread", "ours us", "ratio", "GFLOP/s", "of peak",
        "ratio, 2 threads", "GFLOP/s, 2 threads", "remark",
    )  # fmt: skip
    shown = ", ".join(f"{name} {value / 1e9:.0f} GFLOP/s" for name, value in sorted(peaks.items()))
    notes = _NOTES.format(rounds=options.rounds, seconds=options.seconds, peaks=shown, device=target.isa.name)
    tables.write(options.name, "Single operators beside ONNX Runtime", head, rows, notes + "\n" + _means(measured))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--types", nargs="*", default=list(_GOALS), choices=list(_GOALS))
    parser.add_argument("--only", default="", metavar="TEXT", help="operators with this in their names")
    parser.add_argument("--device", default="native", help="of the target x86")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.0, help="of each round, for each engine")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--name", default="kernels")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 5)
    options.seconds = options.seconds or (0.05 if options.quick else 0.15)
    return options


def _measure(
    operator: Operator, isa: Isa, folder: Path, options: argparse.Namespace, peaks: dict[str, float]
) -> Times | str:
    """Times of both, or why there are none."""
    os.sched_setaffinity(0, _CORES)
    compiled = _compiled(operator, isa, folder)
    if isinstance(compiled, str):
        return compiled
    ours: dict[int, Call] = {}
    theirs: dict[int, Call] = {}
    feeds = {
        name: np.ascontiguousarray(feed.transpose(0, 2, 3, 1) if operator.image else feed)
        for name, feed in operator.feeds.items()
    }
    model = operator.model(False).SerializeToString()
    for threads in _THREADS:
        engine = Engine(compiled, None, threads)
        if not peaks:
            peaks |= {kind: engine.peak(kind) for kind in ("float", "integer")}
        results, ours[threads] = engine.bound(list(feeds.values()))
        expected, theirs[threads] = bound_session(model, operator.feeds, threads)
        ours[threads]()
        theirs[threads]()
        found = results[0].transpose(0, 3, 1, 2) if operator.image else results[0]
        wrong = _difference(operator, found, expected.numpy())
        if wrong:
            return wrong
    return _interleaved(ours, theirs, options)


def _compiled(operator: Operator, isa: Isa, folder: Path) -> Path | str:
    """The library of our model, or why there is none."""
    lowered = lower(ir.from_proto(operator.model(True)), ShapeBinding(), "x86", keeps).model
    if unsupported(lowered):
        return f"no kernel for {', '.join(node.op_type for node in unsupported(lowered))}"
    path = folder / "operator.so"
    compile_network(lowered, isa, "x86", path, find_linker(isa, None), Path(tempfile.gettempdir()) / "graphopt-kernels")
    return path


def bound_session(model: bytes, feeds: Mapping[str, np.ndarray], threads: int) -> tuple[Any, Call]:
    """The output, and a call that fills it: everything is bound before, and no run options are given."""
    options = _RUNTIME.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    if threads == 2:
        options.add_session_config_entry("session.intra_op_thread_affinities", "2")  # counted from 1
    session = _RUNTIME.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    held = {name: _RUNTIME.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(feed)) for name, feed in feeds.items()}
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    (output,) = session.get_outputs()
    dtype = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}[output.type]
    result = _RUNTIME.OrtValue.ortvalue_from_numpy(np.zeros(output.shape, dtype))
    binding.bind_ortvalue_output(output.name, result)

    def call() -> None:
        _ = held  # which live as long as their addresses
        session.run_with_iobinding(binding)

    return result, call


def _difference(operator: Operator, found: np.ndarray, expected: np.ndarray) -> str:
    """What is wrong with our result."""
    off = float(np.abs(found.astype(np.float64) - expected).max())
    if expected.dtype.kind == "f":
        off /= max(1e-30, float(np.abs(expected).max()))
    return f"differs by {off:.3g}" if off > operator.tolerance else ""


def _interleaved(ours: Mapping[int, Call], theirs: Mapping[int, Call], options: argparse.Namespace) -> Times:
    """Medians over rounds, in each of which both take their turns with each number of threads."""
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(options.rounds):
        for threads in _THREADS:
            for name, calls in (("theirs", theirs), ("ours", ours)):
                time.sleep(_PAUSE)
                # our runtime binds the caller by itself where there are several threads
                os.sched_setaffinity(0, _CORES if name == "ours" and threads > 1 else {0})
                found.setdefault((name, threads), []).append(_median(calls[threads], options.seconds))
    os.sched_setaffinity(0, _CORES)
    medians = {key: statistics.median(values) for key, values in found.items()}
    return Times(*({n: medians[name, n] for n in _THREADS} for name in ("theirs", "ours")))


def _median(call: Call, seconds: float) -> float:
    """Microseconds of a call."""
    call()
    call()
    times, clock = list[float](), time.perf_counter
    end = clock() + seconds
    while clock() < end or len(times) < _LEAST_CALLS:
        start = clock()
        call()
        times.append(clock() - start)
    return statistics.median(times) * 1e6


def _cells(operator: Operator, times: Times, peaks: Mapping[str, float]) -> Iterator[str]:
    rate = {n: operator.operations / times.ours[n] / 1e3 for n in _THREADS}
    bytes_multiplied = operator.type == "INT8" or "INT8" in operator.name
    peak = peaks["integer" if bytes_multiplied and peaks.get("integer") else "float"] / 1e9
    yield from (f"{times.theirs[1]:.1f}", f"{times.ours[1]:.1f}", f"{times.ratio(1):.2f}")
    yield from (f"{rate[1]:.0f}", f"{rate[1] / peak:.0%}", f"{times.ratio(2):.2f}", f"{rate[2]:.0f}")


def _means(measured: Mapping[str, Sequence[Times]]) -> str:
    """Geometric means and least ratios by type."""
    lines = ["| type | threads | operators | geometric mean | least | under 0.9 | goal |", f"|{'---|' * 7}"]
    for kind, all_times in measured.items():
        for threads in _THREADS:
            ratios = [times.ratio(threads) for times in all_times]
            low = sum(ratio < 0.9 for ratio in ratios)
            mean = statistics.geometric_mean(ratios)
            cells = (kind, threads, len(ratios), f"{mean:.2f}", f"{min(ratios):.2f}", low, _GOALS[kind])
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
