"""Bring a copy of the model into the form that quantization needs: a high enough opset, nothing unread."""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx_ir as ir

from graphopt.errors import ModelError, UsageError
from graphopt.model_io import input_specs, model_bytes, weight_bytes
from graphopt.opset import opset_version, raise_opset
from graphopt.pass_base import Context
from graphopt.reference import Feed, Reference, random_feed

__all__ = [
    "DYNAMIC_SINCE",
    "PER_CHANNEL_SINCE",
    "QUANTIZE_SINCE",
    "drop_unread",
    "grown_file",
    "lift_opset",
    "needed_opset",
]

QUANTIZE_SINCE = 10
DYNAMIC_SINCE = 11
PER_CHANNEL_SINCE = 13

_FEEDS = 2
_TOLERANCE = 1e-4
_COMPARE_BYTES = 256 << 20  # smaller models are written out to compare sizes


def needed_opset(mode: Literal["auto", "static", "dynamic", "weight"], *, per_channel: bool) -> int:
    """The first opset with the operators that a mode writes."""
    if per_channel:
        return PER_CHANNEL_SINCE
    return DYNAMIC_SINCE if mode in ("auto", "dynamic") else QUANTIZE_SINCE


def lift_opset(model: ir.Model, version: int, ctx: Context) -> str:
    """Raise the opset in place and compare both models in ONNX Runtime.

    Returns:
        Why the opset could not be raised, and the model is unchanged; empty if it was, or was high enough.
    """
    current = opset_version(model)
    if current >= version:
        return ""
    if ctx.keep_opset:
        return f"opset {current} is kept, {version} would be needed"
    before = model.clone()
    try:
        raise_opset(model, version)
    except ModelError as e:
        return e.fact
    problem = _problem(before, model, ctx)
    if problem:
        model.graph, model.ir_version = before.graph, before.ir_version
        return f"raised to opset {version} it {problem}"
    return ""


def drop_unread(model: ir.Model) -> None:
    """Remove initializers that nothing reads."""
    for graph in model.graphs():
        for name, value in list(graph.initializers.items()):
            if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                graph.initializers.pop(name)


def grown_file(before: ir.Model, after: ir.Model) -> str:
    """Says so if the file would not become smaller; large models always do."""
    if weight_bytes(before) > _COMPARE_BYTES:
        return ""
    old, new = len(model_bytes(before)), len(model_bytes(after))
    return f"the file would grow from {old} to {new} bytes" if new >= old else ""


def _problem(before: ir.Model, after: ir.Model, ctx: Context) -> str:
    """What is wrong with the second of two models, on calibration data or on random inputs; empty if nothing is."""
    left = Reference(before, threads=ctx.threads, extensions=ctx.extensions)
    expected: list[tuple[Feed, Feed]] = []
    for feed in _feeds(before, ctx):
        try:
            expected.append((feed, left.run(feed)))
        except ModelError:  # random values can be outside of what a model takes, an index for instance
            ctx.log.warning("%s: the raised opset was not compared: the model takes no random input", before.graph.name)
            return ""
    del left
    try:
        right = Reference(after, threads=ctx.threads, extensions=ctx.extensions)
        different = next(filter(None, (_difference(wanted, right.run(feed)) for feed, wanted in expected)), "")
    except ModelError as e:
        return f"does not run: {e.fact}"
    return f"computes something else: output {different!r}" if different else ""


def _difference(expected: Feed, got: Feed) -> str:
    """Name of an output that differs; empty if none does."""
    for name, array in got.items():
        reference = expected[name]
        if not np.issubdtype(reference.dtype, np.floating):
            if not np.array_equal(reference, array):
                return name
        elif not np.allclose(array, reference, rtol=_TOLERANCE, atol=_scale(reference), equal_nan=True):
            return name
    return ""


def _feeds(model: ir.Model, ctx: Context) -> list[Feed]:
    if ctx.calibration is not None:
        return list(ctx.calibration.feeds(_FEEDS))
    rng = np.random.default_rng(0)  # the step's own stream is for choices, and a check makes none
    try:
        return [random_feed(input_specs(model), ctx.binding, rng) for _ in range(_FEEDS)]
    except UsageError as e:
        ctx.log.warning("%s: the raised opset was not compared: %s", model.graph.name, e.fact)
        return []


def _scale(reference: np.ndarray) -> float:
    finite = reference[np.isfinite(reference)]
    return _TOLERANCE * float(np.abs(finite).max(initial=0.0))
