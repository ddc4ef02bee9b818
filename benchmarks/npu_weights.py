"""What Vela's weight coder makes of clusters and zeros: GRAPHOPT_ZOO=... python benchmarks/npu_weights.py [CASE ...].

Models of the zoo are compiled for npu:ethos-u55-128 after `share` and unstructured pruning of several strengths: bytes
of weights as the NPU reads them, Vela's estimate of cycles, and the metric of the integers in ONNX Runtime. Needs
`pip install 'graphopt[npu]'`. Figures are kept in the cache folder, as in quant_static.py. `--quick`: one model, two
rows.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tables
from quant_figures import Figure, arguments, kept
from zoo_quant import load_zoo

import graphopt

_CASES = ("tiny_resnet8", "cifar10_resnet20")
_TARGET = "npu:ethos-u55-128"
_STEPS = (
    "", "share{bits=6},", "share{bits=5},", "share{bits=4},", "share{bits=3},", "share{bits=2},",
    "share{bits=4 channels=1},", "prune{pattern=unstructured ratio=0.5},", "prune{pattern=unstructured ratio=0.8},",
    "prune{pattern=unstructured ratio=0.8},share{bits=4},",
)  # fmt: skip
_LIMIT = 500
_HEAD = ("case", "passes", "metric", "value", "weights, coded", "bits a weight", "of plain int8", "cycles")
_NOTE = """`weights, coded`: bytes that Vela makes of all weights and biases; `bits a weight` are of all of them. \
Cycles are estimated by Vela, the metric is that of the integers in ONNX Runtime. Codebooks for each channel are \
scaled apart by the scales of channels, so that many integers come of them."""


def main() -> None:
    """Measure what is not yet known and write the table."""
    options = arguments(__doc__, "npu_weights").parse_args()
    if options.child:
        print(json.dumps(_measured(json.loads(options.child))))
        return
    rows: list[tuple[object, ...]] = []
    for case in options.cases or _CASES[: 1 if options.quick else None]:
        plain: Figure = {}
        for step in ("", "share{bits=4},") if options.quick else _STEPS:
            limit = options.limit or _LIMIT
            figure = kept(f"{case} {step} {limit}", {"case": case, "step": step, "limit": limit}, options.cache)
            plain = plain or figure
            rows.append(_row(case, step, figure, plain))
            print(*rows[-1], flush=True)
    tables.write(options.name, "What Vela makes of weights", _HEAD, rows, _NOTE)


def _row(case: str, step: str, figure: Figure, plain: Figure) -> tuple[object, ...]:
    passes = f"`fold,{step}quant`"
    if "fault" in figure:
        return (case, passes, figure["fault"], *[""] * (len(_HEAD) - 3))
    coded = figure["encoded"]
    ratio = f"{coded / plain['encoded']:.2f}x" if "encoded" in plain else ""
    return (
        case, passes, figure["metric"], f"{figure['value']:.4g}", coded, f"{8 * coded / figure['weights']:.2f}", ratio,
        figure["cycles"],
    )  # fmt: skip


def _measured(job: Mapping[str, Any]) -> Figure:
    zoo = load_zoo()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        zoo.export(job["case"], folder, samples=64, limit=8)
        result = graphopt.optimize(
            folder / "model.onnx", f"fold,{job['step']}quant", target=_TARGET, calibration=folder / "calib.npz",
            out=folder / "out", check="none",
        )  # fmt: skip
        (estimate,) = json.loads((result.path / "report.json").read_text("utf8"))["backend"]["estimates"]
        scored = zoo.score(job["case"], result.path / "model.onnx", limit=job["limit"])
    return {
        "encoded": estimate["encoded_bytes"], "weights": estimate["weight_bytes"], "cycles": estimate["cycles"],
        "metric": scored["metric"], "value": scored["value"],
    }  # fmt: skip


if __name__ == "__main__":
    main()
