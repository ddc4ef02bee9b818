"""A QDQ graph lowered to TOSA, and everything it makes compared with what it must make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from integer_evaluation import Rounded, cut, evaluate
from onnx import TensorProto

from graphopt.session import Session
from graphopt_backends.npu.network import emit
from graphopt_backends.npu.tosa import Graph, run_reference, serialize

__all__ = ["Outcome", "check", "lowered"]

Array = np.ndarray[Any, np.dtype[Any]]
TIE = 2.0**-10
"""How near to a tie the real result lies, in steps, where two correct roundings may differ."""


@dataclass
class Outcome:
    """How many integers were compared, and how many of them ONNX Runtime rounds the other way."""

    elements: int = 0
    differ: int = 0


def lowered(model: ir.Model, family: str = "u55") -> Graph:
    """The TOSA graph of a model, with all that its operators make as outputs, in the order of `cut`."""
    made = [value for value in _integers(model) if value not in model.graph.outputs]
    whole = model.clone()
    names = {value.name: value for node in whole.graph for value in node.outputs}
    whole.graph.outputs.extend(names[value.name] for value in made)
    return emit(whole, family)


def check(model: ir.Model, family: str = "u55", runs: int = 4, seed: int = 0) -> Outcome:
    """Run a model on the TOSA reference model, and each of its operators as integers and in ONNX Runtime.

    Every operator is given what the reference model made before it, so that one is judged at a time.
    """
    graph, rng, outcome = lowered(model, family), np.random.default_rng(seed), Outcome()
    blob, parts = serialize(graph), cut(model)
    made = [*model.graph.outputs, *(v for v in _integers(model) if v not in model.graph.outputs)]
    session = Session(parts.SerializeToString(), "parts", optimize=False)
    kinds = [(tensor.dtype, tensor.shape) for tensor in graph.outputs]
    for _ in range(runs):
        feed = {str(value.name): _random(value, rng) for value in model.graph.inputs}
        found = run_reference(blob, list(feed.values()), kinds)
        held = feed | {str(v.name): a.astype(v.dtype.numpy()) for v, a in zip(made, found, strict=True)}
        wanted = session.run(held)
        for name, rounded in evaluate(parts, held).items():
            _same(name, held[name], rounded)
            _near_ties(name, held[name], wanted[f"{name}.made"], rounded)
            outcome.elements += held[name].size
            outcome.differ += int((held[name] != wanted[f"{name}.made"]).sum())
    return outcome


def _integers(model: ir.Model) -> list[ir.Value]:
    return [v for node in model.graph for v in node.outputs if v.dtype != TensorProto.FLOAT]


def _random(value: ir.Value, rng: np.random.Generator) -> Array:
    dtype = value.dtype.numpy()
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, [int(d) for d in value.shape], dtype=dtype, endpoint=True)


def _same(name: str, found: Array, rounded: Rounded) -> None:
    """Bit for bit what the evaluation in integers makes; where it says a real number, that number rounded."""
    if rounded.integers is not None:
        np.testing.assert_array_equal(found, rounded.integers, err_msg=name)
        return
    off = np.abs(found - np.clip(rounded.place, rounded.low, rounded.high))
    assert off.max(initial=0) <= 0.5 + rounded.error + 2.0**-20, f"{name}: {off.max()} with {rounded.error}"


def _near_ties(name: str, found: Array, wanted: Array, rounded: Rounded) -> None:
    """Where ONNX Runtime differs, it does so by 1, and the real number lies between both."""
    differ = found != wanted
    if differ.any():
        assert np.abs(found.astype(np.int64) - wanted)[differ].max() == 1, name
        if found.dtype == np.int16:  # multiplied by 15 bits, which are fewer than the result has
            return
        tie = np.abs(rounded.place[differ] % 1 - 0.5)
        assert tie.max() < TIE + rounded.error, f"{name}: {tie.max()} from a tie, {rounded.error}"
