"""Limits the user set, and which candidate to ship when the last one misses them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.compile.checks import Checks
from graphopt.compile.decisions import Reverted
from graphopt.pass_base import Pass
from graphopt.recipe import Limits, seconds
from graphopt.report.data import Limit, StepReport

__all__ = ["Candidate", "Done", "better", "judge", "keeps_quality", "shortfall", "verdict"]

_QUALITY = ("--max-drop", "--min-sqnr")


@dataclass(frozen=True)
class Done:
    """One step that ran.

    Attributes:
        number: Its place in the pipeline, counted from 1.
        step: The step as the user asked for it.
        report: What it did.
        notes: What the user should not miss.
        reverted: Sites that it left alone on our word.
    """

    number: int
    step: Pass
    report: StepReport
    notes: tuple[str, ...] = ()
    reverted: tuple[Reverted, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """The model after some of the steps.

    Attributes:
        model: The model.
        done: The steps it went through.
        file_bytes: Size on disk.
        checks: How far it is from the original.
        limits: Every limit, met or missed.
    """

    model: ir.Model
    done: tuple[Done, ...]
    file_bytes: int
    checks: Checks
    limits: tuple[Limit, ...]


def judge(limits: Limits, checks: Checks, *, file_bytes: int, input_bytes: int, in_time: bool) -> tuple[Limit, ...]:
    """Compare a candidate with the limits. What could not be measured counts as missed."""
    found: list[Limit] = []
    if limits.max_drop is not None:
        drop = _drop(checks)
        unit = "points" if checks.accuracy is None or checks.accuracy.higher_is_better else "%"
        found.append(Limit("--max-drop", limits.max_drop, drop, drop is not None and drop <= limits.max_drop, unit))
    if limits.min_sqnr is not None:
        worst = min((output.sqnr_db for output in checks.fidelity.outputs), default=None)
        met = worst is not None and worst >= limits.min_sqnr
        found.append(Limit("--min-sqnr", limits.min_sqnr, worst, met, "dB", "at least"))
    if limits.max_size is not None:
        ratio = file_bytes / input_bytes
        found.append(Limit("--max-size", limits.max_size, ratio, ratio <= limits.max_size, "x"))
    if limits.time_limit is not None:
        found.append(Limit("--time-limit", seconds(limits.time_limit, "--time-limit"), None, in_time, "s"))
    return tuple(found)


def keeps_quality(limits: Sequence[Limit]) -> bool:
    """No limit on what the outputs may lose is missed."""
    return all(limit.met for limit in limits if limit.name in _QUALITY)


def shortfall(limits: Sequence[Limit]) -> float:
    """By how much the outputs miss their limits, to tell a better candidate from a worse one; 0 or less: by nothing.

    Points and percent count as they are, decibels as a tenth of theirs; the limit missed most counts.
    """
    found = [-math.inf]
    for limit in limits:
        if limit.name == "--max-drop":
            found.append(math.inf if limit.got is None else limit.got - limit.wanted)
        elif limit.name == "--min-sqnr":
            found.append(math.inf if limit.got is None else (limit.wanted - limit.got) / 10)
    return max(found)


def better(a: Candidate, b: Candidate) -> Candidate:
    """The candidate to ship: quality within the limits first, then the smaller file, then the longer pipeline."""

    def rank(candidate: Candidate) -> tuple[bool, int, int]:
        return not keeps_quality(candidate.limits), candidate.file_bytes, -len(candidate.done)

    return a if rank(a) <= rank(b) else b


def verdict(limits: Sequence[Limit], shipped: str, missed_by_all: Sequence[Limit] = ()) -> str:
    """One line about the limits: `ok`, or what was missed and what was written instead."""
    missed = [*(limit for limit in missed_by_all if not limit.met)] or [limit for limit in limits if not limit.met]
    if not missed:
        return "ok"
    texts = [_missed(limit) for limit in missed]
    return f"{'; '.join(texts)}{f'; written: {shipped}' if shipped else ''}"


def _missed(limit: Limit) -> str:
    if limit.got is None:
        reason = "steps were left out" if limit.name == "--time-limit" else "could not be measured"
        return f"{limit.name} {limit.wanted:g} {limit.unit} missed: {reason}"
    return f"{limit.name} {limit.wanted:g} {limit.unit} missed: {limit.got:.4g} {limit.unit}"


def _drop(checks: Checks) -> float | None:
    if checks.accuracy is not None:
        return checks.accuracy.drop
    agreements = [o.top1_agreement for o in checks.fidelity.outputs if o.top1_agreement is not None]
    return 100 - min(agreements) if agreements else None
