"""The benchmark's table on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from graphopt.measured import Breakdown, Measured, Measurement
from graphopt.report.figures import clean, milliseconds, plural, rate_texts, ratio, runs_text, size, spread, untimed
from graphopt.report.layout import Line, columns, cut, print_lines, width_of, wrapped

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["render_bench"]

_HEAD = ("", "engine", "median", "spread", "speedup", "memory", "deployed", "size")
_KERNELS_HEAD = ("kernel", "runner", "calls", "time", "GOP/s", "of peak", "computes")
_SHORTEST_NAME = 12
_MOST_KERNELS = 10


def render_bench(measured: Measured, console: Console) -> None:
    """Print a benchmark: timed rows by number of threads, then what ran without a clock, then the machine."""
    print_lines(_lines(measured, width_of(console)), console)


def _lines(measured: Measured, width: int) -> Iterator[Line]:
    for threads in sorted({row.threads for row in measured.rows if row.times}):
        timed = [row for row in measured.rows if row.threads == threads and row.times]
        yield ((f"executed, {plural(threads, 'thread')}", "bold"),)
        first = measured.find("original", threads=threads)
        rows = [_row(row, first) for row in timed]
        others = sum(max(len(row[i]) for row in (_HEAD, *rows)) + 2 for i in range(1, len(_HEAD)))
        room = max(_SHORTEST_NAME, width - others)
        yield from columns(_HEAD, [(cut(row[0], room), *row[1:]) for row in rows], left=(0, 1))
        yield ()
    for row in measured.rows:
        if row.times is None:
            text = f"{clean(row.engine)} on {clean(row.subject)}, {plural(row.threads, 'thread')}: {untimed(row)}"
            yield from wrapped(row.how, text, "no time", width, indent=15)
    for part in measured.breakdowns:
        yield from _breakdown(part, width)
    if advice := measured.advice():
        yield from wrapped("advice", advice, "executed", width)
    machine = measured.machine
    yield from wrapped("machine", f"{clean(machine.cpu)}, {plural(machine.cores, 'core')}, {machine.system}", "", width)
    if runs := runs_text(measured):
        yield from wrapped("runs", runs, "", width)


def _breakdown(part: Breakdown, width: int) -> Iterator[Line]:
    """The dearest kernels, and what the others take together."""
    yield ((f"kernels of {clean(part.subject)}, {part.engine}, {plural(part.threads, 'thread')}", "bold"),)
    rows = [
        (clean(k.kernel), k.runner, f"{k.calls}", f"{100 * k.share:.1f} %", *rate_texts(k), clean(k.sites))
        for k in part.kernels[:_MOST_KERNELS]
    ]
    rest = part.kernels[_MOST_KERNELS:]
    if rest:
        share = f"{100 * sum(k.share for k in rest):.1f} %"
        rows.append((plural(len(rest), "more kernel"), "", f"{sum(k.calls for k in rest)}", share, "", "", ""))
    others = sum(max(len(row[i]) for row in (_KERNELS_HEAD, *rows)) + 2 for i in range(len(_KERNELS_HEAD) - 1))
    room = max(_SHORTEST_NAME, width - others)
    yield from columns(_KERNELS_HEAD, [(*row[:-1], cut(row[-1], room)) for row in rows], left=(0, 1, 6))
    yield ()


def _row(row: Measurement, first: Measurement | None) -> tuple[str, ...]:
    if row.times is None:
        raise ValueError(f"{row.subject} was not timed")
    speed = left = ""
    if first is not None and first.times is not None and row is not first:
        speed, left = ratio(row.times.median, first.times.median), ratio(first.file_bytes, row.file_bytes)
    memory = "" if row.peak_memory_mb is None else f"{row.peak_memory_mb:,.0f} MB"
    figures = (milliseconds(row.times.median), spread(row.times), speed, memory, size(row.file_bytes), left)
    return clean(row.subject), clean(row.engine), *figures
