"""INT8 on real trained models, beside other quantizers: GRAPHOPT_ZOO=... python benchmarks/quant_static.py [CASE ...].

Every zoo model goes through `fold,quant` and through the static and dynamic quantizers of onnxruntime,
neural-compressor, nncf and onnxsim (quant_rivals.py: each in an environment of its own), with the same samples.
Every result is scored on the labelled data, and timed in ONNX Runtime beside the float model, their rounds interleaved.
A tool that fails on a model, or writes one that does not load, gets a row that says so.

Figures are kept in the cache folder and written to the table as soon as they are there; a second run goes on where the
first stopped (`--fresh graphopt` measures ours again). The whole table takes about 2 hours on two idle cores (an
estimate); `--quick` (three small cases, 500 samples scored, 32 to calibrate) about 5 minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import quant_rivals
import tables
from quant_figures import Figure, arguments, kept, opens, speed, stored
from quant_rivals import Job
from zoo_quant import load_zoo

import graphopt

_QUICK = ("cifar10_resnet20", "tiny_kws", "mnist_cntk")
_FLOAT = "float"
_METHODS = (
    _FLOAT, "graphopt", "onnxruntime", "neural-compressor", "nncf", "onnxsim",
    "graphopt dynamic", "onnxruntime dynamic", "neural-compressor dynamic", "onnxsim dynamic",
)  # fmt: skip
_TRANSFORMERS = ("minilm", "stories260k")
_FEWER = {"minilm": (64, 1000)}  # calibration samples and scored ones of what takes long
_LOWER_IS_BETTER = ("perplexity",)
_THREADS = (1, 2)
_SMALLER = 0.95  # of the float model: what is no smaller is it, more or less, and counts for no result


def main() -> None:
    """Measure what is not yet known and write the table."""
    options = _options()
    if options.child:
        print(json.dumps(_measured(json.loads(options.child))))
        return
    zoo = load_zoo()
    found: dict[tuple[str, str], Figure] = {}
    for case in options.cases or (_QUICK if options.quick else sorted(zoo.cases())):
        for method in (_FLOAT, *(m for m in options.methods or _METHODS if m != _FLOAT)):
            found[case, method] = _figure(case, method, options)
            print(case, method, json.dumps(found[case, method]), flush=True)
        _add_speed(zoo, case, found, options)
        _write(found, options, quiet=True)
    _write(found, options)


def _options() -> argparse.Namespace:
    parser = arguments(__doc__, "quant_static")
    parser.add_argument("--methods", nargs="*", choices=_METHODS, help="instead of all")
    parser.add_argument("--target", default="ort", help="what graphopt makes the model for")
    parser.add_argument("--passes", default="fold,quant")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the timing; 0: no timing")
    parser.add_argument("--environments", type=Path, default=quant_rivals.ENVIRONMENTS)
    parser.add_argument("--fresh", nargs="*", help="measure these methods again, or all if none is named")
    return parser.parse_args()


def _amounts(case: str, options: argparse.Namespace) -> tuple[int, int | None]:
    """Calibration samples and scored ones; None: all."""
    samples, limit = (32, 500) if options.quick else _FEWER.get(case, (256, None))
    return options.samples or samples, options.limit or limit


def _figure(case: str, method: str, options: argparse.Namespace) -> Figure:
    samples, limit = _amounts(case, options)
    words = f"{case} {method} {samples} {limit or 'all'} {options.target} {options.passes}"
    fresh = options.fresh is not None and (not options.fresh or method in options.fresh)
    job = {
        "case": case,
        "method": method,
        "samples": samples,
        "limit": limit,
        "model": str(_model(options, case, method)),
    }
    job |= {"target": options.target, "passes": options.passes, "environments": str(options.environments)}
    return kept(words, job, options.cache, fresh=fresh)


def _model(options: argparse.Namespace, case: str, method: str) -> Path:
    return options.cache / "models" / case / f"{method.replace(' ', '-')}.onnx"


def _measured(job: Mapping[str, Any]) -> Figure:
    """Quantize and score, in the child."""
    zoo, model = load_zoo(), Path(job["model"])
    model.parent.mkdir(parents=True, exist_ok=True)
    model.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        zoo.export(job["case"], folder, samples=job["samples"], limit=8)
        source, seconds, notes = folder / "model.onnx", 0.0, ()
        if job["method"] == _FLOAT:
            shutil.copyfile(source, model)
        elif job["method"].startswith("graphopt"):
            seconds = _by_graphopt(job, folder, model)
        else:
            made = _by_rival(job, folder, model)
            if made.path is None:
                return {"fault": made.fault}
            seconds, notes = made.seconds, made.notes
        size = stored(model)
        figure: Figure = {"size": size / stored(source), "bytes": size, "seconds": seconds, "notes": list(notes)}
        fault = opens(model)
        if fault:
            return {**figure, "fault": f"does not load: {fault}"}
        scored = zoo.score(job["case"], model, limit=job["limit"])
    return {**figure, "metric": scored["metric"], "value": scored["value"]}


def _by_graphopt(job: Mapping[str, Any], folder: Path, model: Path) -> float:
    passes = job["passes"]
    data: Path | None = folder / "calib.npz"
    if job["method"].endswith(" dynamic"):
        passes, data = "fold,quant{mode=dynamic}", None
    start = time.perf_counter()
    graphopt.optimize(folder / "model.onnx", passes, job["target"], calibration=data, out=folder / "out", check="none")
    seconds = time.perf_counter() - start
    shutil.copyfile(folder / "out" / "model.onnx", model)
    return seconds


def _by_rival(job: Mapping[str, Any], folder: Path, model: Path) -> quant_rivals.Made:
    rival, _, mode = job["method"].partition(" ")
    wanted = Job(
        rival=rival,
        mode=mode or "static",
        model=str(folder / "model.onnx"),
        out=str(model),
        calibration=str(folder / "calib.npz"),
        transformer=job["case"] in _TRANSFORMERS,
    )
    return quant_rivals.made(wanted, Path(job["environments"]))


def _add_speed(zoo: ModuleType, case: str, found: dict[tuple[str, str], Figure], options: argparse.Namespace) -> None:
    """Time all models of a case that load, unless just these were timed before."""
    if not options.rounds:
        return
    good = {
        method: _model(options, case, method)
        for (c, method), figure in found.items()
        if c == case and "value" in figure
    }
    digests = {method: hashlib.sha256(path.read_bytes()).hexdigest() for method, path in good.items()}
    file = options.cache / f"{case}_speed.json"
    known = json.loads(file.read_text("utf8")) if file.exists() else {}
    if known.get("digests") != digests or known.get("rounds") != options.rounds:
        with tempfile.TemporaryDirectory() as folder:
            zoo.export(case, folder, samples=8, limit=8)
            times = speed(good, Path(folder) / "calib.npz", _THREADS, options.rounds)
        text = {name: {str(threads): time for threads, time in row.items()} for name, row in times.items()}
        known = {"digests": digests, "rounds": options.rounds, "times": text}
        file.write_text(json.dumps(known), "utf8")
    for method, times in known["times"].items():
        found[case, method]["times"] = times


def _write(found: Mapping[tuple[str, str], Figure], options: argparse.Namespace, *, quiet: bool = False) -> None:
    amounts = {case: _amounts(case, options) for case, _ in found}
    usual = amounts[max(amounts, key=lambda case: amounts[case][0])]
    apart = "".join(f", {case} {n} and {m or 'all'}" for case, (n, m) in amounts.items() if (n, m) != usual)
    rows = [_row(case, method, figure, found[case, _FLOAT]) for (case, method), figure in found.items()]
    ours = [row for row in found if row[1] == "graphopt" and "value" in found[row]]
    best = sum(_is_best(case, found) for case, _ in ours)
    rivals = sorted({method.partition(" ")[0] for _, method in found} - {_FLOAT, "graphopt"})
    tools = ", ".join(quant_rivals.version(rival, options.environments) for rival in rivals)
    notes = (
        f"{usual[0]} calibration samples at most, {usual[1] or 'all'} scored{apart}; graphopt: `{options.passes}` for "
        f"`{options.target}`. `drop` is in the metric's unit, positive is worse. `faster`: the float model's time over "
        "the result's in ONNX Runtime, one sample, medians of interleaved rounds. `seconds` is the quantizer alone, "
        "without imports.\n\n"
        f"graphopt's static result is the best, or within 0.1 of the best, on {best} of {len(ours)} cases here. "
        f"Results that are not at least {1 - _SMALLER:.0%} smaller than the float model are not counted.\n\n"
        f"Others: {tools}."
    )
    head = ("case", "method", "metric", "value", "drop", "size", "seconds", "faster, 1 thread", "2 threads", "remarks")
    tables.write(options.name, "INT8 on the zoo", head, rows, notes, quiet=quiet)


def _row(case: str, method: str, figure: Figure, base: Figure) -> tuple[str, ...]:
    remarks = "; ".join(figure.get("notes", []))
    if "value" not in figure:
        size = f"{figure['size']:.2f}x" if "size" in figure else ""
        return (case, method, base.get("metric", ""), "", "", size, "", "", "", figure["fault"])
    drop = f"{_drop(figure, base):.4g}" if "value" in base and method != _FLOAT else ""
    seconds = f"{figure['seconds']:.0f}" if method != _FLOAT else ""
    shown = (figure["metric"], f"{figure['value']:.5g}", drop, f"{figure['size']:.2f}x", seconds)
    return (case, method, *shown, *(_faster(figure, base, threads) for threads in _THREADS), remarks)


def _faster(figure: Figure, base: Figure, threads: int) -> str:
    mine, whole = (row.get("times", {}).get(str(threads)) for row in (figure, base))
    return f"{whole / mine:.2f}x" if isinstance(mine, float) and isinstance(whole, float) else str(mine or "")


def _drop(figure: Figure, base: Figure) -> float:
    lost = base["value"] - figure["value"]
    return -lost if figure["metric"] in _LOWER_IS_BETTER else lost


def _is_best(case: str, found: Mapping[tuple[str, str], Figure]) -> bool:
    """Within 0.1 points of the best static result that is smaller; Spearman and perplexity within 0.001 and 0.1 %."""
    base, mine = found[case, _FLOAT], found[case, "graphopt"]
    allowed = {"spearman": 0.001, "perplexity": 0.001 * base["value"]}.get(mine["metric"], 0.1)
    others = [f for (c, m), f in found.items() if c == case and "value" in f and m != _FLOAT and " " not in m]
    others = [f for f in others if f["size"] < _SMALLER]
    return _drop(mine, base) <= min(_drop(other, base) for other in others) + allowed


if __name__ == "__main__":
    main()
