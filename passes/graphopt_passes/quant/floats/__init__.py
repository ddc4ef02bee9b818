"""Narrow float types for the pass `quant`: fp16 arithmetic, bf16 and fp8 weights."""

from graphopt_passes.quant.floats.convert import FloatSettings, check_patterns, convert, noise_by_site
from graphopt_passes.quant.floats.outcome import Converted
from graphopt_passes.quant.floats.plan import Choice

__all__ = ["Choice", "Converted", "FloatSettings", "check_patterns", "convert", "noise_by_site"]
