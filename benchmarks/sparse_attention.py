"""Time and memory of sparse attention against the length: python benchmarks/sparse_attention.py [--lengths 512 ...].

A BERT-shaped encoder with random weights, dense and with `sparse-attention`, in ONNX Runtime, each run in a process of
its own, so that its peak memory is its own; processes take turns. Besides, the dense encoder with ONNX Runtime's own
attention operator, and with `--compiled` the rewritten one compiled for this machine at every length. Writes a table
and a plot with logarithmic axes; the slope of a line is the power of the length that time grows with. What does not fit
into free memory is not run, and the table says so.

All lengths take about 20 minutes on two idle cores (an estimate); `--lengths 512 1024 2048` about two.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import tables

import graphopt
from graphopt.model_io import save_model
from graphopt.reference import Feed

Array = np.ndarray[Any, np.dtype[Any]]
_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
_STEPS = ("sparse-attention{width=256}", "sparse-attention{width=256 loop=true}")
_DENSE = "dense"
_OPERATOR = "dense, com.microsoft.MultiHeadAttention without a mask"
_COMPILED = "compiled"
_NOTE = """{layers} layers, hidden {hidden}, {heads} heads, batch 1, {threads} threads; median of {rounds} processes \
in turn, each the median of {runs} runs after one to warm up. Memory is the peak of the whole process, runtime and \
weights included. Slopes (log-log, over all lengths, and from {first} on): {slopes}."""


@dataclass(frozen=True)
class Shape:
    """Size of the encoder."""

    layers: int = 6
    hidden: int = 384
    heads: int = 6


@dataclass(frozen=True)
class Figure:
    """What one run took."""

    milliseconds: float
    megabytes: float
    fault: str = ""
    remark: str = ""


def main() -> None:
    """Measure every length both ways and write the table and the plot."""
    options = _options()
    if options.child:
        print(json.dumps(asdict(_measured(json.loads(options.child)))))
        return
    shape = Shape(layers=options.layers)
    with tempfile.TemporaryDirectory() as name:
        models, found = _models(Path(name), shape, options.steps), dict[tuple[str, int], Figure]()
        for length in options.lengths:
            there = models | (_compiled(Path(name), length, options.steps[0]) if options.compiled else {})
            rounds = [
                {label: _figure(path, length, shape, options) for label, path in there.items()}
                for _ in range(options.rounds)
            ]
            found |= {(label, length): _middle([figures[label] for figures in rounds]) for label in there}
    _write(found, shape, options)


def _middle(figures: Sequence[Figure]) -> Figure:
    faults = [figure for figure in figures if figure.fault]
    if faults:
        return faults[0]
    milliseconds, megabytes = (
        float(np.median([getattr(figure, name) for figure in figures])) for name in ("milliseconds", "megabytes")
    )
    return Figure(milliseconds, megabytes, remark=figures[0].remark)


def encoder(shape: Shape, seed: int = 0, *, operator: bool = False) -> ir.Model:
    """A BERT-shaped encoder, from vectors `x` `[batch, length, hidden]` and a mask `[batch, length]` to vectors `y`.

    Args:
        shape: Its size.
        seed: Of its weights.
        operator: Its attention is ONNX Runtime's operator, which is fastest without a mask.
    """
    rng, weights = np.random.default_rng(seed), dict[str, Array]()
    body = [
        "real = Cast<to=1>(mask)",
        "padded = Sub(one, real)",
        "hidden = Unsqueeze(padded, middle)",
        "bias = Mul(hidden, low)",
    ]
    value = "x"
    for layer in range(shape.layers):
        value = _layer(body, weights, f"l{layer}_", value, shape, rng, operator=operator)
    constants = {
        "one": np.float32(1),
        "low": np.float32(-10000),
        "middle": np.array([1, 2]),
        "split": np.array([0, 0, shape.heads, shape.hidden // shape.heads]),
        "join": np.array([0, 0, shape.hidden]),
        "scale": np.float32(math.sqrt(shape.hidden // shape.heads)),
        "half": np.float32(0.5),
        "root": np.float32(math.sqrt(2)),
    }
    body[-1] = body[-1].replace(f"{value} =", "y =")
    h = shape.hidden
    arrays = {name: np.asarray(array) for name, array in (constants | weights).items()}
    declared = ", ".join(f"{_element(a)}[{','.join(map(str, a.shape))}] {name}" for name, a in arrays.items())
    signature = f"(float[batch,length,{h}] x, int64[batch,length] mask) => (float[batch,length,{h}] y)"
    opening = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>'
    proto = onnx.parser.parse_model(f"{opening}\nencoder {signature} <{declared}> {{\n" + "\n".join(body) + "\n}")
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    return ir.from_proto(proto)


def _element(array: Array) -> str:
    return "float" if array.dtype == np.float32 else "int64"


def _layer(
    body: list[str],
    weights: dict[str, Array],
    p: str,
    x: str,
    shape: Shape,
    rng: np.random.Generator,
    *,
    operator: bool,
) -> str:
    """Add one layer; returns the name of its result."""
    h = shape.hidden

    def linear(name: str, source: str, inputs: int, outputs: int) -> str:
        weights[f"{p}{name}w"] = (rng.standard_normal((inputs, outputs)) / math.sqrt(inputs)).astype(np.float32)
        weights[f"{p}{name}b"] = (0.02 * rng.standard_normal(outputs)).astype(np.float32)
        body.append(f"{p}{name}m = MatMul({source}, {p}{name}w)")
        body.append(f"{p}{name} = Add({p}{name}m, {p}{name}b)")
        return f"{p}{name}"

    def norm(name: str, left: str, right: str) -> str:
        weights[f"{p}{name}g"], weights[f"{p}{name}o"] = np.ones(h, np.float32), np.zeros(h, np.float32)
        body.append(f"{p}{name}s = Add({left}, {right})")
        body.append(f"{p}{name} = LayerNormalization<axis=-1>({p}{name}s, {p}{name}g, {p}{name}o)")
        return f"{p}{name}"

    orders = {"q": "0,2,1,3", "k": "0,2,3,1", "v": "0,2,1,3"}
    for name, order in orders.items():
        linear(name, x, h, h)
        if not operator:
            body.append(f"{p}{name}4 = Reshape({p}{name}, split)")
            body.append(f"{p}{name}t = Transpose<perm=[{order}]>({p}{name}4)")
    fused = f"com.microsoft.MultiHeadAttention<num_heads={shape.heads}>({p}q, {p}k, {p}v)"
    body += (
        [f"{p}joined = {fused}"]
        if operator
        else [
            f"{p}raw = MatMul({p}qt, {p}kt)",
            f"{p}scaled = Div({p}raw, scale)",
            f"{p}masked = Add({p}scaled, bias)",
            f"{p}shares = Softmax<axis=-1>({p}masked)",
            f"{p}mixed = MatMul({p}shares, {p}vt)",
            f"{p}back = Transpose<perm=[0,2,1,3]>({p}mixed)",
            f"{p}joined = Reshape({p}back, join)",
        ]
    )
    first = norm("n1", x, linear("o", f"{p}joined", h, h))
    wide = linear("f1", first, h, 4 * h)
    body += [
        f"{p}e = Div({wide}, root)",
        f"{p}erf = Erf({p}e)",
        f"{p}erf1 = Add({p}erf, one)",
        f"{p}g = Mul({wide}, {p}erf1)",
        f"{p}gelu = Mul({p}g, half)",
    ]
    return norm("n2", first, linear("f2", f"{p}gelu", 4 * h, h))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=_LENGTHS)
    parser.add_argument("--steps", nargs="*", default=_STEPS, help="pipelines to compare")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3, help="in one process")
    parser.add_argument("--rounds", type=int, default=3, help="processes")
    parser.add_argument("--compiled", action="store_true", help="compile the first pipeline for this machine as well")
    parser.add_argument("--name", default="sparse_attention", help="of the table")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def _models(folder: Path, shape: Shape, steps: Sequence[str]) -> dict[str, Path]:
    """The dense model and what each pipeline makes of it."""
    source = folder / "dense.onnx"
    save_model(encoder(shape), source)
    found = {_DENSE: source, _OPERATOR: folder / "operator.onnx"}
    save_model(encoder(shape, operator=True), found[_OPERATOR])
    for number, step in enumerate(steps):
        out = folder / f"out{number}"
        graphopt.optimize(source, step, out=out, check="none")
        found[step] = out / "model.onnx"
    return found


def _compiled(folder: Path, length: int, step: str) -> dict[str, Path]:
    """What a pipeline makes of the model, compiled for one length."""
    out = folder / f"compiled{length}"
    dims = {"batch": 1, "length": length}
    graphopt.optimize(folder / "dense.onnx", step, target="x86", dims=dims, out=out, check="none")
    return {f"{step}, {_COMPILED}": out / "model.so"}


def _figure(path: Path, length: int, shape: Shape, options: argparse.Namespace) -> Figure:
    needed = 4 * 3 * shape.heads * length**2  # scores, masked, and as weights
    if path.name == "dense.onnx" and needed > 0.8 * _free_bytes():
        return Figure(math.nan, math.nan, f"does not fit: its scores alone need {needed >> 20} MB")
    job = {
        "model": str(path),
        "length": length,
        "hidden": shape.hidden,
        "threads": options.threads,
        "runs": options.runs,
    }
    command = [sys.executable, __file__, "--child", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        return Figure(math.nan, math.nan, lines[-1][:120])
    return Figure(**json.loads(done.stdout.splitlines()[-1]))


def _measured(job: Mapping[str, Any]) -> Figure:
    """Run one model at one length, in the child."""
    path, length = Path(job["model"]), job["length"]
    x = np.random.default_rng(0).standard_normal((1, length, job["hidden"])).astype(np.float32)
    feed: Feed = {"x": x, "mask": np.ones((1, length), np.int64)}
    if path.suffix == ".onnx":
        return Figure(*_timed(_session(path, feed, job["threads"]), job["runs"]))
    from graphopt_backends._engine import Engine

    engine = Engine(path, held if (held := path.with_suffix(".weights")).exists() else None, job["threads"])
    outputs, run = engine.bound([feed["x"], feed["mask"]])
    milliseconds, megabytes = _timed(run, job["runs"])
    expected = _session(path.with_name("model.onnx"), feed, job["threads"])()[0]
    remark = f"differs from ONNX Runtime by at most {np.abs(outputs[0] - expected).max():.0e}"
    return Figure(milliseconds, megabytes, remark=remark)


def _session(path: Path, feed: Feed, threads: int) -> Callable[[], Any]:
    """A run in ONNX Runtime."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given = {port.name: feed[port.name] for port in session.get_inputs()}
    return lambda: session.run(None, given)


def _timed(run: Callable[[], object], runs: int) -> tuple[float, float]:
    """Median milliseconds, and the peak of memory in MB."""
    run()
    times: list[float] = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times)), _status("VmHWM") / 1024


def _status(key: str) -> int:
    """A figure of this process in kB."""
    lines = Path("/proc/self/status").read_text("utf8").splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])


def _free_bytes() -> int:
    lines = Path("/proc/meminfo").read_text("utf8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])


def _write(found: Mapping[tuple[str, int], Figure], shape: Shape, options: argparse.Namespace) -> None:
    head = ("tokens", "model", "ms", "MB", "times faster", "times less memory", "remarks")
    rows = [_row(label, length, figure, found[_DENSE, length]) for (label, length), figure in found.items()]
    first = sorted(options.lengths)[len(options.lengths) // 2]
    labels = dict.fromkeys(label for label, _ in found)
    slopes = [
        f"{label}: time {_slope(found, label, 0, 0)}, {_slope(found, label, first, 0)}; memory "
        f"{_slope(found, label, 0, 1)}, {_slope(found, label, first, 1)}"
        for label in labels
    ]
    notes = _NOTE.format(
        **asdict(shape),
        threads=options.threads,
        runs=options.runs,
        rounds=options.rounds,
        first=first,
        slopes="; ".join(slopes),
    )
    tables.write(options.name, "Sparse attention", head, rows, notes)
    (tables.RESULTS / f"{options.name}.svg").write_text(_plot(found), "utf8")


def _row(label: str, length: int, figure: Figure, dense: Figure) -> tuple[object, ...]:
    if figure.fault:
        return length, label, "", "", "", "", figure.fault
    faster, less = dense.milliseconds / figure.milliseconds, dense.megabytes / figure.megabytes
    gains = ("", "") if label == _DENSE or dense.fault else (f"{faster:.2f}", f"{less:.2f}")
    return length, label, f"{figure.milliseconds:.0f}", f"{figure.megabytes:.0f}", *gains, figure.remark


def _slope(found: Mapping[tuple[str, int], Figure], label: str, first: int, column: int) -> str:
    """Power of the length that a figure grows with, from one length on."""
    points = list(_points(found, label, column))
    points = [(x, y) for x, y in points if x >= first]
    if len(points) < 2:
        return "unknown"
    x, y = np.log(np.array(points)).T
    return f"{np.polyfit(x, y, 1)[0]:.2f}"


def _points(found: Mapping[tuple[str, int], Figure], label: str, column: int) -> Iterator[tuple[int, float]]:
    for (name, length), figure in found.items():
        if name == label and not figure.fault:
            yield length, (figure.milliseconds, figure.megabytes)[column]


def _plot(found: Mapping[tuple[str, int], Figure]) -> str:
    """Time and memory against the length, both axes logarithmic, as SVG."""
    colours = ("#555555", "#c0392b", "#2471a3", "#1e8449", "#b7950b")
    labels = list(dict.fromkeys(label for label, _ in found))
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="860" height="380" font-family="sans-serif" font-size="12">'
    ]
    for column, title in enumerate(("milliseconds", "peak MB")):
        series = [(label, list(_points(found, label, column))) for label in labels]
        parts += _panel(70 + 430 * column, title, [(n, p, colours[labels.index(n) % 5]) for n, p in series if p])
    return "\n".join([*parts, "</svg>", ""])


def _panel(left: int, title: str, series: Sequence[tuple[str, list[tuple[int, float]], str]]) -> Iterator[str]:
    xs = sorted({x for _, points, _ in series for x, _ in points})
    ys = [y for _, points, _ in series for _, y in points]
    low, high = math.floor(math.log2(min(ys))), math.ceil(math.log2(max(ys)))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log2(x) - math.log2(xs[0])) / max(1e-9, math.log2(xs[-1]) - math.log2(xs[0]))
        return left + 330 * across, 320 - 270 * (math.log2(y) - low) / max(1, high - low)

    yield f'<text x="{left}" y="30">{title} against tokens</text>'
    for power in range(low, high + 1):
        _, y = place(xs[0], 2.0**power)
        yield f'<line x1="{left}" x2="{left + 330}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>'
        yield f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{2.0**power:g}</text>'
    for x in xs:
        yield f'<text x="{place(x, 2.0**low)[0]:.1f}" y="340" text-anchor="middle">{x}</text>'
    for number, (label, points, colour) in enumerate(series):
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (place(x, y) for x, y in points))
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
        yield f'<text x="{left + 10}" y="{64 + 16 * number}" fill="{colour}">{label}</text>'


if __name__ == "__main__":
    main()
