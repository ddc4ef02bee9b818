"""What adjustments leave for the builder, kept with the values and nodes themselves, so that it survives copies."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = ["prepare_bias", "prepare_weight", "prepared_bias", "prepared_weight"]

Array = np.ndarray[Any, np.dtype[Any]]

_WEIGHT = "graphopt.quant.rounded_weight"
_BIAS = "graphopt.quant.bias_shift"


def prepare_weight(value: ir.Value, axis: int | None, bits: int, integers: Array) -> None:
    """Keep the integers of a weight for the scales of `weight_scales`; int8 of its shape."""
    known: dict[tuple[int | None, int], Array] = value.meta.get(_WEIGHT, {})
    value.meta[_WEIGHT] = {**known, (axis, bits): integers}


def prepared_weight(value: ir.Value, axis: int | None, bits: int) -> Array | None:
    """The integers kept for a weight; None: it rounds to nearest."""
    return value.meta.get(_WEIGHT, {}).get((axis, bits))


def prepare_bias(node: ir.Node, shift: Array) -> None:
    """Keep what has to be added to the bias of a layer once it computes on integers, `[channels]`."""
    node.meta[_BIAS] = shift


def prepared_bias(node: ir.Node) -> Array | None:
    """What has to be added to the bias of a layer; None: nothing."""
    return node.meta.get(_BIAS)
