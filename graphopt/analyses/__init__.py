"""Facts about a model that passes share; computed once, dropped when the model changes."""

from graphopt.analyses.attention import ATTENTION, AttentionBlock
from graphopt.analyses.channels import CHANNEL_GROUPS, ChannelGroup, ChannelGroups
from graphopt.analyses.constants import CONSTANTS, Constants
from graphopt.analyses.cost import COST, Cost, NodeCost
from graphopt.analyses.linear_inputs import LINEAR_LAYERS, LinearInput, LinearLayers
from graphopt.analyses.moments import MOMENTS, LayerMoments, Moments, MomentsAnalysis
from graphopt.analyses.quantized import QUANTIZED, QuantizedLayer
from graphopt.analyses.ranges import RANGES, Histogram, Ranges, RangesAnalysis
from graphopt.analyses.shapes import SHAPES, Shapes

__all__ = [
    "ATTENTION",
    "CHANNEL_GROUPS",
    "CONSTANTS",
    "COST",
    "LINEAR_LAYERS",
    "MOMENTS",
    "QUANTIZED",
    "RANGES",
    "SHAPES",
    "AttentionBlock",
    "ChannelGroup",
    "ChannelGroups",
    "Constants",
    "Cost",
    "Histogram",
    "LayerMoments",
    "LinearInput",
    "LinearLayers",
    "Moments",
    "MomentsAnalysis",
    "NodeCost",
    "QuantizedLayer",
    "Ranges",
    "RangesAnalysis",
    "Shapes",
]
