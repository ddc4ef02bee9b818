"""Writes a table of results with what is needed to make it again: command, date, machine, versions."""

from __future__ import annotations

import datetime as dt
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from graphopt.bench import this_machine

RESULTS = Path(__file__).parent / "results"


def write(
    name: str,
    title: str,
    head: Sequence[str],
    rows: Sequence[Sequence[object]],
    notes: str = "",
    *,
    quiet: bool = False,
) -> None:
    """Write `results/<name>.md` and, unless `quiet`, print it."""
    machine = this_machine()
    versions = ", ".join(f"{key} {value}" for key, value in machine.versions.items())
    command = shlex.join(["python", *sys.argv])
    lines = [
        f"# {title}",
        "",
        f"- command: `{command}`",
        f"- date: {dt.datetime.now(dt.UTC):%Y-%m-%d}",
        f"- machine: {machine.cpu}, {machine.cores} cores, {machine.system}",
        f"- versions: {versions}",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows),
        *(["", notes] if notes else []),
    ]
    RESULTS.mkdir(exist_ok=True)
    text = "\n".join(lines) + "\n"
    (RESULTS / f"{name}.md").write_text(text, "utf8")
    if not quiet:
        print(text)
