"""Folding `y = scale * x + shift` per channel into the weights of a linear layer; numpy only.

In inference BatchNormalization (Ioffe and Szegedy, 2015) is such a map; Jacob et al. (2018, section 3.2) describe the
folding. All arithmetic is in float64 and rounded once, to the type of the weight.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["affine_of_batchnorm", "scale_columns", "scale_conv", "scale_conv_transpose", "shift_through_conv"]

Array = np.ndarray[Any, np.dtype[Any]]


def affine_of_batchnorm(scale: Array, bias: Array, mean: Array, variance: Array, epsilon: float) -> tuple[Array, Array]:
    """Scale and shift, both [C], of BatchNormalization with running statistics [C]."""
    factor = scale.astype(np.float64) / np.sqrt(variance.astype(np.float64) + epsilon)
    return factor, bias.astype(np.float64) - mean.astype(np.float64) * factor


def scale_conv(weight: Array, scale: Array) -> Array:
    """Scale the output channels of a Conv weight [C_out, C_in/groups, *kernel] by `scale` [C_out]."""
    return weight.astype(np.float64) * scale.reshape(-1, *[1] * (weight.ndim - 1))


def scale_conv_transpose(weight: Array, scale: Array, groups: int) -> Array:
    """Scale the output channels of a ConvTranspose weight [C_in, C_out/groups, *kernel] by `scale` [C_out].

    Output channel `g * C_out/groups + j` is made by column j of the rows that belong to group g.
    """
    rows, columns = weight.shape[:2]
    split = weight.astype(np.float64).reshape(groups, rows // groups, columns, -1)
    return (split * scale.reshape(groups, 1, columns, 1)).reshape(weight.shape)


def scale_columns(weight: Array, scale: Array, *, transposed: bool) -> Array:
    """Scale the outputs of a matrix [K, N], or [N, K] if `transposed`, by `scale` [N]."""
    return weight.astype(np.float64) * (scale.reshape(-1, 1) if transposed else scale)


def shift_through_conv(weight: Array, scale: Array, shift: Array, groups: int) -> tuple[Array, Array]:
    """Fold a map of the *inputs* [C_in] into a Conv without padding.

    Args:
        weight: [C_out, C_in/groups, *kernel].
        scale: [C_in].
        shift: [C_in].
        groups: Groups of the Conv.

    Returns:
        The new weight, and what to add to the bias [C_out].
    """
    per_group = weight.shape[1]
    wide = weight.astype(np.float64).reshape(groups, weight.shape[0] // groups, per_group, -1)
    scaled = wide * scale.reshape(groups, 1, per_group, 1)
    added = np.einsum("gokx,gk->go", wide, shift.reshape(groups, per_group))
    return scaled.reshape(weight.shape), added.reshape(-1)
