"""Accuracy after low-rank factorization: GRAPHOPT_ZOO=... python benchmarks/lowrank_accuracy.py [CASE ...] [--quick].

resnet56 (top-1), UltraFace (box F1), the 260K Llama of TinyStories (perplexity: lower is better) and MiniLM (Spearman)
with 20 % and 40 % of the numbers of the layers that can be factored removed, in steps: plain singular values, ASVD,
whitened by moments, solved anew one layer after another, and with ranks chosen for all layers together. These change
the model whatever its outputs lose; the last column is the pass as it is, which leaves a model alone where factoring
does not pay. Where budgeted ranks lose less than its limits it does the same as they, and is not run again.

Figures are kept in the cache folder, as in quant_static.py, and the table is written after each: a run that was stopped
goes on where it was. `--ways` picks columns, others stay empty until they are measured. The whole table takes about
an hour on two idle cores (an estimate); `--quick` (TinyStories, 20 %, 100 windows) about 5 minutes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tables
from quant_figures import Figure, arguments, kept
from zoo_quant import load_zoo

import graphopt
from graphopt_passes.lowrank import LowRank

_LIMITS: Mapping[str, int | None] = {
    "cifar10_resnet56": 500,
    "ultraface_rfb320": None,
    "stories260k": 100,
    "minilm": 1000,
}
_FLOAT = "float"
_OPTIONS: Mapping[str, str] = {
    "plain": "scale=plain scope=uniform update=false max_error=0",
    "asvd": "scale=asvd scope=uniform update=false max_error=0",
    "whitened": "scope=uniform update=false max_error=0",
    "whitened + update": "scope=uniform max_error=0",
    "+ budgeted ranks": "max_error=0",
    "as it is": "",
}
_BUDGETED, _AS_IT_IS = tuple(_OPTIONS)[-2:]
_HEAD = ("case", "metric", "scored", "ratio", _FLOAT, *_OPTIONS, "outputs lost", "factored", "seconds")
_NOTE = """`scored`: samples, in ONNX Runtime. `ratio`: of the numbers of all layers that can be factored; ranks are \
not rounded, so that all ways remove the same. `outputs lost`: energy of the outputs' error on calibration samples in \
parts of that of their spread, with budgeted ranks. `factored`: layers that the pass as it is factors, of those with a \
weight. `seconds`: of the pass with budgeted ranks, beside whatever else the machine did. Metrics as in the zoo; \
perplexity is better where lower."""


def main() -> None:
    """Measure what is not yet known and write the table."""
    options = _options()
    if options.child:
        print(json.dumps(_measured(json.loads(options.child))))
        return
    ratios = options.ratios or ([0.2] if options.quick else [0.2, 0.4])
    found: dict[tuple[str, float, str], Figure] = {}
    for case in options.cases or (["stories260k"] if options.quick else _LIMITS):
        for ratio in ratios:
            for way in (_FLOAT, *_OPTIONS):
                figure = _figure(case, ratio, way, found, options)
                if figure:
                    found[case, ratio, way] = figure
                    print(case, ratio, way, json.dumps(figure), flush=True)
                    _write(found, options.name, quiet=True)
    _write(found, options.name)


def _options() -> argparse.Namespace:
    parser = arguments(__doc__, "lowrank_accuracy")
    parser.add_argument("--ratios", type=float, nargs="*")
    ways = (_FLOAT, *_OPTIONS)
    parser.add_argument("--ways", nargs="*", choices=ways, help="measure these alone, or none; show what is known")
    parser.add_argument("--fresh", action="store_true", help="measure again what the cache folder knows")
    return parser.parse_args()


def _figure(
    case: str, ratio: float, way: str, found: Mapping[tuple[str, float, str], Figure], options: argparse.Namespace
) -> Figure:
    """A figure that is known or measured now; empty where it is neither to be."""
    if way == _AS_IT_IS and _within_limits(budgeted := found.get((case, ratio, _BUDGETED), {})):
        return budgeted
    limit = options.limit or _LIMITS.get(case)
    words = f"{case} {way} {'' if way == _FLOAT else ratio} {limit or 'all'}"
    wanted = options.ways is None or way in options.ways
    job = {"case": case, "way": way, "ratio": ratio, "limit": limit}
    return kept(words, job, options.cache, fresh=options.fresh and wanted, measure=wanted)


def _within_limits(figure: Figure) -> bool:
    """Whether the pass, with the limits that it has unless told otherwise, would do the same."""
    limits = LowRank()
    lost, nats = figure.get("outputs_lost", float("inf")), figure.get("outputs_nats", float("inf"))
    return lost <= limits.max_error and nats <= limits.max_nats


def _measured(job: Mapping[str, Any]) -> Figure:
    """Factor and score, in the child."""
    zoo = load_zoo()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        zoo.export(job["case"], folder, limit=8)
        figure: Figure = {}
        if job["way"] == _FLOAT:
            shutil.copyfile(folder / "model.onnx", folder / "result.onnx")
        else:
            figure = _factored(job, folder)
        scored = zoo.score(job["case"], folder / "result.onnx", limit=job["limit"])
    return {**figure, "metric": scored["metric"], "value": scored["value"], "scored": scored["n"]}


def _factored(job: Mapping[str, Any], folder: Path) -> Figure:
    start = time.perf_counter()
    result = graphopt.optimize(
        folder / "model.onnx",
        f"fold,lowrank{{of=params ratio={job['ratio']} round_to=1 {_OPTIONS[job['way']]}}}",
        calibration=folder / "calib.npz",
        out=folder / "out",
        check="none",
    )
    seconds = time.perf_counter() - start
    (folder / "out" / "model.onnx").rename(folder / "result.onnx")
    step = result.report.steps[-1]
    return {**step.metrics, "sites": len(step.changes), "seconds": seconds}


def _write(found: Mapping[tuple[str, float, str], Figure], name: str, *, quiet: bool = False) -> None:
    rows = [_row(case, ratio, found) for case, ratio in dict.fromkeys((case, ratio) for case, ratio, _ in found)]
    tables.write(name, "Low rank", _HEAD, rows, _NOTE, quiet=quiet)


def _row(case: str, ratio: float, found: Mapping[tuple[str, float, str], Figure]) -> tuple[object, ...]:
    figures = {way: found.get((case, ratio, way), {}) for way in (_FLOAT, *_OPTIONS)}
    values = [f"{f['value']:.4f}" if "value" in f else f.get("fault", "") for f in figures.values()]
    base, budgeted, last = figures[_FLOAT], figures[_BUDGETED], figures[_AS_IT_IS]
    count = f"{last['factored']} of {last['sites']}" if "sites" in last else ""
    seconds = f"{budgeted['seconds']:.0f}" if "seconds" in budgeted else ""
    start = (case, base.get("metric", ""), base.get("scored", ""), ratio)
    return (*start, *values, budgeted.get("outputs_lost", ""), count, seconds)


if __name__ == "__main__":
    main()
