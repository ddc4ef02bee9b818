"""The rows that a convolution's windows make of its input (im2col)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["pad_sizes", "position_rows", "window_rows"]

Array = np.ndarray[Any, np.dtype[Any]]


def pad_sizes(
    sizes: Sequence[int], reach: Sequence[int], strides: Sequence[int], pads: Sequence[int] | str
) -> list[tuple[int, int]]:
    """Padding before and after each spatial axis.

    Args:
        sizes: Of the input.
        reach: What a kernel spans: `dilation * (kernel - 1) + 1`.
        strides: Of the windows.
        pads: ONNX's list, starts then ends, or `auto_pad`: VALID, SAME_UPPER, SAME_LOWER.
    """
    if not isinstance(pads, str):
        return list(zip(pads[: len(sizes)], pads[len(sizes) :], strict=True))
    if pads == "VALID":
        return [(0, 0)] * len(sizes)
    found: list[tuple[int, int]] = []
    for size, span, stride in zip(sizes, reach, strides, strict=True):
        total = max(0, (-(-size // stride) - 1) * stride + span - size)
        less, more = total // 2, total - total // 2
        found.append((less, more) if pads == "SAME_UPPER" else (more, less))
    return found


def position_rows(x: Array, axis: int, chosen: Array) -> Array:
    """What lies along an axis at chosen positions.

    Args:
        x: Of any rank; with one axis alone there is one position.
        axis: The axis.
        chosen: Indices into the other axes, flattened.

    Returns:
        `[positions, size of the axis]`, of the type of `x`.
    """
    table = np.moveaxis(x, axis, -1) if x.ndim > 1 else x[None]
    return table[np.unravel_index(chosen, table.shape[:-1])]


def window_rows(
    x: Array,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[tuple[int, int]],
    chosen: Array | None = None,
) -> Array:
    """What a convolution multiplies with its kernel at each position of its output (im2col).

    Args:
        x: `[batch, channels, *sizes]`.
        kernel: Kernel sizes.
        strides: Of the windows.
        dilations: Of the kernel.
        pads: Zeros before and after each spatial axis.
        chosen: Indices into the flattened `[batch, *output sizes]`; None: all.

    Returns:
        `[rows, channels, *kernel]`, of the type of `x`.
    """
    padded = np.pad(x, [(0, 0), (0, 0), *pads])
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    out = [(size - r) // s + 1 for size, r, s in zip(padded.shape[2:], reach, strides, strict=True)]
    steps = padded.strides[2:]
    moves = [step * s for step, s in zip(steps, strides, strict=True)]
    inner = [step * d for step, d in zip(steps, dilations, strict=True)]
    windows = np.lib.stride_tricks.as_strided(
        padded,
        (len(x), *out, x.shape[1], *kernel),
        (padded.strides[0], *moves, padded.strides[1], *inner),
        writeable=False,
    )
    if chosen is None:
        return windows.reshape(-1, x.shape[1], *kernel)
    return windows[np.unravel_index(chosen, windows.shape[: len(out) + 1])]
