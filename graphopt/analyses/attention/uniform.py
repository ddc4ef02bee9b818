"""Constants as seen by masks: one number everywhere, or numbers that stay small."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.analyses.attention.sizes import Sizes

__all__ = ["constant_array", "is_computed", "is_small", "uniform"]

_CARRY = frozenset({"Cast", "CastLike", "Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Tile", "Transpose",
                    "Unsqueeze"})  # fmt: skip
_PICK = frozenset({"Gather", "GatherND", "Slice", "Split"})
_LARGEST = 1 << 26  # bytes of a constant that is read
_SMALL = 1e3
_DEPTH = 24


def constant_array(value: ir.Value | None, sizes: Sizes) -> np.ndarray | None:
    """Numbers of a constant, None if it is computed, large or no numbers."""
    tensor = sizes.constants.of(value)
    if tensor is None or tensor.nbytes > _LARGEST or tensor.dtype == ir.DataType.STRING:
        return None
    return tensor.numpy()


def is_computed(value: ir.Value | None, sizes: Sizes) -> bool:
    """Whether a value follows from what the model is fed, by more than its sizes."""
    waiting, met = [value], set[ir.Value]()
    while waiting:
        value = waiting.pop()
        if value is None or value in met or sizes.constants.of(value) is not None:
            continue
        met.add(value)
        node = value.producer()
        if node is None or any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()):
            return True
        if node.op_type not in ("Shape", "Size"):
            waiting += node.inputs
    return False


def uniform(value: ir.Value | None, sizes: Sizes) -> float | None:
    """The number that a tensor holds everywhere, whatever its size; None if it is not known to hold one."""
    for _ in range(_DEPTH):
        array = constant_array(value, sizes)
        if array is not None:
            return float(array.flat[0]) if array.size and np.all(array == array.flat[0]) else None
        node = None if value is None else value.producer()
        if node is None or node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type == "ConstantOfShape":
            attribute = node.attributes.get("value")
            return 0.0 if attribute is None else float(attribute.as_tensor().numpy().reshape(-1)[0])
        if node.op_type not in _CARRY:
            found = sizes.content(value)
            return float(found[0]) if found and len(set(found)) == 1 else None
        value = node.inputs[0]
    return None


def is_small(value: ir.Value | None, sizes: Sizes) -> bool:
    """Whether a mask is made of constants too small to hide a key: tables of biases, and what is picked from them."""
    for _ in range(_DEPTH):
        tensor = sizes.constants.of(value)
        if tensor is not None:
            array = constant_array(value, sizes)
            return array is not None and array.dtype.kind == "f" and bool(np.all(np.abs(array) < _SMALL))
        node = None if value is None else value.producer()
        if node is None or node.op_type not in _CARRY | _PICK:
            return False
        value = node.inputs[0]
    return False
