"""What can go wrong, how it is said, and the exit code that a build system sees."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum
from typing import ClassVar

__all__ = [
    "BackendError",
    "DataError",
    "ExitCode",
    "GraphoptError",
    "ModelError",
    "OptionError",
    "PassError",
    "PluginError",
    "UsageError",
    "WriteError",
    "nearest",
]

_SHOWN = 20


class ExitCode(IntEnum):
    """Exit codes of the command, stable across releases."""

    OK = 0
    PASS_FAILED = 1
    USAGE = 2
    PLUGIN = 3
    LIMIT_MISSED = 4
    BACKEND = 5
    CANNOT_WRITE = 6
    INTERNAL = 70
    INTERRUPTED = 130


class GraphoptError(Exception):
    """A failure with a subject, a fact and, where there is one, a way out; printed as one line.

    Args:
        subject: What the error is about: a file, an option (`quant.bits`), a plugin.
        fact: What is wrong with it, lower case, no full stop.
        hint: What the user can do about it.
    """

    exit_code: ClassVar[ExitCode] = ExitCode.USAGE

    def __init__(self, subject: str, fact: str, hint: str | None = None) -> None:
        super().__init__(subject, fact, hint)
        self.subject = subject
        self.fact = fact
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.subject}: {self.fact}"
        return " ".join((f"{text}; {self.hint}" if self.hint else text).split())


class UsageError(GraphoptError):
    """The command cannot be carried out as given."""


class OptionError(UsageError):
    """An option is unknown, of the wrong type or out of range."""


class ModelError(UsageError):
    """The model cannot be used: unreadable, damaged or outside what graphopt keeps intact."""


class DataError(UsageError):
    """Calibration or evaluation data does not fit the model."""


class PassError(GraphoptError):
    """A pass could not do what was asked of it, or broke its contract."""

    exit_code = ExitCode.PASS_FAILED


class PluginError(GraphoptError):
    """A plugin is broken or clashes with another."""

    exit_code = ExitCode.PLUGIN


class BackendError(GraphoptError):
    """A backend cannot compile the model, or lacks a tool on this machine."""

    exit_code = ExitCode.BACKEND


class WriteError(GraphoptError):
    """The output could not be written."""

    exit_code = ExitCode.CANNOT_WRITE


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the way out for an unknown name: the closest known one, or the first of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
    return f"known: {', '.join(known[:_SHOWN])}{more}" if known else "none is known"
