"""The built-in backends and their targets, registered the way any plugin registers its own."""

from __future__ import annotations

from graphopt.backend_base import Backend
from graphopt.markers import hookimpl
from graphopt.targets import Target
from graphopt_backends import arm, ort, x86
from graphopt_backends.npu import targets as npu
from graphopt_backends.npu.backend import NpuBackend

__all__ = ["graphopt_backends", "graphopt_targets"]


@hookimpl
def graphopt_backends() -> list[Backend]:
    """Return the built-in backends."""
    return [ort.OrtBackend(), x86.X86Backend(), arm.ArmBackend(), NpuBackend()]


@hookimpl
def graphopt_targets() -> list[Target]:
    """Return the built-in targets."""
    return [*ort.TARGETS, *x86.TARGETS, *arm.TARGETS, *npu.TARGETS]
