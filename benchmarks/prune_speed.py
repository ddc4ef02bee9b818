"""Speed of a pruned ResNet-50: python benchmarks/prune_speed.py [--model resnet50] [--ratio 0.5].

Random weights: speed depends on shapes alone. Original and result run in ONNX Runtime in child processes, their rounds
interleaved, one and two threads, one image. Channels are rounded to what the target likes. Then the time that pruning
takes with 64 images to refit on (noise: what is solved does not depend on what they show).

About 5 minutes on two cores, of which refitting takes 2.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import architectures
import numpy as np
import tables

import graphopt
from graphopt.bench import Plan, Subject, bench, feeds_for
from graphopt.model_io import ShapeBinding
from graphopt.plugins import load_plugins

_THREADS = (1, 2)


def main() -> None:
    """Prune, time, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet50", choices=sorted(architectures.MODELS))
    parser.add_argument("--variant", default="script", choices=architectures.VARIANTS)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--target", default="x86")
    parser.add_argument("--passes", help="instead of fold,prune with the ratio and the target's rounding")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--samples", type=int, default=64, help="images to refit on; 0: leave that part out")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "graphopt-architectures")
    parser.add_argument("--name", default="prune_speed")
    options = parser.parse_args()
    source = architectures.export(options.model, options.variant, options.cache)
    rounding = _rounding(options.target)
    passes = options.passes or f"fold,prune{{ratio={options.ratio} round_to={rounding}}}"
    with tempfile.TemporaryDirectory() as folder:
        rows = _timed(source, passes, Path(folder), options.rounds)
        notes = _refit_time(source, passes, Path(folder), options.samples) if options.samples else ""
    head = ("model", "threads", "MACs removed", "original ms", "pruned ms", "faster")
    tables.write(options.name, f"`{passes}` in ONNX Runtime, one image", head, rows, notes)


def _rounding(target: str) -> int:
    return load_plugins().targets.resolve(target).round_to


def _timed(source: Path, passes: str, folder: Path, rounds: int) -> list[tuple[object, ...]]:
    """Both sides after `fold`, so that only pruning tells them apart."""
    before = graphopt.optimize(source, "fold", out=folder / "before", check="none")
    after = graphopt.optimize(source, passes, out=folder / "after", check="sample")
    subjects = [
        Subject("original", before.path / "model.onnx"),
        Subject("pruned", after.path / "model.onnx", "result"),
    ]
    feeds = feeds_for(source, None, ShapeBinding())
    plan = Plan(threads=_THREADS, repeats=10, rounds=rounds, round_seconds=4.0)
    measured = bench(subjects, feeds, plan)
    removed = next(step.metrics["achieved"] for step in after.report.steps if "achieved" in step.metrics)
    rows: list[tuple[object, ...]] = []
    for threads in _THREADS:
        old, new = (
            next(row.times for row in measured.rows if row.subject == subject.name and row.threads == threads)
            for subject in subjects
        )
        if old is None or new is None:
            raise SystemExit(f"not timed with {threads} threads")
        figures = f"{old.median:.1f}", f"{new.median:.1f}", f"{old.median / new.median:.2f}x"
        rows.append((source.stem, threads, f"{float(removed):.3f}", *figures))
        print(*rows[-1], flush=True)
    return rows


def _refit_time(source: Path, passes: str, folder: Path, samples: int) -> str:
    """Seconds of the whole command with calibration data."""
    images = np.random.default_rng(0).standard_normal((samples, 3, 224, 224), dtype=np.float32)
    start = time.perf_counter()
    result = graphopt.optimize(
        source, passes, calibration={"input0": images}, out=folder / "refitted", check="none", threads=2
    )
    took = time.perf_counter() - start
    layers = next(step.metrics["refitted"] for step in result.report.steps if "refitted" in step.metrics)
    return (
        f"With refit on {samples} images of 224 x 224: {took:.0f} s for {layers} layers, reading and writing included."
    )


if __name__ == "__main__":
    main()
