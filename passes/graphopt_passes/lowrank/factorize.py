"""Low-rank factorization: one layer becomes a chain of thin ones that cost less."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from glob import escape
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from graphopt.analyses import COST, Cost
from graphopt.errors import OptionError, nearest
from graphopt.model_io import EMBED_LIMIT, weight_bytes
from graphopt.options import opt
from graphopt.pass_base import Change, Context, Pass, PassResult
from graphopt_passes.lowrank._factors import Parts, Problem
from graphopt_passes.lowrank.judge import Judge, Loss
from graphopt_passes.lowrank.ranks import (
    Rounding,
    Setting,
    Table,
    by_budget,
    by_energy,
    by_ratio,
    costs_of,
    table_of,
    trials,
)
from graphopt_passes.lowrank.residual import Branches, add_branches
from graphopt_passes.lowrank.rewrite import Rewriter
from graphopt_passes.lowrank.schemes import Chain, Form, prepared
from graphopt_passes.lowrank.seen import Scale, problems
from graphopt_passes.lowrank.sequential import Fitted, fit_in_sequence
from graphopt_passes.lowrank.sites import Site, find_sites
from graphopt_passes.quant.blockwise.fit import Method

__all__ = ["LowRank"]

Array = np.ndarray[Any, np.dtype[Any]]

_NEAR = 0.02
_UNFELT, _FELT = 1e-9, 1e-3  # of the outputs' energy, and of that of a layer's own output
_FORMS: tuple[Form, ...] = ("product", "output", "input", "spatial", "tucker", "cp")


@dataclass(frozen=True, kw_only=True)
class LowRank(Pass):
    """Replace layers by chains of thinner ones that make nearly the same output at less cost.

    A matrix becomes two; a convolution, grouped or transposed as well, becomes k x k to few channels and 1 x 1, 1 x 1
    and k x k, k x 1 and 1 x k, 1 x 1, k x k and 1 x 1, or 1 x 1, depthwise k x 1 and 1 x k and 1 x 1 (`cp`), whichever
    loses least for what it saves. Layers that share a weight share its factors. With calibration data, errors are those
    of the layers' outputs, ranks are chosen for all layers together, and each layer is solved anew, with its bias, for
    the output that it had in the original model; without, weights alone decide.

    A layer is left alone where a chain saves no arithmetic or no bytes of the file, where its output would lose more
    than `max_layer_error`, and where no calibration sample feels it, as in a branch that none takes. If the outputs of
    the model, on calibration samples, lose more than `max_error` or `max_nats`, factoring does not pay and nothing
    changes: weights of small models are often of nearly full rank.

    With `residual`, weights of products are stored in 4 bits instead, and what rounding loses is kept in a thin branch
    beside each.

    Refused, and reported: recurrent layers, weights that others read in another way, that are computed or stand behind
    DequantizeLinear, transposed convolutions padded by the size of their output, and layers inside functions. Layers
    inside subgraphs, of many matrices, with a weight on the left or one that they share are not solved anew.
    """

    name: ClassVar[str] = "lowrank"
    lossy: ClassVar[bool] = True
    without_data: ClassVar[str] = "lowrank goes by singular values of weights alone and solves no layer anew"

    ratio: float = opt(0.3, help="fraction removed, of what `of` names, of all layers that can be factored", ge=0, lt=1)
    of: Literal["macs", "params"] = opt("macs", help="what `ratio` is a fraction of")
    energy: float = opt(0.0, help="instead of `ratio`: what every layer's output keeps of its energy", ge=0, lt=1)
    scope: Literal["auto", "uniform", "global", "sensitivity"] = opt(
        "auto",
        help="uniform: the same fraction of every layer; global: more where layers lose less; sensitivity: more where "
        "outputs of the model lose less; auto: sensitivity with calibration data, else uniform",
    )
    scale: Literal["auto", "moments", "asvd", "plain"] = opt(
        "auto",
        help="how inputs weigh: moments (X'X), asvd (their magnitude), plain (all alike); auto: moments with "
        "calibration data, else plain",
    )
    update: bool = opt(True, help="solve layers anew, one after another, for the outputs of the original model")
    form: Literal["auto", "output", "input", "spatial", "tucker", "cp"] = opt(
        "auto", help="what a convolution becomes; auto: what loses least"
    )
    max_error: float = opt(
        0.3, help="change nothing if the model's outputs lose more of their energy; 0: never mind, nor max_nats", ge=0
    )
    max_nats: float = opt(
        0.3, help="the same for outputs read as class scores: logarithm of what perplexity may grow by; 0: any", ge=0
    )
    max_layer_error: float = opt(0.5, help="leave layers alone whose output would lose more of its energy", gt=0)
    round_to: int = opt(0, help="ranks are multiples of this; 0: what the target likes", ge=0)
    residual: bool = opt(
        False, help="store products of matrices in few bits, and what rounding loses in a thin branch beside each"
    )
    rank: int = opt(0, help="with residual, of each branch; 0: what half a bit a weight pays for", ge=0)
    bits: Literal[4, 2] = opt(4, help="with residual, of the weights")
    group_size: int = opt(64, help="with residual, inputs with one scale; 0: all", ge=0)
    tables: bool = opt(False, help="factor tables that rows are looked up in (embeddings): smaller, but arithmetic")
    only: tuple[str, ...] = opt((), help="layers to factor: names or operators, with wildcards; none: all")
    skip: tuple[str, ...] = opt((), help="layers to leave alone: names or operators, with wildcards")

    def requires(self, model: ir.Model, ctx: Context) -> None:
        """Check the options that depend on the data and on the model.

        Raises:
            OptionError: An option needs calibration data, or a wildcard fits no layer.
        """
        if self.scale in ("moments", "asvd") and ctx.calibration is None:
            raise OptionError("lowrank.scale", f"{self.scale} needs samples", "give --calibration, or use plain")
        if self.scope == "sensitivity" and ctx.calibration is None:
            raise OptionError("lowrank.scope", "sensitivity needs samples", "give --calibration, or use uniform")
        found = find_sites(ctx, tables=self.tables)
        known = {name: site.node.op_type for site in found.sites for name in site.names} | {
            c.site: "" for c in found.refused
        }
        for option, globs in (("only", self.only), ("skip", self.skip)):
            for glob in globs:
                if not any(fnmatchcase(text, glob) for text in (*known, *known.values())):
                    fact = f"{glob!r} fits no layer with a weight"
                    raise OptionError(f"lowrank.{option}", fact, nearest(glob, {*known, *known.values()} - {""}))

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Choose a rank for each layer and factor it; in a copy, which takes the model's place if it pays."""
        if self.residual:
            method = Method(self.bits, self.group_size, algorithm="auto")
            wanted = Branches(method, self.rank, self._scale(ctx))
            return add_branches(model, ctx, wanted, self._named, self._too_much)
        work = model.clone()
        inner, before = replace(ctx, model=work, _facts={}), ctx.fact(COST)
        found = find_sites(inner, tables=self.tables)
        reasons = {site.name: reason for site in found.sites if (reason := self._left_out(site))}
        sites = [site for site in found.sites if site.name not in reasons]
        judge = self._judge(model, sites, ctx)
        tables, costs = self._tables(work, sites, judge, reasons, inner)
        settings, notes = self._settings(tables, costs, reasons, inner)
        chosen = [(site, settings[site.name]) for site in sites if site.name in settings]
        fitted = self._factor(work, chosen, inner)
        loss = judge.loss(work) if judge is not None and chosen else Loss()
        why = self._too_much(loss, len(chosen))
        if why:
            reasons |= {site.name: f"does not pay: {why}" for site, _ in chosen}
            settings, notes = {}, (f"factoring does not pay: {why}",)
        elif chosen:
            model.graph = work.graph
            ctx.drop_facts()
        changes = [change for site in found.sites for change in _changes(site, settings, fitted, reasons)]
        metrics = _metrics(before, ctx.fact(COST), tables, settings)
        if judge is not None and chosen:
            metrics |= {"outputs_lost": round(loss.energy, 6), "outputs_nats": round(loss.nats, 6)}
        return PassResult(bool(settings), (*changes, *found.refused), metrics=metrics, notes=notes)

    def revertible(self, model: ir.Model, sites: Sequence[str]) -> tuple[str, ...]:
        """All of them: layers are factored one by one."""
        return tuple(sites)

    def without(self, sites: Sequence[str]) -> LowRank:
        """The same step, leaving these layers alone."""
        return replace(self, skip=(*self.skip, *(escape(site) for site in sites)))

    def _too_much(self, loss: Loss, layers: int) -> str:
        """Why the outputs lose more than they may; empty where they do not."""
        with_all = f"with all {layers} layers factored the model's outputs"
        if not self.max_error:
            return ""
        if loss.energy > self.max_error:
            return f"{with_all} lose {loss.energy:.0%} of their energy, more than max_error={self.max_error:g}"
        if self.max_nats and loss.nats > self.max_nats:
            return (
                f"{with_all}, read as class scores, are {loss.nats:.2f} nats off, more than max_nats={self.max_nats:g}"
            )
        return ""

    def _named(self, site: Site) -> str:
        """Why the user wants a layer to stay; empty where it may go."""
        for name in site.names:
            texts = name, site.node.op_type
            who = "" if name == site.name else f" {name!r}, which shares its weight"
            if self.only and not any(fnmatchcase(text, glob) for glob in self.only for text in texts):
                return f"not in lowrank.only{who and ':'}{who}"
            if any(fnmatchcase(text, glob) for glob in self.skip for text in texts):
                return f"lowrank.skip names{who or ' it'}"
        return ""

    def _left_out(self, site: Site) -> str:
        """Why a layer is not looked at; empty where it is."""
        if named := self._named(site):
            return named
        if self.of == "macs" and site.table:
            return "a table costs no arithmetic that could be saved; use of=params"
        if self.of == "macs" and not site.geometry.counted:
            return "no shape is known to count multiply-accumulates with; give --shape, or of=params"
        return ""

    def _scale(self, ctx: Context) -> Scale:
        if self.scale == "auto":
            return "plain" if ctx.calibration is None else "moments"
        return self.scale

    def _updates(self, ctx: Context) -> bool:
        return self.update and self._scale(ctx) == "moments"

    def _scope(self, ctx: Context) -> str:
        if self.scope == "auto":
            return "uniform" if self._scale(ctx) == "plain" else "sensitivity"
        return self.scope

    def _judge(self, model: ir.Model, sites: Sequence[Site], ctx: Context) -> Judge | None:
        """What measures the outputs; None without data, or where the model is too large to run twice."""
        if ctx.calibration is None or not sites or weight_bytes(model) > EMBED_LIMIT:
            return None
        return Judge(model, ctx.calibration, ctx)

    def _tables(
        self, work: ir.Model, sites: Sequence[Site], judge: Judge | None, reasons: dict[str, str], ctx: Context
    ) -> tuple[dict[str, Table], dict[str, Array]]:
        """What each rank of each layer saves and loses, and what that costs the outputs.

        Nothing of a layer that no sample reaches, such as one in a branch that is never taken: a reason is added.
        """
        rounding = Rounding(self.round_to, ctx.target.round_to)
        forms = _FORMS if self.form == "auto" else ("product", self.form)
        seen = problems(work, sites, self._scale(ctx), ctx, centred=self._updates(ctx))
        tables, costs = dict[str, Table](), dict[str, Array]()
        trying = judge is not None and self._scope(ctx) == "sensitivity"
        label = "measuring ranks, trying some on samples" if trying else "measuring ranks"
        for site, problem in ctx.progress(seen, label):
            chains: Sequence[Form] = (*forms, "output") if site.geometry.window == 1 else forms
            most = self.max_layer_error
            table = table_of(site.geometry, problem, self.of, rounding, chains, tables=site.table, most_error=most)
            asked = trying or site.node.graph is not work.graph
            measured = list[tuple[Setting, float]]()
            if judge is not None and judge.sees and asked and not site.table:
                for setting in trials(table.within(self.max_layer_error), self.ratio):
                    dense = _chain(site, setting, problem).dense
                    measured.append((setting, judge.lost_by(site.name, dense, problem.shift(dense))))
            if any(lost < _UNFELT and setting.error > _FELT for setting, lost in measured):
                reasons[site.name] = "no calibration sample feels it, so that nothing says what it may lose"
                table, measured = replace(table, settings=()), []
            tables[site.name], costs[site.name] = table, costs_of(table, measured)
        return {site.name: tables[site.name] for site in sites}, costs

    def _settings(
        self, tables: Mapping[str, Table], costs: Mapping[str, Array], reasons: dict[str, str], ctx: Context
    ) -> tuple[dict[str, Setting], tuple[str, ...]]:
        """The setting of each layer that is factored, and what to note; reasons for the others are added."""
        good = {name: table.within(self.max_layer_error) for name, table in tables.items()}
        lists, whole = list(good.values()), sum(table.whole for table in good.values())
        choice: list[Setting | None] = [None] * len(lists)
        if self.energy:
            choice = by_energy(lists, self.energy)
        elif self.ratio and self._scope(ctx) == "uniform":
            choice = by_ratio(lists, self.ratio)
        elif self.ratio:
            choice = by_budget(lists, self.ratio * whole, [costs[n][: len(t.settings)] for n, t in good.items()])
        settings = {name: setting for name, setting in zip(good, choice, strict=True) if setting is not None}
        for name, table in tables.items():
            if name not in settings:
                reasons.setdefault(name, self._why_left(table, good[name], self._scope(ctx)))
        saved = sum(setting.saved for setting in settings.values())
        if self.energy or self.ratio * whole - saved <= _NEAR * whole:
            return settings, ()
        return settings, (f"{saved / whole:.2f} of the {self.of} instead of {self.ratio:g} could go",)

    def _why_left(self, table: Table, good: Table, scope: str) -> str:
        if not table.settings:
            return "a chain of any rank costs as much as the layer"
        if not good.settings:
            least = table.settings[0].error
            return f"of nearly full rank: factored to save anything, its output loses {least:.0%} of its energy"
        if self.energy:
            return "no rank that saves anything keeps so much energy"
        if scope == "uniform" and self.ratio:
            return "no rank that loses little saves so much"
        return "the ratio is met without it"

    def _factor(self, work: ir.Model, chosen: Sequence[tuple[Site, Setting]], ctx: Context) -> Mapping[str, Fitted]:
        """Factor the chosen layers and put the chains in their places."""
        settings, rewriter = {site.name: setting for site, setting in chosen}, Rewriter(work)
        found = dict[str, Fitted]()

        def alone(site: Site, setting: Setting) -> Chain:
            ((_, problem),) = problems(work, [site], self._scale(ctx), ctx, centred=False)
            return _chain(site, setting, problem)

        solves = self._updates(ctx) and ctx.calibration is not None
        whole = work.clone() if solves else None
        left = [site for site, _ in chosen if site.alone or not solves]
        for site, problem in problems(work, left, self._scale(ctx), ctx, centred=False):
            chain = _chain(site, settings[site.name], problem)
            found[site.name] = Fitted(chain, why=site.alone if solves else "")
            rewriter.replace(site, chain)
        layers = [(site, setting) for site, setting in chosen if site.name not in found]
        if layers and ctx.calibration is not None:
            ctx.drop_facts()
            found |= fit_in_sequence(work, layers, ctx.calibration, ctx, alone, whole)
        for site, _ in layers:
            rewriter.replace(site, found[site.name].chain)
        return found


def _chain(site: Site, setting: Setting, problem: Problem | Parts) -> Chain:
    return prepared(setting.form, site.geometry, problem).chain(setting.ranks)


def _metrics(
    before: Cost, after: Cost, tables: Mapping[str, Table], settings: Mapping[str, Setting]
) -> dict[str, int | float | str | bool]:
    """What has gone of the whole model, and of the layers that could be factored."""
    saved, whole = sum(s.saved for s in settings.values()), sum(table.whole for table in tables.values())
    return {
        "macs_removed": round(1 - after.macs / max(1, before.macs), 4),
        "params_removed": round(1 - after.params / max(1, before.params), 4),
        "achieved": round(saved / whole, 4) if whole else 0.0,
        "factored": len(settings),
    }


def _changes(
    site: Site, settings: Mapping[str, Setting], fitted: Mapping[str, Fitted], reasons: Mapping[str, str]
) -> list[Change]:
    """What happened at a site: to each node that reads its weight."""
    first = _change(site, settings, fitted, reasons)
    if not first.done:
        return [replace(first, site=name) for name in site.names]
    return [first, *(Change(name, f"factored with {site.name!r}, whose weight it reads") for name, _ in site.shared)]


def _change(
    site: Site, settings: Mapping[str, Setting], fitted: Mapping[str, Fitted], reasons: Mapping[str, str]
) -> Change:
    setting = settings.get(site.name)
    if setting is None:
        return Change.skipped(site.name, reasons[site.name])
    result = fitted[site.name]
    ranks = "rank " + " and ".join(map(str, setting.ranks))
    details: dict[str, int | float | str | bool] = {
        "form": setting.form,
        "rank": setting.ranks[0],
        "energy_lost": round(setting.error, 6),
    }
    if result.error is not None:
        details["output_error"] = round(result.error, 6)
    action = f"factored ({setting.form}, {ranks}): its output loses {setting.error:.1%} of its energy"
    return Change(site.name, action + (f"; not solved anew: {result.why}" if result.why else ""), details=details)
