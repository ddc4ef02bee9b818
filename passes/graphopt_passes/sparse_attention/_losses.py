"""What attention loses when queries see a part of their keys, in numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["root_of", "seen_part", "squares"]

Array = np.ndarray[Any, np.dtype[Any]]
_NOTHING = 1e-30


def seen_part(weights: Array, values: Array | None, outputs: Array, seen: Array) -> tuple[Array, Array]:
    """What is left of attention to keys that are seen, when its weights are spread anew over them.

    The softmax over keys that are seen is the old one divided by the share of it that they had.

    Args:
        weights: `[heads, queries, keys]`, what queries attend to.
        values: `[heads, keys, width]`; None: as if they were orthonormal.
        outputs: `weights @ values`, or `weights`.
        seen: `[queries, keys]`, whether a query sees a key.

    Returns:
        Two of `[heads]`, summed over queries: attention to keys that are seen, and squared distances of the outputs.
    """
    near = weights * seen
    share = near.sum(axis=-1, keepdims=True)
    factor = np.divide(1, share, out=np.zeros_like(share), where=share > _NOTHING)
    moved = (near if values is None else near @ values) * factor - outputs
    return share.sum(axis=(1, 2), dtype=np.float64), squares(moved)


def squares(outputs: Array) -> Array:
    """`[heads]`, sums of squares of `[heads, queries, ...]`."""
    return np.square(outputs).sum(axis=(1, 2), dtype=np.float64)


def root_of(projection: Array) -> Array:
    """`[heads, width, width]`, matrices R with (v R)(v R)^T = (v P)(v P)^T: short rows with the lengths of long ones.

    Args:
        projection: `[heads, width, channels]`, what each head's outputs are multiplied with.
    """
    wide = projection.astype(np.float64)
    values, vectors = np.linalg.eigh(wide @ wide.swapaxes(1, 2))
    return (vectors * np.sqrt(np.maximum(values, 0))[:, None, :]).astype(np.float32)
