"""Caches of earlier tokens that join the keys."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from graphopt.analyses.attention.labels import CARRIERS, LAYOUT
from graphopt.analyses.attention.sizes import Pair, Sizes
from graphopt.analyses.attention.strand import Strand

__all__ = ["cache_length"]

_PASSES_ON = LAYOUT | CARRIERS | {"Cast", "Gather", "Slice", "Split"}
_WRITES = frozenset({"ScatterElements", "ScatterND", "TensorScatter"})
_DEPTH = 16


def cache_length(places: Iterable[Strand], sizes: Sizes) -> Pair | None:
    """How many earlier keys a cache holds, None if there is none.

    A cache is fed to the model, or carried through a loop, and joined with new keys along their length; one that new
    keys are written into counts with the length that it has in all, less what nobody knows: zero.
    """
    for place in places:
        node = place.value.producer()
        if node is None or ("length",) not in place.labels:
            continue
        axis = place.labels.index(("length",))
        if node.op_type in _WRITES and _is_fed(node.inputs[0]):
            return (0, 0)
        if node.op_type == "Concat" and node.attributes.get_int("axis", 0) in (axis, axis - len(place.labels)):
            fed = [value for value in node.inputs[:-1] if _is_fed(value)]
            length = sizes.size(fed[0], axis) if fed else None
            if length is not None:
                return length
    return None


def _is_fed(value: ir.Value | None) -> bool:
    for _ in range(_DEPTH):
        if value is None:
            return False
        node = value.producer()
        if node is None:
            return value.const_value is None
        if node.op_type not in _PASSES_ON:
            return False
        value = node.inputs[0]
    return False
