"""The forms that a site can take, as settings to be measured: how weights are rounded, and whether activations are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.analyses import LayerMoments
from graphopt_passes.quant._maths import quantize_weight, weight_scales
from graphopt_passes.quant.blockwise.fit import Algorithm, Method, round_weight
from graphopt_passes.quant.blockwise.layout import Layout, layout_of
from graphopt_passes.quant.blockwise.store import is_fusable
from graphopt_passes.quant.decide import Decision, Settings, Workbench
from graphopt_passes.quant.mixed.switchboard import Switchboard
from graphopt_passes.quant.mixed.table import Setting
from graphopt_passes.quant.sites import Site, Weight, keyed_nodes
from graphopt_passes.quant.weight import saved_bytes

__all__ = ["current_forms", "eight_bits", "float_bytes", "in_blocks", "switchboard"]

Array = np.ndarray[Any, np.dtype[Any]]
_ON_INTEGERS = ("static", "dynamic")
_NODES_BYTES = 480  # nodes and initializers with their names


def eight_bits(
    unit: Sequence[Site], decisions: Mapping[str, Decision], settings: Settings, label: str = "int8", like: str = ""
) -> Setting:
    """The 8-bit form of a unit, each site as it was decided.

    Args:
        unit: Sites.
        decisions: How each would be computed, by key.
        settings: What was asked for.
        label: What tables call it.
        like: As in `Setting`.
    """

    def rounding(site: Site, place: int, weight: Array, moments: LayerMoments | None) -> Array:  # noqa: ARG001
        kind = decisions[site.key].kind
        axis = site.weights[place].axis if settings.per_channel else None
        if kind == "float":
            return weight
        bits = settings.bits if kind in _ON_INTEGERS else 8
        scales = weight_scales(weight, axis, bits)
        integers = quantize_weight(weight, scales, axis, bits)
        if axis is not None:
            scales = scales.reshape([-1 if i == axis % weight.ndim else 1 for i in range(weight.ndim)])
        return (integers * scales).astype(np.float32)

    rounded = frozenset(site.key for site in unit if decisions[site.key].kind in _ON_INTEGERS)
    stored = _distinct(site for site in unit if decisions[site.key].kind != "float")
    saved = sum(max(0, saved_bytes(weight, per_channel=settings.per_channel)) for weight in stored)
    return Setting(label, saved, rounding, rounded, like)


def in_blocks(unit: Sequence[Site], nodes: Mapping[str, ir.Node], method: Method, *, like: str = "") -> Setting | None:
    """The form in blocks of few bits, arithmetic in float; None where no kernel takes it, or it saves nothing.

    What is measured is rounding by least squares, with importance by data where there is any. Algorithms that spend
    more time on the final weights do not do worse.

    Args:
        unit: Sites.
        nodes: Nodes by key.
        method: How weights are rounded.
        like: As in `Setting`.
    """
    if not all(_has_kernel(site, nodes[site.key]) for site in unit):
        return None
    quick: Algorithm = method.algorithm if method.algorithm in ("rtn", "hqq") else "awq"

    def rounding(site: Site, place: int, weight: Array, moments: LayerMoments | None) -> Array:
        layout = layout_of(site, site.weights[place], nodes[site.key])
        blocks = round_weight(weight, layout, replace(method, algorithm=quick), moments).blocks
        return layout.tensor(blocks.real())

    layouts = {w.value: layout_of(site, w, nodes[site.key]) for site in unit for w in site.weights}
    saved = sum(_saved_in_blocks(layout, method) for layout in layouts.values())
    return Setting(f"int{method.bits}_g{method.group_size}", saved, rounding, like=like) if saved > 0 else None


def _has_kernel(site: Site, node: ir.Node) -> bool:
    """Whether ONNX Runtime multiplies with the integers, or looks rows of them up."""
    weight = site.weights[0]
    return site.operator == "Gather" or (is_fusable(node, weight.index) and len(weight.shape) == 2)


def _saved_in_blocks(layout: Layout, method: Method) -> int:
    groups = -(-layout.inputs // method.group_size) if method.group_size else 1
    grids = layout.outputs * groups * (4 + (0 if method.symmetric else method.bits / 8))
    return int(layout.outputs * layout.inputs * (4 - method.bits / 8) - grids) - _NODES_BYTES


def current_forms(
    bench: Workbench, decisions: Sequence[Decision], method: Method | None = None
) -> list[tuple[Site, Setting]]:
    """Each site that is not float with its form, one by one.

    Args:
        bench: The model.
        decisions: The 8-bit form of each.
        method: How weights are stored in blocks, where they are.
    """
    by_key, nodes = {decision.site.key: decision for decision in decisions}, keyed_nodes(bench.model)
    found: list[tuple[Site, Setting]] = []
    for decision in decisions:
        unit = (decision.site,)
        blocks = in_blocks(unit, nodes, method) if method is not None else None
        if decision.kind != "float":
            found.append((decision.site, blocks or eight_bits(unit, by_key, bench.settings)))
    return found


def _distinct(sites: Iterable[Site]) -> tuple[Weight, ...]:
    """Weights of sites, a shared one once."""
    return tuple({(site.main, weight.value): weight for site in sites for weight in site.weights}.values())


def float_bytes(units: Sequence[Sequence[Site]]) -> int:
    """Bytes of the weights of all units as they are."""
    return sum(4 * weight.size for unit in units for weight in _distinct(unit))


def switchboard(bench: Workbench, decisions: Sequence[Decision]) -> Callable[[Sequence[Site]], Switchboard]:
    """Makes a switchboard whose switches round activations as decided."""
    plan, grids = bench.plan(decisions)
    dynamic = frozenset(d.site.key for d in decisions if d.kind == "dynamic")

    def make(sites: Sequence[Site]) -> Switchboard:
        return Switchboard(bench.model, sites, bench.context, dynamic=dynamic, plan=plan, grids=grids)

    return make
