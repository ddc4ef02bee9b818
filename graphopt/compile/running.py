"""Runs the steps of a pipeline one by one, and makes candidates of what they leave."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from shutil import copyfile

import onnx_ir as ir

from graphopt.analyses import Cost
from graphopt.bench.regions import SLOWER
from graphopt.compile.checks import Checker
from graphopt.compile.clock import runs_here, slowdown, slowed
from graphopt.compile.decisions import LeftOut, Reverted
from graphopt.compile.limits import Candidate, Done, judge
from graphopt.compile.request import Request
from graphopt.compile.summary import step_report, totals
from graphopt.instruments import Instrument
from graphopt.model_io import external_files, save_model
from graphopt.pass_base import Change, Context, Pass
from graphopt.report.data import ModelSummary, StepReport
from graphopt.runner import StepRun, run_step

__all__ = ["Run", "candidate", "guards", "run_guarded", "run_once", "save"]

_NAMED = 6  # layers named in a note; the table of layers has them all
_log = logging.getLogger("graphopt")


@dataclass
class Run:
    """A compile run on its way: what every stage needs from those before it."""

    request: Request
    ctx: Context
    before: ModelSummary
    cost: Cost
    input_bytes: int
    deadline: float | None
    opening_notes: tuple[str, ...]
    instruments: Sequence[Instrument] = ()
    done: tuple[Done, ...] = ()
    left_out: list[LeftOut] = field(default_factory=list[LeftOut])
    written: tuple[Path, ...] = ()
    in_time: bool = True
    clocked: bool = False

    @property
    def steps(self) -> tuple[StepReport, ...]:
        """Reports of the steps that ran."""
        return tuple(done.report for done in self.done)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes so far, in the order of the steps."""
        numbered = [(done.number, note) for done in self.done for note in done.notes]
        together: dict[str, list[int]] = {}
        for entry in sorted(self.left_out, key=lambda entry: entry.step):
            together.setdefault(entry.reason, []).append(entry.step)
        for reason, steps in together.items():
            names = ", ".join(str(self.request.passes[step - 1]) for step in steps)
            numbered.append((steps[0], f"{names} left out: {reason}"))
        return (*self.opening_notes, *(note for _, note in sorted(numbered, key=lambda pair: pair[0])))

    def out_of_time(self) -> bool:
        """Whether the time limit has run out; then what follows hangs on the clock."""
        late = self.deadline is not None and time.monotonic() > self.deadline
        self.clocked |= late
        return late

    def start_from(self, model: ir.Model) -> None:
        """Go on with a copy of another model."""
        self.ctx.model = model.clone()
        self.ctx.drop_facts()


def run_once(state: Run, number: int, step: Pass, reverted: Sequence[Reverted] = ()) -> Done:
    """Run one step on the model in place.

    Args:
        state: The run.
        number: Place of the step in the pipeline, counted from 1.
        step: The step as the user asked for it.
        reverted: Sites that it leaves alone.
    """
    request, ctx = state.request, state.ctx
    sites = [site for entry in reverted for site in entry.sites]
    lighter = step.without(sites) if sites else step
    ran = run_step(lighter, number, ctx, state.instruments, seed=request.seed, check=request.check != "none")
    changes = tuple(_with_reason(change, reverted) for change in ran.result.changes)
    ran = replace(ran, step=step, result=replace(ran.result, changes=changes))
    notes = (*_step_notes(request, ran), *(_reverted_note(step, entry) for entry in reverted))
    return Done(number, step, step_report(ran, totals(ctx.model, ctx)), tuple(notes), tuple(reverted))


def run_guarded(state: Run, number: int, step: Pass) -> Done | None:
    """Run one step; parts that it makes slower stay as they were, all of them if the model is slower even so.

    Returns:
        What was done; None if the step was left out.
    """
    request, ctx = state.request, state.ctx
    before = ctx.model.clone()
    done = run_once(state, number, step)
    if not done.report.modified:
        return done
    slow = {layer for region in slowed(request, before, ctx.model) for layer in region.layers}
    changed = [change.site for change in done.report.changes if change.done and change.site in slow]
    sites = step.revertible(before, list(dict.fromkeys(changed)))
    if sites:
        _log.info("%s: %d layers became slower and are left alone", step, len(sites))
        state.start_from(before)
        where = "" if request.target.backend in (None, "ort") else " in ONNX Runtime"  # its kernels are not timed
        done = run_once(state, number, step, [Reverted(number, sites, f"slower than before otherwise{where}")])
    if done.report.modified and slowdown(request, before, ctx.model) > SLOWER:
        state.start_from(before)
        state.left_out.append(LeftOut(number, "it made the model slower"))
        return None
    return done


def guards(state: Run, step: Pass) -> bool:
    """Whether a step is guarded: asked for, worth it, and possible on this machine."""
    return state.request.guard and step.lossy and runs_here(state.request)


def candidate(state: Run, model: ir.Model, done: Sequence[Done], checker: Checker, folder: Path) -> Candidate:
    """Write a model and compare it with the original."""
    size = save(state, model, folder, modified=any(one.report.modified for one in done))
    checks = checker.check(folder / "model.onnx")
    limits = judge(state.request.limits, checks, file_bytes=size, input_bytes=state.input_bytes, in_time=state.in_time)
    return Candidate(model, tuple(done), size, checks, limits)


def save(state: Run, model: ir.Model, folder: Path, *, modified: bool) -> int:
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


def _with_reason(change: Change, reverted: Iterable[Reverted]) -> Change:
    """A site that was left alone on our word ends with our reason."""
    if change.done:
        return change
    reason = next((entry.reason for entry in reverted if change.site in entry.sites), None)
    return change if reason is None else Change.skipped(change.site, reason)


def _step_notes(request: Request, ran: StepRun) -> Iterable[str]:
    if ran.unchecked:
        yield f"{ran.step}: equal outputs are promised but were not checked: {ran.unchecked}"
    yield from (f"{ran.step.name}: {note}" for note in ran.result.notes)
    if ran.step.without_data and request.calibration is None:
        yield f"no --calibration: {ran.step.without_data}"


def _reverted_note(step: Pass, entry: Reverted) -> str:
    count = len(entry.sites)
    rest = f" and {count - _NAMED} more" if count > _NAMED else ""
    layers = "1 layer" if count == 1 else f"{count} layers"
    return f"{step.name}: {layers} left alone, {entry.reason}: {', '.join(entry.sites[:_NAMED])}{rest}"
