"""Weight-only INT4 on language models: GRAPHOPT_ZOO=... python benchmarks/quant_int4.py [CASE ...] [--quick].

MiniLM (Spearman) and the 260K Llama of TinyStories (perplexity: lower is better) with weights in 4 bits and groups of
32 and 128, found by rounding, GPTQ, AWQ and HQQ, with and without zero points, by graphopt and, in environments of
their own, onnxruntime, neural-compressor, nncf and onnxsim. The others leave embeddings in float, so every way of ours
stands here twice: as it is, and with embeddings left alone, which is the one to compare at equal size.

Figures are kept in the cache folder, as in quant_static.py. The whole table takes about 2 hours on two idle cores (an
estimate); `--quick` (TinyStories, groups of 32 with zero points, 16 samples) about 5 minutes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import quant_rivals
import tables
from quant_figures import Figure, arguments, kept, loss, opens, shown_loss, stored, tables_left_out
from quant_rivals import Job
from zoo_quant import load_zoo

import graphopt

_CASES = ("stories260k", "minilm")
_FLOAT = "float"
_EMBEDDINGS = "graphopt, embeddings too"
_ALGORITHMS: Mapping[str, tuple[str, ...]] = {
    "graphopt": ("rtn", "gptq", "awq", "hqq"),
    _EMBEDDINGS: ("rtn", "gptq", "awq", "hqq"),
    "onnxruntime": ("rtn", "gptq", "hqq", "k_quant"),
    "neural-compressor": ("rtn", "gptq", "awq"),
    "nncf": ("rtn", "gptq", "awq"),
    "onnxsim": ("rtn", "gptq", "awq", "hqq"),
}
_SYMMETRIC_ONLY = ("onnxsim rtn", "onnxsim gptq", "onnxsim awq")
_ZERO_POINTS_ONLY = ("onnxruntime hqq", "onnxruntime k_quant", "onnxsim hqq")
_ANY = -99  # dB: every layer stays in 4 bits, as those of the others do
_NOTE = """{samples} calibration samples, {limit} scored in ONNX Runtime. `loss` is positive where the result is \
worse, in points of Spearman or per cent of perplexity. Standard blockwise INT4, which graphopt writes, is computed \
by ONNX Runtime on activations in 8 bits (accuracy level 4); MatMulNBits, as onnxruntime's quantizer writes it, on \
floats."""


@dataclass(frozen=True)
class Way:
    """One row: who finds the integers, how, and on which grid."""

    tool: str
    algorithm: str = ""
    group: int = 0
    symmetric: bool = False


def main() -> None:
    """Measure what is not yet known and write the table."""
    options = _options()
    if options.child:
        print(json.dumps(_measured(json.loads(options.child))))
        return
    samples = options.samples or (16 if options.quick else 64)
    limit = options.limit or (100 if options.quick else None)
    ways = [Way(_FLOAT), *_ways(options)]
    found: dict[tuple[str, Way], Figure] = {}
    for case in options.cases or (_CASES[:1] if options.quick else _CASES):
        for way in ways:
            found[case, way] = _figure(case, way, samples, limit, options)
            print(case, *asdict(way).values(), json.dumps(found[case, way]), flush=True)
            _write(found, samples, limit, options, quiet=True)
    _write(found, samples, limit, options)


def _options() -> argparse.Namespace:
    parser = arguments(__doc__, "quant_int4")
    parser.add_argument("--tools", nargs="*", choices=_ALGORITHMS, help="instead of all")
    parser.add_argument("--algorithms", nargs="*", help="instead of all")
    parser.add_argument("--groups", type=int, nargs="*")
    parser.add_argument("--asymmetric", action="store_true", help="grids with zero points only")
    parser.add_argument("--environments", type=Path, default=quant_rivals.ENVIRONMENTS)
    parser.add_argument("--fresh", nargs="*", help="measure these tools again, or all if none is named")
    return parser.parse_args()


def _ways(options: argparse.Namespace) -> Iterator[Way]:
    """All rows but the float one; tools that know one kind of grid have no rows of the other."""
    for group in options.groups or ((32,) if options.quick else (32, 128)):
        for symmetric in (False,) if options.quick or options.asymmetric else (False, True):
            for tool, algorithms in _ALGORITHMS.items():
                if options.tools and tool not in options.tools:
                    continue
                for algorithm in algorithms:
                    words = f"{tool} {algorithm}"
                    missing = words in (_ZERO_POINTS_ONLY if symmetric else _SYMMETRIC_ONLY)
                    if not missing and (not options.algorithms or algorithm in options.algorithms):
                        yield Way(tool, algorithm, group, symmetric)


def _figure(case: str, way: Way, samples: int, limit: int | None, options: argparse.Namespace) -> Figure:
    words = (
        f"{case} {way.tool} {way.algorithm} {way.group} {'sym' if way.symmetric else 'asym'} {samples} {limit or 'all'}"
    )
    fresh = options.fresh is not None and (not options.fresh or way.tool in options.fresh)
    job = {"case": case, "way": asdict(way), "samples": samples, "limit": limit}
    return kept(words, job | {"environments": str(options.environments)}, options.cache, fresh=fresh)


def _measured(job: Mapping[str, Any]) -> Figure:
    """Quantize and score, in the child."""
    zoo, way = load_zoo(), Way(**job["way"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        zoo.export(job["case"], folder, samples=job["samples"], limit=8)
        source, model, seconds = folder / "model.onnx", folder / "result.onnx", 0.0
        if way.tool == _FLOAT:
            shutil.copyfile(source, model)
        elif way.tool.startswith("graphopt"):
            seconds = _by_graphopt(way, folder, model)
        else:
            made = _by_rival(job, way, folder, model)
            if made.path is None:
                return {"fault": made.fault}
            seconds = made.seconds
        figure: Figure = {"bytes": stored(model), "seconds": seconds}
        fault = opens(model)
        if fault:
            return {**figure, "fault": f"does not load: {fault}"}
        scored = zoo.score(job["case"], model, limit=job["limit"])
    return {**figure, "metric": scored["metric"], "value": scored["value"]}


def _by_graphopt(way: Way, folder: Path, model: Path) -> float:
    grid = f"group_size={way.group} symmetric={'true' if way.symmetric else 'false'}"
    skip = "" if way.tool == _EMBEDDINGS else tables_left_out(folder / "model.onnx")
    start = time.perf_counter()
    graphopt.optimize(
        folder / "model.onnx",
        f"fold,quant{{bits=4 min_output_sqnr={_ANY} algorithm={way.algorithm} {grid}{skip}}}",
        calibration=folder / "calib.npz",
        out=folder / "out",
        check="none",
    )
    seconds = time.perf_counter() - start
    shutil.copyfile(folder / "out" / "model.onnx", model)
    return seconds


def _by_rival(job: Mapping[str, Any], way: Way, folder: Path, model: Path) -> quant_rivals.Made:
    wanted = Job(
        rival=way.tool,
        mode="int4",
        model=str(folder / "model.onnx"),
        out=str(model),
        calibration=str(folder / "calib.npz"),
        algorithm=way.algorithm,
        group_size=way.group,
        symmetric=way.symmetric,
        format="QOperator",
    )
    return quant_rivals.made(wanted, Path(job["environments"]))


def _write(
    found: Mapping[tuple[str, Way], Figure],
    samples: int,
    limit: int | None,
    options: argparse.Namespace,
    *,
    quiet: bool = False,
) -> None:
    rows = [_row(case, way, figure, found[case, Way(_FLOAT)]) for (case, way), figure in found.items()]
    rivals = sorted({way.tool for _, way in found if way.tool in quant_rivals.RIVALS})
    tools = ", ".join(quant_rivals.version(rival, options.environments) for rival in rivals)
    verdicts = "\n".join(f"- {line}" for line in _verdicts(found))
    notes = f"{_NOTE.format(samples=samples, limit=limit or 'all')}\n\n{verdicts}\n\nOthers: {tools}."
    head = ("case", "tool", "way", "group", "zero points", "metric", "value", "loss", "bytes", "seconds", "remarks")
    tables.write(options.name, "Weight-only INT4", head, rows, notes, quiet=quiet)


def _row(case: str, way: Way, figure: Figure, base: Figure) -> tuple[object, ...]:
    grid = (way.group or "", "" if way.tool == _FLOAT else "no" if way.symmetric else "yes")
    start = (case, way.tool, way.algorithm, *grid, base.get("metric", ""))
    if "value" not in figure:
        return (*start, "", "", figure.get("bytes", ""), "", figure["fault"])
    worse = "" if way.tool == _FLOAT or "value" not in base else shown_loss(figure, base)
    return (*start, f"{figure['value']:.4f}", worse, figure["bytes"], f"{figure['seconds']:.0f}", "")


def _verdicts(found: Mapping[tuple[str, Way], Figure]) -> Iterator[str]:
    """The best of ours against the best of onnxruntime on the same grid, embeddings left alone on both sides."""
    grids = {(case, replace(way, tool="", algorithm="")): None for case, way in found if way.tool != _FLOAT}
    for case, grid in grids:
        base = found[case, Way(_FLOAT)]
        best = [_best(found, case, replace(grid, tool=tool)) for tool in ("graphopt", "onnxruntime")]
        ours, theirs = best
        if ours is None or theirs is None:
            continue
        kind = "without" if grid.symmetric else "with"
        sides = " against ".join(
            f"{way.tool} {way.algorithm} {shown_loss(figure, base)}, {figure['bytes']} bytes"
            for way, figure in (ours, theirs)
        )
        word = "no worse" if loss(ours[1], base) <= loss(theirs[1], base) else "worse"
        yield f"{case}, groups of {grid.group} {kind} zero points: {sides}: {word}"


def _best(found: Mapping[tuple[str, Way], Figure], case: str, wanted: Way) -> tuple[Way, Figure] | None:
    """The algorithm of one tool on one grid that loses least."""
    base = found[case, Way(_FLOAT)]
    ways = [
        (way, figure)
        for (c, way), figure in found.items()
        if c == case and replace(way, algorithm="") == wanted and "value" in figure
    ]
    return min(ways, key=lambda item: loss(item[1], base)) if ways and "value" in base else None


if __name__ == "__main__":
    main()
