"""Asks a hook for an argument that it does not have."""

from __future__ import annotations

from graphopt.markers import hookimpl


@hookimpl
def graphopt_calibration(url: str) -> None:
    return None
