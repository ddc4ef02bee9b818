"""Layers made sparse one by one as they stand in the whole model, and what becomes of its outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from graphopt.calibration import Dataset
from graphopt.pass_base import Context
from graphopt_passes.prune.pattern.fit import Fitted, Method, Shifter, layer_of
from graphopt_passes.prune.pattern.obs import Rule, norm_scores
from graphopt_passes.prune.pattern.sites import Site
from graphopt_passes.prune.pattern.trial import Replacement, Trial
from graphopt_passes.prune.refit.linear_layers import LinearLayer

__all__ = ["Bench"]

_NO_DATA = "there are no samples"


@dataclass(frozen=True, eq=False)
class Bench:
    """Makes layers sparse without changing the model, and tries what becomes of its outputs.

    Attributes:
        sites: Weights, in the order of the graph.
        layers: By name of the site, or why samples are of no use.
        method: How weights are judged.
        trial: Runs the model.
        shifter: Makes one layer after the other sparse.
    """

    sites: Sequence[Site]
    layers: Mapping[str, LinearLayer | str]
    method: Method
    trial: Trial
    shifter: Shifter

    @classmethod
    def of(
        cls,
        model: ir.Model,
        sites: Sequence[Site],
        method: Method,
        ctx: Context,
        runs: int,
        judged_on: Dataset | None = None,
    ) -> Bench:
        """A bench for some weights.

        Args:
            model: The model; it does not change.
            sites: Weights that become sparse.
            method: How weights are judged within a layer.
            ctx: Holds the samples that layers are fitted to; where it holds none, the smallest weights go.
            runs: How often the model is going to run.
            judged_on: What the model runs on; None: the same samples.

        Raises:
            ModelError: ONNX Runtime cannot run the model.
        """
        seen = ctx.calibration is not None
        layers = {site.name: layer_of(site, ctx) if seen else _NO_DATA for site in sites}
        offsets = {name: isinstance(layer, LinearLayer) and layer.offset for name, layer in layers.items()}
        data = replace(ctx, calibration=judged_on or ctx.calibration)
        return cls(sites, layers, method, Trial(model, sites, offsets, runs, data), Shifter(model, ctx))

    def compare(self, plans: Sequence[Sequence[Rule]]) -> list[float]:
        """What each of some plans for all sites costs the outputs, in parts of their energy."""
        self.shifter.rewind()
        tried: list[dict[Site, Replacement]] = [{} for _ in plans]
        for i, site in enumerate(self.sites):
            for plan, replaced in zip(plans, tried, strict=True):
                replaced[site] = self.sparse(site, plan[i])
        return [self.trial.change(replaced) for replaced in tried]

    def alone(self, site: Site, rule: Rule) -> float:
        """What one sparse layer costs the outputs, in parts of their energy; sites come in the graph's order."""
        return self.trial.change({site: self.sparse(site, rule)})

    def sparse(self, site: Site, rule: Rule) -> Replacement:
        """A site made sparse; where samples are of no use, the smallest weights go."""
        layer = self.layers[site.name]
        found = layer if isinstance(layer, str) else self.shifter.fit(site, layer, self.method, rule)
        if isinstance(found, Fitted):
            error = 0.0 if not found.done else found.after
            if error is not None:
                return Replacement(found.weight, found.bias, error**2)
        weight = site.matrix()
        left = np.where(rule.drop(norm_scores(weight)), 0.0, weight)
        energy = max(float(np.square(weight).sum()), np.finfo(np.float64).tiny)
        return Replacement(left, np.zeros(()), float(np.square(weight - left).sum()) / energy)
