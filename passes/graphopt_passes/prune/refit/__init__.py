"""Least squares that bring a pruned model back to what the whole one computed."""

from graphopt_passes.prune.refit.refit import Refit, refit

__all__ = ["Refit", "refit"]
