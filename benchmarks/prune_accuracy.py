"""Accuracy after pruning without training: GRAPHOPT_ZOO=... python benchmarks/prune_accuracy.py [CASE ...] [--quick].

Top-1 on the zoo's CIFAR-10 ResNets after `fold,prune` for every criterion, with and without refit, with 256 and 2,000
calibration images, beside onnxsim's structured pruning and Torch-Pruning's L1 at the same multiply-accumulates
(rivals.py; leave them out with --no-rivals where they are not installed). `prune` itself uses reconstruction, refitted:
that is measured first, then the rivals, then all else. Every figure is kept in the cache folder and written to the
table as soon as it is there, and a second run takes up where the first stopped.

The whole table takes 5 hours on two idle cores (an estimate), most of it for resnet56 with 2,000 images; `--quick`
(resnet20, 50 %, four criteria, 256 images, 1,000 test images) about 10 minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tables
from zoo_quant import load_zoo

import graphopt
from graphopt.plugins import load_plugins

_CASES = ("cifar10_resnet20", "cifar10_resnet56")
_DEFAULT = "reconstruction"
_RIVALS = ("onnxsim l1", "onnxsim l2", "onnxsim wanda", "Torch-Pruning l1")
_WITHOUT_DATA = ("l1", "l2", "bn-scale", "fpgm", "random", "onnxsim l1", "onnxsim l2", "Torch-Pruning l1")


@dataclass(frozen=True)
class Cell:
    """One figure of the table."""

    case: str
    ratio: float
    method: str
    refit: bool
    samples: int

    @property
    def column(self) -> str:
        """Its column."""
        return f"{'refit' if self.refit else 'plain'}, {self.samples}"


def main() -> None:
    """Measure what is not yet known and write the table."""
    options = _options()
    if options.child:
        print(json.dumps(_measured(Cell(**json.loads(options.child)), options.limit)))
        return
    cases = options.cases or (_CASES[:1] if options.quick else _CASES)
    ratios = options.ratios or ([0.5] if options.quick else [0.3, 0.5])
    samples = options.samples or ([256] if options.quick else [256, 2000])
    limit = options.limit or (1000 if options.quick else None)
    methods = options.methods or ([_DEFAULT, "l2", "wanda", "random"] if options.quick else _methods())
    methods = [*methods, *([] if options.no_rivals or options.methods else _RIVALS)]
    found = dict[Cell, dict[str, Any]]()
    for cell in _cells(cases, ratios, methods, samples):
        if options.known and not _path(cell, limit, options).exists():
            continue
        found[cell] = _kept(cell, limit, options)
        print(cell.case, cell.ratio, cell.method, cell.column, json.dumps(found[cell]), flush=True)
        _write(found, samples, limit, options.name, quiet=True)
    _write(found, samples, limit, options.name)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--ratios", type=float, nargs="*")
    parser.add_argument("--samples", type=int, nargs="*", help="calibration images, a column each")
    parser.add_argument("--methods", nargs="*", help="criteria or rivals, instead of all")
    parser.add_argument("--no-rivals", action="store_true")
    parser.add_argument("--limit", type=int, help="score the first N test images only")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "graphopt-prune-accuracy")
    parser.add_argument("--fresh", action="store_true", help="measure again what the cache folder knows")
    parser.add_argument("--known", action="store_true", help="write what the cache folder knows, measure nothing")
    parser.add_argument("--name", default="prune_accuracy")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def _methods() -> list[str]:
    return [_DEFAULT, *(name for name in load_plugins().criteria if name != _DEFAULT)]


def _cells(cases: Sequence[str], ratios: Sequence[float], methods: Sequence[str], samples: Sequence[int]) -> list[Cell]:
    """What can be measured, what matters most first; without data there is one plain figure, under the first column."""
    cells = [
        Cell(case, ratio, method, refit=refit, samples=count)
        for case in cases
        for ratio in ratios
        for method in methods
        for count in samples
        for refit in (False, True)
        if not (refit and method in _RIVALS) and (refit or count == samples[0] or method not in _WITHOUT_DATA)
    ]

    def rank(cell: Cell) -> tuple[int, ...]:
        default, rival = cell.method == _DEFAULT and cell.refit, cell.method in _RIVALS
        if default or rival:
            return (0 if default else 1, samples.index(cell.samples))
        return (2, cases.index(cell.case), samples.index(cell.samples), cell.refit)

    return sorted(cells, key=rank)


def _kept(cell: Cell, limit: int | None, options: argparse.Namespace) -> dict[str, Any]:
    """A figure from the cache, or measured now in a child process."""
    path = _path(cell, limit, options)
    if path.exists() and not options.fresh:
        return json.loads(path.read_text("utf8"))
    command = [sys.executable, __file__, "--child", json.dumps(cell.__dict__)]
    command += ["--limit", str(limit)] if limit else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["no message"]
        return {"fault": last[0].strip()[:160]}
    result = json.loads(done.stdout.splitlines()[-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result), "utf8")
    return result


def _path(cell: Cell, limit: int | None, options: argparse.Namespace) -> Path:
    """Where a figure is kept."""
    words = f"{cell.case} {cell.ratio} {cell.method} {cell.column} {limit or 'all'}"
    return options.cache / f"{words.replace(',', '').replace(' ', '_')}.json"


def _measured(cell: Cell, limit: int | None) -> dict[str, Any]:
    """Prune and score, in the child."""
    zoo = load_zoo()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        zoo.export(cell.case, folder, samples=cell.samples, limit=8)
        start = time.perf_counter()
        removed = (_by_rival if cell.method in _RIVALS else _by_graphopt)(cell, folder)
        seconds = time.perf_counter() - start
        scored = zoo.score(cell.case, folder / "pruned.onnx", limit=limit)
    return {"top1": scored["value"], "removed": removed, "seconds": seconds}


def _by_graphopt(cell: Cell, folder: Path) -> float:
    refit = "" if cell.refit else " refit=false"
    prune = f"prune{{ratio={cell.ratio} criterion={cell.method}{refit}}}"
    result = graphopt.optimize(
        folder / "model.onnx",
        f"{prune},fold" if cell.method == "bn-scale" else f"fold,{prune}",  # which would take its batch norms away
        calibration=folder / "calib.npz",
        out=folder / "out",
        check="none",
    )
    (folder / "out" / "model.onnx").rename(folder / "pruned.onnx")
    return next(float(str(step.metrics["achieved"])) for step in result.report.steps if "achieved" in step.metrics)


def _by_rival(cell: Cell, folder: Path) -> float:
    import rivals

    source, out = folder / "model.onnx", folder / "pruned.onnx"
    whole = rivals.macs(source)
    target = round(whole * (1 - cell.ratio))
    tool, criterion = cell.method.split(" ")
    if tool == "onnxsim":
        rivals.onnxsim_pruned(source, out, criterion, target, np.load(folder / "calib.npz")["input"])
    else:
        rivals.torch_pruned(source, out, target)
    return 1 - rivals.macs(out) / whole


def _write(
    found: dict[Cell, dict[str, Any]],
    samples: Sequence[int],
    limit: int | None,
    name: str,
    *,
    quiet: bool = False,
) -> None:
    """Write the table as far as it goes: a row for each case, ratio and method."""
    columns = [f"{kind}, {count}" for kind in ("plain", "refit") for count in samples]
    rows: dict[tuple[str, float, str], dict[str, dict[str, Any]]] = {}
    for cell, result in sorted(found.items(), key=lambda item: (item[0].case, item[0].ratio)):
        rows.setdefault((cell.case, cell.ratio, cell.method), {})[cell.column] = result
    lines = [(*key, *(_shown(cells.get(column)) for column in columns), *_sums(cells)) for key, cells in rows.items()]
    took = sum(result.get("seconds", 0.0) for result in found.values()) / 60
    notes = (
        f"Top-1 in percent on {limit or 5000} images, by number of calibration images; `plain`: nothing is refitted "
        "(methods that need no data have one figure). `reconstruction`, refitted, is what `prune` does by itself. "
        f"Empty cells were not measured; those measured took {took:.0f} minutes of pruning."
    )
    head = ("case", "ratio", "method", *columns, "MACs removed", "longest, s")
    tables.write(name, "Pruning without training, top-1", head, lines, notes, quiet=quiet)


def _shown(result: dict[str, Any] | None) -> str:
    return "" if result is None else result.get("fault") or f"{result['top1']:.2f}"


def _sums(cells: dict[str, dict[str, Any]]) -> tuple[str, str]:
    done = [result for result in cells.values() if "top1" in result]
    if not done:
        return "", ""
    low, high = min(r["removed"] for r in done), max(r["removed"] for r in done)
    return f"{low:.3f}" if high - low < 5e-4 else f"{low:.3f} to {high:.3f}", f"{max(r['seconds'] for r in done):.0f}"


if __name__ == "__main__":
    main()
