"""The whole plugin surface. Implementations take any subset of the arguments, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graphopt.markers import hookspec

if TYPE_CHECKING:
    from graphopt.backend_base import Backend
    from graphopt.calibration import Dataset
    from graphopt.criterion_base import Criterion
    from graphopt.instruments import Instrument
    from graphopt.pass_base import Pass
    from graphopt.targets import Target

__all__: list[str] = []


@hookspec
def graphopt_passes() -> Sequence[type[Pass]]:  # type: ignore[empty-body]
    """Return pass classes; their `name` is how pipelines spell them."""


@hookspec
def graphopt_backends() -> Sequence[Backend]:  # type: ignore[empty-body]
    """Return backends; a target names the one that compiles for it."""


@hookspec
def graphopt_targets() -> Sequence[Target]:  # type: ignore[empty-body]
    """Return targets: devices to compile for."""


@hookspec
def graphopt_criteria() -> Sequence[type[Criterion]]:  # type: ignore[empty-body]
    """Return criteria classes: how pruning judges channels; their `name` is how `prune{criterion=...}` spells them."""


@hookspec
def graphopt_calibration(uri: str) -> Dataset | None:
    """Open calibration or evaluation data behind a uri of your own, or return None if it is not yours."""


@hookspec
def graphopt_default_pipeline(target: Target) -> str | None:
    """Return the pipeline text to use for a target when the user names no passes, or None."""


@hookspec
def graphopt_instruments(config: Mapping[str, Any]) -> Sequence[Instrument]:  # type: ignore[empty-body]
    """Return instruments: callbacks around passes. `config` holds target and pipeline, as text."""
