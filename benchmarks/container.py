"""Sizes and speed of containers: GRAPHOPT_ZOO=... python benchmarks/container.py [--quick].

ResNet-56 with 16 clusters for each weight, the same with 80 % of all weights zero, both as float32 and as indices in
4 bits with a codebook, and MiniLM and ResNet-56 as they are, beside zip, xz and zstd -19 (the package zstandard) on
the same files. All in one process on one thread; megabytes are those of the ONNX files, times those of the processor,
and the median of several runs. `--quick` leaves MiniLM out. `--large MB` packs a model of that size with external
weights and tells the peak memory instead.
"""

from __future__ import annotations

import argparse
import lzma
import os
import resource
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx
import tables
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from zoo_quant import load_zoo

from graphopt.pack import pack
from graphopt.pack.decoder import Container

_CLUSTERS = 16
_FLOAT_GOAL = 0.9
_TURNS = 60
_RUNS = 5

Floats = NDArray[np.float32]
T = TypeVar("T")


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--large", type=int, metavar="MB")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if options.large:
            _large(Path(name), options.large)
            return
        rows = [_row(path) for path in _models(Path(name), quick=options.quick)]
    head = ("model", "bytes", "zip", "xz -9e", "zstd -19", "container", "of the best", "goal", "graph and index")
    head += (
        "with zstd as well",
        "packed, MB/s",
        "unpacked, MB/s",
        "the same in float32",
        "without the library",
        "xz there and back",
    )
    notes = (
        "`of the best`: container beside the smallest of the others; the goal is 0.9 where weights are stored as "
        "float32, and 1 for indices. `with zstd as well`: what the container would take if each tensor could be zstd "
        "-19 too, which would make its decoder need a library. Speeds are megabytes of the ONNX file in a second of "
        f"processor time, the median of {_RUNS} runs; `the same in float32`: where indices stand for weights of four "
        "bytes, both speeds by the bytes of the float32 file, since the work is the same. `without the library`: "
        "unpacked by Python and numpy alone, once. `xz there and back`: the same speeds of xz -9e in this run."
    )
    tables.write("container", "Packed models beside general compressors", head, rows, notes)


def _models(folder: Path, *, quick: bool) -> Iterator[Path]:
    zoo = load_zoo()
    for case in ("cifar10_resnet56",) if quick else ("cifar10_resnet56", "minilm"):
        (folder / case).mkdir()
        zoo.export(case, folder / case, samples=1, limit=1)
        source = folder / case / "model.onnx"
        yield source.rename(folder / f"{case}.onnx")
    for sparsity, name in ((0.0, "16 clusters"), (0.8, "16 clusters, 80 % zeros")):
        for indices in (False, True):
            model = clustered(onnx.load(folder / "cifar10_resnet56.onnx"), sparsity, indices=indices)
            path = folder / f"cifar10_resnet56, {name}, {'indices' if indices else 'float32'}.onnx"
            path.write_bytes(model.SerializeToString(deterministic=True))
            yield path


def clustered(model: onnx.ModelProto, sparsity: float, *, indices: bool) -> onnx.ModelProto:
    """Give all weights of Conv, Gemm and MatMul few values each; as indices, codebook, Cast and Gather if wanted."""
    names = {node.input[1] for node in model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")}
    found = [t for t in model.graph.initializer if t.name in names and len(t.dims) > 1]
    everything = np.concatenate([np.abs(numpy_helper.to_array(t)).reshape(-1) for t in found])
    threshold = float(np.quantile(everything, sparsity)) if sparsity else 0.0
    added: list[onnx.NodeProto] = []
    for tensor in found:
        book, symbols = _clusters(numpy_helper.to_array(tensor), threshold)
        if not indices:
            tensor.raw_data = book[symbols].tobytes()
            continue
        name, flat = tensor.name, symbols.reshape(-1)
        flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
        nibbles = (flat[::2] | flat[1::2] << 4).tobytes()
        stored = helper.make_tensor(f"{name}.indices", TensorProto.UINT4, tensor.dims, nibbles, raw=True)
        model.graph.initializer.append(numpy_helper.from_array(book, f"{name}.codebook"))
        added.append(helper.make_node("Cast", [stored.name], [f"{name}.places"], to=TensorProto.INT32))
        added.append(helper.make_node("Gather", [f"{name}.codebook", f"{name}.places"], [name]))
        tensor.CopyFrom(stored)
    if indices:
        nodes = [*added, *model.graph.node]
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        model.opset_import[0].version = max(model.opset_import[0].version, 21)
    return model


def _clusters(weight: Floats, threshold: float) -> tuple[Floats, NDArray[np.uint8]]:
    """Codebook in order, with 0 where weights below the threshold become 0, and the index of each weight."""
    flat = weight.reshape(-1)
    kept = flat[np.abs(flat) > threshold] if threshold else flat
    book = _kmeans(kept, min(_CLUSTERS - bool(threshold), max(len(kept), 1)))
    pruned = np.where(np.abs(flat) > threshold, flat, 0) if threshold else flat
    book = np.unique(np.append(book, np.float32(0))) if threshold else book
    symbols = np.searchsorted((book[1:] + book[:-1]) / 2, pruned)
    if threshold:
        symbols[pruned == 0] = np.searchsorted(book, 0)
    return book, symbols.astype(np.uint8).reshape(weight.shape)


def _kmeans(values: Floats, count: int) -> Floats:
    """Lloyd's algorithm on sorted numbers (1957), from even steps and even shares mixed."""
    ordered = np.sort(values.astype(np.float64)) if len(values) else np.zeros(1)
    sums = np.concatenate([[0], np.cumsum(ordered)])
    shares = np.quantile(ordered, (np.arange(count) + 0.5) / count)
    centers = (np.linspace(ordered[0], ordered[-1], count) + shares) / 2
    for _ in range(_TURNS):
        edges = np.searchsorted(ordered, (centers[1:] + centers[:-1]) / 2)
        edges = np.concatenate([[0], edges, [len(ordered)]])
        sizes = np.diff(edges)
        centers = np.sort(np.where(sizes > 0, np.diff(sums[edges]) / np.maximum(sizes, 1), centers))
    return centers.astype(np.float32)


def _row(path: Path) -> tuple[object, ...]:
    import zstandard

    content = path.read_bytes()
    strongest = zstandard.ZstdCompressor(level=19)
    squeezed, squeezing = _timed(lambda: lzma.compress(content, preset=9 | lzma.PRESET_EXTREME), runs=1)
    expanding = _timed(lambda: lzma.decompress(squeezed))[1]
    others = [len(zlib.compress(content, 9)), len(squeezed), len(strongest.compress(content))]
    out = path.with_suffix(".gopt")
    report, packing = _timed(lambda: pack(path, out))
    unpacking = _timed(lambda: _unpacked(out, path.parent / "native"))[1]
    with Container(out) as opened:
        payloads = {row.name: opened.payload(row.name) for row in report.tensors}
    with Container(out, native=False) as opened:
        files, portable = _timed(lambda: opened.unpack(path.parent / "portable"), runs=1)
    if files[0].read_bytes() != content:
        raise RuntimeError(f"{path}: another model came back")
    spared = sum(max(row.packed - len(strongest.compress(payloads[row.name])), 0) for row in report.tensors)
    size, goal = out.stat().st_size, 1 if "indices" in path.name else _FLOAT_GOAL
    ratio = size / min(others)
    goal_text = ("met" if ratio <= goal else "missed") if "clusters" in path.name else ""
    packed, unpacked, slowly = (f"{len(content) / seconds / 1e6:.1f}" for seconds in (packing, unpacking, portable))
    in_floats = path.with_name(path.name.replace("indices", "float32")).stat().st_size
    as_floats = " / ".join(f"{in_floats / seconds / 1e6:.1f}" for seconds in (packing, unpacking))
    return (
        path.stem,
        len(content),
        *others,
        size,
        f"{ratio:.3f}",
        goal_text,
        report.graph_packed,
        size - spared,
        packed,
        unpacked,
        as_floats if "indices" in path.name else "",
        slowly,
        " / ".join(f"{len(content) / seconds / 1e6:.1f}" for seconds in (squeezing, expanding)),
    )


def _timed(action: Callable[[], T], runs: int = _RUNS) -> tuple[T, float]:
    """What it returns, and the median of processor seconds."""
    seconds: list[float] = []
    for _ in range(runs - 1):
        start = time.process_time()
        action()
        seconds.append(time.process_time() - start)
    start = time.process_time()
    found = action()
    return found, statistics.median([*seconds, time.process_time() - start])


def _large(folder: Path, megabytes: int) -> None:
    """Pack and unpack a model with external weights in tensors of 64 MB, and tell peak memory and speed."""
    rng = np.random.default_rng(0)
    count, rows = megabytes // 64, 4096
    tensors: list[TensorProto] = []
    with (folder / "weights.bin").open("wb") as stream:
        for i in range(count):
            tensor = TensorProto(name=f"w{i}", data_type=1, dims=(rows, 4096), data_location=TensorProto.EXTERNAL)
            for key, value in (("location", "weights.bin"), ("offset", stream.tell()), ("length", rows << 14)):
                tensor.external_data.add(key=key, value=str(value))
            tensors.append(tensor)
            for _ in range(0, rows, 256):
                stream.write(rng.normal(size=(256, 4096)).astype("<f4").tobytes())
    model, packed = folder / "model.onnx", folder / "model.gopt"
    model.write_bytes(helper.make_model(helper.make_graph([], "g", [], [], tensors)).SerializeToString())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, action in (
        ("pack", lambda: pack(model, packed)),
        ("unpack", lambda: _unpacked(packed, folder / "unpacked")),
    ):
        child = os.fork()
        if not child:
            start = time.process_time()
            action()
            seconds = time.process_time() - start
            status = Path("/proc/self/status").read_text("utf8")
            parts = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if line.startswith("Rss")}
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(
                f"{name}: {count * 67.1 / seconds:.1f} MB/s, peak {peak:.0f} MB (before: {before / 1024:.0f} MB),"
                f" now {int(parts['RssAnon']) / 1024:.0f} MB besides mapped files",
                flush=True,
            )
            os._exit(0)
        os.waitpid(child, 0)


def _unpacked(container: Path, folder: Path) -> list[Path]:
    with Container(container) as opened:
        return opened.unpack(folder)


if __name__ == "__main__":
    main()
