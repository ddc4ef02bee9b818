"""How samples lie in the outputs of a node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from graphopt_backends.batch.layers import LAYERS
from graphopt_backends.batch.moves import MOVES
from graphopt_backends.batch.site import CONSTANT, Lay, MixedError, Rule, Site

__all__ = ["follow"]

_RULES: Mapping[str, Rule] = {**LAYERS, **MOVES}
_RANDOM = frozenset(
    {"Bernoulli", "RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial"}
)
_TOGETHER = "takes its scale from all samples together"
_REASONS = {
    "DynamicQuantizeLinear": _TOGETHER,
    "com.microsoft.DynamicQuantizeLSTM": _TOGETHER,
    "com.microsoft.DynamicQuantizeMatMul": _TOGETHER,
}
_COUNTED: dict[str, frozenset[int]] = {
    "ConstantOfShape": frozenset({0}), "Expand": frozenset({1}), "Range": frozenset({1}), "Reshape": frozenset({1}),
    "Resize": frozenset({3}), "Slice": frozenset({2}), "Tile": frozenset({1}),
}  # fmt: skip
"""Inputs that may hold the size of the batch."""

_MOVES = frozenset({"Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators that leave every entry as it is."""


def follow(site: Site) -> Sequence[Lay]:
    """How samples lie in the outputs of a node.

    Raises:
        MixedError: Samples do not stay apart, or no rule says that they do.
    """
    node, outputs = site.node, len(site.node.outputs)
    name = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
    if name in _RANDOM:
        raise MixedError("draws random numbers")
    if not any(sample.varies for sample in site.inputs):
        return [CONSTANT] * outputs
    lost = next((sample.lay for sample in site.inputs if sample.lay.mixed and sample.lay.axis is None), None)
    if lost is not None:
        return [lost] * outputs
    counted = [i for i, sample in enumerate(site.inputs) if sample.counts]
    if not set(counted) <= _COUNTED.get(name, frozenset()):
        raise MixedError("computes with the size of the batch")
    rule = _RULES.get(name)
    if rule is None:
        raise MixedError(_REASONS.get(name, "is not known to keep samples apart"))
    axes = list(rule(site))
    if any(output.uses() or output.is_graph_output() for output in node.outputs[len(axes) :]):
        raise MixedError("gives more than is known to keep samples apart")
    axes += axes[-1:] * (outputs - len(axes))
    return [_checked(site, name, Lay(axis)) for axis in axes[:outputs]]


def _checked(site: Site, name: str, lay: Lay) -> Lay:
    """Say where entries depend on other samples already, or on the numbers of samples."""
    mixed = next((sample.lay.mixed for sample in site.inputs if sample.lay.mixed), "")
    kinds = [sample.lay.numbers for sample in site.inputs]
    if mixed or not any(kinds):
        return replace(lay, numbers="all" if name == "Range" else "", mixed=mixed)
    if name in ("GatherND", "ScatterND") and kinds[1] == "first" and not any(kinds[:1] + kinds[2:]):
        return lay
    if name in _MOVES and kinds[0] == "all":
        return replace(lay, numbers="all")
    last = site.rank(0) - 1
    behind = name == "Concat" and kinds[0] == "all" and not any(kinds[1:]) and site.integer("axis", 0) in (-1, last)
    if behind and site.shape(0)[last] == 1:
        return replace(lay, numbers="first")
    return replace(lay, mixed=f"{site.node.name!r} ({site.node.op_type}) computes with the numbers of samples")
