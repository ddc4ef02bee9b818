"""The built-in backends and their targets, registered the way any plugin registers its own."""

from __future__ import annotations

from graphopt.backend_base import Backend
from graphopt.markers import hookimpl
from graphopt.targets import Target

__all__ = ["graphopt_backends", "graphopt_targets"]


@hookimpl
def graphopt_backends() -> list[Backend]:
    """Return the built-in backends."""
    return []


@hookimpl
def graphopt_targets() -> list[Target]:
    """Return the built-in targets."""
    return []
