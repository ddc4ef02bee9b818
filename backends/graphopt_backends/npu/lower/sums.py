"""Sums of products with constant int8 weights: what Conv, ConvTranspose, Gemm and pools without weights share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from graphopt_backends.npu.emitter import Refusal
from graphopt_backends.npu.lower.windows import ONE, Window, pick
from graphopt_backends.npu.tosa import DType, Tensor
from graphopt_backends.npu.units import Grid, Operand, Unit
from graphopt_backends.npu.work import Work, exact

__all__ = ["MOST_WINDOW", "Layer", "convolve", "layer_of", "pointwise", "weighted"]

Array = np.ndarray[Any, np.dtype[Any]]

MOST_WINDOW = 4096
_MOST_SUM = 127 << 16
"""Of the absolute weights of one output (Vela, constraints of CONV2D)."""
_BIAS_BITS = 24


@dataclass(frozen=True)
class Layer:
    """Weights and bias in integers.

    Attributes:
        weight: `[OC, IC / groups, KH, KW]`.
        bias: `[OC]`, in sums.
        steps: What 1 of a sum stands for; one number, or one for each output.
        grid: Of the activation.
        groups: Of channels that are summed apart.
    """

    weight: Array
    bias: Array
    steps: Fraction | tuple[Fraction, ...]
    grid: Grid
    groups: int = 1

    @property
    def sum_type(self) -> DType:
        """How wide sums are."""
        return "int48" if self.grid.dtype == "int16" else "int32"

    def part(self, group: int) -> Layer:
        """The outputs of one group."""
        size = len(self.weight) // self.groups
        own = slice(group * size, (group + 1) * size)
        steps = self.steps if isinstance(self.steps, Fraction) else self.steps[own]
        return Layer(self.weight[own], self.bias[own], steps, self.grid)

    def repeated(self, weight: Array) -> Layer:
        """Several layers with the same bias and steps as one.

        Args:
            weight: `[layers, OC, IC, KH, KW]`.
        """
        count = len(weight)
        steps = self.steps if isinstance(self.steps, Fraction) else self.steps * count
        return Layer(weight.reshape(-1, *weight.shape[2:]), np.tile(self.bias, count), steps, self.grid)


def layer_of(unit: Unit, weight: Array, axis: int, groups: int = 1, factor: Fraction = Fraction(1)) -> Layer:
    """The layer of a unit.

    Args:
        unit: Its second input is the weight, its third the bias.
        weight: The integers of the weight, as `Layer` has them.
        axis: The axis of the outputs in the weight as it is stored.
        groups: Of channels.
        factor: A number that the sums are multiplied by.

    Raises:
        Refusal: Scales lie along another axis, or the bias is computed or too large.
    """
    data, kernel = unit.inputs[0], unit.inputs[1]
    assert data is not None
    assert data.grid is not None
    assert kernel is not None
    assert kernel.grid is not None
    if kernel.grid.axis not in (None, axis % max(len(kernel.shape), 1)):
        raise Refusal("its weight has scales along another axis than that of the outputs")
    outputs, scales = len(weight), kernel.grid.scale.reshape(-1)
    if kernel.grid.axis is not None:  # ConvTranspose has the same ones for every group
        scales = np.tile(scales, outputs // scales.size)
    steps = [data.grid.step * exact(scale) * factor for scale in scales]
    reals = [exact(real) for real in _bias(unit, outputs)]
    most = (1 << 31) - 1 if data.grid.dtype == "int8" else (1 << 39) - 1
    whole = steps * outputs if len(steps) == 1 else steps
    wide = [abs(real) > step * most for real, step in zip(reals, whole, strict=True)]
    if any(wide):
        if weight[wide].any():
            raise Refusal("its bias is wider than the sums that it is added to")
        # an output without weights is its bias alone, on whatever grid
        steps = [abs(r) / (1 << _BIAS_BITS) if w else s for r, s, w in zip(reals, whole, wide, strict=True)]
        whole = steps
    bias = [round(real / step) if step else 0 for real, step in zip(reals, whole, strict=True)]
    return Layer(weight, np.array(bias, np.int64), steps[0] if len(steps) == 1 else tuple(steps), data.grid, groups)


def weighted(unit: Unit) -> tuple[Operand, Array]:
    """The activation of a unit, and the integers of its weight.

    Raises:
        Refusal: The NPU has no such products.
    """
    data, kernel = unit.inputs[0], unit.inputs[1]
    assert data is not None
    assert kernel is not None
    if kernel.array is None:
        raise Refusal("its weight is computed")
    if data.array is not None or data.grid is None:
        raise Refusal("its activation is constant")
    if kernel.grid is None or kernel.grid.dtype != "int8":
        raise Refusal("its weight is not int8")
    if kernel.grid.zero_point:
        raise Refusal("its weight has a zero point")
    return data, kernel.array


def convolve(unit: Unit, work: Work, image: Tensor, layer: Layer, window: Window, made: Sequence[int]) -> Tensor:
    """Sums rounded to the grid of a unit's result, activation applied.

    Args:
        unit: Whose result is meant.
        work: Where operations are added.
        image: `[N, H, W, IC]`.
        layer: Weights and bias.
        window: How it slides; longer steps than the NPU's are made of shorter ones.
        made: Height and width of the result.
    """
    image, window = window.fitted(work.emitter, image, made)
    steps = (1, 1)
    if layer.groups == 1:
        image, layer, window = _blocked(work, image, layer, window, made)
    else:
        window, made, steps = window.slowed(made)
    window.check(MOST_WINDOW)
    if layer.groups > 1 and layer.weight.shape[1] == 1:
        found = _rounded(unit, work, _depthwise(work, image, layer, window, made), layer)
    else:
        parts = list[Tensor]()
        for group in range(layer.groups):
            part, size = layer.part(group), image.shape[3] // layer.groups
            source = work.emitter.slice(image, (0, 0, 0, group * size), (*image.shape[:3], size))
            parts.append(_rounded(unit, work, _full(work, source, part, window, made), part))
        found = work.emitter.concat(parts, 3)
    return pick(work.emitter, found, steps)


def pointwise(work: Work, image: Tensor, grid: Grid, weight: Array, window: Window = ONE) -> Tensor:
    """Sums of each channel by itself, with small integers.

    Args:
        work: Where it is added.
        image: `[N, H, W, C]`.
        grid: Of its integers.
        weight: `[C, KH, KW]`.
        window: How it slides; it leaves nothing over.
    """
    channels = image.shape[3]
    made = [
        (image.shape[1 + a] + sum(window.pads[2 * a : 2 * a + 2]) - window.kernel[a]) // window.strides[a] + 1
        for a in (0, 1)
    ]
    layer = Layer(weight[:, None], np.zeros(channels, np.int64), Fraction(1), grid, channels)
    return _depthwise(work, image, layer, window, made)


def _rounded(unit: Unit, work: Work, sums: Tensor, layer: Layer) -> Tensor:
    return work.rounded(unit, sums, layer.steps)


def _full(work: Work, image: Tensor, layer: Layer, window: Window, made: Sequence[int]) -> Tensor:
    _check_weights(layer.weight)
    return _windowed(work, "CONV2D", image, layer.weight.transpose(0, 2, 3, 1), layer, window, made)


def _depthwise(work: Work, image: Tensor, layer: Layer, window: Window, made: Sequence[int]) -> Tensor:
    channels, outputs = image.shape[3], len(layer.weight)
    kernel = layer.weight.reshape(channels, outputs // channels, *window.kernel).transpose(2, 3, 0, 1)
    return _windowed(work, "DEPTHWISE_CONV2D", image, kernel, layer, window, made)


def _windowed(
    work: Work, kind: str, image: Tensor, weight: Array, layer: Layer, window: Window, made: Sequence[int]
) -> Tensor:
    dtype = layer.sum_type
    constants = work.emitter.constant(weight, "int8"), work.emitter.constant(layer.bias, dtype)
    return work.emitter.add(
        kind, [image, *constants, *_zero_points(work, layer.grid)], (image.shape[0], *made, len(layer.bias)), dtype,
        pad=list(window.pads), stride=list(window.strides), dilation=list(window.dilations), local_bound=False,
        acc_type=dtype,
    )  # fmt: skip


def _blocked(
    work: Work, image: Tensor, layer: Layer, window: Window, made: Sequence[int]
) -> tuple[Tensor, Layer, Window]:
    """Steps of more than 3 as steps of 1 over blocks, whose elements are channels: what embeds patches does so."""
    blocks = window.long_steps
    if blocks == (1, 1):
        return image, layer, window
    window, weight = window.spread(layer.weight, blocks)
    height, width = (
        (made[a] + window.kernel[a] // blocks[a] - 1) * blocks[a] if blocks[a] > 1 else None for a in (0, 1)
    )
    pads = list[tuple[int, int]]([(0, 0)])
    keep = list(image.shape)
    for axis, size in enumerate((height, width), start=1):
        begin = window.pads[2 * axis - 2]
        end = 0 if size is None else size - image.shape[axis] - begin
        pads.append((0, 0) if size is None else (begin, max(end, 0)))
        keep[axis] += min(end, 0)
    image = work.emitter.slice(image, [0] * 4, keep)
    image = work.emitter.pad(image, [*pads, (0, 0)], layer.grid.zero_point)
    samples, height, width, channels = image.shape
    rows, columns = height // blocks[0], width // blocks[1]
    image = work.emitter.reshape(image, (samples * rows, blocks[0], columns, blocks[1] * channels))
    image = work.emitter.transpose(image, (0, 2, 1, 3))
    image = work.emitter.reshape(image, (samples, rows, columns, blocks[0] * blocks[1] * channels))
    outputs, inner, high, wide = weight.shape
    kernel = high // blocks[0], wide // blocks[1]
    weight = weight.reshape(outputs, inner, kernel[0], blocks[0], kernel[1], blocks[1]).transpose(0, 3, 5, 1, 2, 4)
    weight = weight.reshape(outputs, -1, *kernel)
    return image, replace(layer, weight=weight), window.over_blocks(blocks, kernel)


def _zero_points(work: Work, grid: Grid) -> tuple[Tensor, Tensor]:
    """Those of an activation and of its weight."""
    return work.emitter.constant([grid.zero_point], grid.dtype), work.emitter.constant([0], "int8")


def _check_weights(weight: Array) -> None:
    """Refuse weights whose sums the NPU cannot hold."""
    sums = np.abs(weight.astype(np.int64)).reshape(len(weight), -1).sum(1)
    if sums.size and sums.max() > _MOST_SUM:
        raise Refusal("the absolute weights of an output add up to more than 127 * 65536")


def _bias(unit: Unit, outputs: int) -> Array:
    operand = unit.inputs[2] if len(unit.inputs) > 2 else None
    if operand is None:
        return np.zeros(outputs)
    real = operand.real
    if real is None:
        raise Refusal("its bias is computed")
    if unit.kind == "Gemm":
        real = real * unit.node.attributes.get_float("beta", 1.0)
        if real.size not in (1, outputs) or (real.ndim > 1 and real.shape[-1] != real.size):
            raise Refusal("its bias differs from row to row")
    return np.broadcast_to(real.reshape(-1), (outputs,))
