"""What the heads of every core are to see."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt.analyses.attention import AttentionBlock
from graphopt.pass_base import Context
from graphopt_passes.sparse_attention._patterns import Band, computed_scores, seen_scores
from graphopt_passes.sparse_attention._runs import in_runs
from graphopt_passes.sparse_attention.learned import Choice, Setting, Tried, choose
from graphopt_passes.sparse_attention.lowering import Part
from graphopt_passes.sparse_attention.mass import Masses, measured, shares_of_heads, weights_of

__all__ = ["Plan", "fixed_plans", "learned_plans", "mass_metrics"]


@dataclass(frozen=True)
class Plan:
    """What one core is to compute.

    Attributes:
        parts: Which heads see what.
        text: What that is called; empty: what the options say.
        kept: Share of its attention that each head keeps, where data tell.
        longest: Length of the longest sample; 0 without data.
        reason: Why it had better stay as it is; empty if it had not.
        causal: Whether queries see no later key.
        sees: What that is for each head, where heads differ.
    """

    parts: tuple[Part, ...] = ()
    text: str = ""
    kept: Mapping[str, float] = field(default_factory=dict[str, float])
    longest: int = 0
    reason: str = ""
    causal: bool = False
    sees: Mapping[str, str] = field(default_factory=dict[str, str])


def fixed_plans(
    model: ir.Model, blocks: Sequence[AttentionBlock], bands: Sequence[Band | None], ctx: Context
) -> dict[AttentionBlock, Plan]:
    """All heads see the same.

    Args:
        model: The model; it does not change.
        blocks: The cores.
        bands: What each of them sees; None: its operator sees to that.
        ctx: Holds calibration data, if there are any.
    """
    kept = dict[AttentionBlock, Masses]()
    if ctx.calibration is not None:
        pairs = [(b, [band]) for b, band in zip(blocks, bands, strict=True) if band is not None and weights_of(b)]
        found = measured(model, [b for b, _ in pairs], [band for _, band in pairs], ctx) if pairs else []
        kept = {block: masses for (block, _), masses in zip(pairs, found, strict=True)}
    plans = dict[AttentionBlock, Plan]()
    for block, band in zip(blocks, bands, strict=True):
        parts = (Part(tuple(range(block.kv_heads)), band),) if band is not None else ()
        masses = kept.get(block)
        shares = {} if masses is None else shares_of_heads(masses, 0)
        longest = 0 if masses is None else masses.longest
        plans[block] = Plan(parts, kept=shares, longest=longest, causal=block.causal == "yes")
    return plans


def learned_plans(
    model: ir.Model, blocks: Sequence[AttentionBlock], tried: Sequence[Setting], keep: float, ctx: Context
) -> dict[AttentionBlock, Plan]:
    """Every head sees what is worth most to the outputs of its layer; `choose` says how."""
    if not blocks:
        return {}
    bands = [[setting.band(causal=block.causal == "yes") for setting in tried] for block in blocks]
    found = measured(model, blocks, bands, ctx)
    cores = [Tried(block, masses, own) for block, masses, own in zip(blocks, found, bands, strict=True)]
    chosen = choose(cores, keep)
    return {core.block: _learned_plan(core, tried, choices, keep) for core, choices in zip(cores, chosen, strict=True)}


def _learned_plan(core: Tried, tried: Sequence[Setting], choices: Sequence[Choice], keep: float) -> Plan:
    kept, sees, texts = dict[int, float](), dict[int, str](), list[str]()
    for choice in choices:
        number = choice.setting
        text = "everything" if number is None else str(tried[number])
        for head in core.heads(choice.heads):
            kept[head] = 1.0 if number is None else round(float(core.masses.shares[number, head]), 4)
            sees[head] = text
        texts.append(f"{_numbers(choice.heads)}: {text}")
    alone = all(choice.setting is None for choice in choices)
    return Plan(
        tuple(Part(c.heads, None if c.setting is None else core.bands[c.setting]) for c in choices),
        f"learned, heads {'; '.join(texts)}",
        {f"head {head}": kept[head] for head in sorted(kept)},
        core.masses.longest,
        _why_everything(core, keep) if alone else "",
        core.block.causal == "yes",
        {f"head {head} sees": sees[head] for head in sorted(sees)},
    )


def _why_everything(core: Tried, keep: float) -> str:
    """Why a core keeps all its scores."""
    cheaper = core.costs[:-1] < core.costs[-1]
    if (core.masses.shares[cheaper] >= keep).any():
        return f"of the scores that keep={keep:g} leaves to all heads together, those of its heads matter most"
    return f"no pattern keeps {keep:g} of what its heads attend to"


def mass_metrics(plans: Iterable[Plan]) -> dict[str, int | float | str | bool]:
    """What heads keep of their attention, in the mean and at least, and what is left of the scores.

    Scores are those of the longest sample: `scores_seen` that queries use, of those they used before, and
    `scores_computed`, with what blocks compute in vain, of all that attention without a band computes.
    """
    plans = list(plans)
    shares = [share for plan in plans if not plan.reason for share in plan.kept.values()]
    if not shares:
        return {}
    seen, all_seen, computed, every = np.sum([_scores(plan) for plan in plans], axis=0)
    return {
        "attention_kept": round(sum(shares) / len(shares), 4),
        "attention_kept_least": min(shares),
        "scores_seen": round(float(seen / all_seen), 4),
        "scores_computed": round(float(computed / every), 4),
    }


def _scores(plan: Plan) -> tuple[int, int, int, int]:
    """Scores of one sample that are seen, that were seen, that are computed, and that were computed."""
    length, whole = plan.longest, plan.longest**2
    visible = length * (length + 1) // 2 if plan.causal else whole
    heads = len(plan.kept) // max(1, sum(len(part.heads) for part in plan.parts))
    seen, computed = 0, 0
    for part in plan.parts:
        number = heads * len(part.heads)
        seen += number * (visible if part.band is None else seen_scores(part.band, length))
        computed += number * (whole if part.band is None else computed_scores(in_runs(part.band)[0], length))
    return seen, len(plan.kept) * visible, computed, len(plan.kept) * whole


def _numbers(heads: Sequence[int]) -> str:
    return ",".join(map(str, heads))
