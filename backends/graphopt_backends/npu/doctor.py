"""Lines of `graphopt doctor` about what the extra `graphopt[npu]` brings."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from graphopt.backend_base import Finding

__all__ = ["EXTRA", "findings"]

EXTRA = "pip install 'graphopt[npu]'"

_TOOLS = (
    ("Vela", "ethosu", "ethos-u-vela", "nothing is compiled"),
    ("TOSA serializer", "tosa_serializer", "tosa-tools", "nothing is compiled"),
    ("TOSA reference model", "tosa_reference_model", "tosa-tools", "nothing that is compiled can be run"),
)
"""What it is, the module to look for, the distribution that brings it, and what does not work without."""


def findings() -> Sequence[Finding]:
    """Say of each tool which version there is, or what does not work without it; nothing is imported."""
    return tuple(_finding(*tool) for tool in _TOOLS)


def _finding(subject: str, module: str, distribution: str, lost: str) -> Finding:
    if importlib.util.find_spec(module) is None:
        return Finding(subject, f"missing: {lost}", ok=False, hint=EXTRA)
    try:
        return Finding(subject, f"{version(distribution)} ({distribution})")
    except PackageNotFoundError:
        return Finding(subject, f"of unknown version: {distribution} is not installed with pip", hint=EXTRA)
