"""Accuracy after low-rank factorization: GRAPHOPT_ZOO=... python benchmarks/lowrank_accuracy.py [CASE ...] [--quick].

MiniLM (Spearman), resnet56 (top-1), UltraFace (box F1) and the 260K Llama of TinyStories (perplexity: lower is better)
with 20 % and 40 % of the numbers of the layers that can be factored removed, in steps: plain singular values, ASVD,
whitened by moments, solved anew one layer after another, and with ranks chosen for all layers together. These change
the model whatever its outputs lose; the last column is the pass as it is, which leaves a model alone where factoring
does not pay.

Figures are kept in the cache folder, as in quant_static.py. The whole table takes about 2 hours on two idle cores (an
estimate); `--quick` (TinyStories, 20 %, 100 windows) about 5 minutes.
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

_CASES = ("minilm", "cifar10_resnet56", "ultraface_rfb320", "stories260k")
_FLOAT = "float"
_OPTIONS: Mapping[str, str] = {
    "plain": "scale=plain scope=uniform update=false max_error=0",
    "asvd": "scale=asvd scope=uniform update=false max_error=0",
    "whitened": "scope=uniform update=false max_error=0",
    "whitened + update": "scope=uniform max_error=0",
    "+ budgeted ranks": "max_error=0",
    "as it is": "",
}
_HEAD = ("case", "metric", "ratio", _FLOAT, *_OPTIONS, "outputs lost", "factored")
_NOTE = """`ratio`: of the numbers of all layers that can be factored. {limit} scored in ONNX Runtime. `outputs lost`: \
energy of the outputs' error on calibration samples in parts of that of their spread, with budgeted ranks. `factored`: \
layers that the pass as it is factors, of those it looks at. Metrics as in the zoo; perplexity is better where lower."""


def main() -> None:
    """Measure what is not yet known and write the table."""
    options = _options()
    if options.child:
        print(json.dumps(_measured(json.loads(options.child))))
        return
    limit = options.limit or (100 if options.quick else None)
    ratios = options.ratios or ([0.2] if options.quick else [0.2, 0.4])
    found: dict[tuple[str, float, str], Figure] = {}
    for case in options.cases or (_CASES[-1:] if options.quick else _CASES):
        for ratio in ratios:
            for way in (_FLOAT, *_OPTIONS):
                words = f"{case} {way} {'' if way == _FLOAT else ratio} {limit or 'all'}"
                job = {"case": case, "way": way, "ratio": ratio, "limit": limit}
                found[case, ratio, way] = kept(words, job, options.cache, fresh=options.fresh)
                print(case, ratio, way, json.dumps(found[case, ratio, way]), flush=True)
                _write(found, limit, options.name, quiet=True)
    _write(found, limit, options.name)


def _options() -> argparse.Namespace:
    parser = arguments(__doc__, "lowrank_accuracy")
    parser.add_argument("--ratios", type=float, nargs="*")
    parser.add_argument("--fresh", action="store_true", help="measure again what the cache folder knows")
    return parser.parse_args()


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
    return {**figure, "metric": scored["metric"], "value": scored["value"]}


def _factored(job: Mapping[str, Any], folder: Path) -> Figure:
    start = time.perf_counter()
    result = graphopt.optimize(
        folder / "model.onnx",
        f"fold,lowrank{{of=params ratio={job['ratio']} {_OPTIONS[job['way']]}}}",
        calibration=folder / "calib.npz",
        out=folder / "out",
        check="none",
    )
    seconds = time.perf_counter() - start
    (folder / "out" / "model.onnx").rename(folder / "result.onnx")
    step = result.report.steps[-1]
    return {**step.metrics, "sites": len(step.changes), "seconds": seconds}


def _write(
    found: Mapping[tuple[str, float, str], Figure], limit: int | None, name: str, *, quiet: bool = False
) -> None:
    rows = [_row(case, ratio, found) for case, ratio in dict.fromkeys((case, ratio) for case, ratio, _ in found)]
    tables.write(name, "Low rank", _HEAD, rows, _NOTE.format(limit=limit or "All"), quiet=quiet)


def _row(case: str, ratio: float, found: Mapping[tuple[str, float, str], Figure]) -> tuple[object, ...]:
    figures = {way: found.get((case, ratio, way), {}) for way in (_FLOAT, *_OPTIONS)}
    values = [f"{f['value']:.4f}" if "value" in f else f.get("fault", "") for f in figures.values()]
    lost, last = figures["+ budgeted ranks"].get("outputs_lost", ""), figures["as it is"]
    count = f"{last['factored']} of {last['sites']}" if "sites" in last else ""
    return (case, figures[_FLOAT].get("metric", ""), ratio, *values, lost, count)


if __name__ == "__main__":
    main()
