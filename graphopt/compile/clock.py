"""What a clock decides or tells: timings in `measured/`, and the steps that `--guard` leaves out.

A choice made on a clock is written to `decisions.json`; replayed with `--decisions`, it gives the same bytes again.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import onnx_ir as ir

from graphopt.bench import Plan, Subject, bench, bundle_subjects, feeds_for
from graphopt.bundle import MEASURED, write_text
from graphopt.compile.request import Request
from graphopt.errors import UsageError
from graphopt.measured import Measured
from graphopt.model_io import save_model
from graphopt.report.data import Report
from graphopt.report.html import render_measured_html

__all__ = ["DECISIONS", "measure", "read_decisions", "slowdown", "write_decisions"]

DECISIONS = "decisions.json"


def measure(request: Request, folder: Path, report: Report) -> Measured:
    """Time original and result side by side and write `measured/`."""
    original = Subject(request.model.name, request.model)
    backend, kernel = (report.backend.backend, report.backend.kernel) if report.backend else (None, None)
    found = bundle_subjects(folder, report.target, backend, kernel)
    result = [replace(subject, name=request.out.name) for subject in found]  # `folder` has a name for now only
    feeds = feeds_for(request.model, request.evaluation or request.calibration, request.binding)
    measured = bench([original, *result], feeds, extensions=request.extensions)
    write_text(folder / MEASURED / "bench.json", measured.to_json())
    write_text(folder / MEASURED / "report.html", render_measured_html(report, measured))
    return measured


def slowdown(request: Request, before: ir.Model, after: ir.Model) -> float:
    """Time of `after` in ONNX Runtime, as a multiple of that of `before`; 1 where either cannot be timed."""
    with tempfile.TemporaryDirectory(prefix="graphopt-") as name:
        paths = [Path(name) / side / "model.onnx" for side in ("before", "after")]
        for path, model in zip(paths, (before, after), strict=True):
            path.parent.mkdir()
            save_model(model, path)
        feeds = feeds_for(paths[0], request.evaluation or request.calibration, request.binding)
        subjects = [Subject("before", paths[0]), Subject("after", paths[1], "result")]
        measured = bench(subjects, feeds, Plan(rounds=3), extensions=request.extensions)
    first, second = measured.find("original"), measured.find("result")
    if first is None or second is None or first.times is None or second.times is None:
        return 1.0
    return second.times.median / first.times.median


def write_decisions(folder: Path, pipeline: str, left_out: Sequence[int]) -> None:
    """Write which steps were left out, counted from 1."""
    write_text(folder / DECISIONS, json.dumps({"pipeline": pipeline, "left_out": list(left_out)}, indent=1) + "\n")


def read_decisions(path: Path, pipeline: str) -> tuple[int, ...]:
    """Read which steps to leave out.

    Raises:
        UsageError: The file is no record of decisions, or was made for another pipeline.
    """
    try:
        found: Any = json.loads(path.read_text("utf8"))
        left_out, made_for = cast("list[int]", found["left_out"]), found["pipeline"]
        steps = tuple(int(number) for number in left_out)
    except FileNotFoundError as e:
        raise UsageError(f"--decisions {path}", "no such file") from e
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise UsageError(f"--decisions {path}", "not a decisions.json", "take one from a bundle") from e
    if made_for != pipeline:
        raise UsageError(f"--decisions {path}", f"made for the pipeline {made_for!r}", "decide anew with --guard")
    return steps
