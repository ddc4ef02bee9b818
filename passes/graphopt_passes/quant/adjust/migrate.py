"""Divide what layers read by factors of its channels where nothing before can do it: one Mul, if it pays.

SmoothQuant (Xiao et al., 2022) folds the factors into the normalization or layer before. Behind a GELU or where a
residual connection reads the same channels, only a Mul of its own can.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.pass_base import Change
from graphopt_passes.fold.rewiring import FreshNames, site
from graphopt_passes.quant.adjust._balance import Activation, Problem, Reader, best_factors
from graphopt_passes.quant.adjust.constants import scale_constant
from graphopt_passes.quant.adjust.scales import Term
from graphopt_passes.quant.adjust.statistics import ChannelStatistics

__all__ = ["migrate_outliers"]

Array = np.ndarray[Any, np.dtype[Any]]

_PAYS = 4.0  # six decibels, for a pass over the activation
_NOISY = 1e-3  # a layer above 30 dB needs no help


def migrate_outliers(
    model: ir.Model,
    layers: Mapping[ir.Value, Sequence[Term]],
    seen: Mapping[str, ChannelStatistics],
    reader: Callable[[Term, Activation], Reader],
    problem: Callable[[int, Sequence[Reader]], Problem],
    names: FreshNames,
) -> list[Change]:
    """Insert a Mul before layers whose input has outliers, in place; the model computes the same.

    Args:
        model: A float model.
        layers: MatMul and Gemm weights by what they read; nothing else could scale it.
        seen: Ranges of the channels.
        reader: Reads a weight.
        problem: States the noise.
        names: Names taken.

    Returns:
        One change for each activation.
    """
    changes: list[Change] = []
    for value, terms in layers.items():
        place, one = site(terms[0].node), seen.get(value.name or "")
        if one is None or not one.finite:
            changes.append(Change.skipped(place, "no outliers migrated: no finite range of its input was seen"))
            continue
        activation = Activation(np.arange(one.low.size), one.low, one.high, one.square)
        readers = [reader(term, activation) for term in terms]
        stated = problem(one.low.size, readers)
        noise = stated.noise(np.ones(stated.count)) / sum(float(r.importance.size) for r in readers)
        factors, strength, gain = best_factors(stated)
        if noise < _NOISY or gain < _PAYS:
            level, better = -10 * math.log10(max(noise, 1e-12)), 10 * math.log10(gain)
            reason = f"a Mul would make {better:.1f} dB of an expected {level:.0f} dB"
            changes.append(Change.skipped(place, f"no outliers migrated: {reason}"))
            continue
        _insert(model, value, terms, factors, names)
        details: dict[str, int | float | str | bool] = {
            "channels": stated.count,
            "strength": strength,
            "expected_gain_db": round(10 * math.log10(gain), 1),
        }
        changes.append(Change(place, f"outliers migrated by a Mul before {len(terms)} layers", details=details))
    return changes


def _insert(model: ir.Model, value: ir.Value, terms: Sequence[Term], factors: Array, names: FreshNames) -> None:
    array = factors.astype(np.float32)
    name = names.make(f"{value.name}_factors")
    held = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(array.shape))
    held.const_value = ir.Tensor(array, name=name)
    model.graph.register_initializer(held)
    output = names.make(f"{value.name}_smooth")
    node = ir.node(
        "Mul", [value, held], outputs=[ir.Value(name=output, type=value.type, shape=value.shape)], name=output
    )
    first = next(node for node in model.graph if any(term.node is node for term in terms))
    model.graph.insert_before(first, node)
    for term in terms:
        rank_two = array.reshape(-1, 1)
        transposed = term.node.op_type == "Gemm" and term.node.attributes.get_int("transB", 0)
        scale_constant(term.node, term.index, 1 / (rank_two.T if transposed else rank_two), names)
        term.node.replace_input_with(0, node.outputs[0])
