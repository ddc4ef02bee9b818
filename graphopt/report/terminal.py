"""The table on the terminal: 80 columns, plain words, no colour where nobody sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from graphopt.measured import Measured
from graphopt.report.benchmark import render_bench
from graphopt.report.data import Report
from graphopt.report.estimates import estimate_line
from graphopt.report.figures import (
    accuracy_change,
    agreement_text,
    clean,
    fidelity_text,
    limit_text,
    macs_text,
    milliseconds,
    packed_bytes,
    plural,
    quantity,
    ratio,
    reasons,
    score,
    size,
    slower,
    speedup,
)
from graphopt.report.heads import heads_text
from graphopt.report.layout import Line, columns, cut, print_lines, width_of, wrapped

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["render", "render_bench"]

_HEAD = ("", "before", "after", "change", "how")
_FIRST_COLUMN = 30
_REASONS = 8
_EXAMPLES = 3

Row = tuple[str, str, str, str, str]
"""What, before, after, change, how it was obtained."""


def render(report: Report, measured: Measured | None, console: Console, *, verbose: bool = False) -> None:
    """Print the result of a run.

    Args:
        report: What follows from the input.
        measured: Timings of this machine, if they were taken.
        console: Where to print; without a terminal behind it there are no colours.
        verbose: Name every site that was left alone.
    """
    print_lines(_lines(report, measured, width_of(console), verbose), console)


def _lines(report: Report, measured: Measured | None, width: int, verbose: bool) -> Iterator[Line]:
    yield ((clean(report.model), "bold"), (" -> ", "dim"), (clean(report.target), "bold"))
    yield from wrapped("", clean(report.pipeline) or "no passes", "", width, style="dim", indent=0)
    yield ()
    rows = [(cut(row[0], _FIRST_COLUMN), *row[1:]) for row in (*_counted(report), *_scored(report), *_timed(measured))]
    yield from columns(_HEAD, rows, left=(0, 4))
    yield ()
    for label, text, how in _checked(report):
        yield from wrapped(label, text, how, width)
    for text in filter(None, map(heads_text, report.steps)):
        yield from wrapped("attention", text, "", width)
    yield from _left_alone(report, width, verbose)
    for note in (*report.notes, *(slower(measured) if measured else ())):
        yield from wrapped("note", clean(note), "", width, style="yellow")
    for limit in report.limits:
        yield from wrapped("limit", limit_text(limit), "", width, style="" if limit.met else "red")
    yield from wrapped("verdict", clean(report.verdict), "", width, style="bold green" if report.ok else "bold red")


def _counted(report: Report) -> Iterator[Row]:
    before, after = report.before, report.after
    old, new = before.totals, after.totals
    yield _counts("file size", before.file_bytes, after.file_bytes, size)
    if (packed := packed_bytes(report)) is not None:
        yield _counts("packed file", before.file_bytes, packed, size)
    yield _counts("weights", old.weight_bytes, new.weight_bytes, size)
    yield "MACs", macs_text(before), macs_text(after), ratio(old.macs, new.macs), "counted"
    yield _counts("parameters", old.params, new.params, quantity)


def _counts(label: str, before: int, after: int, text: Callable[[int], str]) -> Row:
    return label, text(before), text(after), ratio(before, after), "counted"


def _scored(report: Report) -> Iterator[Row]:
    if (accuracy := report.accuracy) is not None:
        label = f"{clean(accuracy.metric)} ({plural(accuracy.samples, 'sample')})"
        values = (score(accuracy.metric, accuracy.before), score(accuracy.metric, accuracy.after))
        yield label, *values, accuracy_change(accuracy), accuracy.how


def _timed(measured: Measured | None) -> Iterator[Row]:
    """Latency of everything that was executed, against the original in ONNX Runtime."""
    for row in measured.rows if measured else ():
        before = measured.find("original", threads=row.threads) if measured else None
        if row.side == "result" and row.times and before and before.times:
            kind = "latency" if row.engine == before.engine else f"{clean(row.engine)} kernel"
            old, new = before.times.median, row.times.median
            label = f"{kind} ({plural(row.threads, 'thread')})"
            yield label, milliseconds(old), milliseconds(new), speedup(old, new), row.how


def _checked(report: Report) -> Iterator[tuple[str, str, str]]:
    """Fidelity, the kernel and its agreement: label, text, how it was obtained."""
    fidelity = report.fidelity
    ran = fidelity.not_run is None
    where = f"{fidelity.how} on {plural(fidelity.samples, 'sample')}, {fidelity.inputs}" if ran else ""
    yield "fidelity", fidelity_text(fidelity), where
    backend = report.backend
    if backend is None:
        return
    if backend.kernel is not None:
        yield (
            "kernel",
            f"{clean(backend.kernel)}, {size(backend.kernel_bytes)}, for {clean(backend.target)}",
            backend.how,
        )
    else:
        yield "runs", f"model.onnx with {clean(backend.backend)}", backend.how
    agreement = backend.agreement
    how = f"{backend.how} on {plural(agreement.samples, 'sample')}, {agreement.inputs}" if agreement else ""
    yield "agreement", agreement_text(backend), how
    if backend.estimates:
        yield "estimate", *estimate_line(backend.estimates)
    if backend.declined:
        names = sorted({clean(f.operator) for f in backend.declined})
        yield "host", f"runs {plural(len(backend.declined), 'node')}: {', '.join(names)}", ""
    if backend.fallbacks:
        names = sorted({clean(f.operator) for f in backend.fallbacks})
        yield "fallback", f"ONNX Runtime runs {plural(len(backend.fallbacks), 'node')}: {', '.join(names)}", ""


def _left_alone(report: Report, width: int, verbose: bool) -> Iterator[Line]:
    """Why sites were left alone, with counts; some of their names, all with `verbose`."""
    found = reasons(report)
    if not found:
        return
    label = "left alone"
    for reason in found if verbose else found[:_REASONS]:
        names = [clean(site) for site in (reason.sites if verbose else reason.sites[:_EXAMPLES])]
        more = [] if len(names) == len(reason.sites) else ["..."]
        text = f"{len(reason.sites)} x {clean(reason.step)}: {clean(reason.reason)}"
        yield from wrapped(label, text, ", ".join(names + more), width)
        label = ""
    if not verbose and len(found) > _REASONS:
        yield from wrapped(
            "", f"{plural(len(found) - _REASONS, 'more reason')}; -v and report.html name all", "", width
        )
