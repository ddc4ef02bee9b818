"""The benchmark's table on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from graphopt.measured import Measured, Measurement
from graphopt.report.figures import clean, milliseconds, plural, ratio, runs_text, size, spread, untimed
from graphopt.report.layout import Line, columns, cut, print_lines, width_of, wrapped

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["render_bench"]

_HEAD = ("", "engine", "median", "spread", "speedup", "memory", "deployed", "size")
_SHORTEST_NAME = 12


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
    machine = measured.machine
    yield from wrapped("machine", f"{clean(machine.cpu)}, {plural(machine.cores, 'core')}, {machine.system}", "", width)
    if runs := runs_text(measured):
        yield from wrapped("runs", runs, "", width)


def _row(row: Measurement, first: Measurement | None) -> tuple[str, ...]:
    if row.times is None:
        raise ValueError(f"{row.subject} was not timed")
    speed = left = ""
    if first is not None and first.times is not None and row is not first:
        speed, left = ratio(row.times.median, first.times.median), ratio(first.file_bytes, row.file_bytes)
    memory = "" if row.peak_memory_mb is None else f"{row.peak_memory_mb:,.0f} MB"
    figures = (milliseconds(row.times.median), spread(row.times), speed, memory, size(row.file_bytes), left)
    return clean(row.subject), clean(row.engine), *figures
