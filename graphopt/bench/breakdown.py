"""From the times of a compiled model's steps to those of its kernels."""

from __future__ import annotations

from graphopt.backend_base import Profile, StepTime
from graphopt.measured import Breakdown, KernelTime

__all__ = ["breakdown"]


def breakdown(profile: Profile, subject: str, engine: str, threads: int) -> Breakdown:
    """Add up what calls of the same kernel took; the dearest kernel first."""
    total = sum(step.seconds for step in profile.steps)
    groups: dict[tuple[str, str], list[StepTime]] = {}
    for step in profile.steps:
        groups.setdefault((step.runner, step.kernel), []).append(step)
    found: list[KernelTime] = []
    for (runner, kernel), steps in groups.items():
        seconds, operations = sum(s.seconds for s in steps), sum(s.operations for s in steps)
        arithmetic = steps[0].arithmetic
        rate = operations / seconds if arithmetic and seconds else None
        peak = profile.peaks.get(arithmetic, 0.0) * threads
        found.append(
            KernelTime(
                runner, kernel, steps[0].sites, len(steps), seconds * 1e3, seconds / total if total else 0.0,
                None if rate is None else rate / 1e9, rate / peak if rate is not None and peak else None,
            )
        )  # fmt: skip
    return Breakdown(subject, engine, threads, tuple(sorted(found, key=lambda k: (-k.time, k.kernel))))
