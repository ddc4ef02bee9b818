"""`prune`: channels, heads, experts and blocks leave a model; or single weights become zero."""

from graphopt_passes.prune.pruning import Prune

__all__ = ["Prune"]
