"""Take out of the biases what rounding adds to the mean of each output channel."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from graphopt.analyses import CONSTANTS, LINEAR_LAYERS, LayerMoments, MomentsAnalysis
from graphopt.analyses.streaming import stream
from graphopt.pass_base import Change, Context
from graphopt_passes.quant._maths import Grid, dequantize, quantize, quantize_weight, weight_scales
from graphopt_passes.quant.adjust._bias import mean_shift
from graphopt_passes.quant.adjust.layout import channel_axis, layout_of
from graphopt_passes.quant.adjust.prepared import prepare_bias, prepared_weight
from graphopt_passes.quant.sites import Site, bias_place, keyed_nodes, tensor_of

__all__ = ["correct_biases", "shift_bias", "why_no_bias"]

Array = np.ndarray[Any, np.dtype[Any]]

_SAMPLES = 128
_AUDIBLE = 1e-5  # a new bias has to move the mean by this part of the power of the result


class _Constants(Protocol):
    """What adds constants to a graph."""

    def constant(self, wish: str, array: Array, graph: ir.Graph | None = None) -> ir.Value: ...
    def discard(self, value: ir.Value) -> None: ...


def correct_biases(
    model: ir.Model,
    sites: Sequence[Site],
    grids: Mapping[str, Grid],
    ctx: Context,
    *,
    bits: Callable[[Site, ir.Node], int],
    per_channel: bool,
) -> list[Change]:
    """Measure how rounding of weights and inputs shifts the mean of each layer, and prepare its bias for that.

    Args:
        model: A float model whose weights are prepared.
        sites: Layers that will compute on calibrated integers.
        grids: Grid of the input of each layer, by the layer's key.
        ctx: Facts about the model, with calibration data.
        bits: Tells the bits of a weight.
        per_channel: One scale for each output channel.

    Returns:
        What happened at each site.
    """
    nodes, layers, names = keyed_nodes(model), ctx.fact(LINEAR_LAYERS), ctx.fact(CONSTANTS).names
    changes: dict[str, Change] = {}
    labels: dict[str, str] = {}
    for site in sites:
        node = nodes[site.key]
        label, reason = names.label(node), why_no_bias(node, site)
        if not reason and label not in layers.reads:
            reason = layers.left_out.get(label, "what it reads is unknown")
        if reason:
            changes[site.key] = Change.skipped(site.name, f"bias not corrected: {reason}")
        else:
            labels[site.key] = label
    wanted = [site for site in sites if site.key in labels]
    if wanted:
        moments = MomentsAnalysis(layers=tuple(labels.values()), samples=_SAMPLES, pairs=False).compute(model, ctx)
        moved = _moved_means(model, wanted, nodes, grids, ctx)
        for site in wanted:
            one, node = moments.of(labels[site.key]), nodes[site.key]
            shift = _shift(node, site, one, moved[site.key], bits(site, node), per_channel)
            changes[site.key] = _prepare(node, site, one, shift)
    return [changes[site.key] for site in sites]


def shift_bias(constants: _Constants, node: ir.Node, shift: Array) -> None:
    """Add to the bias of a layer, or give it one; a MatMul has its bias in the Add behind it."""
    holder, index = bias_place(node) or (node, 2)
    old = holder.inputs[index] if index < len(holder.inputs) else None
    tensor = tensor_of(old)
    array = shift if tensor is None else tensor.numpy() + shift.reshape(tensor.shape.numpy())
    name = f"{node.outputs[0].name}_bias" if old is None else f"{old.name}_corrected"
    held = constants.constant(name, array.astype(np.float32))
    if index >= len(holder.inputs):
        holder.resize_inputs(index + 1)
    holder.replace_input_with(index, held)
    if old is not None:
        constants.discard(old)


def why_no_bias(node: ir.Node, site: Site) -> str:
    """Why the bias of a layer cannot be changed; empty if it can."""
    if layout_of(node, site.weights[0].shape) is None:
        return f"{site.operator} has no bias for each output channel"
    channels = site.weights[0].channels * (
        node.attributes.get_int("group", 1) if site.operator == "ConvTranspose" else 1
    )
    if site.operator == "MatMul":
        place = bias_place(node)
        if place is None:
            return "no Add with a constant follows, and one would cost a pass over the result"
        value = place[0].inputs[place[1]]
    else:
        value = node.inputs[2] if len(node.inputs) > 2 else None
        if any(node.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta")):
            return "its bias is scaled"
    tensor = tensor_of(value)
    if value is not None and (tensor is None or tensor.dtype != ir.DataType.FLOAT):
        return "its bias is no float32 constant"
    if tensor is not None and (tensor.size != channels or max(tensor.shape.numpy(), default=1) != channels):
        return "its bias is not one number a channel"
    return ""


def _moved_means(
    model: ir.Model, sites: Sequence[Site], nodes: Mapping[str, ir.Node], grids: Mapping[str, Grid], ctx: Context
) -> dict[str, Array]:
    """Mean of what rounding adds to each channel of what a layer reads, `[channels]`, by key."""
    readers: dict[str, list[Site]] = {}
    for site in sites:
        value = nodes[site.key].inputs[0]
        readers.setdefault((value.name if value is not None else "") or "", []).append(site)
    sums: dict[str, Array] = {}
    counts: dict[str, int] = {}
    for seen in stream(model, list(readers), ctx, "measuring shifts", _SAMPLES):
        for name, array in seen.values.items():
            for site in readers[name]:
                grid, axis = grids[site.key], channel_axis(nodes[site.key]) % array.ndim
                off = dequantize(quantize(array, grid), grid) - array
                others = tuple(i for i in range(array.ndim) if i != axis)
                sums[site.key] = sums.get(site.key, 0.0) + off.sum(axis=others, dtype=np.float64)
                counts[site.key] = counts.get(site.key, 0) + off.size // max(1, off.shape[axis])
    return {key: total / max(1, counts[key]) for key, total in sums.items()}


def _shift(
    node: ir.Node, site: Site, moments: LayerMoments | None, moved: Array, bits: int, per_channel: bool
) -> Array | None:
    """What to add to the bias, `[channels]`; None where what the layer reads is not finite."""
    weight, value = site.weights[0], node.inputs[site.weights[0].index]
    tensor, layout = tensor_of(value), layout_of(node, weight.shape)
    if value is None or tensor is None or layout is None:
        raise TypeError(f"{site.name!r} has lost its weight")
    if moments is None or not moments.finite or not np.isfinite(moved).all():
        return None
    array, axis = tensor.numpy(), weight.axis if per_channel else None
    scales = weight_scales(array, axis, bits)
    integers = prepared_weight(value, axis, bits)
    integers = quantize_weight(array, scales, axis, bits) if integers is None else integers
    if axis is not None:
        scales = np.expand_dims(scales, tuple(i for i in range(array.ndim) if i != axis))
    rows, rounded = layout.split(array), layout.split(integers * scales)
    groups, _, channels, taps = rows.shape
    mean = moments.mean.reshape(groups, channels, -1)
    if mean.shape[2] != taps:  # each position of a transposed convolution meets the same input, at its place
        mean = np.broadcast_to(mean / _overlap(node, taps), (groups, channels, taps))
        moved = moved / _overlap(node, taps)
    return mean_shift(rows, rounded, mean, moved.reshape(groups, channels))


def _overlap(node: ir.Node, taps: int) -> float:
    """How many positions of the result one input of a transposed convolution makes."""
    return float(math.prod(node.attributes.get_ints("strides", (1,)))) if taps > 1 else 1.0


def _prepare(node: ir.Node, site: Site, moments: LayerMoments | None, shift: Array | None) -> Change:
    if shift is None or moments is None:
        return Change.skipped(site.name, "bias not corrected: what it reads is not finite")
    tensor, layout = tensor_of(node.inputs[1]), layout_of(node, site.weights[0].shape)
    if tensor is None or layout is None:
        raise TypeError(f"{site.name!r} has lost its weight")
    rows = layout.split(tensor.numpy())
    squares = (moments.squares / max(1, moments.rows)).reshape(rows.shape[0], rows.shape[2], -1)
    power = float(
        np.einsum("grct,gct->", np.square(rows), np.broadcast_to(squares, (*squares.shape[:2], rows.shape[3])))
    )
    part = float(np.square(shift).sum()) / power if power > 0 else 0.0
    fresh = site.operator != "MatMul" and (len(node.inputs) < 3 or node.inputs[2] is None)
    if not shift.any() or (fresh and part < _AUDIBLE):
        return Change.skipped(site.name, "bias not corrected: rounding leaves the means where they are")
    prepare_bias(node, shift)
    level = {"shift_db": round(10 * math.log10(part), 1)} if part > 0 else {}
    return Change(site.name, "bias corrected" if not fresh else "bias added to correct the mean", details=level)
