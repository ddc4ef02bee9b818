"""Pick a setting for every unit of a table: least noise within a size, or least size within a noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from graphopt.allocation import Site as Choices
from graphopt.allocation import allocate
from graphopt_passes.quant.mixed.table import Option, Table

__all__ = ["INTEGERS", "STORED", "Choice", "within_noise", "within_size"]

_ROUNDS = 40
INTEGERS, STORED = "int8", "int8_weights"
"""Labels of 8 bits with rounded activations, and without; they save the same."""


@dataclass(frozen=True)
class Choice:
    """One option a unit; None: it stays float.

    Attributes:
        options: In the order of the table's units.
        saved: Bytes saved in all.
        cost: Sum of the noises.
        reached: What was asked for is reached.
    """

    options: tuple[Option | None, ...]
    saved: float
    cost: float
    reached: bool


def within_size(table: Table, saved: float) -> Choice:
    """The least noise that saves so many bytes, with arithmetic on integers wherever 8 bits are chosen.

    If nothing saves so many, what saves most.
    """
    units = tuple(replace(unit, options=_computed(unit.options)) for unit in table.units)
    narrowed = replace(table, units=units)
    return _allocate(narrowed, _rows(narrowed), saved)


def within_noise(table: Table, limit: float) -> Choice:
    """The most bytes saved at a noise of at most `limit`; what noise is left goes into arithmetic on integers."""
    return _on_integers(table, _smallest(table, limit), limit)


def _computed(options: Sequence[Option]) -> tuple[Option, ...]:
    """Without 8-bit weights for float arithmetic, where integers are on offer."""
    labels = {option.label for option in options}
    return tuple(option for option in options if option.label != STORED or INTEGERS not in labels)


def _on_integers(table: Table, choice: Choice, limit: float) -> Choice:
    """Compute on integers where only 8-bit weights were chosen, the least noise first, as far as the limit allows."""
    options, cost = list(choice.options), choice.cost
    steps: list[tuple[float, int, Option]] = []
    for i, (unit, option) in enumerate(zip(table.units, options, strict=True)):
        integers = next((other for other in unit.options if other.label == INTEGERS), None)
        if option is not None and option.label == STORED and integers is not None:
            steps.append((table.cost(integers) - table.cost(option), i, integers))
    for added, i, integers in sorted(steps, key=lambda step: step[:2]):
        if cost + added <= limit:
            options[i], cost = integers, cost + added
    return replace(choice, options=tuple(options), cost=cost)


def _smallest(table: Table, limit: float) -> Choice:
    rows = _rows(table)
    best, low, high = _allocate(table, rows, 0.0), 0.0, sum(float(row.saving.max()) for row in rows)
    most = _allocate(table, rows, high)
    if most.cost <= limit:
        return most
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        found = _allocate(table, rows, middle)
        if found.cost <= limit:
            best, low = found, max(middle, found.saved)
        else:
            high = middle
        if high - low < 1:
            break
    return best


def _rows(table: Table) -> list[Choices]:
    """The table as the allocator reads it; staying float comes first."""
    rows: list[Choices] = []
    for unit in table.units:
        saving = np.array([0.0, *(float(option.saved) for option in unit.options)])
        cost = np.array([0.0, *(table.cost(option) for option in unit.options)])
        rows.append(Choices(unit.sites[0].name, saving, cost))
    return rows


def _allocate(table: Table, rows: Sequence[Choices], saved: float) -> Choice:
    found = allocate(rows, saved)
    options = tuple(unit.options[i - 1] if i else None for unit, i in zip(table.units, found.choice, strict=True))
    return Choice(options, found.saving, found.cost, found.reached)
