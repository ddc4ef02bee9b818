"""What the outputs of heads are multiplied with before they are added up: the projection behind attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.analyses.attention import AttentionBlock, Axis
from graphopt.analyses.constants import Constants
from graphopt.analyses.shapes import Shapes
from graphopt_passes.sparse_attention.axes import atoms

__all__ = ["projection_of"]

Array = np.ndarray[Any, np.dtype[Any]]
_CARRIERS = frozenset({"Cast", "Dropout", "Identity"})
_RESHAPES = frozenset({"Flatten", "Reshape", "Squeeze", "Unsqueeze"})


def projection_of(block: AttentionBlock, constants: Constants, shapes: Shapes) -> Array | None:
    """`[heads, value width, channels]`, float32; None where no constant matrix is found that takes head after head.

    Args:
        block: The core, whose output is followed through what only moves its elements.
        constants: Of the model.
        shapes: Of the model.
    """
    value, axes = block.output, list(block.output_axes)
    while len(uses := list(value.uses())) == 1:
        node = uses[0].node
        if node.op_type in ("MatMul", "Gemm"):
            return _weight(node, uses[0].idx, axes, block, constants)
        moved = _moved(node, axes, block, shapes)
        if moved is None:
            return None
        value, axes = node.outputs[0], moved
    return None


def _moved(node: ir.Node, axes: Sequence[Axis], block: AttentionBlock, shapes: Shapes) -> list[Axis] | None:
    """What lies along the axes behind a node; None if it does more than to move elements."""
    if node.op_type in _CARRIERS:
        return list(axes)
    if node.op_type == "Transpose":
        order = node.attributes.get_ints("perm", tuple(reversed(range(len(axes)))))
        return [axes[i] for i in order] if len(order) == len(axes) else None
    dims = shapes.of(node.outputs[0])
    if node.op_type not in _RESHAPES or not dims:
        return None
    split = atoms(axes)
    joined = _joined(split)
    if joined is not None and dims[-1] == block.heads * block.value_width:
        return joined
    return split if len(dims) == len(split) else None


def _joined(split: Sequence[Axis]) -> list[Axis] | None:
    """Heads and width as the last axis, where they stand there one behind the other."""
    for heads in (["head"], ["kv_head", "group"], ["kv_head"]):
        if list(split[-len(heads) - 1 :]) == [*heads, "width"]:
            return [*split[: -len(heads) - 1], "head*width"]
    return None


def _weight(
    node: ir.Node, place: int, axes: Sequence[Axis], block: AttentionBlock, constants: Constants
) -> Array | None:
    tensor = constants.of(node.inputs[1]) if place == 0 and axes[-1:] == ["head*width"] else None
    if tensor is None or len(tensor.shape) != 2 or not tensor.dtype.is_floating_point():
        return None
    if node.op_type == "Gemm" and node.attributes.get_int("transA", 0):
        return None
    matrix = tensor.numpy().astype(np.float32)
    if node.op_type == "Gemm" and node.attributes.get_int("transB", 0):
        matrix = matrix.T
    if len(matrix) != block.heads * block.value_width:
        return None
    return matrix.reshape(block.heads, block.value_width, -1)
