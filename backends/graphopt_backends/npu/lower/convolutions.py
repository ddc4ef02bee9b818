"""Conv and ConvTranspose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from graphopt_backends._fold import static_shape
from graphopt_backends.npu.emitter import Refusal
from graphopt_backends.npu.lower.sums import Layer, convolve, layer_of, weighted
from graphopt_backends.npu.lower.windows import Window, as_image, transposed_window_of, window_of
from graphopt_backends.npu.tosa import Tensor
from graphopt_backends.npu.units import Operand, Unit
from graphopt_backends.npu.work import Work, channels_last

__all__ = ["conv", "conv_transpose"]

Array = np.ndarray[Any, np.dtype[Any]]


def conv(unit: Unit, work: Work) -> None:
    """CONV2D, or DEPTHWISE_CONV2D; groups of several channels one after the other."""
    data, weight = weighted(unit)
    window = window_of(unit.node, weight.shape[2:], data.shape[2:])
    weight = weight.reshape(*weight.shape[:2], *window.kernel)
    layer = layer_of(unit, weight, 0, unit.node.attributes.get_int("group", 1))
    _put(unit, work, convolve(unit, work, _image(work, data), layer, window, _made(unit)))


def conv_transpose(unit: Unit, work: Work) -> None:
    """A convolution for each place between two steps.

    TRANSPOSE_CONV2D needs two to four times the cycles (Vela 5.2, windows of 2 to 4, steps of 1 and 2), and knows no
    groups, dilations or longer steps.
    """
    data, weight = weighted(unit)
    made, groups = _made(unit), unit.node.attributes.get_int("group", 1)
    window = transposed_window_of(unit.node, weight.shape[2:], data.shape[2:], made)
    inputs, inner = weight.shape[:2]
    weight = weight.reshape(groups, inputs // groups, inner, *window.kernel).swapaxes(1, 2)
    layer = layer_of(unit, weight.reshape(groups * inner, inputs // groups, *window.kernel), 1, groups)
    image = _image(work, data)
    _put(unit, work, _in_phases(unit, work, image, layer, window, made))


def _in_phases(unit: Unit, work: Work, image: Tensor, layer: Layer, window: Window, made: Sequence[int]) -> Tensor:
    """Result `s * j + p` along an axis of step s is the sum over v of `x[j + v] * w[p + pad - s * v]`.

    So every p is a convolution with weights of its own. Their results lie one behind the other where each is written
    to its place; those of a row are the channels of one convolution, unless channels are summed apart.
    """
    weight, offsets = _phases(layer.weight, window)
    if max(offsets) > 0:
        raise Refusal("its padding is wider than its window")
    (rows, columns), outputs = window.strides, len(layer.weight)
    sizes = [-(-size // step) for size, step in zip(made, window.strides, strict=True)]
    small = Window(weight.shape[-2:], (1, 1), (1, 1), (-offsets[0], 0, -offsets[1], 0))
    samples, places = image.shape[0], sizes[0] * sizes[1]
    found = list[Tensor]()
    for row in range(rows):
        if layer.groups == 1:
            parts = [layer.repeated(weight[:, :, row].transpose(2, 0, 1, 3, 4))]
        else:
            parts = [replace(layer, weight=weight[:, :, row, column]) for column in range(columns)]
        made_parts = [convolve(unit, work, image, part, small, sizes) for part in parts]
        flat = [work.emitter.reshape(part, (samples * places, 1, part.shape[3])) for part in made_parts]
        found.append(
            work.emitter.reshape(work.emitter.concat(flat, 1), (samples * sizes[0], 1, sizes[1] * columns * outputs))
        )
    whole = work.emitter.reshape(work.emitter.concat(found, 1), (samples, sizes[0] * rows, sizes[1] * columns, outputs))
    return work.emitter.slice(whole, [0] * 4, (samples, *made, outputs))


def _phases(weight: Array, window: Window) -> tuple[Array, list[int]]:
    """Weights `[OC, IC, KH, KW]` as `[OC, IC, SH, SW, VH, VW]`, and the first v of each axis."""
    offsets = list[int]()
    for axis in (0, 1):
        step, pad, size = window.strides[axis], window.pads[2 * axis], window.kernel[axis]
        dilation = window.dilations[axis]
        reach = (size - 1) * dilation + 1
        first, last = -((reach - 1 - pad) // step), (step - 1 + pad) // step
        offsets.append(first)
        at = 2 + 2 * axis
        found = np.zeros((*weight.shape[:at], step, last - first + 1, *weight.shape[at + 1 :]), np.int8)
        lead = (slice(None),) * at
        for phase in range(step):
            for v in range(first, last + 1):
                tap, rest = divmod(phase + pad - step * v, dilation)
                if not rest and 0 <= tap < size:
                    found[(*lead, phase, v - first)] = weight[(*lead, tap)]
        weight = found
    return weight.swapaxes(3, 4), offsets


def _image(work: Work, data: Operand) -> Tensor:
    return as_image(work.emitter, work.read(data, channels_last(len(data.shape))))


def _made(unit: Unit) -> tuple[int, int]:
    """Height and width of the result."""
    height, width = (1, *(static_shape(unit.results[0]) or ())[2:])[-2:]
    return height, width


def _put(unit: Unit, work: Work, found: Tensor) -> None:
    """Keep an image, or a row of one without its height, as the result."""
    shape = static_shape(unit.results[0]) or ()
    if len(shape) == 3:
        found = work.emitter.reshape(found, (found.shape[0], found.shape[2], found.shape[3]))
    work.put(unit.results[0], found, channels_last(len(shape)))
