"""Weights of linear layers as rows that meet inputs, whatever the operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = ["Layout", "channel_axis", "layout_of"]

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Layout:
    """How the weight of a layer is stored.

    Attributes:
        shape: Shape of the weight.
        groups: Parts that do not meet.
        first: The stored order: output channels first, or input channels.
    """

    shape: tuple[int, ...]
    groups: int
    first: str

    def split(self, weight: Array) -> Array:
        """`[groups, rows, channels, taps]`: rows are output channels of a group."""
        if self.first == "outputs":
            outputs, inputs = self.shape[0], self.shape[1]
            return weight.reshape(self.groups, outputs // self.groups, inputs, -1)
        inputs, outputs = self.shape[:2]
        return weight.reshape(self.groups, inputs // self.groups, outputs, -1).transpose(0, 2, 1, 3)

    def join(self, rows: Array) -> Array:
        """The weight that `split` gives these rows."""
        if self.first == "outputs":
            return np.ascontiguousarray(rows.reshape(self.shape))
        return np.ascontiguousarray(rows.transpose(0, 2, 1, 3).reshape(self.shape))

    @property
    def channels(self) -> int:
        """Input channels of a group."""
        return self.shape[1] if self.first == "outputs" else self.shape[0] // self.groups


def layout_of(node: ir.Node, shape: tuple[int, ...]) -> Layout | None:
    """The layout of a layer's weight; None for other operators, and for a stack of matrices."""
    groups = node.attributes.get_int("group", 1)
    match node.op_type:
        case "Conv":
            return Layout(shape, groups, "outputs")
        case "ConvTranspose":
            return Layout(shape, groups, "inputs")
        case "Gemm" | "MatMul" if len(shape) == 2:
            transposed = node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))
            return Layout(shape, 1, "outputs" if transposed else "inputs")
        case _:
            return None


def channel_axis(node: ir.Node) -> int:
    """Axis of the channels in what a layer reads and makes."""
    return -1 if node.op_type == "MatMul" else 1
