"""Plans tried for real: units removed from a copy, layers refitted, outputs compared with the original's.

What a group's loss does to the outputs after refitting cannot be read off scores: layers further on make up for some
of it. So plans that different cost tables suggest are tried, and the best is kept. A search goes on from there: it
makes one group dearer or cheaper at a time, plans anew, and keeps what helps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from graphopt.analyses import CHANNEL_GROUPS
from graphopt.analyses.channels import ChannelGroup
from graphopt.calibration import Dataset
from graphopt.pass_base import Context
from graphopt.reference import Feed, Reference
from graphopt_passes.prune.allocation.sensitivity import held_out
from graphopt_passes.prune.criteria.output import output_distance
from graphopt_passes.prune.refit.refit import refit
from graphopt_passes.prune.removal import lost_positions, remove

__all__ = ["Outcome", "search"]

Floats = np.ndarray[Any, np.dtype[np.float64]]
Tables = Sequence[Floats]

_SAMPLES = 128
_BATCH = 16
_FACTORS = (4.0, 0.25)


@dataclass(frozen=True, eq=False)
class Outcome:
    """How far the outputs of a pruned and refitted model are from the model's.

    Attributes:
        groups: Groups that lose units.
        orders: `[units]` for each: the order in which units leave.
        data: Samples, of which 128 are used, every fourth to measure on.
        refitted: Layers are refitted, as they will be.
        ctx: Holds the model, and says how ONNX Runtime runs.
    """

    groups: Sequence[ChannelGroup]
    orders: Sequence[np.ndarray[Any, Any]]
    data: Dataset
    refitted: bool
    ctx: Context

    def of(self, plan: Sequence[int]) -> float:
        """Squared distance of the outputs in parts of their energy, the mean over outputs.

        Args:
            plan: Units that each group loses.

        Raises:
            ModelError: ONNX Runtime cannot run one of the models.
        """
        ctx, (seen, held) = self.ctx, held_out(_first(self.data, _SAMPLES))
        model, whole = ctx.model.clone(), ctx.model
        cuts = zip(self.groups, self.orders, plan, strict=True)
        removals = [(group, np.sort(order[:count]).tolist()) for group, order, count in cuts if count]
        remove(model, ctx.fact(CHANNEL_GROUPS), removals)
        if self.refitted and removals:
            trial = replace(ctx, model=model, rng=copy.deepcopy(ctx.rng), calibration=seen)
            trial.drop_facts()
            refit(whole, model, lost_positions(removals), seen, trial)
        sessions = [Reference(each, threads=ctx.threads, extensions=ctx.extensions) for each in (whole, model)]
        wanted, found = zip(
            *([session.run(feed) for session in sessions] for feed in held.batches(_BATCH)), strict=True
        )
        return float(np.mean([output_distance([w[k] for w in wanted], [f[k] for f in found]) for k in wanted[0]]))


def _first(data: Dataset, count: int) -> Dataset:
    def read() -> Iterator[Feed]:
        return islice(data.read(), count)

    return replace(data, read=read, digest=None)


def search(
    tables: Sequence[Tables],
    plan: Callable[[Tables], list[int]],
    outcome: Callable[[Sequence[int]], float],
    trials: int,
    rng: np.random.Generator,
) -> list[int]:
    """Find the plan with the best outcome.

    Args:
        tables: One or more: for each group `[rungs]` what going down its ladder costs.
        plan: Makes a plan within the budget of a table.
        outcome: Tries a plan; less is better.
        trials: How many plans to try beyond those of the tables.
        rng: Chooses the groups that are made dearer or cheaper.
    """
    tried: dict[tuple[int, ...], float] = {}

    def tried_once(costs: Tables) -> float:
        key = tuple(plan(costs))
        if key not in tried:
            tried[key] = outcome(key)
        return tried[key]

    best = min(tables, key=tried_once)
    moves = [(group, factor) for group in range(len(best)) for factor in _FACTORS]
    left: list[tuple[int, float]] = []
    most, asked = len(tried) + trials, 0
    while len(tried) < most and asked < 4 * (trials + len(moves)):
        asked += 1
        left = left or [moves[i] for i in rng.permutation(len(moves))]
        group, factor = left.pop()
        changed = [cost * factor if i == group else cost for i, cost in enumerate(best)]
        if tried_once(changed) < tried_once(best):
            best = changed
            left.append((group, factor))  # what helped once may help again
    return plan(best)
