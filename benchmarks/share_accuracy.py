"""Weight sharing on trained models: GRAPHOPT_ZOO=... python benchmarks/share_accuracy.py [CASE ...] [--quick].

Codes of 2, 3, 4, 6 and 8 bits with a codebook for each tensor or each output channel: without data, weighted by data,
and with errors compensated on data, beside onnxsim's k-means and an exact one. onnxsim itself writes clustered weights
as floats, for matrices at 4 bits only; so its routine clusters the same tensors or channels at all sizes, and `share`,
which loses nothing of a codebook's worth of numbers, stores them: files of equal size. All start from the model after
`fold`, and leave embeddings alone, as onnxsim does, except where a row says so.

Figures are kept in the cache folder, as in quant_static.py. `--quick` is TinyStories at 3 and 4 bits.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import quant_rivals
import tables
from quant_figures import Figure, arguments, kept, loss, opens, shown_loss, stored, tables_left_out
from zoo_quant import load_zoo

import graphopt
from graphopt.model_io import load_model
from graphopt.pack import pack
from graphopt_passes.share.tensors import find_tensors

_CASES = ("cifar10_resnet20", "cifar10_resnet56", "minilm", "stories260k")
_BITS = (2, 3, 4, 6, 8)
_WAYS: Mapping[str, str] = {
    "tensor": "algorithm=relative",
    "tensor, exact k-means": "algorithm=nearest",
    "tensor, weighted": "algorithm=weighted",
    "tensor, compensated": "algorithm=compensated",
    "channel": "channels=1 algorithm=relative",
    "channel, compensated": "channels=1 algorithm=compensated",
    "all defaults, embeddings too": "",
}
_EMBEDDINGS = "all defaults, embeddings too"
_LIMIT, _LIMITS = 2000, {"minilm": 1000}  # samples scored
_FLOAT, _SHIPPED = "float", "onnxsim as shipped"
_ONNXSIM: Mapping[str, str] = {
    "onnxsim k-means, tensor": "tensor, exact k-means",
    "onnxsim k-means, channel": "channel",
}
_NOTE = """{samples} calibration samples; {limit} scored in ONNX Runtime. `loss` is positive where the result is \
worse: points of the metric, or per cent of perplexity; 80 % of 2,000 images are known to 0.9 points, the difference \
of two similar models to about 0.5. `tensor` and `channel`, exact k-means and onnxsim see no data. Codes of 3 bits \
take 4 in the file and those of 6 take 8; `packed` is the file as `graphopt pack` stores it, where a code takes what \
its frequency is worth. ONNX Runtime computes the lookups when it loads a model: speed and resident size are those of \
float weights in every row. Of stories260k 1.05 MB in every file are its float mask of causal attention, which is no \
weight, and 131 kB its embedding."""


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
    limit = options.limit or (64 if options.quick else 0)
    cases = options.cases or (_CASES[-1:] if options.quick else _CASES)
    wanted, found = [(case, way) for case in cases for way in _ways(options)], dict[tuple[str, Way], Figure]()
    for measure in (False, True):  # what is known already is in the table from the start
        for case, way in wanted:
            scored = limit or _LIMITS.get(case, _LIMIT)
            words = f"{case} {way.name} {way.bits} {samples} {scored}"
            job = {"case": case, "way": asdict(way), "samples": samples, "limit": scored}
            job["environments"] = str(options.environments)
            found[case, way] = kept(words, job, options.cache, measure=measure)
            if measure:
                print(case, way.name, way.bits, json.dumps(found[case, way]), flush=True)
                _write(found, samples, limit, options, quiet=True)
    _write(found, samples, limit, options)


def _options() -> argparse.Namespace:
    parser = arguments(__doc__, "share_accuracy")
    parser.add_argument("--bits", type=int, nargs="*", choices=_BITS)
    parser.add_argument("--ways", nargs="*", choices=(*_WAYS, *_ONNXSIM, _SHIPPED), help="instead of all")
    parser.add_argument("--environments", type=Path, default=quant_rivals.ENVIRONMENTS)
    return parser.parse_args()


def _ways(options: argparse.Namespace) -> Iterator[Way]:
    yield Way(_FLOAT)
    for bits in options.bits or ((3, 4) if options.quick else _BITS):
        for name in options.ways or (*_WAYS, *_ONNXSIM, _SHIPPED):
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
            seconds = _optimized(base, _step(base, way), model, folder / "calib.npz")
        else:
            seconds = _by_onnxsim(way, base, model, folder, Path(job["environments"]))
        packed = pack(model, folder / "packed.gop").packed
        figure: Figure = {"bytes": stored(model), "packed": packed, "seconds": seconds}
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


def _step(source: Path, way: Way) -> str:
    """The pass as one of our own rows has it."""
    left_out = "" if way.name == _EMBEDDINGS else tables_left_out(source)
    return f"share{{bits={way.bits} {_WAYS[way.name]}{left_out}}}"


def _by_onnxsim(way: Way, base: Path, model: Path, folder: Path, environments: Path) -> float:
    """Let onnxsim cluster what `share` would, and store it as `share` does, or as onnxsim does by itself."""
    if way.name == _SHIPPED:
        return _onnxsim({"way": "shipped"}, base, model, folder, environments)
    ours, clustered = Way(_ONNXSIM[way.name], way.bits), folder / "clustered.onnx"
    axes = {tensor.value.name: tensor.weight.axis for tensor in find_tensors(load_model(base))[0]}
    _optimized(base, _step(base, ours), folder / "probe.onnx")
    left = {tensor.name for tensor in onnx.load(folder / "probe.onnx").graph.initializer}
    weights = {
        tensor.name: axes[tensor.name] if "channel" in way.name else None
        for tensor in onnx.load(base).graph.initializer
        if tensor.name not in left
    }
    job = {"way": "clusters", "weights": weights, "entries": 2**way.bits}
    seconds = _onnxsim(job, base, clustered, folder, environments)
    _optimized(clustered, _step(clustered, ours), model)
    return seconds


def _onnxsim(job: Mapping[str, Any], base: Path, out: Path, folder: Path, environments: Path) -> float:
    """Run the driver in the environment of onnxsim; returns the seconds that it took."""
    path = folder / "job.json"
    path.write_text(json.dumps({**job, "model": str(base), "out": str(out)}), "utf8")
    driver = Path(__file__).with_name("share_driver.py")
    python = quant_rivals.interpreter("onnxsim", environments)
    ran = subprocess.run([python, driver, path], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(quant_rivals.last_line(ran.stderr))
    return json.loads(ran.stdout.splitlines()[-1])["seconds"]


def _write(
    found: Mapping[tuple[str, Way], Figure],
    samples: int,
    limit: int,
    options: argparse.Namespace,
    *,
    quiet: bool = False,
) -> None:
    found = {(case, way): figure for (case, way), figure in found.items() if figure and found[case, Way(_FLOAT)]}
    rows = [_row(case, way, figure, found[case, Way(_FLOAT)]) for (case, way), figure in found.items()]
    verdicts = "\n".join(f"- {line}" for line in _verdicts(found))
    rival = quant_rivals.version("onnxsim", options.environments)
    fewer = [f" ({most:,} of {case})" for case, most in _LIMITS.items() if (case, Way(_FLOAT)) in found]
    shown = limit or f"{_LIMIT:,}{''.join(fewer)}"
    notes = f"{_NOTE.format(samples=samples, limit=shown)}\n\n{verdicts}\n\nOther: {rival}."
    head = ("case", "codebooks", "bits", "metric", "value", "loss", "bytes", "packed", "seconds", "remarks")
    tables.write(options.name, "Weight sharing", head, rows, notes, quiet=quiet)


def _row(case: str, way: Way, figure: Figure, base: Figure) -> tuple[object, ...]:
    start = (case, way.name, way.bits or "", base.get("metric", ""))
    if "value" not in figure:
        return (*start, "", "", figure.get("bytes", ""), figure.get("packed", ""), "", figure["fault"])
    worse = "" if way.name == _FLOAT or "value" not in base else shown_loss(figure, base)
    sizes = figure["bytes"], figure["packed"]
    return (*start, f"{figure['value']:.4g}", worse, *sizes, f"{figure['seconds']:.0f}", "")


_MATCHES: Mapping[str, tuple[str, ...]] = {
    "onnxsim k-means, tensor": ("tensor", "tensor, compensated"),
    "onnxsim k-means, channel": ("channel", "channel, compensated"),
}


def _verdicts(found: Mapping[tuple[str, Way], Figure]) -> Iterator[str]:
    """Ours against those of onnxsim in files of the same size, without data and with."""
    for (case, way), theirs in found.items():
        for name in _MATCHES.get(way.name, ()):
            ours, base = found.get((case, Way(name, way.bits))), found[case, Way(_FLOAT)]
            if ours is None or any("value" not in figure for figure in (ours, theirs, base)):
                continue
            word = "no worse" if loss(ours, base) <= loss(theirs, base) else "worse"
            sizes = f"{ours['bytes']} and {theirs['bytes']} bytes"
            sides = f"{shown_loss(ours, base)} against {shown_loss(theirs, base)}"
            yield f"{case}, {way.bits} bits, {name}, {sizes}: loss {sides}: {word}"


if __name__ == "__main__":
    main()
