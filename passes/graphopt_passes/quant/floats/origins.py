"""Where values come from: positions, sizes and masks, which fp16 would spoil, and constants too large for it.

Positions and sizes are computed from shapes and whole numbers. fp16 holds whole numbers up to 2048 only, and an angle
computed from a position is off by more the later it comes, so such arithmetic stays in float32 up to where it meets
the data; it is a small part of any model.

A mask adds something like -1e9 or -3.4e38 before a Softmax. What it adds only has to be far below everything else, so
a smaller constant does as well, as long as nothing but a Softmax or a comparison ever sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import onnx_ir as ir

from graphopt.analyses.names import subgraphs
from graphopt_passes._own_constants import constant_tensor
from graphopt_passes.fold.rewiring import RANDOM

__all__ = ["MASK_CARRIERS", "MASK_LIMIT", "hidden_values", "index_nodes", "masked_values"]

MASK_LIMIT = 32752.0
"""What a mask adds in fp16: half the greatest number, so that two masks together stay finite."""

MASK_CARRIERS = frozenset(
    {
        "Add", "Cast", "CastLike", "Concat", "ConstantOfShape", "Expand", "Gather", "GatherElements", "GatherND",
        "Identity", "Max", "Min", "Pad", "Reshape", "ScatterElements", "ScatterND", "Slice", "Split", "Squeeze", "Sub",
        "Sum", "Tile", "Transpose", "Trilu", "Unsqueeze", "Where",
    }
)  # fmt: skip
"""Operators that hand a masked value on, or make one from a constant."""

_MASK_MAKERS = frozenset({"Mul", "Neg"})
_MASK_READERS = frozenset(
    {
        "ArgMax", "ArgMin", "Clip", "Equal", "Exp", "Greater", "GreaterOrEqual", "Hardmax", "Less", "LessOrEqual",
        "Sigmoid", "Softmax", "Tanh",
    }
)  # fmt: skip
_SIZES = frozenset({"NonZero", "Range", "Shape", "Size"})
_TABLE = 4096  # elements from which a constant is data itself


def index_nodes(nodes: Iterable[tuple[str, ir.Node]], inputs: Iterable[ir.Value]) -> set[str]:
    """Keys of the nodes that compute from shapes, whole numbers and constants alone, at least one not constant.

    Args:
        nodes: All nodes with their keys, every graph in order and after the one around it.
        inputs: Inputs of all graphs.
    """
    whole = {value for value in inputs if value.dtype is not None and not value.dtype.is_floating_point()}
    data = {value for value in inputs if value not in whole}
    found: set[str] = set()
    for key, node in nodes:
        read = [value for value in node.inputs if value is not None and value.name]
        if node.op_type in ("Shape", "Size"):
            origin = "index"
        elif node.op_type in RANDOM or any(True for _ in subgraphs(node)) or any(value in data for value in read):
            origin = "data"
        elif not any(value in whole for value in read):
            origin = "index" if node.op_type in _SIZES else "constant"
        else:
            origin = "data" if _reads_table(node) else "index"
        if origin == "index":
            found.add(key)
        if origin != "constant":
            (whole if origin == "index" else data).update(node.outputs)
    return found


def _reads_table(node: ir.Node) -> bool:
    """Such as an embedding, or a table of angles or of a mask that was computed beforehand."""
    tensors = (constant_tensor(value) for value in node.inputs)
    return any(t is not None and t.dtype.is_floating_point() and t.size >= _TABLE for t in tensors)


def hidden_values(nodes: Sequence[tuple[str, ir.Node]]) -> set[ir.Value]:
    """Values that only Softmax, comparisons and the like see, directly or through `MASK_CARRIERS`.

    Args:
        nodes: As for `index_nodes`.
    """
    hidden: set[ir.Value] = set()
    for _, node in reversed(nodes):
        for value in node.outputs:
            uses = value.uses()
            if not uses or value.is_graph_output():
                continue
            if all(user.op_type in _MASK_READERS or _passes_on(user, index, hidden) for user, index in uses):
                hidden.add(value)
    return hidden


def _passes_on(user: ir.Node, index: int, hidden: set[ir.Value]) -> bool:
    if user.op_type in ("Attention", "MultiHeadAttention"):
        return index == (5 if user.domain == "com.microsoft" else 3)  # what is added to the scores
    return user.op_type in MASK_CARRIERS and all(output in hidden for output in user.outputs if output.name)


def masked_values(
    nodes: Iterable[tuple[str, ir.Node]], hidden: set[ir.Value], too_large: Callable[[ir.Value | ir.Node], bool]
) -> set[ir.Value]:
    """Hidden values that hold what a constant too large for fp16 put there.

    Args:
        nodes: As for `index_nodes`.
        hidden: What `hidden_values` found.
        too_large: Whether a constant value, or the constant in a node's attribute, has elements beyond fp16.
    """
    masked: set[ir.Value] = set()
    for _, node in nodes:
        if node.op_type in MASK_CARRIERS | _MASK_MAKERS:
            marked = any(value in masked or too_large(value) for value in node.inputs if value is not None)
            if marked or (node.op_type == "ConstantOfShape" and too_large(node)):
                masked.update(value for value in node.outputs if value in hidden)
    return masked
