"""Facts about a model that passes share; computed once, dropped when the model changes."""

from graphopt.analyses.constants import CONSTANTS, Constants
from graphopt.analyses.cost import COST, Cost, NodeCost
from graphopt.analyses.shapes import SHAPES, Shapes

__all__ = ["CONSTANTS", "COST", "SHAPES", "Constants", "Cost", "NodeCost", "Shapes"]
