"""Choose for every layer how it is computed, build the model, and take back what costs too much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import onnx_ir as ir

from graphopt.analyses import Ranges, Shapes
from graphopt.analyses.ranges import Method
from graphopt.pass_base import Change, Context
from graphopt.reference import Feed, Reference
from graphopt.targets import IntegerRules
from graphopt_passes.quant._maths import Grid
from graphopt_passes.quant.audit import layer_quality, output_quality
from graphopt_passes.quant.builder import Builder
from graphopt_passes.quant.dynamic import quantize_dynamic, why_not_dynamic
from graphopt_passes.quant.plan import Plan, make_plan
from graphopt_passes.quant.sites import Site, keyed_nodes
from graphopt_passes.quant.static import apply_plan, make_grids, why_not_static
from graphopt_passes.quant.switches import output_noise
from graphopt_passes.quant.weight import quantize_weights, why_not_weight

__all__ = ["Decision", "Kind", "Settings", "Workbench", "assemble", "first_choice", "guard_layers", "guard_outputs"]

Kind = Literal["static", "dynamic", "weight", "float"]
_ROUNDS = 3
_NOISE_FEEDS = 4
_NOISE_RUNS = 64


@dataclass(frozen=True)
class Settings:
    """What the user and the target ask for.

    Attributes:
        calibrator: How ranges are cut.
        per_channel: One scale for each output channel.
        bits: Bits of weights.
        min_sqnr: Least signal to noise of one layer in dB.
        min_output_sqnr: Least signal to noise of every output in dB.
        dynamic: Layers may find input ranges on every run.
        weight_only: Layers may keep float arithmetic and store integers.
        rules: How the target computes on integers.
    """

    calibrator: Method
    per_channel: bool
    bits: int
    min_sqnr: float
    min_output_sqnr: float
    dynamic: bool
    weight_only: bool
    rules: IntegerRules


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
    """

    model: ir.Model
    context: Context
    shapes: Shapes
    ranges: Ranges | None
    feeds: Sequence[Feed]
    settings: Settings

    def plan(self, decisions: Sequence[Decision]) -> tuple[Plan, dict[str, Grid]]:
        """Plan the static layers and fit the grids."""
        static = [d.site for d in decisions if d.kind == "static"]
        if not static or self.ranges is None:
            return Plan(), {}
        plan = make_plan(self.model, static, self.shapes, self.settings.rules)
        return plan, make_grids(self.model, plan, self.ranges, self.settings.calibrator, self.settings.rules)


def first_choice(
    model: ir.Model, sites: Sequence[Site], settings: Settings, *, static: bool, why: str = ""
) -> list[Decision]:
    """The strongest form that each site allows.

    Args:
        model: The model.
        sites: Its sites.
        settings: What was asked for.
        static: Ranges can be calibrated.
        why: Said of layers that are not on integers because they cannot.
    """
    nodes, chosen = keyed_nodes(model), list[Decision]()
    for site in sites:
        node = nodes[site.key]
        wanted = Decision(site, "static")
        refusal = why_not_static(site, node, settings.rules, settings.per_channel) if static else why
        chosen.append(wanted if static and not refusal else fall_back(wanted, node, settings, refusal))
    return chosen


def fall_back(decision: Decision, node: ir.Node, settings: Settings, why: str, sqnr: float | None = None) -> Decision:
    """The next weaker form of a site."""
    site = decision.site
    if (
        decision.kind == "static"
        and settings.dynamic
        and not why_not_dynamic(site, node, per_channel=settings.per_channel)
    ):
        return Decision(site, "dynamic", why, sqnr)
    if decision.kind in ("static", "dynamic") and settings.weight_only:
        refusal = why_not_weight(site, per_channel=settings.per_channel)
        if not refusal:
            return Decision(site, "weight", why, sqnr)
        why = why if refusal in why else "; ".join(filter(None, (why, refusal)))
    return Decision(site, "float", why, sqnr)


def guard_layers(bench: Workbench, decisions: Sequence[Decision]) -> list[Decision]:
    """Take layers off static integers whose own result would be too noisy."""
    static, settings = [d.site for d in decisions if d.kind == "static"], bench.settings
    if not static or bench.ranges is None:
        return list(decisions)
    plan, grids = bench.plan(decisions)
    quality = layer_quality(
        bench.model, plan, grids, static, bench.ranges, bench.feeds, bench.context,
        bits=settings.bits, per_channel=settings.per_channel,
    )  # fmt: skip
    judged, nodes = list[Decision](), keyed_nodes(bench.model)
    for decision in decisions:
        level = quality.get(decision.site.key)
        if level is None:
            judged.append(decision)
        elif level < settings.min_sqnr and not settings.rules.static_only:
            why = f"8-bit activations would leave {level:.1f} dB of signal to noise"
            judged.append(fall_back(decision, nodes[decision.site.key], settings, why, level))
        else:
            judged.append(replace(decision, sqnr=level))
    return judged


def guard_outputs(
    bench: Workbench, decisions: Sequence[Decision]
) -> tuple[ir.Model, list[Change], list[Decision], dict[str, float]]:
    """Build the model; where an output is too noisy, step back with the layers that make most of the noise.

    Returns:
        The model, what happened at each site, the decisions, and the signal to noise of each output in dB.
    """
    settings, current, round_ = bench.settings, list(decisions), 0
    noise: dict[tuple[str, Kind], float] = {}
    original = Reference(bench.model, threads=bench.context.threads, extensions=bench.context.extensions)
    while True:
        model, changes = assemble(bench, current)
        result = Reference(model, threads=bench.context.threads, extensions=bench.context.extensions)
        quality = output_quality(original, result, bench.feeds, bench.context)
        worst = min(quality.values(), default=settings.min_output_sqnr)
        if worst >= settings.min_output_sqnr or settings.rules.static_only or all(d.kind == "float" for d in current):
            return model, changes, current, quality
        bench.context.log.info("quant: %.1f dB at an output, stepping back", worst)
        current = _step_back(bench, current, round_, worst, noise)
        round_ += 1


def _step_back(
    bench: Workbench, decisions: Sequence[Decision], round_: int, worst: float, known: dict[tuple[str, Kind], float]
) -> list[Decision]:
    """Step back with as few layers as keep the sum of what remains below the limit, which each round makes tighter.

    After `_ROUNDS` rounds all layers of the strongest form step back, so that the number of rounds is bounded.

    Args:
        bench: The model.
        decisions: How each site is computed now.
        round_: Number of rounds before.
        worst: Signal to noise at the worst output now, in dB.
        known: Noise of each site in each form, as far as measured; what this round measures is added.
    """
    settings = bench.settings
    _measure(bench, decisions, known)
    noise = {d.site.key: known[d.site.key, d.kind] for d in decisions if d.kind != "float"}
    limit = 10 ** (-settings.min_output_sqnr / 10) / 2 ** (round_ + 1)  # noises add up, and not quite independently
    left = sum(noise.values())
    strongest = next(kind for kind in ("static", "dynamic", "weight") if any(d.kind == kind for d in decisions))
    moved = {d.site.key: noise[d.site.key] for d in decisions if d.kind == strongest} if round_ >= _ROUNDS else {}
    for key in sorted(noise, key=lambda key: (-noise[key], key)):
        if left <= limit and moved:
            break
        moved[key] = noise[key]
        left -= noise[key]
    nodes, stepped = keyed_nodes(bench.model), list[Decision]()
    for decision in decisions:
        share = moved.get(decision.site.key)
        if share is None:
            stepped.append(decision)
        else:
            why = f"its int8 noise would be {100 * share:.2g} % of the signal at an output"
            if share < limit:  # it went with the others
                why = f"with it and others in int8 an output would keep {worst:.1f} dB of signal to noise"
            if decision.sqnr is not None and decision.why:
                why = f"{decision.why}; {why}"
            stepped.append(fall_back(decision, nodes[decision.site.key], settings, why, decision.sqnr))
    return stepped


def _measure(bench: Workbench, decisions: Sequence[Decision], known: dict[tuple[str, Kind], float]) -> None:
    """Measure the noise of the sites whose form is new."""
    new = [d for d in decisions if d.kind != "float" and (d.site.key, d.kind) not in known]
    plan, grids = bench.plan(decisions)
    found = output_noise(
        bench.model,
        plan,
        grids,
        [d.site for d in new if d.kind == "static"],
        [d.site for d in new if d.kind != "static"],
        bench.feeds[: max(1, min(_NOISE_FEEDS, _NOISE_RUNS // max(1, len(new))))],
        bench.context,
        bits=bench.settings.bits,
        per_channel=bench.settings.per_channel,
    )
    known.update({(d.site.key, d.kind): found[d.site.key] for d in new})


def assemble(bench: Workbench, decisions: Sequence[Decision]) -> tuple[ir.Model, list[Change]]:
    """Build the quantized model; returns it and what happened at each site."""
    settings, model = bench.settings, bench.model.clone()
    builder, per_channel = Builder(model, settings.bits), settings.per_channel
    by_key: dict[str, Change] = {}
    static = [d for d in decisions if d.kind == "static"]
    plan, grids = bench.plan(decisions)
    weights = apply_plan(builder, plan, grids, [d.site for d in static], per_channel=per_channel)
    for decision in static:
        by_key[decision.site.key] = _static_change(decision, weights, settings)
    nodes = keyed_nodes(model)
    ranges: dict[str, tuple[ir.Value, ...]] = {}
    for d in decisions:
        if d.kind == "dynamic":
            node = nodes[d.site.key]
            by_key[d.site.key] = quantize_dynamic(builder, node, d.site, ranges, per_channel=per_channel, why=d.why)
    stored = [(d.site, d.why) for d in decisions if d.kind == "weight"]
    for (site, _), change in zip(stored, quantize_weights(builder, stored, per_channel=per_channel), strict=True):
        by_key[site.key] = change
    for d in decisions:
        if d.kind == "float":
            by_key[d.site.key] = Change.skipped(d.site.name, d.why)
    changes = [by_key[d.site.key] for d in decisions]
    names = {node_key: node for node_key, node in keyed_nodes(bench.model).items() if node_key in plan.nodes}
    for key, role in plan.nodes.items():
        if role == "join":
            changes.append(Change(names[key].name or key, f"{names[key].op_type} on int8"))
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
