"""Help accuracy before and while weights are rounded: the float model is changed without changing what it computes."""

from graphopt_passes.quant.adjust.balance import Aims, balance_channels
from graphopt_passes.quant.adjust.bias import correct_biases
from graphopt_passes.quant.adjust.rounding import Rounding, round_weights

__all__ = ["Aims", "Rounding", "balance_channels", "correct_biases", "round_weights"]
