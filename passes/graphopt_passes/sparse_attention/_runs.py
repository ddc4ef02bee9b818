"""Keys in runs: copying a few neighbours at a time is several times faster than copying them one by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from graphopt_passes.sparse_attention._patterns import Band

__all__ = ["in_runs"]

_SIZES = (32, 16, 8, 4)
_MOST_MORE = 0.04
"""Share of keys that no query sees, which runs may add."""


def in_runs(band: Band) -> tuple[Band, int]:
    """The same band with offsets that are whole runs, and the length of a run.

    Blocks begin where runs begin, so that all of them meet runs of one partition of the sequence. Keys that fill up the
    first and the last run are seen by no query.

    Args:
        band: The band; where its offsets have gaps, or where runs would add too many keys, it stays as it is.

    Returns:
        The band, and 1 where it stayed as it is.
    """
    first, last = int(band.offsets[0]), int(band.offsets[-1])
    if band.leading or last - first + 1 != len(band.offsets):
        return band, 1
    for size in _SIZES:
        before, behind = first % size, -(last + 1) % size
        if band.rows % size == 0 and before + behind <= _MOST_MORE * len(band.offsets):
            offsets = np.arange(first - before, last + behind + 1)
            return replace(band, offsets=offsets, seen=np.pad(band.seen, ((0, 0), (before, behind)))), size
    return band, 1
