"""Every kind of quantization on every zoo model, twice: GRAPHOPT_ZOO=... python benchmarks/quant_passes.py [CASE ...].

A result must load in ONNX Runtime, keep its metric as far as its kind allows, and be the same bytes when it is made
again. Figures are kept in the cache folder, as in quant_static.py. The whole table takes about 1 hour on two idle cores
(an estimate); `--quick` (two small cases, 200 samples scored, 16 to calibrate) about 2 minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tables
from quant_figures import Figure, arguments, kept, opens
from zoo_quant import load_zoo

import graphopt

_QUICK = ("tiny_kws", "stories260k")
_FLOAT = "float"
_PASSES = ("quant", "quant{mode=dynamic}", "quant{bits=4}", "quant{dtype=fp16}")
_KINDS = ("static", "dynamic", "weight", "float")


def main() -> None:
    """Measure what is not yet known and write the table."""
    options = _options()
    if options.child:
        print(json.dumps(_measured(json.loads(options.child))))
        return
    samples = options.samples or (16 if options.quick else 64)
    limit = options.limit or (200 if options.quick else None)
    found: dict[tuple[str, str], Figure] = {}
    for case in options.cases or (_QUICK if options.quick else sorted(load_zoo().cases())):
        for passes in (_FLOAT, *(options.passes or _PASSES)):
            job = {"case": case, "passes": passes, "samples": samples, "limit": limit, "target": options.target}
            words = f"{case} {passes} {samples} {limit or 'all'} {options.target}"
            found[case, passes] = kept(words, job, options.cache, fresh=options.fresh and passes != _FLOAT)
            print(case, passes, json.dumps(found[case, passes]), flush=True)
            _write(found, samples, limit, options, quiet=True)
    _write(found, samples, limit, options)


def _options() -> argparse.Namespace:
    parser = arguments(__doc__, "quant_passes")
    parser.add_argument("--passes", nargs="*", help="instead of " + ", ".join(_PASSES))
    parser.add_argument("--target", default="ort")
    parser.add_argument("--fresh", action="store_true", help="measure again what the cache folder knows")
    return parser.parse_args()


def _measured(job: Mapping[str, Any]) -> Figure:
    """Quantize twice and score, in the child."""
    zoo = load_zoo()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        zoo.export(job["case"], folder, samples=job["samples"], limit=8)
        model, figure = folder / "model.onnx", Figure(size=1.0)
        if job["passes"] != _FLOAT:
            figure = _twice(job, folder)
            model = folder / "out0" / "model.onnx"
            fault = opens(model)
            if fault:
                return {**figure, "fault": f"does not load: {fault}"}
        scored = zoo.score(job["case"], model, limit=job["limit"])
    return {**figure, "metric": scored["metric"], "value": scored["value"]}


def _twice(job: Mapping[str, Any], folder: Path) -> Figure:
    source, digests, seconds, counts = folder / "model.onnx", list[str](), 0.0, ""
    data = None if "mode=dynamic" in job["passes"] else folder / "calib.npz"
    for i in (0, 1):
        out, start = folder / f"out{i}", time.perf_counter()
        result = graphopt.optimize(
            source, job["passes"], job["target"], calibration=data, out=out, check="none", force=True
        )
        seconds = time.perf_counter() - start
        digests.append(hashlib.sha256((out / "model.onnx").read_bytes()).hexdigest())
        metrics = result.report.steps[-1].metrics
        counts = ", ".join(f"{metrics[f'layers_{kind}']} {kind}" for kind in _KINDS if metrics.get(f"layers_{kind}"))
    size = (folder / "out0" / "model.onnx").stat().st_size / source.stat().st_size
    return {"size": size, "same": digests[0] == digests[1], "seconds": seconds, "layers": counts}


def _write(
    found: Mapping[tuple[str, str], Figure],
    samples: int,
    limit: int | None,
    options: argparse.Namespace,
    *,
    quiet: bool = False,
) -> None:
    rows = [_row(case, passes, figure, found[case, _FLOAT]) for (case, passes), figure in found.items()]
    made = [figure for (_, passes), figure in found.items() if passes != _FLOAT]
    good = sum("value" in figure and figure["same"] for figure in made)
    notes = (
        f"{samples} calibration samples at most (none for mode=dynamic), {limit or 'all'} scored; `{options.target}`. "
        f"{good} of {len(made)} load, run, and are the same bytes on repetition."
    )
    head = ("case", "passes", "metric", "value", "size", "same bytes", "layers", "seconds", "verdict")
    tables.write(options.name, "Every kind of quantization on the zoo", head, rows, notes, quiet=quiet)


def _row(case: str, passes: str, figure: Figure, base: Figure) -> tuple[object, ...]:
    start = (case, passes if passes == _FLOAT else f"`{passes}`", base.get("metric", ""))
    value = f"{figure['value']:.5g}" if "value" in figure else ""
    if "same" not in figure:
        return (*start, value, "1.00x" if value else "", "", "", "", figure.get("fault", ""))
    same = "yes" if figure["same"] else "no"
    end = (f"{figure['size']:.2f}x", same, figure["layers"], f"{figure['seconds']:.0f}")
    return (*start, value, *end, figure.get("fault", "ok" if figure["same"] else "differs on repetition"))


if __name__ == "__main__":
    main()
