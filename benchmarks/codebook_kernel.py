"""Products with 4-bit codebooks beside ONNX Runtime: python benchmarks/codebook_kernel.py [--quick] [--device native].

A MatMul whose weight is 16 numbers and a code of 4 bits for each element (Cast, Gather), or 16 numbers for each column
(GatherElements), as the pass `share` writes them. Ours keeps the codes packed and looks them up in registers. ONNX
Runtime runs the same file, whose lookup it evaluates when it loads, and a file with the weight in float32. All are
called with bound inputs and outputs, in one process, their rounds interleaved; results are compared before.

Of each round the fastest call counts, of all rounds the median. Other programs on the machine slow down most what reads
most memory, which is float32; the ratio of the fastest calls of all rounds is less open to that. With one thread the
processor time of the caller is measured, who does all the work, with two the time that passes.
About ten minutes; `--quick` (one shape, few rounds) half a minute.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import tables
from kernels import bound_session
from onnx import TensorProto, helper, numpy_helper

from graphopt.model_io import ShapeBinding
from graphopt.targets import Isa
from graphopt_backends._engine import Engine
from graphopt_backends._library import compile_network
from graphopt_backends._link import find_linker
from graphopt_backends._lower import lower
from graphopt_backends.network.blockwise import keeps
from graphopt_backends.x86 import TARGETS

Call = Callable[[], object]

_SHAPES = ((2048, 2048), (3072, 768), (768, 3072), (4096, 4096))
"""Terms of a sum, columns."""

_ROWS, _THREADS, _ENTRIES = (1, 4, 16), (1, 2), 16
_CORES = {0, 1}
_PAUSE = 0.06  # threads of the engine that ran before go to sleep
_TOLERANCE = 1e-4
_NOTES = """Times in us: the fastest call of each of {rounds} interleaved rounds of {seconds} s, the median of those; \
with one thread processor time. Ratios: time of ONNX Runtime with the float32 file / time of ours. Caches: {caches}. \
The float32 weight of 2048x2048 takes 16.8 MB, its codes 2.1 MB; that of 4096x4096 67 MB and 8.4 MB. Ours was \
compiled for {device}; load average while measuring: {load}."""


def main() -> None:
    """Time all shapes and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="native", help="of the target x86")
    parser.add_argument("--threads", type=int, nargs="*", default=list(_THREADS), choices=_THREADS)
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.03, help="of each round, for each engine")
    parser.add_argument("--name", default="codebook_kernel")
    options = parser.parse_args()
    options.rounds = options.rounds or (5 if options.quick else 25)
    isa = next(target.isa for target in TARGETS if target.device == options.device)
    assert isa is not None
    rows, before = list[Sequence[object]](), os.getloadavg()[0]
    for depth, columns in _SHAPES[: 1 if options.quick else None]:
        for count in _ROWS:
            for row in _measured(isa, (count, depth, columns), options):
                rows.append(row)
                print(*row, flush=True)
    head = (
        "rows x k x columns", "tables", "threads", "ONNX Runtime, float32", "the same file in it", "ours", "ratio",
        "ratio of the fastest calls", "largest error",
    )  # fmt: skip
    load = f"{before:.1f} to {os.getloadavg()[0]:.1f}"
    notes = _NOTES.format(rounds=options.rounds, seconds=options.seconds, caches=_caches(), device=isa.name, load=load)
    tables.write(options.name, "Products with 4-bit codebooks beside ONNX Runtime", head, rows, notes)


def _caches() -> str:
    """Sizes of the caches of a core, as Linux tells them."""
    found: list[str] = []
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            found.append(f"level {level} {size}")
    return ", ".join(found) or "unknown"


def _measured(isa: Isa, shape: tuple[int, int, int], options: argparse.Namespace) -> list[Sequence[object]]:
    """A row for one table and for one of each column, with each number of threads."""
    count, depth, columns = shape
    rng, found = np.random.default_rng(0), list[Sequence[object]]()
    feed = rng.standard_normal((count, depth), dtype=np.float32)
    codes = rng.integers(0, _ENTRIES, (depth, columns), np.uint8)
    for kind, number in (("one", 1), ("of columns", columns)):
        books = rng.standard_normal((_ENTRIES, number), dtype=np.float32) / np.float32(depth**0.5)
        plain = _model(shape, {"w": np.take_along_axis(books, codes if number > 1 else codes.reshape(-1, 1), 0)
                               .reshape(depth, columns)}, None)  # fmt: skip
        packed = _model(shape, {"table": books if number > 1 else books[:, 0]}, codes)
        for threads in options.threads:
            os.sched_setaffinity(0, _CORES)
            expected, floats = bound_session(plain.SerializeToString(), {"x": feed}, threads)
            _, same = bound_session(packed.SerializeToString(), {"x": feed}, threads)
            with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
                results, ours = _engine(packed, isa, Path(folder), threads).bound([feed])
            for call in (floats, same, ours):
                call()
            error = float(np.abs(results[0] - expected.numpy()).max() / np.abs(expected.numpy()).max())
            if error > _TOLERANCE:
                raise SystemExit(f"{shape}: differs by {error:.3g}")
            times = _interleaved({"floats": floats, "same": same, "ours": ours}, threads, options)
            medians = {name: statistics.median(fastest) for name, fastest in times.items()}
            ratio, of_fastest = medians["floats"] / medians["ours"], min(times["floats"]) / min(times["ours"])
            cells = (*(f"{medians[name]:.0f}" for name in times), f"{ratio:.2f}", f"{of_fastest:.2f}", f"{error:.1e}")
            found.append((f"{count}x{depth}x{columns}", kind, threads, *cells))
    return found


def _model(
    shape: tuple[int, int, int], constants: Mapping[str, np.ndarray], codes: np.ndarray | None
) -> onnx.ModelProto:
    """A product with a weight `w`, or with one that is looked up in `table`."""
    count, depth, columns = shape
    held, nodes = [numpy_helper.from_array(array, name) for name, array in constants.items()], list[Any]()
    if codes is not None:
        flat = codes.reshape(-1)
        raw = (flat[::2] | flat[1::2] << 4).astype(np.uint8).tobytes()
        held.append(helper.make_tensor("codes", TensorProto.UINT4, codes.shape, raw, raw=True))
        nodes.append(helper.make_node("Cast", ["codes"], ["index"], to=TensorProto.INT32))
        lookup = "Gather" if constants["table"].ndim == 1 else "GatherElements"
        nodes.append(helper.make_node(lookup, ["table", "index"], ["w"], axis=0))
    nodes.append(helper.make_node("MatMul", ["x", "w"], ["y"]))
    source = helper.make_tensor_value_info("x", TensorProto.FLOAT, [count, depth])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [count, columns])
    graph = helper.make_graph(nodes, "product", [source], [result], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _engine(model: onnx.ModelProto, isa: Isa, folder: Path, threads: int) -> Engine:
    """Ours, whose weight stays packed."""
    lowered = lower(ir.from_proto(model), ShapeBinding(), "x86", keeps).model
    path, cache = folder / "product.so", Path(tempfile.gettempdir()) / "graphopt-kernels"
    made = compile_network(lowered, isa, "x86", path, find_linker(isa, None), cache)
    return Engine(path, path.with_suffix(".weights") if made.separate else None, threads)


def _interleaved(calls: Mapping[str, Call], threads: int, options: argparse.Namespace) -> dict[str, list[float]]:
    """Microseconds by name, of the fastest call of every round."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.rounds):
        for name, call in calls.items():
            time.sleep(_PAUSE)
            # our runtime binds the caller by itself where there are several threads
            os.sched_setaffinity(0, _CORES if name == "ours" and threads > 1 else {0})
            found[name].append(_fastest(call, options.seconds, time.perf_counter if threads > 1 else time.thread_time))
    os.sched_setaffinity(0, _CORES)
    return found


def _fastest(call: Call, seconds: float, clock: Callable[[], float]) -> float:
    """Microseconds of a call."""
    call()
    times = list[float]()
    end = clock() + seconds
    while clock() < end or len(times) < 3:
        start = clock()
        call()
        times.append(clock() - start)
    return min(times) * 1e6


if __name__ == "__main__":
    main()
