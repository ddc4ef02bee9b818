"""Fingerprints see every change that reaches the file, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.errors import ModelError
from graphopt.model_io import load_model, save_model
from graphopt.structure import fingerprint, interface, verify

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
branches (bool c, float[N,2] x) => (float[N,2] y)
<float[2] w = {1,2}>
{
  y = If (c) <
    then_branch = yes () => (float[N,2] a) { a = Add(x, w) },
    else_branch = no () => (float[N,2] b) { b = Mul(x, w) }
  >
}
"""


def model() -> ir.Model:
    return ir.from_onnx_text(TEXT)


def in_branch(m: ir.Model) -> ir.Node:
    return next(node for graph in m.graphs() for node in graph if node.op_type == "Mul")


CHANGES: dict[str, Callable[[ir.Model], object]] = {
    "operator in a branch": lambda m: setattr(in_branch(m), "op_type", "Sub"),
    "weight": lambda m: setattr(m.graph.initializers["w"], "const_value", ir.tensor(np.float32([1, 3]), name="w")),
    "name": lambda m: setattr(m.graph.node(0), "name", "renamed"),
    "metadata": lambda m: m.metadata_props.update(author="me"),
    "node metadata": lambda m: m.graph.node(0).metadata_props.update(author="me"),
    "doc": lambda m: setattr(m.graph, "doc_string", "new"),
    "opset": lambda m: m.opset_imports.update({"": 18}),
    "output shape": lambda m: setattr(m.graph.outputs[0], "shape", ir.Shape((1, 2))),
    "removed": lambda m: in_branch(m).replace_input_with(1, in_branch(m).inputs[0]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_fingerprint_sees_a_changed(name: str) -> None:
    before, m = fingerprint(model()), model()
    CHANGES[name](m)
    assert fingerprint(m) != before


def test_fingerprint_is_the_same_for_clones_and_after_a_round_trip(tmp_path: Path) -> None:
    m = model()
    assert fingerprint(m.clone()) == fingerprint(m)
    save_model(m, tmp_path / "a.onnx")
    first, second = load_model(tmp_path / "a.onnx"), load_model(tmp_path / "a.onnx")
    assert fingerprint(first) == fingerprint(second)


def test_verify_accepts_what_it_was_and_names_what_is_gone() -> None:
    m = model()
    expected = interface(m)
    verify(m, expected)
    m.graph.inputs[1].name = "z"
    with pytest.raises(ModelError, match="input 'x'"):
        verify(m, expected)


def test_verify_names_a_missing_operator_set() -> None:
    m = model()
    m.graph.node(0).domain = "acme"
    with pytest.raises(ModelError, match="domain 'acme' is not imported"):
        verify(m, interface(m))
