"""Windows that slide over images: pads and steps as TOSA wants them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt_backends.npu.emitter import Emitter, Refusal
from graphopt_backends.npu.tosa import Tensor

__all__ = ["MOST_STRIDE", "ONE", "Window", "as_image", "pick", "strided", "transposed_window_of", "window_of"]

Array = np.ndarray[Any, np.dtype[Any]]
MOST_STRIDE = 3


@dataclass(frozen=True)
class Window:
    """A window over height and width.

    Attributes:
        kernel: Its size.
        strides: Its steps.
        dilations: How far its elements lie apart.
        pads: What is added above, below, left and right.
    """

    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int]
    pads: tuple[int, int, int, int]

    def fitted(self, emitter: Emitter, image: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Window]:
        """An image and pads of which the windows leave nothing over, as TOSA demands.

        ONNX rounds the number of windows down, or up with `ceil_mode`; what the last window does not reach is taken
        from the padding, then from the image, and what it lacks is added to the padding.

        Args:
            emitter: Cuts the image.
            image: `[N, H, W, C]`.
            sizes: Height and width of the result.
        """
        pads, keep, strides = list(self.pads), list(image.shape), list(self.strides)
        for axis in (0, 1):
            reach = (sizes[axis] - 1) * self.strides[axis] + (self.kernel[axis] - 1) * self.dilations[axis] + 1
            end = reach - image.shape[axis + 1] - pads[2 * axis]
            pads[2 * axis + 1] = max(end, 0)
            keep[axis + 1] += min(end, 0)
            if sizes[axis] == 1:
                strides[axis] = 1
        cut = emitter.slice(image, [0, 0, 0, 0], keep)
        return cut, replace(self, strides=(strides[0], strides[1]), pads=(pads[0], pads[1], pads[2], pads[3]))

    @property
    def long_steps(self) -> tuple[int, int]:
        """Steps that the NPU does not have, and 1 for others."""
        height, width = (stride if stride > MOST_STRIDE else 1 for stride in self.strides)
        return height, width

    def slowed(self, made: Sequence[int]) -> tuple[Window, Sequence[int], tuple[int, int]]:
        """Steps of 1 instead of long ones, the size of what that makes, and which of it is wanted: every n-th."""
        steps = self.long_steps
        strides = [1 if step > 1 else stride for step, stride in zip(steps, self.strides, strict=True)]
        sizes = [(size - 1) * step + 1 for size, step in zip(made, steps, strict=True)]
        return replace(self, strides=(strides[0], strides[1])), sizes, steps

    def spread(self, weight: Array, blocks: tuple[int, int]) -> tuple[Window, Array]:
        """Dilations written as zeros, and zeros behind, along axes that are cut into blocks: whole blocks of weights.

        Args:
            weight: Its last two axes are those of the window.
            blocks: Their sizes; 1 leaves an axis as it is.
        """
        kernel, dilations = list(self.kernel), list(self.dilations)
        for axis, block in enumerate(blocks):
            if block > 1:
                reach = (kernel[axis] - 1) * dilations[axis] + 1
                wide = np.zeros(
                    (*weight.shape[: 2 + axis], -(-reach // block) * block, *weight.shape[3 + axis :]), np.int8
                )
                wide[(slice(None),) * (2 + axis) + (slice(0, reach, dilations[axis]),)] = weight
                kernel[axis], dilations[axis], weight = wide.shape[2 + axis], 1, wide
        return replace(self, kernel=(kernel[0], kernel[1]), dilations=(dilations[0], dilations[1])), weight

    def over_blocks(self, blocks: tuple[int, int], kernel: tuple[int, int]) -> Window:
        """The window over an image of blocks, which holds the pads of the axes that were cut."""
        strides = [1 if block > 1 else stride for block, stride in zip(blocks, self.strides, strict=True)]
        top, bottom, left, right = self.pads
        rows, columns = (
            (0, 0) if block > 1 else ends for block, ends in zip(blocks, ((top, bottom), (left, right)), strict=True)
        )
        return Window(kernel, (strides[0], strides[1]), self.dilations, (*rows, *columns))

    def check(self, most: int, *, high: int = 64, stride: int = MOST_STRIDE) -> None:
        """Refuse what Ethos-U has no windows for."""
        height, width = self.kernel
        if not (1 <= height * width <= most and height <= high):
            raise Refusal(f"its window of {height}x{width} is larger than the NPU's ({most} elements, {high} rows)")
        if max(self.strides) > stride:
            raise Refusal(f"its stride of {max(self.strides)} is more than {stride}")


ONE = Window((1, 1), (1, 1), (1, 1), (0, 0, 0, 0))
"""A window of one element."""


def window_of(node: ir.Node, kernel: Sequence[int], image: Sequence[int]) -> Window:
    """The window of a node over an image of one or two dimensions.

    Args:
        node: Conv, a pooling operator or the like.
        kernel: Size of the window.
        image: Height and width, or the length.
    """
    rank, auto = len(kernel), _auto(node)
    strides, dilations = _steps(node, "strides", rank), _steps(node, "dilations", rank)
    pads = list(node.attributes.get_ints("pads", None) or [0] * 2 * rank)
    if auto != "NOTSET":
        pads = [0] * 2 * rank if auto == "VALID" else _same(auto, kernel, image, strides, dilations)
    return _window(kernel, strides, dilations, pads)


def transposed_window_of(node: ir.Node, kernel: Sequence[int], image: Sequence[int], made: Sequence[int]) -> Window:
    """The window of ConvTranspose, whose pads are what its full result is larger than the result.

    Args:
        node: ConvTranspose.
        kernel: Size of the window.
        image: Height and width, or the length.
        made: Height and width of the result.
    """
    rank, auto = len(kernel), _auto(node)
    strides, dilations = _steps(node, "strides", rank), _steps(node, "dilations", rank)
    begins = list(node.attributes.get_ints("pads", None) or [0] * 2 * rank)[:rank]
    if auto == "VALID":
        begins = [0] * rank
    elif auto != "NOTSET" or node.attributes.get_ints("output_shape", None):
        more = node.attributes.get_ints("output_padding", None) or [0] * rank
        sizes = zip(strides, image, more, kernel, dilations, made[-rank:], strict=True)
        totals = [max(s * (i - 1) + m + (k - 1) * d + 1 - o, 0) for s, i, m, k, d, o in sizes]
        begins = [total // 2 if auto == "SAME_UPPER" else total - total // 2 for total in totals]
    return _window(kernel, strides, dilations, begins + [0] * rank)


def _auto(node: ir.Node) -> str:
    return node.attributes.get_string("auto_pad", "NOTSET") or "NOTSET"


def _steps(node: ir.Node, name: str, rank: int) -> list[int]:
    return list(node.attributes.get_ints(name, None) or [1] * rank)


def _window(kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], pads: Sequence[int]) -> Window:
    """A window over two dimensions; over one it has a height of 1."""
    rank = len(kernel)
    if rank not in (1, 2):
        raise Refusal(f"it slides over {rank} dimensions")
    if min(pads) < 0:
        raise Refusal("its padding is negative")
    one, none = [1] * (2 - rank), [0] * (2 - rank)
    (top, left), (bottom, right) = [*none, *pads[:rank]], [*none, *pads[rank:]]
    (high, wide), (down, along), (apart, aside) = ([*one, *values] for values in (kernel, strides, dilations))
    return Window((high, wide), (down, along), (apart, aside), (top, bottom, left, right))


def _same(
    auto: str, kernel: Sequence[int], image: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[int]:
    """Pads that make the result as large as the image, divided by the stride."""
    begins, ends = list[int](), list[int]()
    for size, length, stride, dilation in zip(kernel, image, strides, dilations, strict=True):
        reach = (-(-length // stride) - 1) * stride + (size - 1) * dilation + 1
        total = max(reach - length, 0)
        begins.append(total // 2 if auto == "SAME_UPPER" else total - total // 2)
        ends.append(total - begins[-1])
    return begins + ends


def as_image(emitter: Emitter, tensor: Tensor) -> Tensor:
    """`[N, L, C]` as an image of one row."""
    if len(tensor.shape) == 3:
        samples, length, channels = tensor.shape
        return emitter.reshape(tensor, (samples, 1, length, channels))
    return tensor


def pick(emitter: Emitter, image: Tensor, steps: tuple[int, int]) -> Tensor:
    """Every n-th row and column."""
    for axis, step in enumerate(steps, start=1):
        image = strided(emitter, image, axis, 0, -(-image.shape[axis] // step), step)
    return image


def strided(emitter: Emitter, tensor: Tensor, axis: int, begin: int, count: int, step: int) -> Tensor:
    """Every n-th element along an axis: steps become an axis of which one index is kept."""
    starts, sizes = [0] * len(tensor.shape), list(tensor.shape)
    starts[axis], sizes[axis] = begin, count * step
    over = begin + count * step - tensor.shape[axis]
    if step == 1:
        return emitter.slice(tensor, starts, sizes)
    if over > 0:  # the last step reaches over the end
        pads: list[tuple[int, int]] = [(0, 0)] * len(tensor.shape)
        pads[axis] = (0, over)
        tensor = emitter.pad(tensor, pads, 0)
    tensor = emitter.slice(tensor, starts, sizes)
    lead, tail = int(np.prod(sizes[:axis])), int(np.prod(sizes[axis + 1 :]))
    tensor = emitter.reshape(tensor, (lead * count, step, tail))
    tensor = emitter.slice(tensor, (0, 0, 0), (lead * count, 1, tail))
    sizes[axis] = count
    return emitter.reshape(tensor, sizes)
