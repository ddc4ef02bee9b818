"""Weights that are made of few values, as `share` leaves them for compilers that code what often occurs in few bits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt_passes.quant.sites import Site, keyed_nodes, tensor_of

__all__ = ["have_few_values"]

_MOST = 64
_MEMBERS = 8  # weights that share a value, on average


def have_few_values(model: ir.Model, sites: Sequence[Site]) -> bool:
    """Whether most weights of some layers lie in tensors of few values, each of which occurs often."""
    nodes, few, whole = keyed_nodes(model), 0, 0
    for site in sites:
        for weight in site.weights:
            tensor = tensor_of(nodes[site.key].inputs[weight.index])
            if tensor is not None:
                whole += weight.size
                few += weight.size if _has_few(tensor.numpy()) else 0
    return 2 * few > whole


def _has_few(array: np.ndarray) -> bool:
    most = min(_MOST, array.size // _MEMBERS)
    start = array.reshape(-1)[: 4 * _MOST]  # nearly all of a weight that is not shared differ
    return len(np.unique(start)) <= most and len(np.unique(array)) <= most
