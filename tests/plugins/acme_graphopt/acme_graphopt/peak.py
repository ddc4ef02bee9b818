"""A pruning criterion: a channel is worth as much as the largest weight that makes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analyses import ChannelGroup
from graphopt.criterion_base import Criterion, weight_parts, weights_of
from graphopt.markers import hookimpl
from graphopt.pass_base import Context


class Peak(Criterion):
    """Largest magnitude among the weights that make a channel, in any of its layers."""

    name: ClassVar[str] = "acme-peak"

    def scores(self, model: ir.Model, groups: Sequence[ChannelGroup], ctx: Context) -> list[np.ndarray | None]:
        """Look at the weights of one group after another."""
        return [self._peaks(group, ctx) for group in groups]

    def _peaks(self, group: ChannelGroup, ctx: Context) -> np.ndarray | None:
        made = (part for place in weights_of(group, "output") for part in weight_parts(place, ctx))
        peaks = [np.abs(part).max(axis=1) for part in made]
        return np.max(peaks, axis=0) if peaks else None


@hookimpl
def graphopt_criteria() -> list[type[Criterion]]:
    """Tell graphopt about the criterion."""
    return [Peak]
