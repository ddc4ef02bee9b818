"""Joins everything: resolve the request, run the passes, check, compile for the target, write the bundle."""

from graphopt.compile.optimize import Result, optimize, plan
from graphopt.compile.request import Request
from graphopt.recipe import Limits

__all__ = ["Limits", "Request", "Result", "optimize", "plan"]
