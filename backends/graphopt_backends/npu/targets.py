"""The Arm Ethos-U processors: what passes have to know of them."""

from __future__ import annotations

from graphopt.targets import INTEGER_OPERATORS, IntegerRules, Target

__all__ = ["OPERATORS", "TABLES", "TARGETS"]

TABLES = frozenset(
    {"Abs", "Add", "Atan", "Ceil", "Celu", "Clip", "Cos", "Cosh", "Div", "Elu", "Erf", "Exp", "Floor", "Gelu",
     "HardSigmoid", "HardSwish", "LeakyRelu", "Log", "Max", "Min", "Mish", "Mul", "Neg", "PRelu", "Pow", "Reciprocal",
     "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Sub", "Swish", "Tan", "Tanh",
     "ThresholdedRelu"}
)  # fmt: skip
"""Operators whose result hangs on one number each, if their other operands are numbers: a table of 256 entries."""

OPERATORS = INTEGER_OPERATORS | TABLES | {
    "ArgMax", "BatchNormalization", "ConvTranspose", "DepthToSpace", "GlobalMaxPool", "Identity", "ReduceMax",
    "ReduceMean", "ReduceMin", "ReduceSum", "Softmax", "SpaceToDepth",
}  # fmt: skip
"""ONNX operators that an Ethos-U can compute on integers."""

_RULES = IntegerRules(operators=OPERATORS, activation="int8", static_only=True, integers_only=True)

_BLOCK = 32
"""Input channels that Ethos-U55 and U65 multiply at once: of 97 to 128, all cost the cycles of 128."""

_BLOCK_U85 = 16
"""Likewise for Ethos-U85."""


def _target(device: str, summary: str, *, round_to: int = _BLOCK, default: bool = False) -> Target:
    return Target(
        name="npu", device=device, backend="npu", summary=summary, default=default, round_to=round_to, integers=_RULES
    )


TARGETS = (
    _target("ethos-u55-32", "32 products a cycle: the smallest Ethos-U, beside a Cortex-M"),
    _target("ethos-u55-64", "64 products a cycle, beside a Cortex-M: Himax WiseEye2"),
    _target(
        "ethos-u55-128", "128 products a cycle, beside a Cortex-M: Alif Ensemble, Infineon PSOC Edge", default=True
    ),
    _target("ethos-u55-256", "256 products a cycle, beside a Cortex-M: Renesas RA8P1, Alif Ensemble"),
    _target("ethos-u65-256", "256 products a cycle, with a DRAM: NXP i.MX 93"),
    _target("ethos-u65-512", "512 products a cycle on two cores, with a DRAM"),
    _target("ethos-u85-128", "128 products a cycle, beside a Cortex-M or -A", round_to=_BLOCK_U85),
    _target("ethos-u85-256", "256 products a cycle, beside a Cortex-M or -A: Alif Ensemble E4", round_to=_BLOCK_U85),
    _target("ethos-u85-512", "512 products a cycle, beside a Cortex-M or -A", round_to=_BLOCK_U85),
    _target("ethos-u85-1024", "1024 products a cycle, beside a Cortex-A", round_to=_BLOCK_U85),
    _target("ethos-u85-2048", "2048 products a cycle, beside a Cortex-A: the largest Ethos-U", round_to=_BLOCK_U85),
)
