"""Models for Ethos-U: GRAPHOPT_ZOO=... python benchmarks/npu.py [CASE ...] [--limit 300] [--quick].

Models of the zoo are quantized for `npu`, as they are and pruned to half of their multiply-accumulates. The first table
says what runs on the NPU and how the metric of the integers in ONNX Runtime compares with that on the TOSA reference
model, which computes what the NPU does; the second holds Vela's estimates of one inference for several devices. Needs
`pip install 'graphopt[npu]'`. Figures are kept in the cache folder, as in quant_static.py. `--quick`: keyword spotting.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tables
from quant_figures import Figure, arguments, kept
from zoo_compiled import Compiled
from zoo_quant import load_zoo

import graphopt
from graphopt.backend_base import BuildOptions
from graphopt.model_io import load_model
from graphopt.plugins import load_plugins
from graphopt_backends._plan import read_plan

_CASES = (
    "tiny_kws", "tiny_resnet8", "mobilenet_v1_025", "mobilenet_v2", "cifar10_resnet20", "cifar10_resnet56",
    "ultraface_rfb320", "yunet_n320",
)  # fmt: skip
_DEVICES = ("ethos-u55-128", "ethos-u55-256", "ethos-u65-512", "ethos-u85-512")
_WAYS: Mapping[str, str] = {"as it is": "fold,quant", "pruned": "fold,prune{ratio=0.5},quant"}
_LIMIT = 300
_SCORES = (
    "case", "passes", "metric", "scored", "float", "int8, ONNX Runtime", "int8, reference model", "MACs on the NPU",
    "left to the host",
)  # fmt: skip
_CYCLES = ("case", "passes", *_DEVICES, "SRAM", "weights, coded")
_SCORES_NOTE = """`int8, reference model`: the TOSA reference model runs what the NPU runs, ONNX Runtime the host's \
part: emulated."""
_CYCLES_NOTE = """Estimated by Vela, nothing was run: thousands of cycles of one inference, and milliseconds at the \
clock of the system that Vela's options name by default. `SRAM`, and weights as the NPU reads them: of the first \
device, in bytes. Published beside it: MobileNetV2 of 224x224 through ExecuTorch takes 19 ms on the U55-256 of an Alif \
Ensemble E8, measured on the board (pytorch/executorch#19131)."""


def main() -> None:
    """Measure what is not yet known and write both tables."""
    options = _options()
    if options.child:
        print(json.dumps(_measured(json.loads(options.child))))
        return
    found: dict[tuple[str, str], Figure] = {}
    for case in options.cases or (_CASES[:1] if options.quick else _CASES):
        for way in _WAYS:
            limit = options.limit or _LIMIT
            job = {"case": case, "way": way, "limit": limit}
            found[case, way] = kept(f"{case} {way} {limit}", job, options.cache)
            print(case, way, json.dumps(found[case, way]), flush=True)
    scores, cycles = [], []
    for (case, way), figure in found.items():
        if "fault" in figure:
            scores.append((case, way, figure["fault"], *[""] * (len(_SCORES) - 3)))
            continue
        values = [f"{figure[key]:.4g}" for key in ("float", "onnxruntime", "reference")]
        scores.append((case, way, figure["metric"], figure["scored"], *values, figure["macs"], figure["host"]))
        times = [
            f"{figure[device]['cycles'] / 1e3:.0f} k, {figure[device]['seconds'] * 1e3:.3g} ms" for device in _DEVICES
        ]
        first = figure[_DEVICES[0]]
        cycles.append((case, way, *times, first["sram"], first["encoded"]))
    tables.write(options.name, "On Ethos-U: accuracy", _SCORES, scores, _SCORES_NOTE)
    tables.write(f"{options.name}_cycles", "On Ethos-U: Vela's estimates", _CYCLES, cycles, _CYCLES_NOTE)


def _options() -> argparse.Namespace:
    return arguments(__doc__, "npu").parse_args()


def _measured(job: Mapping[str, Any]) -> Figure:
    """Quantize, build for all devices and score, in the child."""
    zoo, case = load_zoo(), job["case"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        zoo.export(case, folder, limit=8)
        result = graphopt.optimize(
            folder / "model.onnx", _WAYS[job["way"]], target=f"npu:{_DEVICES[0]}",
            calibration=folder / "calib.npz", out=folder / "out", check="none",
        )  # fmt: skip
        integers = result.path / "model.onnx"
        registry = load_plugins()
        backend, figure = registry.backends["npu"], dict[str, Any]()
        for device in _DEVICES:
            target, place = registry.targets.resolve(f"npu:{device}"), folder / device
            place.mkdir()
            build = backend.build(load_model(integers), target, place, BuildOptions())
            figure[device] = _estimated(build.estimates)
            if device == _DEVICES[0]:
                compiled = Compiled(backend, target, place, read_plan(place))
                figure |= {"macs": build.facts["macs on the NPU"], "host": build.facts["operators on the host"]}
        models = {"float": folder / "model.onnx", "onnxruntime": integers, "reference": compiled}
        for key, model in models.items():
            scored = zoo.score(case, model, limit=job["limit"])
            figure |= {key: scored["value"], "metric": scored["metric"], "scored": scored["n"]}
    return figure


def _estimated(estimates: Any) -> dict[str, Any]:
    memory = [next((size for name, size in e.memory.items() if "sram" in name.lower()), 0) for e in estimates]
    return {
        "cycles": sum(e.cycles for e in estimates), "seconds": sum(e.seconds for e in estimates),
        "sram": max(memory), "encoded": sum(e.encoded_bytes for e in estimates),
    }  # fmt: skip


if __name__ == "__main__":
    main()
