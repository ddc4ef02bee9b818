"""fp16: compute in it wherever that keeps the results, measured; store weights in it elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from graphopt.analyses import SHAPES
from graphopt.errors import ModelError
from graphopt.model_io import EMBED_LIMIT, weight_bytes
from graphopt.pass_base import Change, Context
from graphopt.reference import Feed, Reference
from graphopt_passes.quant.floats.extremes import EXTREMES
from graphopt_passes.quant.floats.levels import added_noise, blame, output_levels, value_levels, worst_level
from graphopt_passes.quant.floats.outcome import Converted
from graphopt_passes.quant.floats.plan import Choice, Plan, Survey
from graphopt_passes.quant.floats.rewrite import write_plan
from graphopt_passes.quant.floats.storage import StoredWeight, cast_weights, find_weights

__all__ = ["half_noise", "to_half"]

_HALF = ir.DataType.FLOAT16
_ROUNDS = 6
_TARGET = 40.0  # dB that an output should keep; fp16 leaves 50 to 70 where nothing is wrong
_SAME = 3.0  # dB that are no reason to keep more nodes


@dataclass(frozen=True)
class _Bench:
    """What plans are tried on.

    Attributes:
        survey: The model.
        ctx: Says how ONNX Runtime runs.
        feeds: Samples to judge outputs on; none without calibration data.
        limit: Least signal to noise of every output in dB.
        original: The model, ready to run; None without samples.
    """

    survey: Survey
    ctx: Context
    feeds: Sequence[Feed]
    limit: float
    original: Reference | None

    def written(self, plan: Plan, *, simulate: bool = False) -> tuple[ir.Model, list[StoredWeight]]:
        """The model in fp16, and what became of the weights of nodes in float32."""
        result = write_plan(self.survey, plan, simulate=simulate)
        if not plan.store:
            return result, []
        stored = find_weights(result, _HALF, lambda key, _: self.survey.left.get(key, ""))
        cast_weights(result, [weight for weight in stored if not weight.refusal], _HALF)
        return result, stored

    def levels(self, model: ir.Model) -> dict[str, float]:
        """Signal to noise of the outputs of a model in dB; nothing without samples.

        Raises:
            ModelError: ONNX Runtime does not run it.
        """
        session = Reference(model, threads=self.ctx.threads, extensions=self.ctx.extensions)
        return {} if self.original is None else output_levels(self.original, session, self.feeds, self.ctx)


@dataclass(frozen=True)
class _Tried:
    """A plan with the signal to noise of each output in dB."""

    plan: Plan
    levels: Mapping[str, float]

    @property
    def worth(self) -> tuple[int, int]:
        """Better outputs first, to a few decibels; then more nodes in fp16."""
        return int(worst_level(self.levels) // _SAME), len(self.plan.narrow)


def to_half(work: ir.Model, ctx: Context, choice: Choice, feeds: Sequence[Feed], limit: float) -> Converted:
    """Convert a model to fp16.

    Args:
        work: The model; it does not change.
        ctx: Facts about it.
        choice: What the user leaves to the pass.
        feeds: Samples to judge outputs on; none without calibration data.
        limit: Least signal to noise of every output in dB.
    """
    ranges = ctx.fact(EXTREMES) if ctx.calibration is not None else None
    survey = Survey(work, ctx.fact(SHAPES), ranges, choice)
    original = Reference(work, threads=ctx.threads, extensions=ctx.extensions) if feeds else None
    bench = _Bench(survey, ctx, feeds, limit, original)
    tried = _runnable(bench, _judged(bench))
    result, stored = bench.written(tried.plan)
    changes = _changes(survey, tried.plan, stored)
    if not tried.plan.narrow and all(weight.refusal for weight in stored):
        return Converted(None, changes)
    return Converted(result, changes, _metrics(tried))


def half_noise(work: ir.Model, ctx: Context, choice: Choice, feeds: Sequence[Feed]) -> dict[str, float]:
    """Noise over signal that each node adds in fp16, see `added_noise`, by the name of its site.

    Args:
        work: The model; it does not change.
        ctx: Facts about it.
        choice: What the user leaves to the pass.
        feeds: Samples to judge on.
    """
    ranges = ctx.fact(EXTREMES) if ctx.calibration is not None else None
    survey = Survey(work, ctx.fact(SHAPES), ranges, choice)
    plan = survey.plan({})
    levels = value_levels(survey, plan, write_plan(survey, plan, simulate=True), feeds, ctx)
    added = added_noise(survey, levels)
    return {node.name or key: added[key] for key, node in survey.nodes if key in plan.narrow}


def _judged(bench: _Bench) -> _Tried:
    """Plan, simulate, and keep the nodes in float32 that spoil an output, as long as that helps."""
    survey, kept = bench.survey, dict[str, str]()
    plan = survey.plan(kept)
    if bench.original is None:
        return _Tried(plan, {})
    target, tried = max(bench.limit, _TARGET), list[_Tried]()
    for round_ in range(_ROUNDS):
        simulated, _ = bench.written(plan, simulate=True)
        tried.append(_Tried(plan, bench.levels(simulated)))
        bad = [name for name, level in tried[-1].levels.items() if level < target]
        if not bad:
            return tried[-1]
        worst = worst_level(tried[-1].levels)
        bench.ctx.log.info("quant: %.1f dB at an output in fp16, looking for the nodes to keep", worst)
        found = value_levels(survey, plan, simulated, bench.feeds, bench.ctx)
        more = blame(survey, plan, found, bad, target, hops=2**round_ - 1)
        if not more:
            break
        kept |= more
        plan = survey.plan(kept)
    good = [each for each in tried if worst_level(each.levels) >= bench.limit]
    return max(good, key=lambda each: each.worth) if good else _last_resort(bench, tried[-1])


def _last_resort(bench: _Bench, last: _Tried) -> _Tried:
    """Only store weights in fp16, or not even that."""
    why = f"with it in fp16 an output keeps {worst_level(last.levels):.1f} dB of signal to noise"
    plan = _less(bench, last.plan, dict.fromkeys(last.plan.narrow, why))
    levels = bench.levels(bench.written(plan, simulate=True)[0])
    return _Tried(plan, levels) if worst_level(levels) >= bench.limit else _Tried(replace(plan, store=False), {})


def _less(bench: _Bench, plan: Plan, kept: Mapping[str, str]) -> Plan:
    """A plan that keeps more nodes in float32."""
    return bench.survey.plan({**plan.wide, **kept})


def _runnable(bench: _Bench, tried: _Tried) -> _Tried:
    """The plan; where ONNX Runtime does not take it, one without an operator type, or with nothing in fp16."""
    plan, problem = tried.plan, _problem(bench, tried.plan)
    if not problem:
        return tried
    bench.ctx.log.warning("quant: %s", problem)
    nodes = dict(bench.survey.nodes)
    kinds = sorted({nodes[key].op_type for key in plan.narrow})
    chosen = _less(bench, plan, dict.fromkeys(plan.narrow, problem))
    for kind in bench.ctx.progress(kinds, "looking for an operator"):
        refused = {key: problem for key in plan.narrow if nodes[key].op_type == kind}
        candidate = _less(bench, plan, refused)
        if candidate.narrow and not _problem(bench, candidate):
            chosen = candidate
            break
    return _Tried(chosen, bench.levels(bench.written(chosen, simulate=True)[0]))


def _problem(bench: _Bench, plan: Plan) -> str:
    """Why a plan cannot be used: ONNX Runtime does not take it, or an output is not finite; empty if it can."""
    result, _ = bench.written(plan)
    if bench.original is None and weight_bytes(result) > EMBED_LIMIT:
        return ""
    try:
        levels = bench.levels(result)
    except ModelError as e:
        return f"ONNX Runtime does not run it in fp16: {e.fact}"
    return "an output is not finite in fp16" if worst_level(levels) == -math.inf else ""


def _changes(survey: Survey, plan: Plan, stored: Sequence[StoredWeight]) -> tuple[Change, ...]:
    by_reader = {key: weight for weight in stored for key in weight.readers}
    changes: list[Change] = []
    for key, node in survey.nodes:
        site = node.name or key
        if key in plan.narrow:
            weights = survey.weights(node, plan.narrow[key])
            details = {"bits": 16, "weights": weights} if weights else {"bits": 16}
            changes.append(Change(site, "fp16", details=details))
        elif key in plan.wide:
            weight, reason = by_reader.get(key), plan.wide[key]
            if weight is not None and not weight.refusal:
                details = {"bits": 16, "weights": weight.size, "weight_sqnr_db": round(min(weight.sqnr, 999.0), 1)}
                changes.append(Change(site, f"weights in fp16, arithmetic in float32: {reason}", details=details))
            else:
                changes.append(Change.skipped(site, f"stays float32: {reason}"))
    for function in survey.model.functions.values():
        places = (f"{function.name}/{node.name or node.op_type}" for node in function if node.op_type != "Constant")
        changes += [Change.skipped(place, "stays float32: inside a function; inline it first") for place in places]
    return tuple(changes)


def _metrics(tried: _Tried) -> dict[str, int | float | str | bool]:
    found: dict[str, int | float | str | bool] = {
        "nodes_fp16": len(tried.plan.narrow),
        "nodes_float32": len(tried.plan.wide),
    }
    if tried.levels:
        found["output_sqnr_db"] = round(worst_level(tried.levels), 1)
    return found
