"""Weights of linear layers as integers that are chosen by what the layer makes of them on the calibration data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from graphopt.analyses import CONSTANTS, LINEAR_LAYERS, LayerMoments, MomentsAnalysis
from graphopt.pass_base import Change, Context
from graphopt_passes.quant._maths import pair_reach, quantize_weight, top_integer, weight_scales
from graphopt_passes.quant.adjust._rounding import damped, flip, gptq, output_error
from graphopt_passes.quant.adjust.layout import Layout, layout_of
from graphopt_passes.quant.adjust.prepared import prepare_weight
from graphopt_passes.quant.sites import Site, keyed_nodes, tensor_of

__all__ = ["Rounding", "round_weights"]

Array = np.ndarray[Any, np.dtype[Any]]
Rounding = Literal["nearest", "gptq", "adaround"]

_SAMPLES = 128
_WIDEST = 8192  # inputs; the inverse of more takes minutes
_PAIR = 128  # two weights of one sign that kernels add in pairs: 255 * 128 is the most that 16 bits hold


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
    array, axis = tensor.numpy(), weight.axis if per_channel else None
    top = top_integer(axis, bits)
    scales = weight_scales(array, axis, bits)
    plain = quantize_weight(array, scales, axis, bits)
    spread = np.ascontiguousarray(_scales_like(array, scales, axis))
    rows, steps, nearest = (_rows(layout, part, moments) for part in (array, spread, plain))
    steps = steps[:, :, 0].astype(np.float64)
    found = np.empty(rows.shape)
    for group, xx in enumerate(moments.xx):
        parts = rows[group].astype(np.float64), steps[group], nearest[group].astype(np.float64)
        found[group] = _round_group(*parts, top, damped(xx, moments.rows), how)
    chosen = _weight(layout, found.astype(np.int8), rows.shape)
    if axis is not None and bits < 8:
        chosen = _unsaturated(chosen, plain, axis)
    prepare_weight(value, axis, bits, chosen)
    before, after = (_error(rows, steps, _rows(layout, integers, moments), moments) for integers in (plain, chosen))
    return 10 * math.log10(before / after) if before > 0 and after > 0 else 0.0


def _round_group(weight: Array, scales: Array, plain: Array, top: int, product: Array, how: Rounding) -> Array:
    """Round the rows of one group; each keeps what is best for it, nearest among the choices."""
    better = gptq(weight, scales, top, product)
    if how == "adaround":
        better = flip(weight, scales, better, top, product)
    return _better(weight, scales, plain, better, product)


def _unsaturated(chosen: Array, plain: Array, axis: int) -> Array:
    """Rows of the nearest integers where two neighbours among the chosen would saturate 16 bits with uint8."""
    saturated = pair_reach(np.moveaxis(chosen, axis, 0).astype(np.float64)) > _PAIR
    shape = tuple(-1 if i == axis % chosen.ndim else 1 for i in range(chosen.ndim))
    return np.where(saturated.reshape(shape), plain, chosen)


def _error(rows: Array, steps: Array, integers: Array, moments: LayerMoments) -> float:
    """Mean square of what the rounding of all rows does to the result."""
    if moments.xx is None:
        return 0.0
    parts = zip(rows, steps, integers, moments.xx, strict=True)
    return sum(float(output_error(w, s, i, damped(xx, moments.rows)).sum()) for w, s, i, xx in parts)


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
