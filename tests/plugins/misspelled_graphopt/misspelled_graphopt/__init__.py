"""Implements a hook that does not exist."""

from __future__ import annotations

from graphopt.markers import hookimpl
from graphopt.pass_base import Pass


@hookimpl
def graphopt_passses() -> list[type[Pass]]:
    return []
