"""`report.json`: the report as text, and back."""

from __future__ import annotations

from graphopt.errors import UsageError
from graphopt.records import from_text, to_text
from graphopt.report.data import Report

__all__ = ["from_json", "to_json"]


def to_json(report: Report) -> str:
    """Write a report as JSON; the same report gives the same bytes."""
    return to_text(report)


def from_json(text: str) -> Report:
    """Read what `to_json` wrote.

    Raises:
        UsageError: The text is not a report.
    """
    try:
        return from_text(Report, text)
    except ValueError as e:
        raise UsageError("report.json", f"not a report: {e}", "build again with --force") from e
