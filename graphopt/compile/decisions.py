"""What a clock decided, as a record that replays: `decisions.json`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from graphopt.bundle import write_text
from graphopt.errors import UsageError
from graphopt.records import from_text, to_text
from graphopt.report.data import Limit

__all__ = ["DECISIONS", "Decisions", "LeftOut", "Reverted", "read_decisions", "write_decisions"]

DECISIONS = "decisions.json"


@dataclass(frozen=True)
class LeftOut:
    """A step, counted from 1, that was left out, and why."""

    step: int
    reason: str


@dataclass(frozen=True)
class Reverted:
    """Sites that a step, counted from 1, left alone, and why."""

    step: int
    sites: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Decisions:
    """All that was decided on a pipeline; a replay does the same, and looks neither at the clock nor for better.

    Attributes:
        pipeline: The pipeline it holds for.
        left_out: Steps that did not run.
        reverted: Sites that steps left alone.
        in_time: No step was left out for lack of time.
        missed: Limits as the whole pipeline left them, where something else was shipped.
    """

    pipeline: str
    left_out: tuple[LeftOut, ...] = ()
    reverted: tuple[Reverted, ...] = ()
    in_time: bool = True
    missed: tuple[Limit, ...] = ()

    def why_left_out(self, number: int) -> str | None:
        """Why a step was left out; None if it ran."""
        return next((entry.reason for entry in self.left_out if entry.step == number), None)

    def reverted_by(self, number: int) -> tuple[Reverted, ...]:
        """What a step left alone."""
        return tuple(entry for entry in self.reverted if entry.step == number)


def write_decisions(folder: Path, decisions: Decisions) -> None:
    """Write decisions into a bundle."""
    order = sorted(decisions.left_out, key=lambda entry: entry.step)
    write_text(folder / DECISIONS, to_text(replace(decisions, left_out=tuple(order))))


def read_decisions(path: Path, pipeline: str) -> Decisions:
    """Read decisions from a file.

    Raises:
        UsageError: The file is no record of decisions, or was made for another pipeline.
    """
    try:
        found = from_text(Decisions, path.read_text("utf8"))
    except FileNotFoundError as e:
        raise UsageError(f"--decisions {path}", "no such file") from e
    except (OSError, ValueError) as e:
        raise UsageError(f"--decisions {path}", "not a decisions.json", "take one from a bundle") from e
    if found.pipeline != pipeline:
        raise UsageError(f"--decisions {path}", f"made for the pipeline {found.pipeline!r}", "decide anew with --guard")
    return found
