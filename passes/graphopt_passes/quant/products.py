"""Products of two activations, as attention has them, on static integers: where asked for, and where data allows."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from graphopt.analyses import Shapes
from graphopt.analyses.lifting import steady_dimensions, why_hidden
from graphopt.analyses.quantized import find_quantized
from graphopt.pass_base import Change
from graphopt_passes.quant.audit import layer_quality
from graphopt_passes.quant.decide import Decision, Workbench
from graphopt_passes.quant.sites import KEPT, keyed_nodes, tensor_of

__all__ = ["PRODUCTS", "find_products", "judge_products", "told_before"]

PRODUCTS = frozenset({"MatMul"})
"""Operators that multiply two activations."""


def find_products(model: ir.Model, shapes: Shapes, only: Sequence[str], skip: Sequence[str]) -> dict[str, str]:
    """Products of two float activations, each with the reason why it stays float, empty if it need not, by key.

    Args:
        model: The model.
        shapes: Types of its values.
        only: Shell patterns of the names of nodes that may be quantized; none: all.
        skip: Those of nodes that may not.
    """
    steady, quantized, found = steady_dimensions(model), find_quantized(model), dict[str, str]()
    for key, node in keyed_nodes(model).items():
        if node.op_type not in PRODUCTS or node.domain not in ("", "ai.onnx") or node in quantized or KEPT in node.meta:
            continue
        values = [value for value in (*node.inputs, *node.outputs) if value is not None]
        floats = all(shapes.dtype(value) == ir.DataType.FLOAT and tensor_of(value) is None for value in values)
        if not floats or any(value.is_initializer() for value in values):
            continue
        name = node.name or key
        if only and not any(fnmatch.fnmatchcase(name, pattern) for pattern in only):
            found[key] = "not named by only"
        elif any(fnmatch.fnmatchcase(name, pattern) for pattern in skip):
            found[key] = "named by skip"
        else:
            found[key] = next(filter(None, (why_hidden(value, shapes, steady) for value in values)), "")
    return found


def judge_products(bench: Workbench, decisions: Sequence[Decision]) -> Workbench:
    """Take products off static integers that never ran, or whose result would be too noisy."""
    ranges, settings, nodes = bench.ranges, bench.settings, keyed_nodes(bench.model)
    asked = [key for key, why in bench.products.items() if not why]
    if not asked or ranges is None:
        return bench if ranges is not None else replace(bench, products={})
    seen = {key: ranges.of(nodes[key].outputs[0]) for key in asked}
    refused = {key: "no calibration sample runs it" for key, found in seen.items() if not found or not found.count}
    bench = replace(bench, products={**bench.products, **refused})
    plan, grids = bench.plan(decisions)
    quality = layer_quality(
        bench.model, plan, grids, (), ranges, bench.feeds, bench.context, products=bench.allowed_products,
        bits=settings.bits, per_channel=settings.per_channel, power_of_two=settings.rules.power_of_two,
    )  # fmt: skip
    noisy = {key: level for key, level in quality.items() if level < settings.min_sqnr}
    why = "8-bit activations would leave {:.1f} dB of signal to noise"
    refused = {key: why.format(level) for key, level in noisy.items()}
    return replace(bench, products={**bench.products, **refused})


def told_before(changes: Sequence[Change], bench: Workbench, decisions: Sequence[Decision]) -> tuple[Change, ...]:
    """Changes without those of nodes that are told of later: products, and whatever a plan for all nodes decides."""
    nodes, told = keyed_nodes(bench.model), [*bench.products]
    if bench.settings.rules.integers_only:
        plan, _ = bench.plan(decisions)
        told += [*plan.nodes, *plan.left]
    later = {nodes[key].name or key for key in told}
    return tuple(change for change in changes if change.site not in later)
