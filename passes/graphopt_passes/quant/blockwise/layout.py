"""How the weight of a layer becomes a matrix `[inputs, outputs]`, and what was made of the matrix a tensor again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt_passes.quant.sites import Site, Weight

__all__ = ["Layout", "layout_of"]

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Layout:
    """A weight seen as a matrix.

    Attributes:
        shape: Shape of the weight.
        stored: Shape that its codes are stored in: a convolution's kernel is one axis with its channels.
        axis: Axis of `stored` that the layer sums over; blocks lie along it.
        parts: Parts of the outputs, each with inputs of its own: those of a grouped convolution.
    """

    shape: tuple[int, ...]
    stored: tuple[int, ...]
    axis: int
    parts: int = 1

    @property
    def inputs(self) -> int:
        """Rows of the matrix."""
        return self.stored[self.axis]

    @property
    def outputs(self) -> int:
        """Columns of the matrix."""
        return math.prod(self.stored) // self.inputs

    @property
    def reshaped(self) -> bool:
        """The codes are stored in another shape than the weight."""
        return self.shape != self.stored

    def matrix(self, weight: Array) -> Array:
        """The weight as `[inputs, outputs]`; a view where the weight has two axes."""
        return np.moveaxis(weight.reshape(self.stored), self.axis, 0).reshape(self.inputs, -1)

    def tensor(self, matrix: Array) -> Array:
        """Codes, or scales `[groups, outputs]`, as they are stored."""
        others = tuple(size for i, size in enumerate(self.stored) if i != self.axis)
        return np.ascontiguousarray(np.moveaxis(matrix.reshape(-1, *others), 0, self.axis))


def layout_of(site: Site, weight: Weight, node: ir.Node) -> Layout:
    """Layout of one weight of a site."""
    shape, kind = weight.shape, site.operator
    if kind == "Conv":
        parts = node.attributes.get_int("group", 1)
        return Layout(shape, (shape[0], math.prod(shape[1:])) if math.prod(shape[2:]) > 1 else shape, 1, parts)
    if kind == "ConvTranspose":
        return Layout(shape, shape, 0, node.attributes.get_int("group", 1))
    if kind == "MatMul":
        return Layout(shape, shape, len(shape) - (2 if weight.index else 1))
    if kind == "Gemm":
        return Layout(shape, shape, 1 if node.attributes.get_int("transB", 0) else 0)
    return Layout(shape, shape, len(shape) - 1)  # a table, or a recurrent layer
