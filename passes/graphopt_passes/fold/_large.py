"""Large weights that are only turned, reshaped or cast: done when they are written, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.analyses import Shapes
from graphopt.pass_base import Change
from graphopt.surgeon import COMPUTABLE
from graphopt_passes.fold.rewiring import DETERMINISTIC_DOMAINS, LARGE, FreshNames, constant, make_constant, site

__all__ = ["fold_large_weights"]

Array = np.ndarray[Any, np.dtype[Any]]
_MOVES = frozenset({"Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


def fold_large_weights(model: ir.Model, shapes: Shapes, names: FreshNames) -> list[Change]:
    """Replace a move of a large weight by a weight that is moved when somebody reads it.

    Models may exceed memory, so the moved weight is not kept: its file stays mapped, and writing the model moves one
    weight after the other.
    """
    changes: list[Change] = []
    for graph in list(model.graphs()):
        for node in graph:
            tensor = constant(node.inputs[0]) if node.inputs and node.op_type in _MOVES else None
            if tensor is None or tensor.nbytes <= LARGE or node.domain not in DETERMINISTIC_DOMAINS:
                continue
            move = _move(node, tensor, shapes)
            output = node.outputs[0]
            if move is None or tensor.dtype not in COMPUTABLE or output.is_graph_output() or not output.uses():
                continue
            shape, rule = move
            moved = ir.LazyTensor(_later(rule, tensor), dtype=tensor.dtype, shape=ir.Shape(shape))
            make_constant(output, moved, names)
            changes.append(Change(site(node), f"folded: a weight of shape {list(shape)}"))
    return changes


def _later(rule: Callable[[Array], Array], tensor: ir.TensorProtocol) -> Callable[[], ir.TensorProtocol]:
    return lambda: ir.Tensor(np.ascontiguousarray(rule(tensor.numpy())))


def _move(
    node: ir.Node, tensor: ir.TensorProtocol, shapes: Shapes
) -> tuple[tuple[int, ...], Callable[[Array], Array]] | None:
    """Shape of the result, and how to get it."""
    before = tensor.shape.numpy()
    if node.op_type == "Transpose":
        perm = tuple(node.attributes.get_ints("perm", tuple(reversed(range(len(before))))))
        return tuple(before[axis] for axis in perm), lambda array: array.transpose(perm)
    after = shapes.static(node.outputs[0])
    return None if after is None else (after, lambda array: array.reshape(after))
