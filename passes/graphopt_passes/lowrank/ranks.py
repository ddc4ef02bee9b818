"""What each rank of each layer would save and cost, and the choice among them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from graphopt.allocation import Site as Choice
from graphopt.allocation import allocate
from graphopt_passes.lowrank._factors import Parts, Problem
from graphopt_passes.lowrank.schemes import (
    Form,
    Geometry,
    Ranks,
    bytes_saved,
    forms_of,
    full_rank,
    ladder,
    macs_of,
    params_of,
    prepared,
)
from graphopt_passes.prune.allocation.budget import step_of

__all__ = [
    "Measure",
    "Rounding",
    "Setting",
    "Table",
    "by_budget",
    "by_energy",
    "by_ratio",
    "costs_of",
    "table_of",
    "trials",
]

Array = np.ndarray[Any, np.dtype[Any]]
Measure = Literal["macs", "params"]

_TRIED = {"product": 48, "output": 24, "input": 8, "spatial": 10, "tucker": 8, "cp": 4}
_WIDEST = 2400


@dataclass(frozen=True)
class Setting:
    """One way to factor a layer.

    Attributes:
        form: Which chain.
        ranks: Its ranks.
        saved: What it saves, in the unit of the budget.
        error: Energy of the output's error in parts of that of the output.
    """

    form: Form
    ranks: Ranks
    saved: int
    error: float


@dataclass(frozen=True)
class Table:
    """The settings of a layer that are worth a thought, by what they save, ascending.

    Attributes:
        whole: What the layer costs as it is, in the unit of the budget.
        settings: Each saves more than the one before, and loses more.
    """

    whole: int
    settings: tuple[Setting, ...]

    def within(self, error: float) -> Table:
        """The settings that lose no more than this."""
        return replace(self, settings=tuple(setting for setting in self.settings if setting.error <= error))


@dataclass(frozen=True)
class Rounding:
    """What ranks are multiples of.

    Attributes:
        wanted: What the user asked for; 0: what the target likes.
        target: What the target likes.
    """

    wanted: int
    target: int

    def step(self, geometry: Geometry, form: Form) -> int:
        """The step for a layer; small ones have four steps at least."""
        return step_of(max(full_rank(form, geometry)), self.wanted, self.target)


def table_of(
    geometry: Geometry,
    problem: Problem | Parts,
    of: Measure,
    rounding: Rounding,
    forms: Sequence[Form],
    *,
    tables: bool = False,
    most_error: float = np.inf,
) -> Table:
    """What each rank saves and costs, for every chain that the layer can become.

    Args:
        geometry: Of the layer.
        problem: Its weight, and how errors count.
        of: What is to be saved.
        rounding: Of ranks.
        forms: Chains that may be used.
        tables: Rows are looked up, so that a chain may cost more multiply-accumulates than the nothing it replaces.
        most_error: Of each chain only the highest rank that loses more is looked at.
    """
    settings = list[Setting]()
    for form in forms_of(geometry):
        wide = geometry.inputs * geometry.window > _WIDEST
        if form not in forms or (form not in ("product", "output") and wide):
            continue
        paying = list(_paying(form, geometry, of, rounding, tables=tables))
        if not paying:
            continue
        ready, most = prepared(form, geometry, problem), _TRIED[form]
        for i in np.unique(np.linspace(0, len(paying) - 1, min(most, len(paying))).round().astype(int))[::-1]:
            ranks, saved = paying[i]
            settings.append(Setting(form, ranks, saved, ready.error(ranks)))
            if settings[-1].error > most_error:  # lower ranks lose more
                break
    return Table(_amount(geometry, of), tuple(_worthwhile(settings)))


def _paying(
    form: Form, geometry: Geometry, of: Measure, rounding: Rounding, *, tables: bool
) -> Iterator[tuple[Ranks, int]]:
    """Ranks at which neither numbers nor arithmetic nor the file grow, and what they save."""
    for ranks in ladder(form, geometry, rounding.step(geometry, form)):
        params = geometry.params - params_of(form, geometry, ranks)
        macs = geometry.macs - macs_of(form, geometry, ranks)
        saved = params if of == "params" else macs
        if bytes_saved(form, geometry, ranks) > 0 and (tables or macs > 0):
            yield ranks, saved


def _worthwhile(settings: Sequence[Setting]) -> list[Setting]:
    """Without those that save less than another and lose no less."""
    found = list[Setting]()
    for setting in sorted(settings, key=lambda s: (-s.saved, s.error)):
        if not found or setting.error < found[-1].error:
            found.append(setting)
    return found[::-1]


def _amount(geometry: Geometry, of: Measure) -> int:
    return geometry.params if of == "params" else geometry.macs


def by_ratio(tables: Sequence[Table], ratio: float) -> list[Setting | None]:
    """The same part of each layer: the least error among what saves at least that; None where nothing does."""

    def chosen(table: Table) -> Setting | None:
        enough = [setting for setting in table.settings if setting.saved >= ratio * table.whole]
        return enough[0] if enough else None

    return [chosen(table) for table in tables]


def by_energy(tables: Sequence[Table], energy: float) -> list[Setting | None]:
    """Of each layer what can go while its output keeps so much of its energy; None where that is nothing."""

    def chosen(table: Table) -> Setting | None:
        good = [setting for setting in table.settings if 1 - setting.error >= energy]
        return good[-1] if good else None

    return [chosen(table) for table in tables]


def trials(table: Table, ratio: float) -> list[Setting]:
    """Settings to measure what a layer's errors cost the outputs: one as all layers would have it, one far below.

    A budget takes much from some layers, where what the outputs lose may grow faster than the layer's own error.
    """
    found = [setting for part in (ratio, (1 + ratio) / 2) for setting in by_ratio([table], part) if setting]
    return list(dict.fromkeys(found or table.settings[-1:]))


def costs_of(table: Table, measured: Sequence[tuple[Setting, float]]) -> Array:
    """`[settings]`: what the outputs lose with each setting of a layer, never less where it loses more itself.

    Args:
        table: Of the layer.
        measured: Settings with what the outputs lose; between them the loss per error is interpolated. If there are
            none, errors are losses.
    """
    errors = np.array([setting.error for setting in table.settings])
    if not measured:
        return errors
    known = sorted((setting.error, lost / max(setting.error, 1e-12)) for setting, lost in measured)
    rates = np.interp(errors, [error for error, _ in known], [rate for _, rate in known])
    return np.maximum.accumulate(rates * errors)


def by_budget(tables: Sequence[Table], target: float, costs: Sequence[Array]) -> list[Setting | None]:
    """What saves `target` in all at the least sum of costs.

    Args:
        tables: Of each layer.
        target: To be saved in all.
        costs: Of the settings of each layer.
    """
    choices = [
        Choice(
            str(i),
            np.array([0.0, *(float(setting.saved) for setting in table.settings)]),
            np.concatenate(([0.0], cost)),
        )
        for i, (table, cost) in enumerate(zip(tables, costs, strict=True))
    ]
    if not choices:
        return []
    found = allocate(choices, target)
    return [table.settings[i - 1] if i else None for table, i in zip(tables, found.choice, strict=True)]
