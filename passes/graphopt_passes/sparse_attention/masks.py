"""What is added to the scores of a band: masks of the model, and what lies outside of the band."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from graphopt.analyses.attention import AttentionBlock, Mask
from graphopt_passes.sparse_attention.bands import Bands
from graphopt_passes.sparse_attention.frame import Frame
from graphopt_passes.sparse_attention.writer import Writer

__all__ = ["MIXING_FILL", "Bias", "band_bias", "least", "mask_values", "masks_left", "user_bias"]

MIXING_FILL = -5000.0
"""Hidden scores above it may weigh something: adding it is not the same as putting it in their place."""


@dataclass(frozen=True, eq=False)
class Bias:
    """What scores get.

    Attributes:
        value: Added to them; None: nothing.
        live: Boolean, `[..., blocks, rows, 1]`, False where a query sees nothing, so that its result is zero; None:
            that is not asked for.
    """

    value: ir.Value | None
    live: ir.Value | None = None


def least(dtype: ir.DataType) -> float:
    """What hides a key without hiding it from a query that sees nothing else: half of the least number."""
    return float(np.finfo(dtype.numpy()).min) / 2 if dtype != ir.DataType.BFLOAT16 else -1.5e38


def masks_left(block: AttentionBlock) -> tuple[Mask, ...]:
    """What the masks say besides that no query sees a later key, where the band sees to that."""
    if block.causal != "yes":
        return block.masks
    found: list[Mask] = []
    for mask in block.masks:
        conditions = tuple(condition for condition in mask.conditions if not condition.causal)
        if not mask.causal and (mask.kind == "add" or conditions):
            found.append(replace(mask, conditions=conditions))
    return tuple(found)


def mask_values(mask: Mask) -> tuple[ir.Value, ...]:
    """What a mask reads."""
    return (*(() if mask.value is None else (mask.value,)), *(condition.value for condition in mask.conditions))


def user_bias(writer: Writer, masks: Sequence[Mask], bands: Bands, dtype: ir.DataType) -> ir.Value | None:
    """The band of all masks of the model, as one number for each score."""
    found: ir.Value | None = None
    for mask in masks:
        part = _added(writer, mask, bands, dtype) if mask.value is not None else _kept(writer, mask, bands, dtype)
        found = part if found is None else writer.op("Add", found, part)
    return found


def _added(writer: Writer, mask: Mask, bands: Bands, dtype: ir.DataType) -> ir.Value:
    assert mask.value is not None
    part = bands.of_mask(mask.value)
    return part if bands.dtype(mask.value) == dtype else writer.op("Cast", part, to=int(dtype))


def _kept(writer: Writer, mask: Mask, bands: Bands, dtype: ir.DataType) -> ir.Value:
    """A finite number that takes the place of scores makes all hidden keys alike; so does one that drowns the score."""
    kept: ir.Value | None = None
    for condition in mask.conditions:
        part = bands.of_mask(condition.value)
        part = writer.op("Not", part) if condition.negated else part
        kept = part if kept is None else writer.op("And", kept, part)
    fill = mask.fill if mask.added or np.isinf(mask.fill) else least(dtype)
    return writer.op("Where", kept, writer.number(0, dtype), writer.number(fill, dtype))


def band_bias(writer: Writer, block: AttentionBlock, bands: Bands, frame: Frame) -> Bias:
    """All that is added to the scores of a band.

    Keys outside of the band get minus infinity; a query always sees itself, so that no row is without a finite score:
    what the model's own masks hide gets a finite number, and rows that would be NaN, which would reach their
    neighbours in the next layer, are means instead.
    """
    dtype = block.score_type
    own = user_bias(writer, masks_left(block), bands, dtype)
    outside: ir.Value | None = None
    if frame.seen is not None:
        outside = writer.op("Where", frame.seen, writer.number(0, dtype), writer.number(-np.inf, dtype))
    if own is None:
        return Bias(outside)
    live: ir.Value | None = None
    if block.zero_rows:
        whole = own if outside is None else writer.op("Add", own, outside)
        top = writer.highest(whole)
        live = writer.op("GreaterOrEqual", top, writer.number(float(np.finfo(dtype.numpy()).min), dtype))
    finite = writer.op("Max", own, writer.number(least(dtype), dtype))
    return Bias(finite if outside is None else writer.op("Add", finite, outside), live)
