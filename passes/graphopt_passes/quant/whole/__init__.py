"""Targets that compute on integers only: every operator that they have stands between integers."""

from graphopt_passes.quant.whole.plan import plan_whole

__all__ = ["plan_whole"]
