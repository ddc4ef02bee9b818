"""Which channels of which tensors live or die together: the dependency graph of a model, at the grain of indices.

`groups` applies one rule per operator (`rules/`) to atoms that every index of every axis has (`axis_maps`), and reads
the groups off the partition that the rules leave.
"""

from graphopt.analyses.channels.axis_maps import Kind
from graphopt.analyses.channels.groups import (
    CHANNEL_GROUPS,
    ChannelGroup,
    ChannelGroups,
    ChannelGroupsAnalysis,
    Place,
)
from graphopt.analyses.channels.tables import IndexTable, Mean, SizeTable, Span

__all__ = [
    "CHANNEL_GROUPS",
    "ChannelGroup",
    "ChannelGroups",
    "ChannelGroupsAnalysis",
    "IndexTable",
    "Kind",
    "Mean",
    "Place",
    "SizeTable",
    "Span",
]
