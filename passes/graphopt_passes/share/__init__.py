"""Weights as codes of small codebooks."""

from graphopt_passes.share.sharing import Share

__all__ = ["Share"]
