"""Random networks on integers: operators in a row, with what they branch into and join."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from quantized_graphs import Drawing

__all__ = ["draw_network"]


class _Network:
    """Blocks one after the other; each takes and leaves an image `[N, C, H, W]`."""

    def __init__(self, pick: Callable[[Sequence[Any]], Any], seed: int) -> None:
        self.pick, self.d = pick, Drawing(seed)
        self.current = self.d.input(pick([1, 1, 2]), pick([2, 3, 4]), pick([4, 6, 5]), pick([4, 6, 7]))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.d.samples[self.current].shape

    def act(self) -> tuple[str, dict[str, Any]] | None:
        return self.pick([None, ("Relu", {}), ("Clip", {"min": np.float32(0), "max": np.float32(6)})])

    def convolved(self, source: str, outputs: int, size: int, groups: int = 1, **attributes: Any) -> str:
        inputs = self.d.samples[source].shape[1]
        weight = self.d.weight(outputs, inputs // groups, size, size, axis=self.pick([0, None]))
        bias = [self.d.bias(source, weight, outputs)] if self.pick([True, False]) else []
        pads = [size // 2] * 4
        return self.d.op("Conv", source, weight, *bias, act=self.act(), pads=pads, group=groups, **attributes)

    def conv(self) -> None:
        self.current = self.convolved(self.current, self.pick([2, 3, 6]), self.pick([1, 3]))

    def depthwise(self) -> None:
        channels = self.shape[1]
        self.current = self.convolved(self.current, channels, 3, channels)

    def residual(self) -> None:
        branch = self.convolved(self.current, self.shape[1], 3)
        kind = self.pick(["Add", "Sub", "Mul", "Max"])
        self.current = self.d.op(kind, branch, self.current, act=self.act())

    def joined(self) -> None:
        other = self.convolved(self.current, 2, 1)
        self.current = self.d.op("Concat", self.current, other, axis=1)

    def parted(self) -> None:
        if self.shape[1] < 2:
            return
        before, sizes = len(self.d.nodes), [1, self.shape[1] - 1]
        self.d.op("Split", self.current, self.d.constant(sizes, "int64"), axis=1, results=2)
        first, second = (n.output[0] for n in self.d.nodes[before:] if n.op_type == "QuantizeLinear")
        self.current = self.d.op("Concat", second, self.d.op("Sigmoid", first), axis=1)

    def turned(self) -> None:
        swapped = self.d.op("Transpose", self.current, perm=[0, 2, 3, 1], grid=self.current)
        mixed = self.d.op("MatMul", swapped, self.d.weight(self.shape[1], 3, axis=1))
        self.current = self.d.op("Transpose", mixed, perm=[0, 3, 1, 2])

    def rows(self) -> None:
        samples, channels, height, width = self.shape
        flat = self.d.op("Reshape", self.current, self.d.constant([samples, channels, -1], "int64"), grid=self.current)
        cross = self.d.op("MatMul", flat, self.d.op("Transpose", flat, perm=[0, 2, 1], grid=flat))
        mixed = self.d.op("MatMul", self.d.op("Softmax", cross, axis=-1), flat)
        back = self.d.constant([samples, channels, height, width], "int64")
        self.current = self.d.op("Reshape", mixed, back, grid=mixed)

    def squeezed(self) -> None:
        small = self.d.op("GlobalAveragePool", self.current)
        gate = self.d.op("Sigmoid", self.convolved(small, self.shape[1], 1))
        self.current = self.d.op("Mul", self.current, gate)

    def pooled(self) -> None:
        kind, pads = self.pick(["MaxPool", "AveragePool"]), self.pick([[0] * 4, [1, 0, 1, 0]])
        self.current = self.d.op(
            kind, self.current, kernel_shape=[2, 2], strides=self.pick([[1, 1], [2, 2]]), pads=pads
        )
        if min(self.shape[2:]) < 2:
            self.enlarged()

    def enlarged(self) -> None:
        if max(self.shape[2:]) > 8:
            return
        sizes = self.d.constant([*self.shape[:2], *(2 * size for size in self.shape[2:])], "int64")
        self.current = self.d.op("Resize", self.current, "", "", sizes, mode=self.pick(["nearest", "linear"]))

    def cut(self) -> None:
        padded = self.d.op("Pad", self.current, self.d.constant([0, 0, 1, 0, 0, 0, 0, 2], "int64"))
        ends = self.d.constant([0, 1], "int64"), self.d.constant([-1, 1000], "int64"), self.d.constant([2, 3], "int64")
        self.current = self.d.op("Slice", padded, *ends)

    def curved(self) -> None:
        self.current = self.d.op(self.pick(["HardSwish", "LeakyRelu", "Tanh"]), self.current)

    def head(self) -> None:
        flat = self.d.op("Flatten", self.current, grid=self.current)
        self.current = self.d.op("Gemm", flat, self.d.weight(self.d.samples[flat].shape[1], 5, axis=1))


def draw_network(pick: Callable[[Sequence[Any]], Any], seed: int) -> ir.Model:
    """A network of several blocks.

    Args:
        pick: Chooses one of several things.
        seed: Of weights and grids.
    """
    network = _Network(pick, seed)
    blocks = [
        network.conv, network.depthwise, network.residual, network.joined, network.parted, network.turned,
        network.rows, network.squeezed, network.pooled, network.enlarged, network.cut, network.curved,
    ]  # fmt: skip
    for _ in range(pick([2, 3, 4, 5])):
        pick(blocks)()
    if pick([True, False]):
        network.head()
    return network.d.output(network.current)
