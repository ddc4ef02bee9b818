"""What goes where: the answer to stdout, everything else to stderr."""

from __future__ import annotations

import logging
import sys
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from graphopt.pass_base import Progress as ProgressFunction

__all__ = ["log_to_stderr", "out_console", "progress_on_stderr"]


def out_console() -> Console:
    """Console for the answer."""
    return Console(file=sys.stdout, highlight=False, soft_wrap=True)


def log_to_stderr(verbose: int, *, quiet: bool) -> None:
    """Send graphopt's log to stderr: warnings, with -v what every step does, with -vv everything."""
    level = logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING, force=True)
    for name in ("graphopt", "graphopt_passes", "graphopt_backends"):
        logging.getLogger(name).setLevel(level)
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)


@contextmanager
def progress_on_stderr(*, quiet: bool) -> Generator[ProgressFunction]:
    """Give the function that passes wrap their loops in: bars on a terminal, a line per loop elsewhere."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield _silent if quiet else _lines
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:

        def progress(items: Iterable[Any], label: str) -> Iterator[Any]:
            total = len(items) if hasattr(items, "__len__") else None  # type: ignore[arg-type]
            task = bars.add_task(label, total=total)
            for item in items:
                yield item
                bars.advance(task)
            bars.remove_task(task)

        yield progress


def _lines(items: Iterable[Any], label: str) -> Iterator[Any]:
    print(f"{label} ...", file=sys.stderr, flush=True)  # noqa: T201  progress belongs on stderr
    yield from items


def _silent(items: Iterable[Any], label: str) -> Iterator[Any]:  # noqa: ARG001
    yield from items
