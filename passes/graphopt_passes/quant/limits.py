"""How much noise is taken, and what is said of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from graphopt.targets import IntegerRules
from graphopt_passes.quant.decide import Decision

__all__ = ["LAYER_SQNR", "OUTPUT_SQNR", "limit_of", "metrics_of", "notes_of"]

LAYER_SQNR = 22.0
"""Signal to noise of one layer in dB that it has to keep, if nothing else is asked for."""

OUTPUT_SQNR = 16.0
"""Likewise for outputs."""


def limit_of(asked: float | None, usual: float, rules: IntegerRules) -> float:
    """The limit that was asked for, or the usual one; none where a target has no other form to step back to.

    What an NPU does not compute another processor does, so there the user may ask for a limit.
    """
    if rules.static_only and (asked is None or not rules.integers_only):
        return -math.inf
    return usual if asked is None else asked


def notes_of(quality: Mapping[str, float], rules: IntegerRules) -> tuple[str, ...]:
    """Say which outputs are noisier than they would be where layers step back."""
    noisy = [f"{name} {level:.1f} dB" for name, level in quality.items() if level < OUTPUT_SQNR]
    text = "signal to noise of outputs: {}; min_output_sqnr would leave the noisiest layers to another processor"
    return (text.format(", ".join(noisy)),) if noisy and rules.integers_only else ()


def metrics_of(decisions: Sequence[Decision], quality: dict[str, float]) -> dict[str, int | float | str | bool]:
    """Counts of layers by what they compute on, and the signal to noise of the worst output."""
    counts = {kind: sum(d.kind == kind for d in decisions) for kind in ("static", "dynamic", "weight", "float")}
    found: dict[str, int | float | str | bool] = {f"layers_{kind}": count for kind, count in counts.items()}
    if quality:
        found["output_sqnr_db"] = round(min(quality.values()), 1)
    return found
