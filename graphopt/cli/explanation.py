"""Texts of `graphopt explain`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from graphopt.backend_base import Backend
from graphopt.options import specs
from graphopt.pass_base import Pass
from graphopt.targets import WEIGHT_AXES, IntegerRules, Target

__all__ = ["explain_pass", "explain_target"]

_WIDTH = max(map(len, WEIGHT_AXES))
_WIDEST = 48


def explain_pass(cls: type[Pass]) -> str:
    """What a pass does, and a table of its options."""
    promise = "may change the outputs" if cls.lossy else "keeps the outputs equal, which is checked"
    lines = [f"{cls.name}: {promise}", "", inspect.getdoc(cls) or "", ""]
    lines += ["options:", *_options(cls)] if specs(cls) else ["no options"]
    return "\n".join(lines)


def _options(cls: type[Any]) -> Iterator[str]:
    """A line for each option that a class declares; two where the left part would push all others away."""
    options = specs(cls)
    width = max((len(left) for o in options if len(left := f"{o.name}={o.type}") <= _WIDEST), default=0)
    for option in options:
        bounds = f"  ({option.bounds})" if str(option.bounds) else ""
        left = f"{option.name}={option.type}"
        if len(left) > width:
            yield f"  {left}"
            left = ""
        yield f"  {left:{width}}  {option.help}{bounds}  [default: {_text(option.default)}]"


def explain_target(target: Target, backend: Backend | None = None) -> str:
    """What a target is, what passes and backends know of it, and what can be asked of its backend."""
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
        f"  forms        {_forms(rules)}",
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
    if backend is not None and backend.options is not None:
        lines += ["", f"options, written '{target}{{option=value ...}}':", *_options(backend.options)]
    else:
        lines += ["", "no options"]
    if backend is not None and (more := backend.explain(target)):
        lines += ["", *more]
    return "\n".join(lines)


def _forms(rules: IntegerRules) -> str:
    if rules.integers_only:
        return "static only, for all of these operators and for results of the model"
    return "static only" if rules.static_only else "static, dynamic, weights only"


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
