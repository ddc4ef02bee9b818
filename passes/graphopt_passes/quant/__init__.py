"""The pass `quant`: 8-bit integers for weights and, with calibration data, for activations."""

from graphopt_passes.quant.quantize import Quant

__all__ = ["Quant"]
