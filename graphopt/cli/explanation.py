"""Texts of `graphopt explain`."""

from __future__ import annotations

import inspect
from typing import Any

from graphopt.options import specs
from graphopt.pass_base import Pass
from graphopt.targets import WEIGHT_AXES, IntegerRules, Target

__all__ = ["explain_pass", "explain_target"]

_WIDTH = max(map(len, WEIGHT_AXES))


def explain_pass(cls: type[Pass]) -> str:
    """What a pass does, and a table of its options."""
    promise = "may change the outputs" if cls.lossy else "keeps the outputs equal, which is checked"
    lines = [f"{cls.name}: {promise}", "", inspect.getdoc(cls) or "", ""]
    options = specs(cls)
    lines += ["options:"] if options else ["no options"]
    width = max((len(f"{o.name}={o.type}") for o in options), default=0)
    for option in options:
        bounds = f"  ({option.bounds})" if str(option.bounds) else ""
        left = f"{option.name}={option.type}"
        lines.append(f"  {left:{width}}  {option.help}{bounds}  [default: {_text(option.default)}]")
    return "\n".join(lines)


def explain_target(target: Target) -> str:
    """What a target is, and what passes and backends know of it."""
    rules = target.integers
    lines = [
        f"{target}: {target.summary}",
        "",
        f"  backend      {target.backend or 'none: the ONNX model itself ships'}",
        f"  round to     channel counts that are multiples of {target.round_to}",
        f"  activations  {rules.activation}, {'symmetric' if rules.symmetric_activations else 'with a zero point'}",
        f"  weights      int8, symmetric, {_weights(rules)}",
        "  biases       int32, scale of the input times that of the weight",
        f"  scales       {'powers of two' if rules.power_of_two else 'any'}",
        f"  forms        {'static only' if rules.static_only else 'static, dynamic, weights only'}",
        f"  integers     {', '.join(sorted(rules.operators))}",
    ]
    if rules.per_channel:
        lines += ["  scales along axis"]
        lines += [f"    {name:{_WIDTH}} {'; '.join(map(str, axes))}" for name, axes in WEIGHT_AXES.items()]
    if target.isa is not None:
        isa = target.isa
        features = " ".join(isa.features) or "none beyond the baseline"
        lines += [
            f"  cpu          {isa.cpu or 'baseline'} ({isa.triple}), {isa.vector_bits} bit vectors, dot: {isa.dot}",
            f"  features     {features}",
        ]
    return "\n".join(lines)


def _weights(rules: IntegerRules) -> str:
    place = "a scale for each output channel" if rules.per_channel else "one scale for the tensor"
    return (
        place if rules.weight_bits == 8 else f"{place}, neighbours within 128 together, where products add in 16 bits"
    )


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None or value == ():
        return "none"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)  # type: ignore[arg-type]
