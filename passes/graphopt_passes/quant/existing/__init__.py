"""Models that come quantized: how their integers become floats again."""

from graphopt_passes.quant.existing.dequantize import Undone, as_floats, dequantize_model

__all__ = ["Undone", "as_floats", "dequantize_model"]
