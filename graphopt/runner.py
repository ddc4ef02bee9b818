"""Runs passes one after another and holds each to its contract.

For every step: `requires`, `run`, then the checks that need no trust: `modified` tells the truth, the graph is valid
and keeps its interface, a pass that promises equal outputs keeps the promise in ONNX Runtime, `ensures`. Facts that
the pass did not declare preserved are dropped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.errors import GraphoptError, ModelError, PassError
from graphopt.instruments import Instrument
from graphopt.model_io import input_specs
from graphopt.pass_base import Context, Pass, PassResult
from graphopt.reference import Feed, Reference, random_feed
from graphopt.structure import fingerprint, interface, verify

__all__ = ["LOSSLESS_TOLERANCE", "StepRun", "check_feeds", "differing_output", "run_pass", "run_step"]

LOSSLESS_TOLERANCE = 1e-4
"""Largest difference, as a fraction of an output's largest magnitude, that counts as equal."""

_CHECK_FEEDS = 4


@dataclass(frozen=True)
class StepRun:
    """One step that ran.

    Attributes:
        step: The pass with its options.
        result: What it did.
        unchecked: Why the promise of equal outputs could not be checked; empty if it was, or was not made.
    """

    step: Pass
    result: PassResult
    unchecked: str = ""


def run_step(
    step: Pass,
    number: int,
    ctx: Context,
    instruments: Sequence[Instrument] = (),
    *,
    seed: int = 0,
    check: bool = True,
) -> StepRun:
    """Run one step of a pipeline on `ctx.model` in place.

    Args:
        step: The pass.
        number: Its place in the pipeline, counted from 1.
        ctx: Holds the model; its `rng` is replaced by a stream of the step's own.
        instruments: Callbacks around the step.
        seed: Seed of all random streams.
        check: Check a lossless pass in ONNX Runtime.

    Raises:
        GraphoptError: The step failed; the subject names it.
    """
    ctx.rng = np.random.default_rng(_stream(seed, number, step))
    for instrument in instruments:
        instrument.before_pass(step.step(), ctx.model, ctx)
    try:
        run = run_pass(step, ctx, check=check)
    except GraphoptError as e:
        for instrument in instruments:
            instrument.failed(step.step(), e)
        if isinstance(e, PassError):
            e.subject = f"{e.subject} (step {number})"
        raise
    for instrument in instruments:
        instrument.after_pass(step.step(), ctx.model, ctx, run.result)
    return run


def run_pass(step: Pass, ctx: Context, *, check: bool = True) -> StepRun:
    """Run one pass under its contract.

    Raises:
        GraphoptError: The pass refused, failed, or broke the contract.
    """
    model, expected, before = ctx.model, interface(ctx.model), fingerprint(ctx.model)
    original = model.clone() if check and not step.lossy else None
    try:
        step.requires(model, ctx)
        result = step.run(model, ctx)
    except (GraphoptError, KeyboardInterrupt, MemoryError, OSError):
        raise
    except Exception as e:
        raise PassError(str(step), f"failed: {type(e).__name__}: {e}", "run again with -v for the traceback") from e
    _check_modified(step, result, before != fingerprint(model))
    if result.modified:
        try:
            verify(model, expected)
        except ModelError as e:
            raise PassError(str(step), f"left a broken model: {e.fact}", "this is a bug in the pass") from e
        ctx.drop_facts(result.preserved)
    unchecked = ""
    if original is not None and result.modified:
        unchecked = _check_lossless(step, original, ctx)
    step.ensures(model, ctx)
    return StepRun(step, result, unchecked)


def check_feeds(ctx: Context, count: int) -> list[Feed]:
    """Feeds to compare models on: calibration samples where there are any, else random values."""
    if ctx.calibration is not None:
        return list(ctx.calibration.feeds(count))
    specs, rng = input_specs(ctx.model), np.random.default_rng(0)
    return [random_feed(specs, ctx.binding, rng) for _ in range(count)]


def differing_output(before: Feed, after: Feed, tolerance: float = LOSSLESS_TOLERANCE) -> str | None:
    """Name the first output that differs by more than `tolerance` of its largest magnitude, and by how much."""
    for name, expected in before.items():
        got: Any = after[name]
        if expected.dtype.kind not in "fiub":
            continue
        if expected.shape != got.shape:
            return f"output {name!r} has shape {got.shape}, was {expected.shape}"
        a, b = expected.astype(np.float64), got.astype(np.float64)
        finite = np.isfinite(a) & np.isfinite(b)
        if (np.isfinite(a) != np.isfinite(b)).any():
            return f"output {name!r} is not finite where it was, or the reverse"
        scale = float(np.abs(a[finite]).max(initial=0.0))
        worst = float(np.abs(a[finite] - b[finite]).max(initial=0.0))
        if worst > tolerance * scale + 1e-6:
            return f"output {name!r} differs by {worst:.3g} where the largest value is {scale:.3g}"
    return None


def _stream(seed: int, number: int, step: Pass) -> list[int]:
    words = np.frombuffer(hashlib.sha256(step.name.encode()).digest()[:8], np.uint32)
    return [seed, number, *map(int, words)]


def _check_modified(step: Pass, result: PassResult, changed: bool) -> None:
    if changed != result.modified:
        says = "says that it changed nothing, but did" if changed else "says that it changed the model, but did not"
        raise PassError(str(step), says, "set PassResult.modified to what happened")


def _check_lossless(step: Pass, original: ir.Model, ctx: Context) -> str:
    feeds = check_feeds(replace(ctx, model=original), _CHECK_FEEDS)
    try:
        reference = Reference(original, threads=ctx.threads, extensions=ctx.extensions)
        expected = [reference.run(feed) for feed in feeds]
    except ModelError as e:
        return f"the input does not run in ONNX Runtime: {e.fact}"
    del reference
    result = Reference(ctx.model, threads=ctx.threads, extensions=ctx.extensions)
    for feed, before in islice(zip(feeds, expected, strict=True), _CHECK_FEEDS):
        if difference := differing_output(before, result.run(feed)):
            raise PassError(str(step), f"promises equal outputs, but {difference}", "this is a bug in the pass")
    return ""
