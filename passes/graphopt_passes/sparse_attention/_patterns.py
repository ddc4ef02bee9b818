"""Which keys a query sees, in numbers: what blocks of queries gather, and the whole map that it stands for.

Queries are taken in blocks of `rows`. All queries of a block meet the same keys: those at fixed offsets from the
block's first query, and the first few tokens of the sequence, where these are global. A table of offsets against rows
says which of them a query really sees.

    window    keys at a distance below the width (Longformer, Beltagy et al. 2020)
    strided   those, and beyond them keys at multiples of a stride, at a distance below stride * width (Sparse
              Transformer, Child et al. 2019, with positions instead of distances, so that a block of queries shares
              them, and a limited reach, so that costs grow with the length and not with its square)
    block     those of the own block and of its neighbours (BigBird, Zaheer et al. 2020); of every block further away
              the mean of its keys and of its values
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

__all__ = ["Band", "Kind", "band_of", "computed_scores", "seen_scores", "visible", "visible_rows"]

Array = np.ndarray[Any, np.dtype[Any]]
Kind = Literal["window", "strided", "block"]
_ROWS = 128
"""Queries in a block: fewer waste less on keys that only some of them see, more share copies of keys."""


@dataclass(frozen=True, eq=False)
class Band:
    """The keys that blocks of queries meet.

    Attributes:
        rows: Queries in a block.
        offsets: `[columns]`, positions of keys relative to the first query of a block.
        seen: `[rows, columns]`, whether a query sees a key.
        leading: Tokens at the start of the sequence that all queries see, and that see all keys.
        causal: Whether queries see no later key.
        pooled: Whether blocks of keys that are not met are met as their mean.
    """

    rows: int
    offsets: Array
    seen: Array
    leading: int
    causal: bool
    pooled: bool = False

    @property
    def columns(self) -> int:
        """Keys that a block of queries meets, means left out."""
        return len(self.offsets) + self.leading


def band_of(kind: Kind, width: int, *, causal: bool, leading: int = 0, stride: int = 4, rows: int = 0) -> Band:
    """The band of a pattern.

    Args:
        kind: The pattern.
        width: A query sees keys at a distance below it; of `block` the length of a block.
        causal: Queries see no later key.
        leading: Global tokens.
        stride: Of `strided`.
        rows: Queries in a block; 0: what is fast.
    """
    if kind == "block":
        offsets = np.arange(-width, width if causal else 2 * width)
        first = np.arange(width)[:, None]
        seen = offsets <= first if causal else np.ones((width, len(offsets)), bool)
        return Band(width, offsets, seen, leading, causal, pooled=True)
    rows = rows or min(_ROWS, max(16, 1 << (width - 1).bit_length()))
    if kind == "strided":
        rows = -(-rows // stride) * stride
    offsets = np.arange(-width, rows + (0 if causal else width))
    if kind == "strided":
        far = np.arange(-stride * width, rows + (0 if causal else stride * width), stride)
        offsets = np.concatenate([offsets, far[(far < offsets[0]) | (far > offsets[-1])]])
    distance = offsets - np.arange(rows)[:, None]
    seen = np.abs(distance) < width
    if kind == "strided":
        seen |= (offsets % stride == 0) & (np.abs(distance) < stride * width)
    if causal:
        seen &= distance <= 0
    used = seen.any(axis=0)
    return Band(rows, offsets[used], seen[:, used], leading, causal)


def visible(band: Band, length: int) -> Array:
    """`[length, length]`: whether a query sees a key itself; what it sees as means of blocks is left out."""
    return visible_rows(band, np.arange(length), length)


def visible_rows(band: Band, queries: Array, length: int) -> Array:
    """`[queries, length]`: the same for some queries, given by their positions."""
    row = queries % band.rows
    columns = (queries - row)[:, None] + band.offsets
    inside = band.seen[row] & (columns >= 0) & (columns < length)
    found = np.zeros((len(queries), length), bool)
    found[np.nonzero(inside)[0], columns[inside]] = True
    found[:, : band.leading] = True
    found[queries < band.leading] = True
    return found & (np.arange(length) <= queries[:, None]) if band.causal else found


def computed_scores(band: Band, length: int) -> int:
    """Scores that a head computes, those that are hidden afterwards and those of means of blocks among them."""
    blocks = -(-length // band.rows)
    means = blocks if band.pooled else 0
    leading = 0 if band.causal else min(band.leading, length) * length
    return blocks * band.rows * (band.columns + means) + leading


def seen_scores(band: Band, length: int) -> int:
    """Scores that a head uses; a mean of a block counts as one."""
    own = int(visible(band, length).sum())
    if not band.pooled:
        return own
    number = np.arange(length) // band.rows
    back = number[:, None] - np.arange(number[-1] + 1)
    far = back > 1 if band.causal else np.abs(back) > 1
    return own + int(far[band.leading :].sum())
