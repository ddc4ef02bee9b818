"""Peak memory of pruning a model with 2.5 GB of weights: python benchmarks/prune_memory.py [--gigabytes 2.5].

The model is made here: MatMul and Gemm layers whose weights lie in one external file. `graphopt` prunes it in a child
process whose memory is read from /proc every 10 ms. Anonymous memory is what counts: pages of mapped files can be
dropped at any time. The check in ONNX Runtime is a process of its own and reported by itself. Linux only.

About 2 minutes, and twice the model's size on disk.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import tables

_WIDTH = 4096
_LAYER_BYTES = _WIDTH * _WIDTH * 4


def main() -> None:
    """Make the model, prune it with and without the check, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.5)
    parser.add_argument("--passes", default="prune{ratio=0.5}")
    parser.add_argument("--name", default="prune_memory")
    options = parser.parse_args()
    rows = list[tuple[object, ...]]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        layers = round(options.gigabytes * 1e9 / _LAYER_BYTES)
        make_model(folder / "model.onnx", layers)
        size = (folder / "model.onnx.data").stat().st_size
        for check in ("none", "auto"):
            out = folder / check
            command = [sys.executable, "-m", "graphopt", str(folder / "model.onnx"), "--passes", options.passes]
            command += ["--check", check, "-o", str(out), "--overwrite"]
            peaks, seconds, code = watched(command)
            kept = sum(file.stat().st_size for file in out.iterdir() if file.is_file()) if out.exists() else 0
            figures = (f"{peaks[key] / 1e9:.2f}" for key in ("anonymous", "mapped", "children"))
            rows.append(
                (f"--check {check}", f"{size / 1e9:.2f}", f"{kept / 1e9:.2f}", *figures, f"{seconds:.0f}", code)
            )
            print(*rows[-1], flush=True)
    head = (
        "run", "weights in, GB", "out", "peak anonymous, GB", "peak mapped", "peak anonymous of children", "seconds",
        "exit code",
    )  # fmt: skip
    tables.write(options.name, f"Memory of `{options.passes}` on {layers} layers of {_WIDTH} x {_WIDTH}", head, rows)


def make_model(path: Path, layers: int) -> None:
    """Write a network of `layers` linear layers, MatMul and Gemm in turn, without ever holding it in memory."""
    rng = np.random.default_rng(0)
    block = rng.standard_normal((_WIDTH, _WIDTH), dtype=np.float32) / np.float32(_WIDTH**0.5)
    nodes, weights, current = list[onnx.NodeProto](), list[onnx.TensorProto](), "x"
    with path.with_name(f"{path.name}.data").open("wb") as stream:
        for i in range(layers):
            tensor = onnx.TensorProto(name=f"w{i}", data_type=onnx.TensorProto.FLOAT, dims=[_WIDTH, _WIDTH])
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (
                ("location", f"{path.name}.data"), ("offset", i * _LAYER_BYTES), ("length", _LAYER_BYTES)
            ):  # fmt: skip
                tensor.external_data.add(key=key, value=str(value))
            weights.append(tensor)
            stream.write(np.roll(block, 17 * i, axis=i % 2).tobytes())
            made = f"a{i}"
            nodes.append(onnx.helper.make_node("Gemm" if i % 2 else "MatMul", [current, f"w{i}"], [made], f"layer{i}"))
            if i < layers - 1:
                nodes.append(onnx.helper.make_node("Relu", [made], [f"r{i}"], f"relu{i}"))
            current = f"r{i}"
    nodes[-1].output[0] = "y"
    shapes = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", _WIDTH]) for name in "xy"]
    graph = onnx.helper.make_graph(nodes, "wide", shapes[:1], shapes[1:], weights)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)


def watched(command: list[str]) -> tuple[dict[str, int], float, int]:
    """Run a command; returns peaks in bytes, seconds, and the exit code."""
    peaks = {"anonymous": 0, "mapped": 0, "children": 0, "together": 0}
    start = time.perf_counter()
    with tempfile.TemporaryFile() as errors, subprocess.Popen(command, stdout=errors, stderr=errors) as process:
        while process.poll() is None:
            anonymous, mapped = _resident(process.pid)
            peaks["anonymous"] = max(peaks["anonymous"], anonymous)
            peaks["mapped"] = max(peaks["mapped"], mapped)
            children = sum(_resident(pid)[0] for pid in _children(process.pid))
            peaks["children"] = max(peaks["children"], children)
            peaks["together"] = max(peaks["together"], anonymous + children)
            time.sleep(0.01)
        seconds = time.perf_counter() - start
        if process.returncode:
            errors.seek(0)
            print(errors.read().decode(errors="replace"), file=sys.stderr)
    return peaks, seconds, process.returncode


def _resident(pid: int) -> tuple[int, int]:
    """Anonymous and file-backed resident bytes of a process; zeros once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text("utf8").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    fields = dict(line.partition(":")[::2] for line in lines)
    anonymous, mapped = (int(fields.get(key, "0 kB").split()[0]) * 1024 for key in ("RssAnon", "RssFile"))
    return anonymous, mapped


def _children(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found = [int(child) for child in task.read_text("utf8").split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
        for child in found:
            yield child
            yield from _children(child)


if __name__ == "__main__":
    main()
