"""Which of the two plans a target wants: integers where they pay, or everywhere."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from graphopt.analyses import Shapes
from graphopt.targets import IntegerRules
from graphopt_passes.quant.plan import Plan, make_plan
from graphopt_passes.quant.sites import Site
from graphopt_passes.quant.whole import plan_whole

__all__ = ["plan_for"]


def plan_for(
    model: ir.Model,
    linear: Collection[Site],
    shapes: Shapes,
    rules: IntegerRules,
    products: Collection[str] = (),
) -> Plan:
    """Plan a model; arguments as those of `make_plan`."""
    plan = plan_whole if rules.integers_only else make_plan
    return plan(model, linear, shapes, rules, products)
