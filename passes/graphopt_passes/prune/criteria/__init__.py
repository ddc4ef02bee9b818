"""Which criterion judges, built-in or of a plugin, and what units are worth by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from graphopt.analyses.channels import ChannelGroup
from graphopt.criterion_base import Criterion, judge
from graphopt.errors import OptionError, nearest
from graphopt.pass_base import Context
from graphopt_passes.prune.criteria.activations import Activation, AveragePercentageOfZeros, Wanda
from graphopt_passes.prune.criteria.output import OutputChange
from graphopt_passes.prune.criteria.reconstruction import Reconstruction
from graphopt_passes.prune.criteria.weights import L1, L2, BatchNormScale, GeometricMedian, Random

__all__ = ["BUILT_IN", "find_criterion", "worth"]

BUILT_IN: tuple[type[Criterion], ...] = (
    L1,
    L2,
    BatchNormScale,
    GeometricMedian,
    Activation,
    AveragePercentageOfZeros,
    Wanda,
    Reconstruction,
    OutputChange,
    Random,
)
"""Criteria that `prune` knows even where no plugin was loaded."""

_OWN: Mapping[str, Criterion] = MappingProxyType({criterion.name: criterion() for criterion in BUILT_IN})


def find_criterion(name: str, ctx: Context) -> Criterion:
    """The criterion of a name; `auto` is `reconstruction` with calibration data and `l2` without.

    Raises:
        OptionError: There is none, it needs gradients, or it needs data and there is none.
    """
    known = {**_OWN, **ctx.criteria}
    if name == "taylor":
        raise OptionError("prune.criterion", "taylor needs gradients, not available yet", "use l2")
    if name == "auto":
        return known["l2" if ctx.calibration is None else "reconstruction"]
    if name not in known:
        raise OptionError("prune.criterion", f"no criterion called {name!r}", nearest(name, ["auto", *known]))
    if known[name].needs_data and ctx.calibration is None:
        raise OptionError("prune.criterion", f"{name} needs samples", "give --calibration, or use l2")
    return known[name]


def worth(criterion: Criterion, model: ir.Model, groups: Sequence[ChannelGroup], ctx: Context) -> list[np.ndarray]:
    """What the units of each group are worth, on one scale for all groups.

    Scores have a mean of 1 in each group or, where a criterion's scores are comparable, are shares of what layers
    compute. Groups that the criterion has nothing to go by for are judged by l2, on the same scale: as if all units of
    the group together made one whole output, in proportion to their squared norms.

    Returns:
        For each group float64 `[units]`; ascending, it is the order to remove units in.

    Raises:
        PassError: The criterion breaks its contract.
        ModelError: ONNX Runtime cannot run the model.
    """
    found = judge(criterion, model, groups, ctx)
    open_groups = [group for group, scores in zip(groups, found, strict=True) if scores is None]
    norms = iter(L2().scores(model, open_groups, ctx))
    return [_by_norm(next(norms), criterion) if scores is None else scores for scores in found]


def _by_norm(norms: np.ndarray, criterion: Criterion) -> np.ndarray:
    return np.square(norms) / max(float(np.square(norms).sum()), 1e-300) if criterion.comparable else norms
