"""Why a core keeps all its scores."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.analyses.attention import AttentionBlock
from graphopt.analyses.shapes import Shapes
from graphopt_passes.sparse_attention._patterns import Band
from graphopt_passes.sparse_attention.masks import MIXING_FILL, mask_values, masks_left
from graphopt_passes.sparse_attention.unit_axes import UnitAxes

__all__ = ["why_not", "why_not_on", "why_short"]

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
_PAYS_FROM = 2
"""Lengths below so many widths are as fast with all their scores."""


def why_short(known: int | None, width: int) -> str:
    """Why a sequence is too short for a window; empty where it is not, or its length is open."""
    if known is None or known > _PAYS_FROM * width:
        return ""
    return f"a sequence of {known} is too short for a width of {width} to pay"


def why_not(block: AttentionBlock, shapes: Shapes) -> str:
    """Why a core cannot or should not see less; empty where nothing speaks against it.

    Args:
        block: The core.
        shapes: Of the model.
    """
    if block.dropped:
        return block.dropped
    if any("window" in axes for axes in (block.query_axes, block.key_axes, block.value_axes, block.score_axes)):
        return "its samples are windows of a sequence already"
    if block.past:
        return "caches join its keys, so that few queries meet many keys"
    if block.queries is not None and block.keys is not None and block.queries != block.keys:
        return f"cross-attention: {block.queries} queries meet {block.keys} keys"
    if not block.same_length:
        return "nothing shows that there are as many keys as queries"
    if block.score_type not in _FLOATS:
        return f"its softmax is computed in {block.score_type}"
    if block.softcap and block.form == "operator" and block.masks:
        return "versions differ in whether it masks scores before or after it caps them"
    return _why_not_masks(block, shapes)


def _why_not_masks(block: AttentionBlock, shapes: Shapes) -> str:
    for mask in masks_left(block):
        for value in mask_values(mask):
            rank, dtype = shapes.rank(value), shapes.dtype(value)
            if rank is None or dtype is None:
                return f"neither rank nor type of its mask {value.name!r} are known"
            if rank > len(block.score_axes):
                return f"its mask {value.name!r} has more axes than the scores"
        if mask.kind == "keep" and not mask.added and mask.fill > MIXING_FILL:
            return f"a mask puts {mask.fill:g} in the place of scores, which may weigh something"
    return ""


def why_not_on(block: AttentionBlock, band: Band, units: UnitAxes) -> str:
    """Why a core cannot be computed on a band; empty if it can."""
    if not band.pooled:
        return ""
    for value in (value for mask in masks_left(block) for value in mask_values(mask)):
        rank = units.shapes.rank(value) or 0
        if rank > 1 and not units.one(value, rank - 2):
            return f"its mask {value.name!r} depends on the query, so that a block has no one mean"
    return ""
