"""The accuracy loop: where the outputs lose more than the user allows, steps leave their worst sites alone.

The idea is NNCF's accuracy control: rank the sites by what each does to the outputs, revert the worst, validate on the
user's data, rank anew when a step back made things worse, and keep the best that was seen. Here a search by halves over
the ranked sites takes the place of one validation a site, and it works on any step that offers to leave sites alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from graphopt.compile.checks import Checker
from graphopt.compile.decisions import LeftOut, Reverted
from graphopt.compile.limits import Candidate, Done, better, keeps_quality, shortfall
from graphopt.compile.running import Run, candidate, run_once
from graphopt.report.data import Limit

__all__ = ["Search", "recover"]

_FEEDS = 8
_RERANKS = 3
_log = logging.getLogger("graphopt")


@dataclass
class Search:
    """Finds how many of the first sites of a ranking must be reverted, with few attempts.

    Attributes:
        attempt: Reverts sites; returns by how much the limits are missed then, 0 or less for not at all.
        rerank: Orders the sites left anew, given those reverted.
        stop: Asked before every attempt: whether to give up.
        attempts: How many there were.
    """

    attempt: Callable[[tuple[str, ...]], float]
    rerank: Callable[[tuple[str, ...], tuple[str, ...]], tuple[str, ...]]
    stop: Callable[[], bool]
    attempts: int = field(default=0, init=False)

    def run(self, ranked: Sequence[str], missed: float) -> tuple[str, ...] | None:
        """The fewest first sites that suffice; None if nothing short of all of them does, or it had to stop before.

        Args:
            ranked: Sites, the worst first.
            missed: By how much the limits are missed with none reverted.
        """
        order, low, count, reranks = tuple(ranked), 0, 1, 0
        while count < len(order) and not self.stop():
            now = self._try(order[:count])
            if now <= 0:
                return order[: self._halve(order, low, count)]
            if now > missed and reranks < _RERANKS:
                order, count, reranks = self._anew(order, low, count), low + 1, reranks + 1
            else:
                missed, low, count = now, count, 2 * count
        if self.stop() or len(order) - low <= 1:
            return None
        high = self._halve(order, low, len(order))
        return order[:high] if high < len(order) else None

    def _anew(self, order: tuple[str, ...], low: int, count: int) -> tuple[str, ...]:
        """The ranking misled: go back to the first `low`, and order the others anew, or those tried now come last."""
        others = self.rerank(order[low:], order[:low])
        if others[: count - low] == order[low:count]:
            others = (*order[count:], *order[low:count])
        return (*order[:low], *others)

    def _halve(self, order: tuple[str, ...], low: int, high: int) -> int:
        """The least count above `low` that suffices, where `high` does."""
        while high - low > 1 and not self.stop():
            middle = (low + high) // 2
            if self._try(order[:middle]) <= 0:
                high = middle
            else:
                low = middle
        return high

    def _try(self, sites: tuple[str, ...]) -> float:
        self.attempts += 1
        return self.attempt(sites)


def recover(
    state: Run, snapshots: Sequence[ir.Model], last: Candidate, checker: Checker, folder: Path
) -> tuple[Candidate, Sequence[Limit]]:
    """Find the best model that keeps the limits on the outputs, when the whole pipeline does not.

    Goes back to the last step after which they were kept, reverts the worst sites of the step that broke them, and goes
    on from there.

    Args:
        state: The run, with all steps that ran.
        snapshots: The model before each of these steps.
        last: The model after all of them.
        checker: Compares with the original.
        folder: Where candidates are written.

    Returns:
        The candidate to ship, and the limits as the whole pipeline leaves them.
    """
    steps, best = last.done, last
    for count, model in reversed(list(enumerate(snapshots))):
        base = candidate(state, model, steps[:count], checker, folder)
        best = better(best, base)
        if keeps_quality(base.limits):
            best = _go_on(state, base, last, checker, folder)
            break
    if len(best.done) == len(steps):
        return best, best.limits
    missed = ", ".join(limit.name for limit in last.limits if not limit.met)
    state.left_out += [LeftOut(done.number, f"{missed} missed") for done in steps[len(best.done) :]]
    return best, last.limits


def _go_on(state: Run, base: Candidate, last: Candidate, checker: Checker, folder: Path) -> Candidate:
    """Take the steps after a good candidate again, with as many sites reverted as it takes."""
    full: Candidate | None = last if len(last.done) == len(base.done) + 1 else None
    for done in last.done[len(base.done) :]:
        if full is None:
            full = _attempt(state, base, done, (), checker, folder)
        if not keeps_quality(full.limits):
            full = _revert(state, base, full, checker, folder)
        if full is None:
            return base
        base, full = full, None
    return base


def _revert(state: Run, base: Candidate, full: Candidate, checker: Checker, folder: Path) -> Candidate | None:
    """The last step of `full` once more on `base`, with its worst sites reverted; None if that does not help."""
    done = full.done[-1]
    before = [site for entry in done.reverted for site in entry.sites]
    changed = dict.fromkeys(change.site for change in done.report.changes if change.done)
    sites = done.step.revertible(base.model, [site for site in changed if site not in before])
    if len(sites) < 2:
        return None
    feeds = list(checker.feeds(_FEEDS))
    kept: list[Candidate] = []  # the last that suffices has the fewest sites reverted

    def rank(left: tuple[str, ...], reverted: tuple[str, ...]) -> tuple[str, ...]:
        state.start_from(base.model)
        return done.step.worst_first(base.model, state.ctx, left, (*before, *reverted), feeds)

    def attempt(names: tuple[str, ...]) -> float:
        found = _attempt(state, base, done, names, checker, folder)
        missed = shortfall(found.limits)
        _log.info("%s: %d of %d layers reverted, %+.4g from the limit", done.step, len(names), len(sites), missed)
        if missed <= 0:
            kept[:] = [found]
        return missed

    search = Search(attempt, rank, state.out_of_time)
    if state.out_of_time() or search.run(rank(sites, ()), shortfall(full.limits)) is None:
        return None
    return kept[0]


def _attempt(
    state: Run, base: Candidate, done: Done, names: tuple[str, ...], checker: Checker, folder: Path
) -> Candidate:
    """One more step on a candidate, with sites reverted besides those that it left alone before."""
    asked = [limit.name for limit in base.limits if limit.name in ("--max-drop", "--min-sqnr")]
    reason = f"reverted to keep {' and '.join(asked)}"
    reverted = (*done.reverted, *([Reverted(done.number, names, reason)] if names else []))
    state.start_from(base.model)
    again = run_once(state, done.number, done.step, reverted)
    return candidate(state, state.ctx.model, (*base.done, again), checker, folder)
