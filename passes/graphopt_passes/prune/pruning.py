"""Structured pruning: channels leave the model, with everything that depends on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from graphopt.analyses import CHANNEL_GROUPS, CONSTANTS, COST, SHAPES, ChannelGroup, ChannelGroups, Cost
from graphopt.analyses.names import Names
from graphopt.errors import OptionError, nearest
from graphopt.options import opt
from graphopt.pass_base import Change, Context, Pass, PassResult
from graphopt.reference import Feed
from graphopt_passes.prune.allocation.budget import Budget, Facts, ladder, step_of, unit_width
from graphopt_passes.prune.allocation.plan import plan_global, plan_uniform, score_costs, why_missed, writers
from graphopt_passes.prune.allocation.search import Outcome, search
from graphopt_passes.prune.allocation.sensitivity import sensitivity
from graphopt_passes.prune.blocks import BlockRemoval, OutputJudge, Savings, prune_blocks
from graphopt_passes.prune.criteria import find_criterion, worth
from graphopt_passes.prune.pattern.sparsity import Sparsity
from graphopt_passes.prune.refit.refit import Refit, refit
from graphopt_passes.prune.removal import lost_positions, remove
from graphopt_passes.prune.residual_blocks import Block, find_blocks, join_shortcuts

__all__ = ["Prune"]

_RATIO = 0.3
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

    With `pattern=unstructured` or N:M no channel goes: the single weights that matter least become zero in place, and
    with calibration data the others make up for them. Only sparse kernels run such layers faster.

    Refused, and reported with the node that stands in the way: channels that reach an input, an output, a function or
    an operator that looks across channels, and weights that are not constant.
    """

    name: ClassVar[str] = "prune"
    lossy: ClassVar[bool] = True
    without_data: ClassVar[str] = "prune chooses by weights alone and refits no layer"

    ratio: float = opt(_RATIO, help="fraction removed, of what `of` names", ge=0, lt=1)
    pattern: str = opt(
        "channels",
        help="channels; or zeros inside weights: unstructured, or N:M (2:4: of 4 neighbouring inputs at most 2 stay)",
    )
    of: Literal["macs", "params", "bytes"] = opt("macs", help="what `ratio` is a fraction of")
    criterion: str = opt(
        "auto",
        help="how channels are judged: l1, l2, bn-scale, fpgm, activation, apoz, wanda, reconstruction, output-change, "
        "random, or one of a plugin's; auto: reconstruction with calibration data (what layers lose), else l2; single "
        "weights: l1, l2, wanda or obs; auto: obs with calibration data, else l2",
    )
    scope: Literal["auto", "uniform", "global", "sensitivity", "search"] = opt(
        "auto",
        help="uniform: the same fraction of every layer; global: more where scores are low; sensitivity: more where "
        "outputs change less; search: tries plans in full; auto: global if scores compare layers, else uniform; for "
        "unstructured sensitivity with calibration data, else global",
    )
    trials: int = opt(16, help="plans that scope=search tries beyond those two, each with its own refit", ge=0)
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
            OptionError: There is no such criterion, it lacks data, or a wildcard fits no layer.
        """
        if self.pattern != "channels":
            self._sparsity().requires(model, ctx)
            return
        if self.criterion == "obs":
            hint = "use pattern=2:4 or pattern=unstructured"
            raise OptionError("prune.criterion", "obs judges single weights, not channels", hint)
        find_criterion(self.criterion, ctx)
        unknown = next((name for name in self.units if name not in _UNITS), None)
        if unknown is not None:
            raise OptionError("prune.units", f"{unknown!r} is no kind of unit", nearest(unknown, _UNITS))
        if "blocks" in self.units and ctx.calibration is None:
            raise OptionError("prune.units", "blocks are judged on samples", "give --calibration, or leave blocks out")
        if self.scope in ("sensitivity", "search") and ctx.calibration is None:
            raise OptionError("prune.scope", f"{self.scope} needs samples", "give --calibration, or use uniform")
        layers = _layers(model, ctx.fact(CHANNEL_GROUPS))
        if "blocks" in self.units:
            for block in find_blocks(model, ctx.fact(SHAPES), ctx.fact(CONSTANTS))[0]:
                layers.operators.update({block.name: block.operator, **dict(block.layers)})
        for option, globs in (("only", self.only), ("skip", self.skip)):
            glob = layers.unmatched(globs)
            if glob is not None:
                known = {*layers.operators, *layers.operators.values()}
                raise OptionError(
                    f"prune.{option}", f"{glob!r} fits no layer that makes channels", nearest(glob, known)
                )

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Choose units within the budget and remove them."""
        if self.pattern != "channels":
            return self._sparsity().run(model, ctx)
        before, whole = ctx.fact(COST), model.clone() if self.refit and ctx.calibration is not None else None
        blocks = self._remove_blocks(model, ctx)
        groups = ctx.fact(CHANNEL_GROUPS)
        chosen, reasons = self._candidates(model, groups, ctx)
        target, scope = _amount(before, self.of) * (1 - self.ratio), self._scope(ctx)
        removals, _, missed = self._removals(model, chosen, target, scope, ctx)
        refitted = self._remove(model, whole, blocks, groups, removals, ctx)
        after = ctx.fact(COST)
        taken = {id(group): len(units) for group, units in removals}
        changes = [
            _change(group, taken.get(id(group), 0), reasons.get(id(group)), before, after) for group in groups.groups
        ]
        changes += [Change.skipped(name, reason) for name, reason in groups.elsewhere.items()]
        changes += [*blocks.changes, *refitted.changes]
        metrics = self._metrics(before, after) | {"refitted": refitted.layers}
        metrics |= {"criterion": find_criterion(self.criterion, ctx).name, "scope": scope}
        if refitted.layers:
            metrics |= {"refit_error_before": round(refitted.before, 6), "refit_error_after": round(refitted.after, 6)}
        if missed is not None:
            metrics |= {"ratio_missed": missed}
        notes = () if missed is None else (missed,)
        return PassResult(bool(removals or blocks.steps), tuple(changes), metrics=metrics, notes=notes)

    def revertible(self, model: ir.Model, sites: Sequence[str]) -> tuple[str, ...]:
        """With a pattern all of them: weights become zero in one layer whatever becomes of others."""
        return () if self.pattern == "channels" else tuple(sites)

    def worst_first(
        self, model: ir.Model, ctx: Context, sites: Sequence[str], reverted: Sequence[str], feeds: Sequence[Feed]
    ) -> tuple[str, ...]:
        """Order layers by what zeros in each alone do to the outputs."""
        return self._sparsity().worst_first(model, ctx, sites, feeds)

    def without(self, sites: Sequence[str]) -> Prune:
        """The same step with these layers as they were; unlike with `skip` the others do not become sparser for it."""
        if self.pattern == "channels":
            return super().without(sites)
        return _Sparing(**vars(self), spared=tuple(sites))

    def _sparsity(self) -> Sparsity:
        """The same pass where weights become zero and no channel goes."""
        for option in ("of", "round_to", "units"):
            if getattr(self, option) != getattr(Prune, option):
                fact = f"pattern={self.pattern} removes no channels"
                raise OptionError(f"prune.{option}", fact, "leave it out, or use pattern=channels")
        return Sparsity(
            pattern=self.pattern,
            ratio=self.ratio,
            default_ratio=_RATIO,
            criterion=self.criterion,
            scope=self.scope,
            refit=self.refit,
            only=self.only,
            skip=self.skip,
        )

    def _remove_blocks(self, model: ir.Model, ctx: Context) -> BlockRemoval:
        """Remove residual blocks where they are asked for, as long as channels would be missed more."""
        if "blocks" not in self.units:
            return BlockRemoval()
        savings = Savings(model, ctx.fact(COST), ctx.fact(CONSTANTS), self.of)
        wanted = _amount(ctx.fact(COST), self.of) * self.ratio
        refuse, others = self._keeps_block, lambda judge: self._price(model, judge, ctx)
        removal = prune_blocks(model, ctx, savings, wanted, refuse=refuse, others=others)
        if removal.steps:
            ctx.drop_facts()
        return removal

    def _keeps_block(self, block: Block) -> str | None:
        """Why the user wants a block to stay, or None."""
        layers = _Layers({block.name: block.operator, **dict(block.layers)})
        named = layers.match(block.name, self.only) or all(layers.match(name, self.only) for name, _ in block.layers)
        if self.only and not named:
            return "not in prune.only"
        skipped = next((name for name in layers.operators if layers.match(name, self.skip)), None)
        return None if skipped is None else f"prune.skip names {skipped!r}"

    def _price(self, model: ir.Model, judge: OutputJudge, ctx: Context) -> float:
        """How much the outputs change, for each unit saved, if channels alone go and no layer is refitted."""
        groups, whole = ctx.fact(CHANNEL_GROUPS), _amount(ctx.fact(COST), self.of)
        chosen = self._candidates(model, groups, ctx)[0]
        scope = "uniform" if self._scope(ctx) == "uniform" else "global"  # what is quick
        removals, left, _ = self._removals(model, chosen, whole * (1 - self.ratio), scope, ctx)
        if left >= whole:
            return math.inf
        copy = model.clone()
        remove(copy, groups, removals)
        return judge.of(copy) / (whole - left)

    def _removals(
        self, model: ir.Model, chosen: Sequence[ChannelGroup], target: float, scope: str, ctx: Context
    ) -> tuple[list[tuple[ChannelGroup, list[int]]], float, str | None]:
        """The units that go so that the model costs `target`, what it will cost, and why that is not the target."""
        facts = Facts(ctx.fact(COST), ctx.fact(CONSTANTS))
        budget = Budget(facts, chosen, self.of)
        ladders = [self._ladder(group, ctx) for group in chosen]
        if not chosen or not self.ratio or target >= budget.whole:
            none = [0] * len(chosen)
            missed = why_missed(budget, ladders, none, target, self.of) if self.ratio and not chosen else None
            return [], budget.whole, missed
        worths = worth(find_criterion(self.criterion, ctx), model, chosen, ctx)
        removed = self._plan(budget, ladders, chosen, worths, target, scope, ctx)
        lost = [np.sort(np.argsort(w, kind="stable")[:n]) for w, n in zip(worths, removed, strict=True)]
        removals = [(group, units.tolist()) for group, units in zip(chosen, lost, strict=True) if len(units)]
        return removals, budget.after(removed), why_missed(budget, ladders, removed, target, self.of)

    def _remove(
        self,
        model: ir.Model,
        whole: ir.Model | None,
        blocks: BlockRemoval,
        groups: ChannelGroups,
        removals: list[tuple[ChannelGroup, list[int]]],
        ctx: Context,
    ) -> Refit:
        """Remove the units, and let the layers that are left make up for them and for the blocks."""
        if not removals and not blocks.steps:
            return Refit()
        remove(model, groups, removals)
        ctx.drop_facts()
        refitted = Refit()
        if whole is not None and ctx.calibration is not None:
            refitted = refit(whole, model, {**blocks.sums, **lost_positions(removals)}, ctx.calibration, ctx)
        join_shortcuts(model, blocks.blocks)
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
        return ladder(group.units, step, group.least)

    def _plan(
        self,
        budget: Budget,
        ladders: Sequence[Sequence[int]],
        groups: Sequence[ChannelGroup],
        worths: Sequence[np.ndarray],
        target: float,
        scope: str,
        ctx: Context,
    ) -> list[int]:
        """How many units each group loses."""
        if scope == "uniform":
            return plan_uniform(budget, ladders, [group.units for group in groups], target)
        tables = [score_costs(writers(groups, ctx), worths, ladders)] if scope != "sensitivity" else []
        if scope != "global":
            tables.append(sensitivity(ctx.model, groups, worths, ladders, ctx))
        if len(tables) == 1 or ctx.calibration is None:
            return plan_global(budget, ladders, tables[0], target)
        orders = [np.argsort(scores, kind="stable") for scores in worths]
        outcome = Outcome(groups, orders, ctx.calibration, self.refit, ctx)
        trials = self.trials if scope == "search" else 0
        return search(tables, lambda costs: plan_global(budget, ladders, costs, target), outcome.of, trials, ctx.rng)

    def _scope(self, ctx: Context) -> str:
        """The scope, `auto` resolved."""
        if self.scope == "auto" and not find_criterion(self.criterion, ctx).comparable:
            return "uniform"
        return "global" if self.scope == "auto" else self.scope

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


@dataclass(frozen=True, kw_only=True)
class _Sparing(Prune):
    """A step that leaves some layers alone; its text is that of the step."""

    spared: tuple[str, ...]

    def without(self, sites: Sequence[str]) -> Prune:
        return replace(self, spared=(*self.spared, *sites))

    def _sparsity(self) -> Sparsity:
        return replace(super()._sparsity(), spared=self.spared)


def _amount(cost: Cost, of: Literal["macs", "params", "bytes"]) -> int:
    return {"macs": cost.macs, "params": cost.params, "bytes": cost.weight_bytes}[of]


def _layers(model: ir.Model, groups: ChannelGroups) -> _Layers:
    producers = {name for group in groups.groups for name in group.producers}
    names = {label: node.op_type for node, label in Names(model).labels.items()}
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
