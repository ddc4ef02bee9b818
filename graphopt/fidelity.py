"""How far a rewritten model is from the original, measured in ONNX Runtime.

Each model runs in a child process of its own, one after the other, so that two large models never share memory and a
crash of the runtime is a line in the report. Feeds and outputs pass through files, batch by batch.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.errors import ModelError
from graphopt.session import Feed, FeedFolder

__all__ = ["FeedFolder", "OutputFidelity", "compare", "free_memory", "needed_memory", "run_apart"]

Array = np.ndarray[Any, np.dtype[Any]]
_MEMORY_FACTOR = 2.5  # ONNX Runtime holds a model about twice while it loads, plus activations


@dataclass(frozen=True)
class OutputFidelity:
    """OutputFidelity of one output from the original's, over all samples.

    Attributes:
        name: Name of the output.
        max_abs: Largest absolute difference.
        mean_abs: Mean absolute difference.
        reference_min: Least value of the original's output, to judge the differences by.
        reference_max: Greatest value of it.
        sqnr_db: Signal to noise, 10 log10(sum reference^2 / sum difference^2); infinite where equal.
        cosine: Cosine of the angle between both, all samples as one vector.
        top1_agreement: Percent of rows with the same greatest element; None where the output holds no classes.
        nan: The result holds NaN where the original does not.
    """

    name: str
    max_abs: float
    mean_abs: float
    reference_min: float
    reference_max: float
    sqnr_db: float
    cosine: float
    top1_agreement: float | None = None
    nan: bool = False


def run_apart(
    model: Path,
    feeds: FeedFolder,
    outputs: FeedFolder,
    *,
    threads: int = 1,
    optimize: bool = True,
    extensions: Sequence[str] = (),
) -> None:
    """Run a model on all feeds in a child process and write its outputs.

    Raises:
        ModelError: ONNX Runtime cannot load or run it, or the child died.
    """
    job = {
        "model": str(model),
        "feeds": str(feeds.folder),
        "outputs": str(outputs.folder),
        "threads": threads,
        "optimize": optimize,
        "extensions": list(extensions),
    }
    command = [sys.executable, "-m", "graphopt.session", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        raise ModelError(model.name, f"ONNX Runtime died with signal {-done.returncode} on it")
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise ModelError(model.name, lines[-1] if lines else "ONNX Runtime cannot run it")


def compare(expected: Iterable[Feed], got: Iterable[Feed]) -> tuple[OutputFidelity, ...]:
    """Compare the numeric outputs of two models on the same feeds, run by run.

    Raises:
        ModelError: An output changed its shape.
    """
    sums: dict[str, _Sums] = {}
    for before, after in zip(expected, got, strict=True):
        for name, value in before.items():
            if value.dtype.kind in "fiub":
                sums.setdefault(name, _Sums(name)).add(value, after[name])
    return tuple(total.distance() for total in sums.values())


def free_memory() -> int:
    """Bytes of memory that a new process can have."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return 1 << 62
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 1 << 62)


def needed_memory(weight_bytes: int) -> int:
    """Bytes of memory that running a model with so many bytes of weights takes, roughly."""
    return int(_MEMORY_FACTOR * weight_bytes)


class _Sums:
    """Running totals for one output."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.worst = self.total = self.signal = self.noise = self.norm = self.dot = 0.0
        self.low, self.high = float("inf"), float("-inf")
        self.count = self.same = self.rows = 0
        self.nan, self.classes = False, True

    def add(self, expected: Array, got: Array) -> None:
        if expected.shape != got.shape:
            raise ModelError("model", f"output {self.name!r} has shape {got.shape}, was {expected.shape}")
        a, b = expected.astype(np.float64), got.astype(np.float64)
        self.classes = self.classes and a.ndim >= 2 and a.shape[-1] > 1 and expected.dtype.kind == "f"
        if self.classes and a.size:
            self.same += int((a.argmax(-1) == b.argmax(-1)).sum())
            self.rows += a[..., 0].size
        usable = np.isfinite(a) & np.isfinite(b)
        self.nan = self.nan or bool((np.isnan(b) & ~np.isnan(a)).any())
        a, b = a[usable], b[usable]
        difference = np.abs(a - b)
        self.worst = max(self.worst, float(difference.max(initial=0)))
        self.low = min(self.low, float(a.min(initial=np.inf)))
        self.high = max(self.high, float(a.max(initial=-np.inf)))
        self.total += float(difference.sum())
        self.noise += float((difference**2).sum())
        self.signal += float((a**2).sum())
        self.norm += float((b**2).sum())
        self.dot += float((a * b).sum())
        self.count += a.size

    def distance(self) -> OutputFidelity:
        length = float(np.sqrt(self.signal * self.norm))
        equal = self.noise == 0
        return OutputFidelity(
            name=self.name,
            max_abs=self.worst,
            mean_abs=self.total / max(self.count, 1),
            reference_min=self.low,
            reference_max=self.high,
            sqnr_db=float("inf") if equal else 10 * float(np.log10(max(self.signal, 1e-300) / self.noise)),
            cosine=1.0 if equal else self.dot / length if length else 0.0,
            top1_agreement=100 * self.same / self.rows if self.classes and self.rows else None,
            nan=self.nan,
        )
