"""From a model to a bundle: the one function behind the command line and the Python API."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from shutil import copyfile
from typing import Any

import onnx_ir as ir

from graphopt.analyses import COST, Cost
from graphopt.backend_base import Backend, BuildOptions
from graphopt.bundle import MEASURED, Manifest, file_digests, new_folder, up_to_date, write_manifest, write_text
from graphopt.compile.checks import Checker, Checks, agreement, evaluator
from graphopt.compile.clock import measure, slowdown, write_decisions
from graphopt.compile.limits import Candidate, better, judge, keeps_quality, verdict
from graphopt.compile.request import Request, cache_key, command_line, shape_texts, versions
from graphopt.compile.resolve import resolve
from graphopt.compile.summary import layer_rows, model_summary, step_report, totals
from graphopt.errors import BackendError, ExitCode
from graphopt.instruments import Instrument, instruments_for
from graphopt.measured import Measured
from graphopt.model_io import external_files, save_model, weight_bytes
from graphopt.pass_base import Context, Pass, Progress
from graphopt.recipe import seconds
from graphopt.report.data import BackendReport, Data, FileEntry, Limit, ModelSummary, Report, StepReport
from graphopt.report.encoding import from_json, to_json
from graphopt.report.html import render_html
from graphopt.runner import StepRun, run_step

__all__ = ["Result", "optimize", "plan"]

_log = logging.getLogger("graphopt")
_SLOWER = 1.05  # within five percent a machine's noise decides


@dataclass(frozen=True)
class Result:
    """What `optimize` made.

    Attributes:
        path: The bundle.
        report: Everything that was found out.
        measured: Timings, if they were asked for.
        exit_code: 0, or 4 if a limit was missed.
        up_to_date: The bundle was there already, made from the same inputs.
    """

    path: Path
    report: Report
    measured: Measured | None = None
    exit_code: ExitCode = ExitCode.OK
    up_to_date: bool = False


@dataclass
class _Run:
    """A compile run on its way: what every stage needs from those before it."""

    request: Request
    ctx: Context
    before: ModelSummary
    cost: Cost
    input_bytes: int
    deadline: float | None
    steps: list[StepReport]
    notes: list[str]
    left_out: list[int] = field(default_factory=list[int])
    written: tuple[Path, ...] = ()
    in_time: bool = True

    def leave_out(self, number: int, step: Pass, reason: str) -> None:
        """Write down that a step, counted from 1, was left out."""
        self.left_out.append(number)
        self.notes.append(f"{step} left out: {reason}")


def plan(request: Request) -> dict[str, Any]:
    """What a run would do, for `--dry-run`."""
    key = cache_key(request)
    return {
        "model": str(request.model),
        "target": str(request.target),
        "passes": [str(step) for step in request.passes],
        "out": str(request.out),
        "calibration": request.calibration.origin if request.calibration else None,
        "eval": request.evaluation.origin if request.evaluation else None,
        "shapes": shape_texts(request.binding),
        "up_to_date": up_to_date(request.out, key) is not None,
    }


def optimize(model: str | Path, passes: Any = None, target: str | None = None, **options: Any) -> Result:
    """Optimize a model and write a bundle.

    Args:
        model: Path of an ONNX model.
        passes: Pipeline text such as `"fold,prune{ratio=0.5},quant"`, or a sequence of passes.
        target: What to make it for, such as `"arm"`; `"ort"`, portable ONNX, by default.
        **options: As the command's options: `out`, `recipe`, `calibration`, `evaluation`, `metric_name`, `limits`,
            `shapes`, `dims`, `check`, `verify`, `measure`, `seed`, `threads`, `keep_opset`, `extensions`, `force`,
            `overwrite`, `fallback`, `emit`, `cc`, `cache`, `disable`; and `progress`, a function that wraps loops.
            Data may be a path, `module:function`, or arrays by input name.

    Returns:
        The bundle with its report. A missed limit is no error: see `exit_code`.

    Raises:
        GraphoptError: The request cannot be carried out; nothing was written.
    """
    progress: Progress | None = options.pop("progress", None)
    request, loaded = resolve(model, passes, target, **options)
    return run(request, loaded, progress)


def run(request: Request, model: ir.Model, progress: Progress | None = None) -> Result:
    """Carry out a resolved request."""
    started = time.monotonic()
    key = cache_key(request)
    manifest = None if request.force else up_to_date(request.out, key)
    if manifest is not None:
        return _existing(request, manifest)
    backend = request.registry.backend_of(request.target)
    options = BuildOptions(
        binding=request.binding,
        cc=request.cc,
        fallback=request.fallback,
        emit=request.emit,
        cache=request.cache,
        threads=request.threads,
    )
    if backend is not None:
        backend.ready(request.target, options)
    state = _start(request, model, progress, started)
    with Checker(request, model.clone(), weight_bytes(model)) as checker, new_folder(request.out) as folder:
        candidate, missed = _choose(state, checker, folder)
        built = None if backend is None else _compile(backend, candidate, state, checker, folder, options)
        report = _report(state, candidate, missed, built, folder)
        code = ExitCode.OK if report.verdict == "ok" else ExitCode.LIMIT_MISSED
        _write(report, folder, key, code)
        measured = measure(request, folder, report) if request.measure else None
    return Result(request.out, report, measured, code)


def _start(request: Request, model: ir.Model, progress: Progress | None, started: float) -> _Run:
    ctx = Context(
        model=model,
        target=request.target,
        calibration=request.calibration,
        binding=request.binding,
        keep_opset=request.keep_opset,
        threads=request.threads,
        extensions=request.extensions,
        evaluate=evaluator(request),
        criteria=request.registry.criteria,
        log=_log,
    )
    if progress is not None:
        ctx.progress = progress
    input_bytes = request.model.stat().st_size + sum(path.stat().st_size for path in external_files(model))
    limit = request.limits.time_limit
    deadline = None if limit is None else started + seconds(limit, "--time-limit")
    before = model_summary(model, ctx, input_bytes)
    return _Run(request, ctx, before, ctx.fact(COST), input_bytes, deadline, [], _opening_notes(request, before))


def _choose(state: _Run, checker: Checker, folder: Path) -> tuple[Candidate, Sequence[Limit]]:
    """Run the passes and pick what to ship; returns it with the limits that the whole pipeline missed."""
    request, ctx = state.request, state.ctx
    keep = request.limits.max_drop is not None or request.limits.min_sqnr is not None
    snapshots = [ctx.model.clone()] if keep else []
    instruments = instruments_for(request.registry, {"target": str(request.target), "pipeline": request.pipeline})
    for number, step in enumerate(request.passes, 1):
        if state.deadline is not None and time.monotonic() > state.deadline:
            state.in_time = False
            rest = ", ".join(map(str, request.passes[number - 1 :]))
            state.notes.append(f"the time limit ran out: {rest} left out")
            break
        if number in (request.decisions or ()):
            state.leave_out(number, step, "as decided before")
            continue
        _step(state, number, step, instruments)
        if keep and len(snapshots) == len(state.steps):
            snapshots.append(ctx.model.clone())
    if request.guard or request.decisions is not None:
        write_decisions(folder, request.pipeline, state.left_out)
    last = _candidate(state, ctx.model, len(state.steps), checker, folder)
    if keeps_quality(last.limits):
        return last, last.limits
    best = last
    for number, model in reversed(list(enumerate(snapshots[:-1]))):
        other = _candidate(state, model, number, checker, folder)
        best = better(best, other)
        if keeps_quality(other.limits):
            break  # fewer steps would only be larger
    if best is not last:
        ctx.model = best.model
        ctx.drop_facts()
        state.steps = state.steps[: best.steps]
    _save(state, best.model, folder, modified=any(step.modified for step in state.steps))
    return best, last.limits


def _step(state: _Run, number: int, step: Pass, instruments: Sequence[Instrument]) -> None:
    """Run one step; with `--guard` undo it if it makes the model slower."""
    request, ctx = state.request, state.ctx
    before = ctx.model.clone() if request.guard and step.lossy else None
    ran = run_step(step, number, ctx, instruments, seed=request.seed, check=request.check != "none")
    if before is not None and ran.result.modified and slowdown(request, before, ctx.model) > _SLOWER:
        ctx.model = before
        ctx.drop_facts()
        state.leave_out(number, step, "it made the model slower")
        return
    _take(state, ran)


def _take(state: _Run, step: StepRun) -> None:
    """Put one finished step into the report."""
    report = step_report(step, totals(state.ctx.model, state.ctx))
    state.steps.append(report)
    if step.unchecked:
        state.notes.append(f"{step.step}: equal outputs are promised but were not checked: {step.unchecked}")
    state.notes.extend(f"{step.step.name}: {note}" for note in step.result.notes)
    if step.step.without_data and state.request.calibration is None:
        state.notes.append(f"no --calibration: {step.step.without_data}")


def _candidate(state: _Run, model: ir.Model, steps: int, checker: Checker, folder: Path) -> Candidate:
    size = _save(state, model, folder, modified=any(step.modified for step in state.steps[:steps]))
    checks = checker.check(folder / "model.onnx")
    limits = judge(state.request.limits, checks, file_bytes=size, input_bytes=state.input_bytes, in_time=state.in_time)
    return Candidate(model, steps, size, checks, limits)


def _save(state: _Run, model: ir.Model, folder: Path, *, modified: bool) -> int:
    """Write model.onnx; a model that no step touched is the input, byte for byte. Returns the bytes written."""
    for old in state.written:
        old.unlink()
    target, source = folder / "model.onnx", state.request.model
    if modified:
        state.written = save_model(model, target)
    else:
        copies = {source: target} | {p: folder / p.relative_to(source.parent) for p in external_files(model)}
        for path, copy in copies.items():
            copy.parent.mkdir(parents=True, exist_ok=True)
            copyfile(path, copy)
        state.written = tuple(copies.values())
    return sum(path.stat().st_size for path in state.written)


def _compile(
    backend: Backend, candidate: Candidate, state: _Run, checker: Checker, folder: Path, options: BuildOptions
) -> BackendReport | None:
    """Build for the target and run what was built."""
    request = state.request
    unsupported = backend.unsupported(candidate.model, request.target, options)
    if unsupported and request.fallback is None:
        first = unsupported[0]
        operators = ", ".join(sorted({item.operator for item in unsupported}))
        fact = f"cannot take {operators}: {first.site!r}: {first.reason}"
        raise BackendError(f"backend {backend.name}", fact, "leave these to ONNX Runtime with --fallback ort")
    _log.info("compiling for %s", request.target)
    built = backend.build(candidate.model, request.target, folder, options)
    if built.kernel is None:
        return None
    report = BackendReport(
        backend=backend.name,
        target=str(request.target),
        how="compiled only",
        kernel=built.kernel,
        kernel_bytes=(folder / built.kernel).stat().st_size,
        files=built.files,
        facts=dict(sorted(built.facts.items())),
        fallbacks=built.fallbacks,
    )
    how = backend.how(request.target)
    if how not in ("executed", "emulated"):
        return replace(report, not_run=_why_not(backend, request, folder))
    if not request.verify:
        return replace(report, not_run="compiled only: --no-verify")
    quantized = any(node.op_type == "QuantizeLinear" for node in candidate.model.graph)
    found = agreement(backend, folder, request, checker, state.ctx.fact(COST).macs, quantized=quantized)
    if found is None:
        return replace(report, not_run="compiled only: there is nothing to compare with")
    if not found.ok:
        fact = f"{built.kernel} differs from model.onnx by {found.max_abs:.3g}, allowed is {found.tolerance:.3g}"
        raise BackendError(f"backend {backend.name}", fact, "report it; --no-verify ships it all the same")
    return replace(report, how=how, agreement=found)


def _why_not(backend: Backend, request: Request, folder: Path) -> str:
    """Why this machine cannot run what was compiled, in the words of the backend."""
    try:
        backend.load(folder, request.target, request.threads)
    except BackendError as e:
        return f"compiled only: {e.fact.removeprefix('compiled only: ')}"
    return "compiled only: the backend does not run it here"


def _report(
    state: _Run, candidate: Candidate, missed: Sequence[Limit], built: BackendReport | None, folder: Path
) -> Report:
    request, ctx, checks = state.request, state.ctx, candidate.checks
    after = model_summary(candidate.model, ctx, candidate.file_bytes)
    data = {"--calibration": request.calibration, "--eval": request.evaluation}
    given = {option: dataset for option, dataset in data.items() if dataset is not None}
    shipped = "" if candidate.limits == missed else _shipped(state.steps)
    used = versions(request.registry)
    return Report(
        version=used["graphopt"],
        model=request.model.name,
        digest=request.digest,
        target=str(request.target),
        pipeline=request.pipeline,
        seed=request.seed,
        before=state.before,
        after=after,
        steps=tuple(state.steps),
        fidelity=checks.fidelity,
        accuracy=checks.accuracy,
        limits=candidate.limits,
        verdict=verdict(candidate.limits, shipped, missed),
        backend=built,
        layers=layer_rows(state.cost, ctx.fact(COST), state.steps),
        files=tuple(
            FileEntry(str(path.relative_to(folder)), path.stat().st_size)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ),
        notes=(*state.notes, *_closing_notes(state, candidate, checks)),
        command=command_line(request, {option: Path(d.origin).name for option, d in given.items()}),
        data=tuple(
            Data("calibration" if option == "--calibration" else "evaluation", Path(d.origin).name, d.digest)
            for option, d in given.items()
        ),
        versions=used,
        shapes=shape_texts(request.binding),
    )


def _write(report: Report, folder: Path, key: str | None, code: ExitCode) -> None:
    """Write the reports and the manifest."""
    write_text(folder / "report.json", to_json(report))
    write_text(folder / "report.html", render_html(report))
    manifest = Manifest(
        graphopt=report.version,
        model=report.model,
        digest=report.digest,
        target=report.target,
        pipeline=report.pipeline,
        seed=report.seed,
        key=key,
        exit_code=int(code),
        shapes=report.shapes,
        versions=report.versions,
        files=file_digests(folder),
        kernel=report.backend.kernel if report.backend else None,
        fallback=bool(report.backend and report.backend.fallbacks),
    )
    write_manifest(folder, manifest)


def _existing(request: Request, manifest: Manifest) -> Result:
    """The bundle that is there already; measured now if that was asked for and was not done."""
    report = from_json((request.out / "report.json").read_text("utf8"))
    file = request.out / MEASURED / "bench.json"
    measured = Measured.from_json(file.read_text("utf8")) if file.is_file() else None
    if measured is None and request.measure:
        measured = measure(request, request.out, report)
    return Result(request.out, report, measured, ExitCode(manifest.exit_code), up_to_date=True)


def _opening_notes(request: Request, before: ModelSummary) -> list[str]:
    notes: list[str] = []
    if before.macs_unknown:
        count, first = len(before.macs_unknown), before.macs_unknown[0]
        notes.append(f"MACs of {count} layers are unknown, {first!r} among them: fix sizes with --shape or --dim")
    if request.calibration is not None and request.calibration.synthetic:
        notes.append("calibrated on random values, on request: activation ranges are not those of real data")
    return notes


def _closing_notes(state: _Run, candidate: Candidate, checks: Checks) -> list[str]:
    notes: list[str] = []
    if candidate.file_bytes > state.input_bytes:
        notes.append(f"the result is larger than its input: {candidate.file_bytes} bytes, was {state.input_bytes}")
    if not any(step.modified for step in state.steps):
        notes.append("no step changed anything: model.onnx is the input")
    if checks.accuracy is not None and checks.accuracy.drop > 1 and state.request.limits.max_drop is None:
        lost = f"{checks.accuracy.drop:.3g} {'points' if checks.accuracy.higher_is_better else '%'}"
        notes.append(f"{checks.accuracy.metric} lost {lost}; with --max-drop that becomes exit code 4")
    if any(output.nan for output in checks.fidelity.outputs):
        notes.append("the result returns NaN where the original does not")
    if checks.fidelity.not_run is None and checks.fidelity.inputs == "random inputs":
        notes.append("compared on random inputs: give --eval or --calibration for a distance that means something")
    return notes


def _shipped(steps: Sequence[StepReport]) -> str:
    return f"the model after {steps[-1].step}" if steps else "the input, unchanged"
