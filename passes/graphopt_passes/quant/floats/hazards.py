"""What activations do to fp16: too large, sums that are too large on the way, too small.

With calibration data the ranges decide. Without, operators whose results grow fast, squares and sums above all, are
taken for too large until an operator follows that brings them back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir

from graphopt_passes._own_constants import constant_tensor
from graphopt_passes.quant.floats._rounding import HALF_MAX
from graphopt_passes.quant.floats.extremes import Extremes
from graphopt_passes.quant.floats.ports import Ports

__all__ = ["Hazards", "growing_nodes"]

_LIMIT = HALF_MAX / 2  # other data may reach further than the samples do
_LEAST_RMS = 2.0**-19  # 40 dB above the rounding of denormals
_NOTHING = Extremes()
_MEANS = frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean"})
_SQUARES = frozenset({"GlobalLpPool", "LpPool", "ReduceL2"})
_INNER_SQUARES = frozenset(
    {"GroupNormalization", "InstanceNormalization", "LRN", "LpNormalization", "MeanVarianceNormalization"}
)
_GROWING = frozenset(
    {
        "CumSum", "DFT", "Det", "Exp", "GlobalLpPool", "LRN", "LpNormalization", "LpPool", "MeanVarianceNormalization",
        "InstanceNormalization", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceProd", "ReduceSum",
        "ReduceSumSquare", "STFT",
    }
)  # fmt: skip
_KEEPING = frozenset(
    {"Add", "Cast", "Clip", "Identity", "Max", "ReduceMean", "ReduceSum", "Reshape", "Squeeze", "Sum", "Unsqueeze"}
)
_SHRINKING = frozenset({"Div", "Log", "Reciprocal", "Sqrt"})


class Hazards:
    """Judges values of the main graph by their ranges.

    Args:
        ranges: How far activations reach, by name.
        masked: Values whose extremes are a mask's, which will be clipped.
    """

    def __init__(self, ranges: Mapping[str, Extremes], masked: set[ir.Value]) -> None:
        self._ranges = ranges
        self._masked = masked

    def of(self, node: ir.Node, ports: Ports) -> str:
        """Reason why a node cannot compute in fp16; empty if it can."""
        values = [node.outputs[i] for i in ports.outputs]
        values += [value for i in ports.inputs if (value := node.inputs[i]) is not None]
        for value in values:
            seen = self._seen(value)
            reach = self._reach(value, seen)
            if reach > _LIMIT:
                return f"{value.name!r} reaches {reach:.3g} on the calibration data, fp16 ends at 65504"
            if 0 < seen.rms < _LEAST_RMS:
                return f"{value.name!r} is so small, {seen.rms:.2g} on average, that fp16 keeps few of its digits"
        inner = self._inner(node, ports)
        if inner > _LIMIT:
            return f"its sums reach {inner:.3g} on the calibration data, fp16 ends at 65504"
        return ""

    def _seen(self, value: ir.Value | None) -> Extremes:
        return self._ranges.get(value.name or "", _NOTHING) if value is not None else _NOTHING

    def _reach(self, value: ir.Value, seen: Extremes) -> float:
        if value in self._masked:  # the mask stands on one side, which is clipped; the other one counts
            return max(0.0, min(-seen.low, seen.high))
        return seen.reach

    def _inner(self, node: ir.Node, ports: Ports) -> float:
        """Greatest magnitude between input and output, where the operator adds before it divides or takes a root."""
        if not ports.inputs or not ports.outputs:
            return 0.0
        before, after = self._seen(node.inputs[0]), self._seen(node.outputs[0])
        if node.op_type in _MEANS:
            return after.reach * before.count / max(after.count, 1)
        if node.op_type in _SQUARES:
            return after.reach**2
        return before.reach**2 if node.op_type in _INNER_SQUARES else 0.0


def growing_nodes(nodes: Iterable[tuple[str, ir.Node]]) -> dict[str, str]:
    """Nodes that may leave fp16's range on data that nobody has shown us, by key, with the reason.

    Args:
        nodes: All nodes with their keys, in order.
    """
    large: dict[ir.Value, str] = {}
    found: dict[str, str] = {}
    for key, node in nodes:
        source = next((large[value] for value in node.inputs if value in large), None)
        if _grows(node):
            found[key] = f"{node.op_type} may exceed fp16's range, and no calibration data covers it"
            source = node.op_type
        elif source is not None and node.op_type in _KEEPING | _SHRINKING:
            found[key] = f"follows a {source} that may exceed fp16's range, and no calibration data covers it"
        if source is not None and key in found and node.op_type not in _SHRINKING:
            large.update(dict.fromkeys(node.outputs, source))
    return found


def _grows(node: ir.Node) -> bool:
    if node.op_type in _GROWING and node.domain in ("", "ai.onnx"):
        return True
    if node.op_type == "Mul":
        return node.inputs[0] is node.inputs[1]
    if node.op_type != "Pow":
        return False
    exponent = constant_tensor(node.inputs[1])
    return exponent is None or exponent.size > 64 or bool(np.abs(exponent.numpy()).max(initial=0.0) > 1)
