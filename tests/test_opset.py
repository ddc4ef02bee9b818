from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.errors import ModelError
from graphopt.model_io import load_model, save_model
from graphopt.opset import opset_version, raise_opset
from graphopt.reference import Reference

HEADER = '<ir_version: 6, opset_import: ["" : {opset}]>'
BRANCHES = """g (bool c, float[2,1,64] x) => (float[N,M] y) <float[64,64] big> {
  [squeeze] s = Squeeze<axes = [1]>(x)
  [matmul] m = MatMul(s, big)
  [choose] y = If(c) <
    then_branch = yes () => (float[N,M] a) { [inner] u = Unsqueeze<axes = [0]>(m)  [back] a = Squeeze<axes = [0]>(u) },
    else_branch = no () => (float[N,M] b) { [negative] b = Neg(m) }
  >
}"""


def parsed(text: str, opset: int) -> ir.Model:
    return ir.from_onnx_text(HEADER.format(opset=opset) + text)


def branches(opset: int = 11) -> ir.Model:
    """A model with a weight of 16 kB in the main graph and one in a branch."""
    model = parsed(BRANCHES.replace("x) =>", "x, float[64,64] big) =>").replace(" <float[64,64] big>", ""), opset)
    rng = np.random.default_rng(0)
    big = next(value for value in model.graph.inputs if value.name == "big")
    model.graph.inputs.remove(big)
    big.const_value = ir.tensor(rng.standard_normal((64, 64)).astype(np.float32), name="big")
    model.graph.register_initializer(big)
    negative = next(node for graph in model.graphs() for node in graph if node.name == "negative")
    tensor = ir.tensor(rng.standard_normal((2, 64, 64)).astype(np.float32), name="inner_weight")
    weight = ir.Value(
        name="inner_weight", const_value=tensor, shape=ir.Shape([2, 64, 64]), type=ir.TensorType(tensor.dtype)
    )
    assert isinstance(negative.graph, ir.Graph)
    negative.graph.register_initializer(weight)
    reduced = ir.node("ReduceSum", [weight], {"axes": [0, 1], "keepdims": 0}, name="reduce")
    added = ir.node("Add", [negative.inputs[0], reduced.outputs[0]], name="add")
    reduced.outputs[0].name, added.outputs[0].name = "reduced", "added"
    negative.graph.insert_before(negative, [reduced, added])
    negative.replace_input_with(0, added.outputs[0])
    return model


def runs(model: ir.Model) -> list[np.ndarray]:
    session, rng = Reference(model), np.random.default_rng(1)
    x = rng.standard_normal((2, 1, 64)).astype(np.float32)
    return [session.run({"c": np.array(c), "x": x})["y"] for c in (True, False)]


def test_a_version_that_is_there_already_changes_nothing() -> None:
    model = branches()
    assert not raise_opset(model, 11)
    assert not raise_opset(model, 9)
    assert opset_version(model) == 11


def test_operators_that_stayed_the_same_only_get_a_new_number() -> None:
    model = parsed("g (float[2,3] x) => (float[2,3] y) { [rectify] r = Relu(x)  [add] y = Add(r, x) }", 11)
    graph = model.graph
    assert raise_opset(model, 13)
    assert model.graph is graph, "no converter was needed"
    assert opset_version(model) == 13
    assert model.ir_version == 7


def test_a_default_that_changed_is_not_taken_for_the_same() -> None:
    model = parsed("g (float[2,3,4] x) => (float[2,3,4] y) { [soft] y = Softmax(x) }", 11)
    x = {"x": np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)}
    before = Reference(model).run(x)["y"]
    raise_opset(model, 13)
    np.testing.assert_allclose(Reference(model).run(x)["y"], before, rtol=1e-6)


def test_branches_and_their_weights_are_converted() -> None:
    model = branches()
    before = runs(model)
    assert raise_opset(model, 13)
    for left, right in zip(before, runs(model), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)
    kinds = {(node.op_type, len(node.inputs)) for graph in model.graphs() for node in graph}
    assert ("Squeeze", 2) in kinds, "axes have become an input"
    assert [value.name for value in model.graph.inputs] == ["c", "x"]
    assert "big" in model.graph.initializers


def test_weights_stay_in_their_file(tmp_path: Path) -> None:
    save_model(branches(), tmp_path / "model.onnx", embed_limit=0)
    model = load_model(tmp_path / "model.onnx")
    raise_opset(model, 13)
    assert isinstance(model.graph.initializers["big"].const_value, ir.ExternalTensor)
    assert len(runs(model)) == 2


def test_names_and_metadata_survive() -> None:
    model = branches()
    model.metadata_props["author"] = "somebody"
    model.graph.doc_string = "what it does"
    first = next(iter(model.graph))
    first.metadata_props["scope"] = "encoder"
    first.doc_string = "line 3"
    first.outputs[0].metadata_props["kind"] = "squeezed"
    shapes = [str(value.shape) for value in (*model.graph.inputs, *model.graph.outputs)]
    raise_opset(model, 13)
    node = next(node for node in model.graph if node.name == "squeeze")
    assert (model.metadata_props["author"], model.graph.doc_string) == ("somebody", "what it does")
    assert (node.metadata_props["scope"], node.doc_string) == ("encoder", "line 3")
    assert node.outputs[0].metadata_props["kind"] == "squeezed"
    assert [str(value.shape) for value in (*model.graph.inputs, *model.graph.outputs)] == shapes


def test_an_unknown_operator_beside_unchanged_ones_is_no_obstacle() -> None:
    text = '<ir_version: 6, opset_import: ["" : 11, "acme" : 1]> g (float[2] x) => (float[2] y) {'
    model = ir.from_onnx_text(text + " r = Relu(x)  y = acme.Magic(r) }")
    assert raise_opset(model, 13)
    assert model.opset_imports == {"": 13, "acme": 1}


def test_what_cannot_be_converted_is_refused_and_left_alone() -> None:
    text = '<ir_version: 6, opset_import: ["" : 11, "acme" : 1]> g (float[2,1] x) => (float[N] y) {'
    model = ir.from_onnx_text(text + " r = acme.Magic(x)  y = Squeeze<axes = [1]>(r) }")
    graph = model.graph
    try:
        raise_opset(model, 13)
    except ModelError as e:
        assert "Squeeze" in e.fact
        assert model.graph is graph
        assert opset_version(model) == 11
    else:  # converters that keep unknown operators are welcome
        assert {node.domain for node in model.graph} >= {"acme"}


def test_functions_are_refused_where_operators_changed() -> None:
    text = """<ir_version: 8, opset_import: ["" : 11, "local" : 1]>
    g (float[2,1] x) => (float[N] y) { h = local.twice(x)  y = Squeeze<axes = [1]>(h) }
    <opset_import: ["" : 11], domain: "local"> twice (a) => (b) { b = Add(a, a) }"""
    model = ir.from_onnx_text(text)
    with pytest.raises(ModelError, match="opset 13 is needed, and functions cannot be converted"):
        raise_opset(model, 13)
