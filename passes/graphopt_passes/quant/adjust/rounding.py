"""Weights of linear layers as integers that are chosen by what the layer makes of them on the calibration data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from graphopt.analyses import CONSTANTS, LINEAR_LAYERS, LayerMoments, MomentsAnalysis
from graphopt.pass_base import Change, Context
from graphopt_passes.quant._maths import weight_scales
from graphopt_passes.quant.adjust._rounding import damped, flip, gptq, nearest, output_error
from graphopt_passes.quant.adjust.layout import Layout, layout_of
from graphopt_passes.quant.adjust.prepared import prepare_weight
from graphopt_passes.quant.sites import Site, keyed_nodes, tensor_of

__all__ = ["Rounding", "round_weights"]

Array = np.ndarray[Any, np.dtype[Any]]
Rounding = Literal["nearest", "gptq", "adaround"]

_SAMPLES = 128
_WIDEST = 8192  # inputs; the inverse of more takes minutes


def round_weights(
    model: ir.Model,
    sites: Sequence[Site],
    how: Rounding,
    ctx: Context,
    *,
    bits: Callable[[Site, ir.Node], int],
    per_channel: bool,
) -> list[Change]:
    """Round the weights of Conv, ConvTranspose, Gemm and MatMul.

    Args:
        model: A float model.
        sites: What will be quantized.
        how: `gptq`, or `adaround`, which starts from it.
        ctx: Facts about the model, with calibration data.
        bits: Tells the bits of a weight.
        per_channel: One scale for each output channel.

    Returns:
        What happened at each site; the integers are kept with the weights.
    """
    nodes, layers, names = keyed_nodes(model), ctx.fact(LINEAR_LAYERS), ctx.fact(CONSTANTS).names
    wanted: dict[str, Site] = {}
    changes: dict[str, Change] = {}
    for site in sites:
        node, weight = nodes[site.key], site.weights[0]
        value = node.inputs[weight.index]
        layout = layout_of(node, weight.shape)
        label = names.label(node)
        reason = ""
        if layout is None or len(site.weights) > 1 or weight.index != 1:
            reason = f"{site.operator} reads its weight in another way"
        elif label not in layers.reads:
            reason = layers.left_out.get(label, "what it reads is unknown")
        elif layout.channels * math.prod(weight.shape[2:]) > _WIDEST:
            reason = f"it has more than {_WIDEST} inputs"
        elif value is not None and len(tuple(value.uses())) > 1:
            reason = "its weight is shared"
        if reason:
            changes[site.key] = Change.skipped(site.name, f"weights round to nearest: {reason}")
        else:
            wanted[label] = site
    analysis = MomentsAnalysis(layers=tuple(wanted), samples=_SAMPLES)
    for portion in analysis.portions(ctx) if wanted else ():
        moments = portion.compute(model, ctx)
        for label in portion.layers or ():
            site, one = wanted[label], moments.of(label)
            node = nodes[site.key]
            gain = _round(node, site, one, how, bits=bits(site, node), per_channel=per_channel)
            if isinstance(gain, str):
                changes[site.key] = Change.skipped(site.name, f"weights round to nearest: {gain}")
            else:
                details = {"expected_gain_db": round(gain, 1)}
                changes[site.key] = Change(site.name, f"weights rounded by {how}", details=details)
    return [changes[site.key] for site in sites]


def _round(
    node: ir.Node, site: Site, moments: LayerMoments | None, how: Rounding, *, bits: int, per_channel: bool
) -> float | str:
    """Prepare the integers of one weight; returns how much less the result is off, in dB, or why it cannot be done."""
    weight, value = site.weights[0], node.inputs[site.weights[0].index]
    tensor = tensor_of(value)
    layout = layout_of(node, weight.shape)
    if moments is None or moments.xx is None or not moments.finite:
        return "the products of its inputs take too much memory, or are not finite"
    if value is None or tensor is None or layout is None:
        raise TypeError(f"{site.name!r} has lost its weight")
    array, top = tensor.numpy(), 2 ** (bits - 1) - 1
    axis = weight.axis if per_channel else None
    scales = _scales_like(array, weight_scales(array, axis, bits), axis)
    rows, steps = _rows(layout, array, moments), _rows(layout, np.ascontiguousarray(scales), moments)
    found, before, after = np.empty(rows.shape), 0.0, 0.0
    for group, (part, step, xx) in enumerate(zip(rows, steps[:, :, 0], moments.xx, strict=True)):
        found[group], plain, better = _round_group(
            part.astype(np.float64), step.astype(np.float64), top, xx, moments, how
        )
        before, after = before + plain, after + better
    gain = 10 * math.log10(before / after) if before > 0 and after > 0 else 0.0
    prepare_weight(value, axis, bits, _weight(layout, found.astype(np.int8), rows.shape))
    return gain


def _round_group(
    weight: Array, scales: Array, top: int, xx: Array, moments: LayerMoments, how: Rounding
) -> tuple[Array, float, float]:
    """Round the rows of one group; each keeps what is best for it, nearest among the choices."""
    product = damped(xx, moments.rows)
    plain = nearest(weight, scales, top)
    better = gptq(weight, scales, top, product)
    if how == "adaround":
        better = flip(weight, scales, better, top, product)
    better = _better(weight, scales, plain, better, product)
    errors = [float(output_error(weight, scales, chosen, product).sum()) for chosen in (plain, better)]
    return better, errors[0], errors[1]


def _better(weight: Array, scales: Array, first: Array, second: Array, product: Array) -> Array:
    """Row by row the one with the lesser error of the result."""
    wins = output_error(weight, scales, second, product) < output_error(weight, scales, first, product)
    return np.where(wins[:, None], second, first)


def _scales_like(weight: Array, scales: Array, axis: int | None) -> Array:
    if axis is None:
        return np.broadcast_to(scales, weight.shape)
    others = tuple(i for i in range(weight.ndim) if i != axis)
    return np.broadcast_to(np.expand_dims(scales, others), weight.shape)


def _rows(layout: Layout, weight: Array, moments: LayerMoments) -> Array:
    """`[groups, rows, inputs]` as the moments count inputs: with kernel positions, or position by position."""
    split = layout.split(weight)
    groups, rows, channels, taps = split.shape
    if moments.squares.shape[1] == channels * taps:
        return split.reshape(groups, rows, channels * taps)
    return split.transpose(0, 1, 3, 2).reshape(groups, rows * taps, channels)


def _weight(layout: Layout, rows: Array, shape: tuple[int, ...]) -> Array:
    """The weight that `_rows` gives these rows."""
    groups, channels = shape[0], layout.channels
    if shape[2] != channels:
        return layout.join(rows.reshape(groups, shape[1], channels, -1))
    taps = math.prod(layout.shape[2:])
    return layout.join(rows.reshape(groups, shape[1] // taps, taps, channels).transpose(0, 1, 3, 2))
