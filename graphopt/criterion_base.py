"""The contract between pruning and a criterion, which says how much each unit of a channel group is worth.

A criterion is a class with a name and one method. What it needs to know of a unit it asks for by place:

    weights_of(group, "output")     the constants that make the units; "input": those that read them
    weight_parts(place, ctx)        their slices, `[units, elements]`, in parts that fit into memory
    axis_sums(place, ctx, np.abs)   or just a sum for each index of the axis
    activity(groups, ctx)           what the units' activations are like on the calibration data
    ctx.fact(MOMENTS)               second moments of what linear layers read

Criteria of plugins come in through the hook `graphopt_criteria` and are spelled like built-in ones.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analyses._axis_maps import Role
from graphopt.analyses.activity import ActivityAnalysis, AxisActivity
from graphopt.analyses.channels import ChannelGroup, Place
from graphopt.analyses.constants import CONSTANTS
from graphopt.analyses.dequantize import real_values
from graphopt.analyses.shapes import SHAPES
from graphopt.errors import PassError
from graphopt.pass_base import Context
