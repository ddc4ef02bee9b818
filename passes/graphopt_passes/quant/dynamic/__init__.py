"""Dynamic INT8: activations rounded to a grid found on every run, products on integers (opset 11)."""

from graphopt_passes.quant.dynamic.layers import quantize_dynamic
from graphopt_passes.quant.dynamic.refusals import OPERATORS, note_ranks, why_not_dynamic
from graphopt_passes.quant.dynamic.rounding import Rounding

__all__ = ["OPERATORS", "Rounding", "note_ranks", "quantize_dynamic", "why_not_dynamic"]
