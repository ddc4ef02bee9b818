"""Which positions of padded samples no output depends on.

Text is padded to a common length, and a mask says which positions are real. What a model computes at the others is as
large as what it computes anywhere, so that moments taken over all positions may be mostly those of padding.

A mask is found by what it does, not by its name: an input of zeros and ones such that, where it is zero, the other
inputs can be changed and the outputs stay as they are. Outputs that have the mask's positions are compared where the
mask is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analyses.streaming import needed_samples
from graphopt.pass_base import Analysis, Context
from graphopt.reference import Feed, Reference

__all__ = ["PADDING", "PaddingAnalysis", "heeded_rows"]

Array = np.ndarray[Any, np.dtype[Any]]

_SAMPLES = 8
_SAME = 1e-4


@dataclass(frozen=True)
class PaddingAnalysis(Analysis[str | None]):
    """Find the input that says which positions count, `[samples, positions]`; None where there is none."""

    name: ClassVar[str] = "padding"

    def compute(self, model: ir.Model, ctx: Context) -> str | None:
        """Try the inputs that look like masks, on a few samples.

        Raises:
            DataError: There is no calibration data.
            ModelError: ONNX Runtime cannot run the model on it.
        """
        feeds = list(needed_samples(ctx, "padding needs").batches(_SAMPLES, _SAMPLES))
        candidates = [name for name in (feeds[0] if feeds else ()) if all(_is_mask(name, feed) for feed in feeds)]
        candidates = [name for name in candidates if any((feed[name] == 0).any() for feed in feeds)]
        if not candidates:
            return None
        session = Reference(model, threads=ctx.threads, extensions=ctx.extensions)
        plain = [session.run(feed) for feed in feeds]
        for name in candidates:
            changed = [session.run(_changed(feed, name)) for feed in feeds]
            pairs = zip(feeds, plain, changed, strict=True)
            if all(_is_same(feed[name], before, after) for feed, before, after in pairs):
                return name
        return None


def heeded_rows(count: int, activation: Array, mask: Array | None) -> Array | None:
    """Indices of the rows along the last axis of an activation that the mask keeps; None: all of them.

    Args:
        count: How many rows there are.
        activation: `[samples, positions, ..., channels]`, or anything else.
        mask: `[samples, positions]`.
    """
    if mask is None or activation.ndim < 3 or activation.shape[:2] != mask.shape or not mask.any():
        return None
    each = count // mask.size
    return np.flatnonzero(np.repeat(mask.reshape(-1) != 0, each)) if each * mask.size == count else None


def _is_mask(name: str, feed: Feed) -> bool:
    array = feed[name]
    fits = array.ndim == 2 and array.size > 0 and bool(((array == 0) | (array == 1)).all() and array.any())
    return fits and any(_has_positions(other, array) for key, other in feed.items() if key != name)


def _has_positions(array: Array, mask: Array) -> bool:
    return array.shape[:2] == mask.shape


def _changed(feed: Feed, name: str) -> Feed:
    """The same with other numbers in the other inputs where the mask is zero: those of another position that counts."""
    mask, found = feed[name] != 0, dict(feed)
    for key, array in feed.items():
        if key != name and _has_positions(array, feed[name]):
            found[key] = np.where(mask.reshape(*mask.shape, *[1] * (array.ndim - 2)), array, _elsewhere(array, mask))
    return found


def _elsewhere(array: Array, mask: Array) -> Array:
    """For every position what stands at one that counts, one after the other."""
    return np.resize(array[mask], array.shape)


def _is_same(mask: Array, before: Mapping[str, Array], after: Mapping[str, Array]) -> bool:
    return all(_is_close(one, other) for one, other in _compared(mask, before, after))


def _compared(mask: Array, before: Mapping[str, Array], after: Mapping[str, Array]) -> Iterator[tuple[Array, Array]]:
    for name, one in before.items():
        keep = mask != 0 if _has_positions(one, mask) else ...
        yield one[keep], after[name][keep]


def _is_close(one: Array, other: Array) -> bool:
    if one.dtype.kind not in "fiub" or not one.size:
        return bool(np.array_equal(one, other))
    scale = float(np.abs(one).max())
    return bool(np.abs(one.astype(np.float64) - other).max() <= _SAME * scale)


PADDING = PaddingAnalysis()
