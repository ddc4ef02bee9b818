"""From a model to a bundle: the one function behind the command line and the Python API."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt.analyses import COST
from graphopt.backend_base import Backend, BuildOptions
from graphopt.bundle import MEASURED, Manifest, file_digests, new_folder, up_to_date, write_manifest, write_text
from graphopt.compile.checks import Checker, Checks, agreement, evaluator
from graphopt.compile.clock import measure, runs_here
from graphopt.compile.decisions import Decisions, LeftOut, write_decisions
from graphopt.compile.limits import Candidate, keeps_quality, verdict
from graphopt.compile.request import Request, cache_key, command_line, shape_texts, versions
from graphopt.compile.resolve import resolve
from graphopt.compile.reverting import recover
from graphopt.compile.running import Run, candidate, guards, run_guarded, run_once, save
from graphopt.compile.summary import layer_rows, model_summary
from graphopt.errors import BackendError, ExitCode
from graphopt.instruments import instruments_for
from graphopt.measured import Measured
from graphopt.model_io import external_files, weight_bytes
from graphopt.pack import pack
from graphopt.pass_base import Context, Progress
from graphopt.recipe import seconds
from graphopt.report.data import BackendReport, Data, FileEntry, Limit, ModelSummary, Report, StepReport
from graphopt.report.encoding import from_json, to_json
from graphopt.report.html import render_html

__all__ = ["Result", "optimize", "plan"]

_log = logging.getLogger("graphopt")


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


def plan(request: Request) -> dict[str, Any]:
    """What a run would do, for `--dry-run`."""
    key = cache_key(request)
    return {
        "model": str(request.model),
        "target": request.target_text,
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
            `overwrite`, `fallback`, `emit`, `cc`, `cache`, `disable`, `pack`; `target_options`, options of the target
            by name, which may also stand in its text; `require_npu`; and `progress`, a function that wraps loops. Data
            may be a path, `module:function`, or arrays by input name.

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
        target=request.target_options,
    )
    if backend is not None:
        backend.ready(request.target, options)
    state = _start(request, model, progress, started)
    with Checker(request, model.clone(), weight_bytes(model)) as checker, new_folder(request.out) as folder:
        candidate, missed = _choose(state, checker, folder)
        built = None if backend is None else _compile(backend, candidate, state, checker, folder, options)
        if request.pack:
            pack(folder / "model.onnx", folder / "model.gopt")
        report = _report(state, candidate, missed, built, folder)
        code = ExitCode.OK if report.verdict == "ok" else ExitCode.LIMIT_MISSED
        _write(report, folder, key, code)
        measured = measure(request, folder, report) if request.measure else None
    return Result(request.out, report, measured, code)


def _start(request: Request, model: ir.Model, progress: Progress | None, started: float) -> Run:
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
    notes, words = _opening_notes(request, before), {"target": request.target_text, "pipeline": request.pipeline}
    instruments = instruments_for(request.registry, words)
    return Run(request, ctx, before, ctx.fact(COST), input_bytes, deadline, notes, instruments)


def _choose(state: Run, checker: Checker, folder: Path) -> tuple[Candidate, Sequence[Limit]]:
    """Run the passes and pick what to ship; returns it with the limits that the whole pipeline missed."""
    request, ctx = state.request, state.ctx
    snapshots = _run_steps(state)
    last = candidate(state, ctx.model, state.done, checker, folder)
    best, missed = last, last.limits
    if request.decisions is not None:
        missed = request.decisions.missed if last.limits and request.decisions.missed else last.limits
    elif not keeps_quality(last.limits):
        best, missed = recover(state, snapshots, last, checker, folder)
    if best is not last:
        ctx.model, state.done = best.model, best.done
        ctx.drop_facts()
    save(state, best.model, folder, modified=any(step.modified for step in state.steps))
    if request.guard or request.decisions is not None or state.clocked:
        reverted = tuple(entry for done in state.done for entry in done.reverted)
        shown = () if missed == best.limits else tuple(missed)
        write_decisions(folder, Decisions(request.pipeline, tuple(state.left_out), reverted, state.in_time, shown))
    return best, missed


def _run_steps(state: Run) -> list[ir.Model]:
    """Run all steps that there is time for; returns the model before each that ran, if a search may need it."""
    request, ctx, decided = state.request, state.ctx, state.request.decisions
    keep = decided is None and (request.limits.max_drop is not None or request.limits.min_sqnr is not None)
    snapshots: list[ir.Model] = []
    state.in_time = decided is None or decided.in_time
    for number, step in enumerate(request.passes, 1):
        reason = decided.why_left_out(number) if decided else _out_of_time(state)
        if reason is not None:
            state.left_out.append(LeftOut(number, reason))
            continue
        if keep:
            snapshots.append(ctx.model.clone())
        if guards(state, step):
            done = run_guarded(state, number, step)
        else:
            done = run_once(state, number, step, decided.reverted_by(number) if decided else ())
        if done is not None:
            state.done = (*state.done, done)
        elif keep:
            snapshots.pop()
    return snapshots


def _out_of_time(state: Run) -> str | None:
    if not state.out_of_time():
        return None
    state.in_time = False
    return "the time limit ran out"


def _compile(
    backend: Backend, candidate: Candidate, state: Run, checker: Checker, folder: Path, options: BuildOptions
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
        runners=built.runners,
        estimates=built.estimates,
        declined=built.declined,
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
    state: Run, candidate: Candidate, missed: Sequence[Limit], built: BackendReport | None, folder: Path
) -> Report:
    request, ctx, checks = state.request, state.ctx, candidate.checks
    after = model_summary(candidate.model, ctx, candidate.file_bytes)
    data = {"--calibration": request.calibration, "--eval": request.evaluation}
    given = {option: dataset for option, dataset in data.items() if dataset is not None}
    shipped = "" if candidate.limits == missed else _shipped(state.steps)
    used = versions(request)
    return Report(
        version=used["graphopt"],
        model=request.model.name,
        digest=request.digest,
        target=request.target_text,
        pipeline=request.pipeline,
        seed=request.seed,
        before=state.before,
        after=after,
        steps=state.steps,
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


def _opening_notes(request: Request, before: ModelSummary) -> tuple[str, ...]:
    notes: list[str] = []
    if before.macs_unknown:
        count, first = len(before.macs_unknown), before.macs_unknown[0]
        notes.append(f"MACs of {count} layers are unknown, {first!r} among them: fix sizes with --shape or --dim")
    if request.calibration is not None and request.calibration.synthetic:
        notes.append("calibrated on random values, on request: activation ranges are not those of real data")
    if request.guard and not runs_here(request):
        notes.append(f"--guard: no clock here speaks for {request.target}, so no step was measured")
    return tuple(notes)


def _closing_notes(state: Run, candidate: Candidate, checks: Checks) -> list[str]:
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
