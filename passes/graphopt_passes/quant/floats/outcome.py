"""What a conversion hands back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from graphopt.pass_base import Change

__all__ = ["Converted"]


@dataclass(frozen=True)
class Converted:
    """A converted model.

    Attributes:
        model: The result; None if nothing is worth changing.
        changes: What happened at each site.
        metrics: Figures for the report.
    """

    model: ir.Model | None
    changes: tuple[Change, ...]
    metrics: Mapping[str, int | float | str | bool] = field(default_factory=dict[str, "int | float | str | bool"])
