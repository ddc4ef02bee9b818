"""What a clock tells: timings in `measured/`, and what `--guard` asks.

A choice made on a clock is written to `decisions.json`; replayed with `--decisions`, it gives the same bytes again.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from graphopt.bench import Plan, Subject, bench, bundle_subjects, feeds_for
from graphopt.bench.regions import slower_regions
from graphopt.bundle import MEASURED, write_text
from graphopt.compile.request import Request
from graphopt.fidelity import free_memory, needed_memory
from graphopt.measured import Measured, Region
from graphopt.model_io import model_files, save_model
from graphopt.report.data import Report
from graphopt.report.html import render_measured_html

__all__ = ["measure", "runs_here", "slowdown", "slowed"]

_log = logging.getLogger("graphopt")


def runs_here(request: Request) -> bool:
    """Whether this machine runs what is made for the target, so that its clock says something about it."""
    backend = request.registry.backend_of(request.target)
    return backend is None or backend.how(request.target) == "executed"


def measure(request: Request, folder: Path, report: Report) -> Measured:
    """Time original and result side by side and write `measured/`."""
    original = Subject(request.model.name, request.model)
    backend, kernel = (report.backend.backend, report.backend.kernel) if report.backend else (None, None)
    found = bundle_subjects(folder, report.target, backend, kernel)
    result = [replace(subject, name=request.out.name) for subject in found]  # `folder` has a name for now only
    feeds = feeds_for(request.model, request.evaluation or request.calibration, request.binding)
    measured = bench([original, *result], feeds, extensions=request.extensions)
    if runs_here(request):
        regions = _slower(request, request.model, folder / "model.onnx")
        measured = replace(measured, slower_regions=regions)
    write_text(folder / MEASURED / "bench.json", measured.to_json())
    write_text(folder / MEASURED / "report.html", render_measured_html(report, measured))
    return measured


def slowdown(request: Request, before: ir.Model, after: ir.Model) -> float:
    """Time of `after` in ONNX Runtime, as a multiple of that of `before`; 1 where either cannot be timed."""
    with _saved(before, after) as paths:
        feeds = feeds_for(paths[0], request.evaluation or request.calibration, request.binding)
        subjects = [Subject("before", paths[0]), Subject("after", paths[1], "result")]
        measured = bench(subjects, feeds, Plan(rounds=3), extensions=request.extensions)
    first, second = measured.find("original"), measured.find("result")
    if first is None or second is None or first.times is None or second.times is None:
        return 1.0
    return second.times.median / first.times.median


def slowed(request: Request, before: ir.Model, after: ir.Model) -> tuple[Region, ...]:
    """Regions of `before` that take longer in `after`, in ONNX Runtime."""
    with _saved(before, after) as paths:
        return _slower(request, *paths)


def _slower(request: Request, before: Path, after: Path) -> tuple[Region, ...]:
    needed = sum(needed_memory(sum(file.stat().st_size for file in model_files(path))) for path in (before, after))
    if needed > free_memory() / 2:
        _log.warning("regions were not timed: that needs %.0f GB", needed / 1e9)
        return ()
    feeds = feeds_for(before, request.evaluation or request.calibration, request.binding)
    return slower_regions(before, after, feeds, extensions=request.extensions)


@contextmanager
def _saved(before: ir.Model, after: ir.Model) -> Generator[tuple[Path, Path]]:
    """Write two models for a while."""
    with tempfile.TemporaryDirectory(prefix="graphopt-") as name:
        first, second = (Path(name) / side / "model.onnx" for side in ("before", "after"))
        for path, model in ((first, before), (second, after)):
            path.parent.mkdir()
            save_model(model, path)
        yield first, second
