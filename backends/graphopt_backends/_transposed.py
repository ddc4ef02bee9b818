"""A transposed convolution is a convolution.

Its result at full size is y[i * stride + k * dilation] = sum of x[i] w[k]. Results whose positions leave the same rest
when divided by the stride read the same pixels: those of all rests together are the filters of one convolution with
stride 1, whose taps run backwards. Where the stride is not 1, its channels are then moved in between the pixels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt_backends._builder import Builder
from graphopt_backends._fold import is_constant, static_shape

__all__ = ["transposed_convolution"]

Layout = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class _Axis:
    """One axis of an image.

    Attributes:
        size: Pixels of the image.
        taps: Of the transposed convolution.
        stride: Pixels of the result from pixel to pixel of the image.
        dilation: Pixels of the result from tap to tap.
        before: Pixels that are cut from the front of the full result.
        result: Pixels of the result.
    """

    size: int
    taps: int
    stride: int
    dilation: int
    before: int
    result: int

    @property
    def far(self) -> int:
        """How many pixels before its own place the last tap reads."""
        return (self.taps - 1) * self.dilation // self.stride

    @property
    def step(self) -> int:
        """Pixels from tap to tap of the convolution."""
        return math.gcd(*(k * self.dilation // self.stride for k in range(self.taps))) or 1

    @property
    def window(self) -> int:
        """Taps of the convolution."""
        return self.far // self.step + 1

    def place(self, tap: int) -> tuple[int, int]:
        """Rest of the results that a tap belongs to, and its place in the window."""
        back, rest = divmod(tap * self.dilation, self.stride)
        return rest, (self.far - back) // self.step

    @property
    def first(self) -> int:
        """First position of the convolution that is needed."""
        return self.before // self.stride

    @property
    def count(self) -> int:
        """Positions of the convolution that are needed."""
        return (self.before + self.result - 1) // self.stride - self.first + 1

    @property
    def pads(self) -> tuple[int, int]:
        """Border of the convolution; negative: pixels that it does not read."""
        front = self.far - self.first
        return front, self.count + self.far - self.size - front


def transposed_convolution(graph: ir.Graph, node: ir.Node) -> bool:
    """Replace a ConvTranspose with a constant weight."""
    axes, weight = _axes(node), node.inputs[1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if axes is None or weight is None or node.inputs[0] is None:
        return False
    groups = node.attributes.get_int("group", 1)
    make = Builder(graph, node)
    packed = _constants(make, weight, lambda array: _filters(array, axes, groups), groups, axes)
    if packed is None:
        return False
    inputs: list[ir.Value | None] = [_cut(make, node.inputs[0], axes), packed]
    if bias is not None:
        tiled = _constants(make, bias, lambda array: _tiled(array, axes, groups), groups, axes)
        if tiled is None:
            return False
        inputs.append(tiled)
    pads = [max(0, axis.pads[end]) for end in (0, 1) for axis in axes]
    attributes = {
        "group": groups, "dilations": [axis.step for axis in axes], "pads": pads, "strides": [1] * len(axes),
        "kernel_shape": [axis.window for axis in axes],
    }  # fmt: skip
    if all(axis.stride == 1 for axis in axes):
        make.finish("Conv", inputs, node.outputs[0], **attributes)
    else:
        _interleave(make, node, make("Conv", inputs, **attributes), axes, groups)
    return True


def _axes(node: ir.Node) -> list[_Axis] | None:
    source, weight, result = (static_shape(value) for value in (node.inputs[0], node.inputs[1], node.outputs[0]))
    if source is None or weight is None or result is None:
        return None
    rank = len(source) - 2
    strides = node.attributes.get_ints("strides") or [1] * rank
    dilations = node.attributes.get_ints("dilations") or [1] * rank
    given = node.attributes.get_ints("pads") or [0] * (2 * rank)
    extra = node.attributes.get_ints("output_padding") or [0] * rank
    mode = node.attributes.get_string("auto_pad", "NOTSET")
    found: list[_Axis] = []
    for i in range(rank):
        size, taps, wanted = source[i + 2], weight[i + 2], result[i + 2]
        whole = strides[i] * (size - 1) + extra[i] + dilations[i] * (taps - 1) + 1
        before = given[i]
        if mode in ("SAME_UPPER", "SAME_LOWER") or "output_shape" in node.attributes:
            total = max(0, whole - wanted)
            before = total // 2 if mode == "SAME_UPPER" else total - total // 2
        found.append(_Axis(size, taps, strides[i], dilations[i], before, wanted))
    return found


def _constants(make: Builder, value: ir.Value, laid_out: Layout, groups: int, axes: Sequence[_Axis]) -> ir.Value | None:
    """A constant, or the dequantization of one, in the layout of the convolution."""
    if is_constant(value) and value.const_value is not None:
        return make.array(laid_out(value.const_value.numpy()))
    quantized = value.producer()
    if quantized is None or quantized.op_type != "DequantizeLinear" or quantized.attributes.get_int("block_size", 0):
        return None
    arrays = [v.const_value.numpy() for v in quantized.inputs if v is not None and is_constant(v) and v.const_value]
    if len(arrays) != len(quantized.inputs) or (len(arrays) > 2 and arrays[2].any()):
        return None
    scales = arrays[1:]
    if scales[0].size > 1:
        if arrays[0].ndim > 1 and quantized.attributes.get_int("axis", 1) % arrays[0].ndim != 1:
            return None
        whole = groups if arrays[0].ndim > 1 else 1  # the filters of every group share the scales of a weight
        scales = [_tiled(np.tile(array, whole), axes, groups) for array in scales]
    return make("DequantizeLinear", [make.array(laid_out(arrays[0])), *map(make.array, scales)], axis=0)


def _filters(weight: np.ndarray, axes: Sequence[_Axis], groups: int) -> np.ndarray:
    """[channels, filters / groups, taps...] to [groups * rests * filters / groups, channels / groups, window...]."""
    channels, filters = weight.shape[0] // groups, weight.shape[1]
    own = weight.reshape(groups, channels, filters, *weight.shape[2:])
    rests, windows = [axis.stride for axis in axes], [axis.window for axis in axes]
    found = np.zeros((groups, *rests, filters, channels, *windows), weight.dtype)
    for taps in itertools.product(*(range(axis.taps) for axis in axes)):
        places = [axis.place(tap) for axis, tap in zip(axes, taps, strict=True)]
        rest, window = tuple(place[0] for place in places), tuple(place[1] for place in places)
        found[(slice(None), *rest, slice(None), slice(None), *window)] = own[(..., *taps)].swapaxes(1, 2)
    return found.reshape(-1, channels, *windows)


def _tiled(values: np.ndarray, axes: Sequence[_Axis], groups: int) -> np.ndarray:
    """Numbers for each filter, repeated for all rests."""
    rests = math.prod(axis.stride for axis in axes)
    own = values.reshape(groups, 1, -1)
    return np.ascontiguousarray(np.broadcast_to(own, (groups, rests, own.shape[2]))).reshape(-1)


def _cut(make: Builder, value: ir.Value, axes: Sequence[_Axis]) -> ir.Value:
    """The image without the pixels that no result reads."""
    cuts = [(i, axis) for i, axis in enumerate(axes, 2) if min(axis.pads) < 0]
    if not cuts:
        return value
    starts = [max(0, -axis.pads[0]) for _, axis in cuts]
    ends = [axis.size - max(0, -axis.pads[1]) for _, axis in cuts]
    return make("Slice", [value, make.ints(starts), make.ints(ends), make.ints([i for i, _ in cuts])])


def _interleave(make: Builder, node: ir.Node, value: ir.Value, axes: Sequence[_Axis], groups: int) -> None:
    """Move the channels of all rests in between the pixels, and cut what is too much."""
    result = static_shape(node.outputs[0])
    assert result is not None
    rank, counts, rests = len(axes), [axis.count for axis in axes], [axis.stride for axis in axes]
    apart = [result[0], groups, *rests, result[1] // groups, *counts]
    pairs = [place for i in range(rank) for place in (3 + rank + i, 2 + i)]
    moved = make("Transpose", [make("Reshape", [value, make.ints(apart)])], perm=[0, 1, 2 + rank, *pairs])
    wide = [count * rest for count, rest in zip(counts, rests, strict=True)]
    whole = make("Reshape", [moved, make.ints([*result[:2], *wide])])
    starts = [axis.before - axis.first * axis.stride for axis in axes]
    ends = [start + size for start, size in zip(starts, result[2:], strict=True)]
    along = make.ints(range(2, 2 + rank))
    make.finish("Slice", [whole, make.ints(starts), make.ints(ends), along], node.outputs[0])
