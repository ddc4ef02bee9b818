"""The table on the terminal: 80 columns, plain words, no colour where nobody sees it."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from graphopt.measured import Measured
from graphopt.report.data import Report
from graphopt.report.figures import (
    accuracy_change,
    agreement_text,
    clean,
    fidelity_text,
    limit_text,
    macs_text,
    milliseconds,
    plural,
    quantity,
    ratio,
    reasons,
    score,
    size,
    speedup,
)

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["render"]

_WIDEST = 110
_LABEL = 12
_FIRST_COLUMN = 30
_REASONS = 8
_EXAMPLES = 3

Row = tuple[str, str, str, str, str]
"""What, before, after, change, how it was obtained."""

Line = Sequence[tuple[str, str]]
"""Pieces of one line, each with its style."""


def render(report: Report, measured: Measured | None, console: Console, *, verbose: bool = False) -> None:
    """Print the result of a run.

    Args:
        report: What follows from the input.
        measured: Timings of this machine, if they were taken.
        console: Where to print; without a terminal behind it there are no colours.
        verbose: Name every site that was left alone.
    """
    from rich.text import Text

    width = max(40, min(console.width, _WIDEST))
    for line in _lines(report, measured, width, verbose):
        text = Text.assemble(*line)
        text.rstrip()
        console.print(text, soft_wrap=True)


def _lines(report: Report, measured: Measured | None, width: int, verbose: bool) -> Iterator[Line]:
    yield ((clean(report.model), "bold"), (" -> ", "dim"), (clean(report.target), "bold"))
    yield from _wrapped("", clean(report.pipeline) or "no passes", "", width, style="dim", indent=0)
    yield ()
    yield from _table([*_counted(report), *_scored(report), *_timed(measured)])
    yield ()
    for label, text, how in _checked(report):
        yield from _wrapped(label, text, how, width)
    yield from _left_alone(report, width, verbose)
    for note in report.notes:
        yield from _wrapped("note", clean(note), "", width, style="yellow")
    for limit in report.limits:
        yield from _wrapped("limit", limit_text(limit), "", width, style="" if limit.met else "red")
    yield from _wrapped("verdict", clean(report.verdict), "", width, style="bold green" if report.ok else "bold red")


def _counted(report: Report) -> Iterator[Row]:
    before, after = report.before, report.after
    old, new = before.totals, after.totals
    yield _counts("file size", before.file_bytes, after.file_bytes, size)
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
    """Latency in ONNX Runtime; only rows that were executed carry times."""
    if measured is None:
        return
    for threads in sorted({row.threads for row in measured.rows}):
        before, after = measured.find("original", threads=threads), measured.find("result", threads=threads)
        if before and after and before.times and after.times:
            label = f"latency ({plural(threads, 'thread')})"
            old, new = before.times.median, after.times.median
            yield label, milliseconds(old), milliseconds(new), speedup(old, new), after.how


def _table(rows: Sequence[Row]) -> Iterator[Line]:
    rows = [(_cut(row[0]), *row[1:]) for row in rows]
    head = ("", "before", "after", "change", "how")
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        cells = [row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3))]
        styles = ("dim",) * 3 if row is head else ("bold", "", "dim")
        yield (cells[0], styles[0]), ("  " + "  ".join(cells[1:]), styles[1]), ("  " + row[4], styles[2])


def _cut(label: str) -> str:
    return label if len(label) <= _FIRST_COLUMN else f"{label[: _FIRST_COLUMN - 3]}..."


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
        yield from _wrapped(label, text, ", ".join(names + more), width)
        label = ""
    if not verbose and len(found) > _REASONS:
        yield from _wrapped(
            "", f"{plural(len(found) - _REASONS, 'more reason')}; -v and report.html name all", "", width
        )


def _wrapped(label: str, text: str, how: str, width: int, *, style: str = "", indent: int = _LABEL) -> Iterator[Line]:
    """A label and beside it the text, with how it was obtained in brackets after it."""
    whole = f"{text} ({how})" if how else text
    parts = textwrap.wrap(whole, width - indent, break_on_hyphens=False) or [""]
    plain = len(text)
    for i, part in enumerate(parts):
        head = (label if i == 0 else "").ljust(indent)
        cut = max(0, min(len(part), plain))
        yield (head, "bold"), (part[:cut], style), (part[cut:], "dim")
        plain -= len(part) + 1
