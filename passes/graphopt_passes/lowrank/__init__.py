"""Weights as products of thin ones."""

from graphopt_passes.lowrank.factorize import LowRank

__all__ = ["LowRank"]
