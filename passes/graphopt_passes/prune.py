"""Structured pruning: channels leave the model, with everything that depends on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from graphopt.analyses import CHANNEL_GROUPS, CONSTANTS, COST, SHAPES, ChannelGroup, ChannelGroups, Cost
from graphopt.errors import OptionError, nearest
from graphopt.options import opt
from graphopt.pass_base import Change, Context, Pass, PassResult
from graphopt_passes._prune_budget import Budget, Facts, ladder, step_of, unit_width
from graphopt_passes._prune_criteria import Criterion, scores
from graphopt_passes._prune_output_error import output_scores
from graphopt_passes._prune_plan import plan_global, plan_uniform
from graphopt_passes._prune_refit import Refit, refit
from graphopt_passes._prune_removal import lost_positions, remove

__all__ = ["Prune"]

_UNITS = ("channels", "heads", "neurons", "hidden", "experts", "groups", "blocks")


@dataclass(frozen=True)
class _Layers:
    """Names and operators of the nodes that make channels, for globs and reports."""

    operators: dict[str, str]

    def match(self, name: str, globs: Sequence[str]) -> bool:
        return any(fnmatchcase(name, glob) or fnmatchcase(self.operators.get(name, ""), glob) for glob in globs)

    def unmatched(self, globs: Sequence[str]) -> str | None:
        return next((glob for glob in globs if not any(self.match(name, (glob,)) for name in self.operators)), None)


@dataclass(frozen=True, kw_only=True)
class Prune(Pass):
    """Remove the channels that matter least, with everything that depends on them.

    Channels are removed physically: from the weights that make them, the biases, batch norms and slopes that follow
    them, the layers that read them, residual partners and depthwise filters, and from every shape that the graph
    states. Inputs and outputs of the model keep their shapes. With calibration data, the layers that read them are
    refitted by least squares, which keeps most of the accuracy; without, weights alone decide and stay as they are.

    Refused, and reported with the node that stands in the way: channels that reach an input, an output, a subgraph or
    an operator that looks across channels, and weights that are not constant.
    """

    name: ClassVar[str] = "prune"
    lossy: ClassVar[bool] = True
    without_data: ClassVar[str] = "prune chooses channels by weights alone and refits no layer"

    ratio: float = opt(0.3, help="fraction removed, of what `of` names", ge=0, lt=1)
    of: Literal["macs", "params", "bytes"] = opt("macs", help="what `ratio` is a fraction of")
    criterion: Literal["auto", "output", "l2", "l1", "bn-scale", "random", "taylor"] = opt(
        "auto", help="how channels are judged; auto: by what layers lose on calibration data (output), else l2"
    )
    scope: Literal["auto", "uniform", "global"] = opt(
        "auto",
        help="the same fraction from every layer, or more where channels matter less; auto: global if judged by output",
    )
    round_to: int = opt(0, help="kept channels are a multiple of this; 0: what the target likes", ge=0)
    units: tuple[str, ...] = opt(
        ("channels", "heads", "neurons", "hidden", "experts", "groups"),
        help="what may go; blocks as well: whole residual blocks, judged on calibration data",
    )
    refit: bool = opt(True, help="re-solve the layers behind removed channels on calibration data")
    only: tuple[str, ...] = opt((), help="layers to prune: names or operators, with wildcards; none: all")
    skip: tuple[str, ...] = opt((), help="layers to leave alone: names or operators, with wildcards")

    def requires(self, model: ir.Model, ctx: Context) -> None:
        """Check the options that depend on the model.

        Raises:
            OptionError: The criterion needs gradients, or a wildcard fits no layer.
        """
        if self.criterion == "taylor":
            raise OptionError("prune.criterion", "taylor needs gradients, not available yet", "use l2")
        if self.criterion == "output" and ctx.calibration is None:
            raise OptionError("prune.criterion", "output needs samples", "give --calibration, or use l2")
        unknown = next((name for name in self.units if name not in _UNITS), None)
        if unknown is not None:
            raise OptionError("prune.units", f"{unknown!r} is no kind of unit", nearest(unknown, _UNITS))
        if "blocks" in self.units and ctx.calibration is None:
            raise OptionError("prune.units", "blocks are judged on samples", "give --calibration, or leave blocks out")
        groups = ctx.fact(CHANNEL_GROUPS)
        layers = _layers(model, groups)
        for option, globs in (("only", self.only), ("skip", self.skip)):
            glob = layers.unmatched(globs)
            if glob is not None:
                known = {*layers.operators, *layers.operators.values()}
                raise OptionError(
                    f"prune.{option}", f"{glob!r} fits no layer that makes channels", nearest(glob, known)
                )

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Choose units within the budget and remove them."""
        groups, before = ctx.fact(CHANNEL_GROUPS), ctx.fact(COST)
        chosen, reasons = self._candidates(model, groups, ctx)
        budget = Budget(model, Facts(before, ctx.fact(SHAPES), ctx.fact(CONSTANTS)), chosen, self.of)
        worth = self._worth(model, chosen, ctx)
        removed = self._plan(budget, chosen, worth, ctx)
        lost = [np.sort(np.argsort(w, kind="stable")[:n]) for w, n in zip(worth, removed, strict=True)]
        removals = [(group, units.tolist()) for group, units in zip(chosen, lost, strict=True) if len(units)]
        refitted = self._remove(model, groups, removals, ctx)
        after = ctx.fact(COST)
        taken = {id(group): len(units) for group, units in removals}
        changes = [
            _change(group, taken.get(id(group), 0), reasons.get(id(group)), before, after) for group in groups.groups
        ]
        changes += [Change.skipped(name, reason) for name, reason in groups.elsewhere.items()]
        changes += refitted.changes
        metrics = self._metrics(before, after) | {"refitted": refitted.layers}
        if refitted.layers:
            metrics |= {"refit_error_before": round(refitted.before, 6), "refit_error_after": round(refitted.after, 6)}
        return PassResult(bool(removals), tuple(changes), metrics=metrics)

    def _judge(self, ctx: Context) -> Literal["output"] | Criterion:
        """The criterion, `auto` resolved."""
        if self.criterion != "auto":
            return self.criterion
        return "output" if ctx.calibration is not None else "l2"

    def _worth(self, model: ir.Model, groups: Sequence[ChannelGroup], ctx: Context) -> list[np.ndarray]:
        """What the units of each group are worth, `[units]`."""
        judge = self._judge(ctx)
        by_weights: Criterion = "l2" if judge == "output" else judge
        worth = [scores(model, ctx.fact(CONSTANTS), group, by_weights, ctx.rng) for group in groups]
        if judge == "output" and ctx.calibration is not None and self.ratio:
            worth = output_scores(model, groups, worth, ctx.calibration, ctx)
        return worth

    def _remove(
        self, model: ir.Model, groups: ChannelGroups, removals: list[tuple[ChannelGroup, list[int]]], ctx: Context
    ) -> Refit:
        """Remove the units, and let the layers that are left make up for them."""
        if not removals:
            return Refit()
        data = ctx.calibration if self.refit else None
        whole = model if data is None else model.clone()
        remove(model, groups, removals)
        ctx.drop_facts()
        if data is None:
            return Refit()
        refitted = refit(whole, model, lost_positions(removals), data, ctx)
        ctx.drop_facts()
        return refitted

    def _candidates(
        self, model: ir.Model, groups: ChannelGroups, ctx: Context
    ) -> tuple[list[ChannelGroup], dict[int, str]]:
        """Groups that may lose units, and by identity why the others may not."""
        blind = self.of == "macs" and not ctx.fact(COST).macs
        layers, chosen, reasons = _layers(model, groups), list[ChannelGroup](), dict[int, str]()
        for group in groups.groups:
            reason = group.pin
            if reason is None and group.kind.partition(" ")[0] not in self.units:
                reason = f"prune.units does not name {group.kind}"
            if reason is None and self.only and not any(layers.match(name, self.only) for name in group.producers):
                reason = "not in prune.only"
            if reason is None and (name := next((n for n in group.producers if layers.match(n, self.skip)), None)):
                reason = f"prune.skip names {name!r}"
            if reason is None and blind:
                reason = "no shape is known to count multiply-accumulates with; give --shape, or of=params"
            if reason is None and len(self._ladder(group, ctx)) == 1:
                reason = f"{group.units} {group.kind} are too few to remove any"
            if reason is None:
                chosen.append(group)
            else:
                reasons[id(group)] = reason
        return chosen, reasons

    def _ladder(self, group: ChannelGroup, ctx: Context) -> list[int]:
        step = step_of(group.units, self.round_to, ctx.target.round_to, unit_width(group))
        return ladder(group.units, step)

    def _plan(
        self, budget: Budget, groups: Sequence[ChannelGroup], worth: Sequence[np.ndarray], ctx: Context
    ) -> list[int]:
        if not groups or not self.ratio:
            return [0] * len(groups)
        ladders, target = [self._ladder(group, ctx) for group in groups], budget.whole * (1 - self.ratio)
        if self.scope == "global" or (self.scope == "auto" and self._judge(ctx) == "output"):
            # a channel that many layers share is missed by all of them
            costs = [
                np.concatenate([[0.0], np.cumsum(np.sort(w))])[rungs] * len(group.producers)
                for group, w, rungs in zip(groups, worth, ladders, strict=True)
            ]
            return plan_global(budget, ladders, costs, target)
        return plan_uniform(budget, ladders, [group.units for group in groups], target)

    def _metrics(self, before: Cost, after: Cost) -> dict[str, int | float | str | bool]:
        amounts = {
            "macs": (before.macs, after.macs),
            "params": (before.params, after.params),
            "bytes": (before.weight_bytes, after.weight_bytes),
        }
        metrics: dict[str, int | float | str | bool] = {"of": self.of, "ratio": self.ratio}
        for name, (old, new) in amounts.items():
            metrics |= {f"{name}_before": old, f"{name}_after": new}
        old, new = amounts[self.of]
        return metrics | {"achieved": round(1 - new / old, 6) if old else 0.0}


def _layers(model: ir.Model, groups: ChannelGroups) -> _Layers:
    producers = {name for group in groups.groups for name in group.producers}
    names = {node.name or f"{node.op_type}_{i}": node.op_type for i, node in enumerate(model.graph)}
    return _Layers({name: operator for name, operator in names.items() if name in producers})


def _change(group: ChannelGroup, lost: int, reason: str | None, before: Cost, after: Cost) -> Change:
    if reason is not None:
        return Change.skipped(group.name, reason)
    if not lost:
        return Change.skipped(group.name, "the ratio is met without it")

    def macs(cost: Cost) -> int:
        return sum(cost.nodes[name].macs or 0 for name in group.producers if name in cost.nodes)

    return Change(
        group.name,
        f"removed {lost} of {group.units} {group.kind}",
        details={
            "channels_before": group.units,
            "channels_after": group.units - lost,
            "layers": len(group.producers),
            "macs_before": macs(before),
            "macs_after": macs(after),
        },
    )
