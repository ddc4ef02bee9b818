"""Attention that sees a part of the sequence."""

from graphopt_passes.sparse_attention.sparsify import SparseAttention

__all__ = ["SparseAttention"]
