"""When each adjustment acts: on the float copy before calibration, and on weights and biases once forms are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from graphopt.pass_base import Change, Context
from graphopt_passes.quant._maths import Grid
from graphopt_passes.quant.adjust.balance import Aims, balance_channels
from graphopt_passes.quant.adjust.bias import correct_biases
from graphopt_passes.quant.adjust.outliers import split_outliers
from graphopt_passes.quant.adjust.rounding import Rounding, round_weights
from graphopt_passes.quant.decide import Decision, Settings, Workbench
from graphopt_passes.quant.prepare import drop_unread
from graphopt_passes.quant.sites import Site, keyed_nodes

__all__ = ["Help", "adjust_floats", "adjust_integers"]


@dataclass(frozen=True)
class Help:
    """What the user asks for.

    Attributes:
        equalize: Move ranges between layers.
        smooth: Move outliers of activations into weights, by data.
        bias_correction: Take out of biases what rounding adds to means.
        rounding: How weights are rounded.
        outliers: Part of the input channels of a product that may stay float.
    """

    equalize: bool
    smooth: bool
    bias_correction: bool
    rounding: Rounding
    outliers: float


def adjust_floats(
    work: ir.Model,
    ctx: Context,
    sites: Sequence[Site],
    settings: Settings,
    mode: Literal["auto", "static", "dynamic", "weight"],
    asked: Help,
) -> list[Change]:
    """Change the float copy, in place, so that eight bits fit it better; it computes the same.

    Args:
        work: The copy.
        ctx: Facts about it, which are dropped where they no longer hold.
        sites: Layers that will be quantized.
        settings: How.
        mode: The strongest form; auto takes the strongest that the data allow.
        asked: What to do.
    """
    if not sites or not (asked.equalize or asked.smooth or asked.outliers):
        return []
    strongest = mode
    if mode == "auto":
        strongest = "static" if ctx.calibration is not None else "dynamic"
    aims = Aims(
        form=strongest,
        keys=frozenset(site.key for site in sites if site.main),
        bits=settings.bits,
        per_channel=settings.per_channel,
        equalize=asked.equalize,
        smooth=asked.smooth,
    )
    changes: list[Change] = []
    if asked.equalize or asked.smooth:
        changes += balance_channels(work, ctx, aims)
        ctx.drop_facts()
    if asked.outliers and strongest != "weight" and ctx.calibration is not None:
        changes += split_outliers(work, sites, asked.outliers, ctx)
    drop_unread(work)
    ctx.drop_facts()
    return changes


def adjust_integers(bench: Workbench, decisions: Sequence[Decision], asked: Help) -> list[Change]:
    """Choose the integers of weights and what is added to biases; both are kept with the float model.

    Args:
        bench: The float model; what it computes does not change.
        decisions: How each site is computed.
        asked: What to do.
    """
    changes: list[Change] = []
    settings = bench.settings
    bits, per_channel = settings.weight_bits, settings.per_channel
    stored = {d.site.key for d in decisions if d.kind == "weight"}
    if bench.context.calibration is None:
        return changes
    if asked.rounding != "nearest":
        sites = [d.site for d in decisions if d.kind != "float" and d.site.main]
        changes += round_weights(
            bench.model,
            sites,
            asked.rounding,
            bench.context,
            bits=lambda site, node: 8 if site.key in stored else bits(site, node),
            per_channel=per_channel,
        )
    if asked.bias_correction:
        sites = [d.site for d in decisions if d.kind == "static"]
        grids = _input_grids(bench, decisions, sites)
        changes += correct_biases(bench.model, sites, grids, bench.context, bits=bits, per_channel=per_channel)
    return changes


def _input_grids(bench: Workbench, decisions: Sequence[Decision], sites: Sequence[Site]) -> dict[str, Grid]:
    """The grid of what each layer on calibrated integers reads, by key."""
    (plan, grids), nodes = bench.plan(decisions), keyed_nodes(bench.model)
    found: dict[str, Grid] = {}
    for site in sites:
        value = nodes[site.key].inputs[plan.inputs[site.key][0]]
        found[site.key] = grids[plan.grid_of(value.name or "" if value is not None else "")]
    return found
