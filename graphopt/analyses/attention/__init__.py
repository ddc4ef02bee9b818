"""Attention, found by what a graph computes and not by what it calls things.

`ctx.fact(ATTENTION)` gives one `AttentionBlock` for every core of the main graph and of those inside nodes, in graph
order.
"""

from graphopt.analyses.attention.analysis import ATTENTION, AttentionAnalysis
from graphopt.analyses.attention.block import AttentionBlock, Axes, Axis, Condition, Mask
from graphopt.analyses.attention.summary import as_record, summaries

__all__ = [
    "ATTENTION",
    "AttentionAnalysis",
    "AttentionBlock",
    "Axes",
    "Axis",
    "Condition",
    "Mask",
    "as_record",
    "summaries",
]
