"""Choose for every layer how it is computed, and build the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import onnx_ir as ir

from graphopt.analyses import Ranges, Shapes
from graphopt.analyses.ranges import Method
from graphopt.pass_base import Change, Context
from graphopt.reference import Feed
from graphopt.targets import IntegerRules
from graphopt_passes.quant._maths import Grid
from graphopt_passes.quant.builder import Builder
from graphopt_passes.quant.dynamic import Rounding, quantize_dynamic, why_not_dynamic
from graphopt_passes.quant.plan import Plan
from graphopt_passes.quant.planning import plan_for
from graphopt_passes.quant.sites import Site, keyed_nodes
from graphopt_passes.quant.static import adds_pairs, apply_plan, make_grids, why_not_static
from graphopt_passes.quant.weight import quantize_weights, why_not_weight

__all__ = ["Decision", "Kind", "Settings", "Workbench", "assemble", "fall_back", "first_choice"]

Kind = Literal["static", "dynamic", "weight", "float"]


@dataclass(frozen=True)
class Settings:
    """What the user and the target ask for.

    Attributes:
        calibrator: How ranges are cut; auto: as `Workbench.methods` says, else minmax.
        per_channel: One scale for each output channel.
        bits: Bits of weights.
        min_sqnr: Least signal to noise of one layer in dB; minus infinity: any will do.
        min_output_sqnr: Least signal to noise of every output in dB, likewise.
        dynamic: Layers may find input ranges on every run.
        dynamic_convs: So may Conv, which is slower than in float.
        weight_only: Layers may keep float arithmetic and store integers.
        rules: How the target computes on integers.
    """

    calibrator: Method | Literal["auto"]
    per_channel: bool
    bits: int
    min_sqnr: float
    min_output_sqnr: float
    dynamic: bool
    weight_only: bool
    rules: IntegerRules
    dynamic_convs: bool = False

    def weight_bits(self, site: Site, node: ir.Node) -> int:
        """Bits of the weight of a site on integers."""
        return self.bits if adds_pairs(site, node) else 8


@dataclass(frozen=True)
class Decision:
    """How one site is computed, why not better, and its signal to noise where it was measured."""

    site: Site
    kind: Kind
    why: str = ""
    sqnr: float | None = None


@dataclass(frozen=True)
class Workbench:
    """The model to quantize with what is known of it.

    Attributes:
        model: Float model, its batch norms folded and its opset raised; it is not changed.
        context: Facts about it.
        shapes: Types of its values.
        ranges: Activation ranges; None without calibration data.
        feeds: Samples to judge layers and outputs on.
        settings: What was asked for.
        methods: How the ranges of single values are cut, by name.
        products: Products of two activations that were asked for, by key: why they stay float, empty if they do not.
    """

    model: ir.Model
    context: Context
    shapes: Shapes
    ranges: Ranges | None
    feeds: Sequence[Feed]
    settings: Settings
    methods: Mapping[str, Method] = field(default_factory=dict[str, Method])
    products: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def allowed_products(self) -> tuple[str, ...]:
        """Keys of the products that do not stay float."""
        return tuple(key for key, why in self.products.items() if not why)

    def plan(self, decisions: Sequence[Decision]) -> tuple[Plan, dict[str, Grid]]:
        """Plan the static layers and fit the grids."""
        static = [d.site for d in decisions if d.kind == "static"]
        products = self.allowed_products
        if not (static or products or self.settings.rules.integers_only) or self.ranges is None:
            return Plan(), {}
        plan = plan_for(self.model, static, self.shapes, self.settings.rules, products)
        usual = "minmax" if self.settings.calibrator == "auto" else self.settings.calibrator
        return plan, make_grids(self.model, plan, self.ranges, usual, self.settings.rules, self.methods)


def first_choice(
    model: ir.Model,
    sites: Sequence[Site],
    settings: Settings,
    *,
    static: bool,
    why: str = "",
    hidden: Mapping[str, str] | None = None,
) -> list[Decision]:
    """The strongest form that each site allows.

    Args:
        model: The model.
        sites: Its sites.
        settings: What was asked for.
        static: Ranges can be calibrated.
        why: Said of layers that are not on integers because they cannot.
        hidden: Reasons why ranges of single layers cannot be calibrated, by key.
    """
    nodes, chosen = keyed_nodes(model), list[Decision]()
    for site in sites:
        node = nodes[site.key]
        wanted = Decision(site, "static")
        refusal = why
        if static:
            unseen = (hidden or {}).get(site.key, "")
            refusal = why_not_static(site, node, settings.rules, settings.per_channel) or unseen
        chosen.append(wanted if static and not refusal else fall_back(wanted, node, settings, refusal))
    return chosen


def fall_back(decision: Decision, node: ir.Node, settings: Settings, why: str, sqnr: float | None = None) -> Decision:
    """The next weaker form of a site."""
    site = decision.site
    if decision.kind == "static" and settings.dynamic:
        refusal = why_not_dynamic(site, node, per_channel=settings.per_channel, convs=settings.dynamic_convs)
        if not refusal:
            return Decision(site, "dynamic", why, sqnr)
        why = why or refusal
    if decision.kind in ("static", "dynamic") and settings.weight_only:
        refusal = why_not_weight(site, per_channel=settings.per_channel)
        if not refusal:
            return Decision(site, "weight", why, sqnr)
        why = why if refusal in why else "; ".join(filter(None, (why, refusal)))
    return Decision(site, "float", why, sqnr)


def assemble(bench: Workbench, decisions: Sequence[Decision]) -> tuple[ir.Model, list[Change]]:
    """Build the quantized model; returns it and what happened at each site."""
    settings, model = bench.settings, bench.model.clone()
    builder = Builder(model, settings.bits, power_of_two=settings.rules.power_of_two)
    per_channel = settings.per_channel
    by_key: dict[str, Change] = {}
    static = [d for d in decisions if d.kind == "static"]
    plan, grids = bench.plan(decisions)
    weights = apply_plan(builder, plan, grids, [d.site for d in static], per_channel=per_channel)
    for decision in static:
        by_key[decision.site.key] = _static_change(decision, weights, settings)
    nodes = keyed_nodes(model)
    rounding = Rounding(builder)
    for d in decisions:
        if d.kind == "dynamic":
            node = nodes[d.site.key]
            by_key[d.site.key] = quantize_dynamic(rounding, node, d.site, per_channel=per_channel, why=d.why)
    stored = [(d.site, d.why) for d in decisions if d.kind == "weight"]
    at_load = settings.rules.weights_at_load
    made = quantize_weights(builder, stored, per_channel=per_channel, at_load=at_load)
    by_key |= {site.key: change for (site, _), change in zip(stored, made, strict=True)}
    for d in decisions:
        if d.kind == "float":
            by_key[d.site.key] = Change.skipped(d.site.name, d.why)
    changes = [by_key[d.site.key] for d in decisions]
    names = keyed_nodes(bench.model)
    for key, role in plan.nodes.items():
        if role in ("curve", "end", "join", "product"):
            changes.append(Change(names[key].name or key, f"{names[key].op_type} on int8"))
    left = (*bench.products.items(), *plan.left.items())
    changes += [Change.skipped(names[key].name or key, why) for key, why in left if why]
    return model, changes


def _static_change(decision: Decision, weights: Mapping[str, float], settings: Settings) -> Change:
    site = decision.site
    details: dict[str, int | float | str | bool] = {
        "bits": settings.bits,
        "weights": site.weights[0].size,
        "scales": "channel" if settings.per_channel else "tensor",
        "weight_sqnr_db": round(min(weights[site.key], 999.0), 1),
    }
    if decision.sqnr is not None:
        details["layer_sqnr_db"] = round(decision.sqnr, 1)
    return Change(site.name, "int8, calibrated ranges", details=details)
