"""INT8 on real trained models: GRAPHOPT_ZOO=... python benchmarks/zoo_quant.py [CASE ...] [--passes fold,quant].

The zoo is a folder with zoo.py (`cases()`, `export`, `score`); every model is quantized with its calibration samples
and scored on its labelled data, original and result alike.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

import tables

import graphopt


def load_zoo() -> ModuleType:
    """Import zoo.py from the folder that GRAPHOPT_ZOO names."""
    folder = os.environ.get("GRAPHOPT_ZOO")
    if not folder:
        sys.exit("GRAPHOPT_ZOO is not set")
    spec = importlib.util.spec_from_file_location("zoo", Path(folder) / "zoo.py")
    if spec is None or spec.loader is None:
        sys.exit(f"{folder} holds no zoo.py")
    module = sys.modules["zoo"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Quantize and score."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--passes", default="fold,quant")
    parser.add_argument("--limit", type=int, help="score the first N samples only")
    parser.add_argument("--name", default="zoo_quant")
    options = parser.parse_args()
    zoo, rows = load_zoo(), []
    for name in options.cases or sorted(zoo.cases()):
        with tempfile.TemporaryDirectory() as folder:
            zoo.export(name, folder, limit=8)
            start = time.perf_counter()
            result = graphopt.optimize(
                f"{folder}/model.onnx", options.passes, calibration=f"{folder}/calib.npz", out=f"{folder}/out"
            )
            took = time.perf_counter() - start
            before = zoo.score(name, f"{folder}/model.onnx", limit=options.limit)
            after = zoo.score(name, f"{folder}/out/model.onnx", limit=options.limit)
        report = result.report
        skipped = sum(not change.done for step in report.steps for change in step.changes)
        size = report.after.file_bytes / report.before.file_bytes
        figures = f"{before['value']:.4g}", f"{after['value']:.4g}", f"{size:.2f}x", skipped, f"{took:.0f}"
        rows.append((name, before["metric"], *figures))
        print(*rows[-1], flush=True)
    head = ("case", "metric", "float", "result", "size", "left alone", "seconds")
    tables.write(options.name, f"`{options.passes}` on the zoo", head, rows)


if __name__ == "__main__":
    main()
