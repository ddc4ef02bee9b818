"""Weight-only quantization in blocks: 8, 4 or 2 bits, each group of inputs with a scale of its own."""

from graphopt_passes.quant.blockwise.fit import Algorithm, Method, needs_data
from graphopt_passes.quant.blockwise.quantize import quantize_blocks

__all__ = ["Algorithm", "Method", "needs_data", "quantize_blocks"]
