"""The table on the terminal: 80 columns, plain words, no colour where nobody sees it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from graphopt.measured import Measured
from graphopt.report.data import Report
from graphopt.report.figures import (
    Reason,
    accuracy_change,
    agreement_text,
    clean,
    fidelity_text,
    limit_text,
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
        verbose: Name every layer that was left alone, and every operator's count.
    """
    _title(report, console)
    _print_rows([*_counted(report), *_scored(report), *_timed(measured)], console)
    for label, text, how in _checked(report):
        _line(console, label, text, how)
    _left_alone(reasons(report), console, verbose=verbose)
    for note in report.notes:
        _line(console, "note", clean(note), "", "yellow")
    for limit in report.limits:
        _line(console, "limit", limit_text(limit), "", "" if limit.met else "red")
    _line(console, "verdict", clean(report.verdict), "", "green" if report.ok else "red")


def _title(report: Report, console: Console) -> None:
    from rich.text import Text

    parts = ((clean(report.model), "bold"), " -> ", (clean(report.target), "bold"), f"  {clean(report.pipeline)}")
    console.print(Text.assemble(*parts), soft_wrap=False)
    console.print()


def _counted(report: Report) -> Iterator[Row]:
    before, after = report.before, report.after
    yield _size_row("file size", before.file_bytes, after.file_bytes)
    yield _size_row("weights", before.totals.weight_bytes, after.totals.weight_bytes)
    macs = (before.totals.macs, after.totals.macs)
    lower = "at least " if before.macs_unknown or after.macs_unknown else ""
    yield "MACs", *(f"{lower}{quantity(m)}" for m in macs), ratio(*macs), "counted"  # type: ignore[misc]
    params = (before.totals.params, after.totals.params)
    yield "parameters", quantity(params[0]), quantity(params[1]), ratio(*params), "counted"


def _size_row(label: str, before: int, after: int) -> Row:
    return label, size(before), size(after), ratio(before, after), "counted"


def _scored(report: Report) -> Iterator[Row]:
    if (accuracy := report.accuracy) is not None:
        label = f"{clean(accuracy.metric)} ({plural(accuracy.samples, 'sample')})"
        values = (score(accuracy.metric, accuracy.before), score(accuracy.metric, accuracy.after))
        yield label, *values, accuracy_change(accuracy), accuracy.how


def _timed(measured: Measured | None) -> Iterator[Row]:
    """Latency in ONNX Runtime; only rows that were executed carry times."""
    for threads in sorted({row.threads for row in measured.rows}) if measured else ():
        before, after = (measured.find(side, threads=threads) for side in ("original", "result"))  # type: ignore[union-attr]
        if before and after and before.times and after.times:
            label = f"latency ({plural(threads, 'thread')})"
            values = (before.times.median, after.times.median)
            yield label, f"{values[0]:.3g} ms", f"{values[1]:.3g} ms", speedup(*values), before.how


def _print_rows(rows: list[Row], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("", no_wrap=True, style="bold")
    for head in ("before", "after", "change"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("how", no_wrap=True, style="dim")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
    console.print()


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
        yield "kernel", f"{clean(backend.kernel)}, {size(backend.kernel_bytes)}, {clean(backend.target)}", backend.how
    else:
        yield "runs", f"model.onnx with {clean(backend.backend)}", backend.how
    agreement = backend.agreement
    how = f"{backend.how} on {plural(agreement.samples, 'sample')}, {agreement.inputs}" if agreement else ""
    yield "agreement", agreement_text(backend), how
    if backend.fallbacks:
        names = sorted({clean(f.operator) for f in backend.fallbacks})
        yield "fallback", f"ONNX Runtime runs {plural(len(backend.fallbacks), 'node')}: {', '.join(names)}", ""


def _line(console: Console, label: str, text: str, how: str = "", style: str = "") -> None:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(width=10, no_wrap=True)
    grid.add_column(overflow="fold")
    body = Text(text, style=style)
    if how:
        body.append(f" ({how})", style="dim")
    grid.add_row(Text(label, style="bold"), body)
    console.print(grid)


def _left_alone(found: tuple[Reason, ...], console: Console, *, verbose: bool) -> None:
    """Print why sites were left alone, with counts; their names with `verbose`."""
    if not found:
        return
    total = sum(len(reason.sites) for reason in found)
    _line(console, "left alone", f"{plural(total, 'site')}, each pass on its own:")
    for reason in found if verbose else found[:_REASONS]:
        names = [clean(site) for site in (reason.sites if verbose else reason.sites[:_EXAMPLES])]
        more = "" if len(names) == len(reason.sites) else ", ..."
        _line(console, "", f"{len(reason.sites)} x {reason.step}: {clean(reason.reason)}", f"{', '.join(names)}{more}")
    if not verbose and len(found) > _REASONS:
        _line(console, "", f"and {plural(len(found) - _REASONS, 'reason')} more; -v and report.html name all")
