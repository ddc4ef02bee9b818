"""Weight sharing on trained models: GRAPHOPT_ZOO=... python benchmarks/share_accuracy.py [CASE ...] [--quick].

Codes of 2, 3, 4, 6 and 8 bits with a codebook for each tensor or each output channel, by k-means alone, weighted by the
data, and with errors compensated on data, beside onnxsim's k-means. onnxsim itself writes clustered weights as floats,
for matrices at 4 bits only; so its routine clusters the same tensors at all sizes, and `share`, which loses nothing
of a tensor that holds so few numbers, stores them: files of equal size. All start from the model after `fold`, and
leave embeddings alone.

Figures are kept in the cache folder, as in quant_static.py. `--quick` is TinyStories at 3 and 4 bits.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import quant_rivals
import tables
from quant_figures import Figure, arguments, kept, opens, stored
from zoo_quant import load_zoo

import graphopt

_CASES = ("cifar10_resnet20", "cifar10_resnet56", "minilm", "stories260k")
_BITS = (2, 3, 4, 6, 8)
_WAYS: Mapping[str, str] = {
    "tensor": "algorithm=nearest",
    "tensor, weighted": "algorithm=weighted",
    "tensor, compensated": "",
    "channel": "channels=1 algorithm=nearest",
    "channel, compensated": "channels=1",
}
_FLOAT, _ONNXSIM, _SHIPPED = "float", "onnxsim k-means", "onnxsim as shipped"
_NOTE = """{samples} calibration samples, {limit} scored in ONNX Runtime. `loss` is positive where the result is \
worse: points of the metric, or per cent of perplexity. Codes of 3 bits take 4 in the file and those of 6 take 8. \
ONNX Runtime computes the lookups when it loads a model: speed and resident size are those of float weights in every \
row."""


@dataclass(frozen=True)
class Way:
    """One row."""

    name: str
    bits: int = 0


def main() -> None:
    """Measure what is not yet known and write the table."""
    options = _options()
    if options.child:
        print(json.dumps(_measured(json.loads(options.child))))
        return
    samples = options.samples or (16 if options.quick else 64)
    limit = options.limit or (64 if options.quick else None)
    found: dict[tuple[str, Way], Figure] = {}
    for case in options.cases or (_CASES[-1:] if options.quick else _CASES):
        for way in _ways(options):
            words = f"{case} {way.name} {way.bits} {samples} {limit or 'all'}"
            job = {"case": case, "way": asdict(way), "samples": samples, "limit": limit}
            found[case, way] = kept(words, job | {"environments": str(options.environments)}, options.cache)
            print(case, way.name, way.bits, json.dumps(found[case, way]), flush=True)
            _write(found, samples, limit, options, quiet=True)
    _write(found, samples, limit, options)


def _options() -> argparse.Namespace:
    parser = arguments(__doc__, "share_accuracy")
    parser.add_argument("--bits", type=int, nargs="*", choices=_BITS)
    parser.add_argument("--ways", nargs="*", choices=(*_WAYS, _ONNXSIM, _SHIPPED), help="instead of all")
    parser.add_argument("--environments", type=Path, default=quant_rivals.ENVIRONMENTS)
    return parser.parse_args()


def _ways(options: argparse.Namespace) -> Iterator[Way]:
    yield Way(_FLOAT)
    for bits in options.bits or ((3, 4) if options.quick else _BITS):
        for name in options.ways or (*_WAYS, _ONNXSIM, _SHIPPED):
            if name != _SHIPPED or bits == 4:
                yield Way(name, bits)


def _measured(job: Mapping[str, Any]) -> Figure:
    """Share and score, in the child."""
    zoo, way = load_zoo(), Way(**job["way"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        zoo.export(job["case"], folder, samples=job["samples"], limit=8)
        base, model, seconds = folder / "folded.onnx", folder / "result.onnx", 0.0
        _optimized(folder / "model.onnx", "fold", base)
        if way.name == _FLOAT:
            shutil.copyfile(base, model)
        elif way.name in _WAYS:
            seconds = _optimized(base, _step(base, way.bits, _WAYS[way.name]), model, folder / "calib.npz")
        else:
            seconds = _by_onnxsim(way, base, model, folder, Path(job["environments"]))
        figure: Figure = {"bytes": stored(model), "seconds": seconds}
        if fault := opens(model):
            return {**figure, "fault": f"does not load: {fault}"}
        scored = zoo.score(job["case"], model, limit=job["limit"])
    return {**figure, "metric": scored["metric"], "value": scored["value"]}


def _optimized(source: Path, passes: str, model: Path, calibration: Path | None = None) -> float:
    """Run passes; returns the seconds that it took."""
    start, out = time.perf_counter(), model.with_suffix("")
    graphopt.optimize(source, passes, calibration=calibration, out=out, check="none")
    seconds = time.perf_counter() - start
    shutil.copyfile(out / "model.onnx", model)
    return seconds


def _step(source: Path, bits: int, options: str) -> str:
    """The pass, which leaves tables that are looked up alone."""
    graph = onnx.load(source).graph
    tables_ = {t.name for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) == 2}
    names = [node.name for node in graph.node if node.op_type == "Gather" and node.input[0] in tables_]
    skip = f" skip={','.join(json.dumps(name) for name in names)}" if names else ""
    return f"share{{bits={bits} {options}{skip}}}"


def _by_onnxsim(way: Way, base: Path, model: Path, folder: Path, environments: Path) -> float:
    """Let onnxsim cluster what `share` would, and store it as `share` does, or as onnxsim does by itself."""
    shipped = way.name == _SHIPPED
    clustered = model if shipped else folder / "clustered.onnx"
    job: dict[str, Any] = {"way": "shipped" if shipped else "clusters", "model": str(base), "out": str(clustered)}
    if not shipped:
        probe = folder / "probe.onnx"
        _optimized(base, _step(base, way.bits, _WAYS["tensor"]), probe)
        left = {tensor.name for tensor in onnx.load(probe).graph.initializer}
        job["weights"] = [tensor.name for tensor in onnx.load(base).graph.initializer if tensor.name not in left]
        job["entries"] = 2**way.bits
    (folder / "job.json").write_text(json.dumps(job), "utf8")
    driver = Path(__file__).with_name("share_driver.py")
    python = quant_rivals.interpreter("onnxsim", environments)
    ran = subprocess.run([python, driver, folder / "job.json"], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(quant_rivals.last_line(ran.stderr))
    if not shipped:
        _optimized(clustered, _step(clustered, way.bits, _WAYS["tensor"]), model)
    return json.loads(ran.stdout.splitlines()[-1])["seconds"]


def _write(
    found: Mapping[tuple[str, Way], Figure],
    samples: int,
    limit: int | None,
    options: argparse.Namespace,
    *,
    quiet: bool = False,
) -> None:
    rows = [_row(case, way, figure, found[case, Way(_FLOAT)]) for (case, way), figure in found.items()]
    verdicts = "\n".join(f"- {line}" for line in _verdicts(found))
    rival = quant_rivals.version("onnxsim", options.environments)
    notes = f"{_NOTE.format(samples=samples, limit=limit or 'all')}\n\n{verdicts}\n\nOther: {rival}."
    head = ("case", "codebooks", "bits", "metric", "value", "loss", "bytes", "seconds", "remarks")
    tables.write(options.name, "Weight sharing", head, rows, notes, quiet=quiet)


def _row(case: str, way: Way, figure: Figure, base: Figure) -> tuple[object, ...]:
    start = (case, way.name, way.bits or "", base.get("metric", ""))
    if "value" not in figure:
        return (*start, "", "", figure.get("bytes", ""), "", figure["fault"])
    loss = "" if way.name == _FLOAT or "value" not in base else _shown(_loss(figure, base), figure["metric"])
    return (*start, f"{figure['value']:.4g}", loss, figure["bytes"], f"{figure['seconds']:.0f}", "")


def _loss(figure: Figure, base: Figure) -> float:
    if figure["metric"] == "perplexity":
        return 100 * (figure["value"] / base["value"] - 1)
    return base["value"] - figure["value"]


def _shown(loss: float, metric: str) -> str:
    return f"{loss:.1f} %" if metric == "perplexity" else f"{loss:.4f}"


def _verdicts(found: Mapping[tuple[str, Way], Figure]) -> Iterator[str]:
    """A codebook for each tensor, fitted by ours, against those of onnxsim in files of the same size."""
    for (case, way), theirs in found.items():
        ours = found.get((case, Way("tensor, compensated", way.bits)))
        base = found[case, Way(_FLOAT)]
        if way.name != _ONNXSIM or ours is None or any("value" not in figure for figure in (ours, theirs, base)):
            continue
        sides: Sequence[float] = (_loss(ours, base), _loss(theirs, base))
        shown = [_shown(side, base["metric"]) for side in sides]
        word = "no worse" if sides[0] <= sides[1] else "worse"
        sizes = f"{ours['bytes']} and {theirs['bytes']} bytes"
        yield f"{case}, {way.bits} bits, {sizes}: loss {shown[0]} against {shown[1]}: {word}"


if __name__ == "__main__":
    main()
