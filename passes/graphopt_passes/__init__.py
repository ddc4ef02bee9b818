"""The built-in passes, registered the way any plugin registers its own."""

from __future__ import annotations

from graphopt.criterion_base import Criterion
from graphopt.markers import hookimpl
from graphopt.pass_base import Pass

__all__ = ["graphopt_criteria", "graphopt_passes"]


@hookimpl
def graphopt_passes() -> list[type[Pass]]:
    """Return the built-in passes."""
    from graphopt_passes.fold import Fold
    from graphopt_passes.lowrank import LowRank
    from graphopt_passes.prune import Prune
    from graphopt_passes.quant import Quant
    from graphopt_passes.share import Share
    from graphopt_passes.sparse_attention import SparseAttention

    return [Fold, LowRank, Prune, Quant, Share, SparseAttention]


@hookimpl
def graphopt_criteria() -> list[type[Criterion]]:
    """Return the built-in criteria."""
    from graphopt_passes.prune.criteria import BUILT_IN

    return list(BUILT_IN)
