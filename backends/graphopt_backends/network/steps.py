"""The steps of a compiled network: calls of kernels on memory that was laid out before."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BEHIND", "BETWEEN", "DONE", "ENTRY", "PEAK", "TAKE", "Place", "Step"]

ENTRY = "graphopt_entry"
"""Name of the entry function: void(parameters..., team, int32 task, int32 tasks)."""

TAKE = "graphopt_take"
"""Function of the runtime: int32(team, step, part), whether this thread computes a part of a step."""

DONE = "graphopt_done"
"""Function of the runtime that is told of every part: void(team, step)."""

BETWEEN = "graphopt_between"
"""Function of the runtime that is told between two steps of one thread: void(team, step)."""

BEHIND = "graphopt_behind"
"""Function of the runtime that waits for all parts of a step: void(team, step, parts)."""

PEAK = "graphopt_peak_"
"""What the names of functions begin with that measure the CPU; behind it stands the arithmetic."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: an offset in bytes in a parameter of the entry function."""

    parameter: str
    offset: int = 0


@dataclass(frozen=True)
class Step:
    """A call of a kernel.

    Attributes:
        kernel: Name of its function.
        places: Its pointers, in order.
        shared: All tasks compute a part of it; else the first computes it alone.
        scratch: Bytes of the workspace that each task needs for itself, the kernel's last pointer; 0: it has none.
        scratch_at: Where the first task's part of it begins.
        operations: How much arithmetic it is.
        sites: Names of the nodes that it computes.
        arithmetic: `float` or `integer` where it multiplies and adds most of the time; else empty.
    """

    kernel: str
    places: tuple[Place, ...]
    shared: bool
    scratch: int = 0
    scratch_at: int = 0
    operations: int = 0
    sites: tuple[str, ...] = ()
    arithmetic: str = ""
