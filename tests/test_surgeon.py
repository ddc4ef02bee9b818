"""graphsurgeon's corner of graphopt: computing constants, passes written against it, cutting models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
import pytest

from graphopt.errors import ModelError, PassError
from graphopt.model_io import load_model, model_bytes, save_model
from graphopt.options import opt
from graphopt.pass_base import Change, Context, PassResult
from graphopt.reference import Reference
from graphopt.surgeon import damage, evaluate, extract
from graphopt.surgeon_pass import SurgeonPass
from graphopt.targets import Target

HEAD = '<ir_version: 8, opset_import: ["" : 17]>\n'
CHAIN = (
    HEAD
    + """g (float[2,3] x) => (float[2,3] y) <float[3] w = {1, 2, 3}> {
  [add] a = Add (x, w)
  [first] b = Neg (a)
  [second] c = Neg (b)
  [last] y = Relu (c)
}"""
)
BRANCHES = (
    HEAD
    + """g (bool c, float[2] x) => (float[2] y, float[2] z) <float[2] w = {1, 2}, float[2] v = {3, 4}> {
  h = Add (x, w)
  y = If (c) <
    then_branch = t () => (float[2] p) { p = Mul (h, v) },
    else_branch = e () => (float[2] q) { q = Neg (h) }
  >
  z = Relu (h)
}"""
)


def context(model: ir.Model) -> Context:
    return Context(model, Target(name="ort"))


@dataclass(frozen=True, kw_only=True)
class Unnegate(SurgeonPass):
    """Remove pairs of Neg."""

    name: ClassVar[str] = "unnegate"
    lossy: ClassVar[bool] = False

    limit: int = opt(10, help="pairs removed at most")

    def rewrite(self, graph: gs.Graph, ctx: Context) -> tuple[Change, ...]:
        changes: list[Change] = []
        for node in [n for n in graph.nodes if n.op == "Neg"][: self.limit]:
            before = node.inputs[0].inputs
            if before and before[0].op == "Neg":
                for reader in list(node.outputs[0].outputs):
                    reader.inputs[reader.inputs.index(node.outputs[0])] = before[0].inputs[0]
                changes.append(Change(node.name, "removed with the Neg before it"))
        return tuple(changes)


@dataclass(frozen=True, kw_only=True)
class Scramble(SurgeonPass):
    """Reverse the nodes, or do nothing."""

    name: ClassVar[str] = "scramble"
    lossy: ClassVar[bool] = False

    really: bool = opt(False, help="do it")

    def rewrite(self, graph: gs.Graph, ctx: Context) -> bool:
        if self.really:
            graph.nodes.reverse()
        return self.really


def run(step: SurgeonPass, model: ir.Model) -> PassResult:
    return step.run(model, context(model))


def test_evaluate_computes_outputs_with_onnx_runtime() -> None:
    model = ir.from_onnx_text(
        HEAD + "g () => (float[2] y, float[2] z) <float[2] w = {1, 4}> { y = Sqrt (w) \n z = Neg (y) }"
    )
    found = evaluate(model)
    assert found["y"].tolist() == [1, 2]
    assert found["z"].tolist() == [-1, -2]


def test_evaluate_leaves_out_what_has_no_kernel(capfd: pytest.CaptureFixture[str]) -> None:
    body = "g () => (float[2] y, float[2] z) <float[2] w = {1, 4}> { y = Sqrt (w) \n z = Nonsense (w) }"
    found = evaluate(ir.from_onnx_text(HEAD + body))
    assert list(found) == ["y"]
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_a_surgeon_pass_rewrites_and_keeps_descriptions() -> None:
    model = ir.from_onnx_text(CHAIN)
    model.graph.doc_string = "a chain"
    model.graph.metadata_props["made"] = "by hand"
    model.graph[3].metadata_props["layer"] = "4"
    model.graph[3].doc_string = "rectifies"
    model.graph[0].outputs[0].metadata_props["scale"] = "1"
    feed = {"x": np.arange(6, dtype=np.float32).reshape(2, 3) - 4}
    wanted = Reference(model).run(feed)["y"]
    result = run(Unnegate(), model)
    assert result.modified
    assert [change.site for change in result.changes] == ["second"]
    assert [node.name for node in model.graph] == ["add", "last"]
    assert (model.graph.doc_string, model.graph.metadata_props["made"]) == ("a chain", "by hand")
    assert (model.graph[1].metadata_props, model.graph[1].doc_string) == ({"layer": "4"}, "rectifies")
    assert model.graph[0].outputs[0].metadata_props == {"scale": "1"}
    np.testing.assert_array_equal(Reference(model).run(feed)["y"], wanted)


def test_a_surgeon_pass_that_changes_nothing_leaves_every_byte() -> None:
    model = ir.from_onnx_text(CHAIN)
    before, graph = model_bytes(model), model.graph
    assert not run(Scramble(), model).modified
    assert model_bytes(model) == before
    assert model.graph is graph


def test_a_surgeon_pass_is_an_ordinary_pass() -> None:
    assert str(Unnegate()) == "unnegate"
    assert str(Unnegate(limit=1)) == "unnegate{limit=1}"


def test_a_surgeon_pass_sorts_what_it_scrambles() -> None:
    model = ir.from_onnx_text(CHAIN)
    assert run(Scramble(really=True), model).modified
    assert [node.name for node in model.graph] == ["add", "first", "second", "last"]


def test_large_weights_stay_outside_graphsurgeon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("graphopt.surgeon._KEPT_OUTSIDE", 8)
    model = ir.from_onnx_text(CHAIN)
    tensor = model.graph.initializers["w"].const_value
    run(Unnegate(), model)
    assert model.graph.initializers["w"].const_value is tensor


def test_external_weights_survive_a_surgeon_pass(tmp_path: Path) -> None:
    path = save_model(ir.from_onnx_text(CHAIN), tmp_path / "model.onnx", embed_limit=0)[0]
    model = load_model(path)
    wanted = Reference(path).run({"x": np.ones((2, 3), np.float32)})["y"]
    run(Unnegate(), model)
    np.testing.assert_array_equal(Reference(model).run({"x": np.ones((2, 3), np.float32)})["y"], wanted)


def four_bit(model: ir.Model) -> None:
    value = model.graph.initializers["w"]
    value.const_value = ir.PackedTensor(np.array([0x21, 3], np.uint8), ir.DataType.INT4, shape=ir.Shape([3]), name="w")
    value.type = ir.TensorType(ir.DataType.INT4)


def brain_float(model: ir.Model) -> None:
    model.graph[0].outputs[0].type = ir.TensorType(ir.DataType.BFLOAT16)


def annotated(model: ir.Model) -> None:
    model.graph[0].outputs[0].meta["quant_parameter_tensor_names"] = {"SCALE_TENSOR": "w"}


def sequence(model: ir.Model) -> None:
    model.graph[0].outputs[0].type = ir.SequenceType(ir.TensorType(ir.DataType.FLOAT))


def typed(model: ir.Model) -> None:
    value = ir.TypeAndShape(ir.TensorType(ir.DataType.FLOAT), ir.Shape([1]))
    model.graph[0].attributes["type"] = ir.AttrTypeProto("type", value)


def function(model: ir.Model) -> None:
    source = ir.val("x", ir.DataType.FLOAT, [2])
    node = ir.node("Neg", [source])
    graph = ir.Graph([source], node.outputs, nodes=[node], opset_imports={"": 17}, name="f")
    made = ir.Function("mine", "f", graph=graph, attributes=[])
    model.functions[made.identifier()] = made


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (four_bit, "holds INT4 in 'w'"),
        (brain_float, "holds BFLOAT16 in 'a'"),
        (annotated, "has a quantization annotation on 'a'"),
        (sequence, "holds a sequence or an optional in 'a'"),
        (typed, "has the attribute 'type' on 'add'"),
        (function, "has functions"),
    ],
)
def test_a_surgeon_pass_refuses_what_graphsurgeon_would_damage(spoil: Callable[[ir.Model], None], reason: str) -> None:
    model = ir.from_onnx_text(CHAIN)
    assert damage(model) is None
    spoil(model)
    with pytest.raises(PassError, match=reason) as caught:
        run(Unnegate(), model)
    assert str(caught.value).startswith("unnegate: ")
    assert "onnx_ir" in str(caught.value)


def test_a_surgeon_pass_says_so_where_graphsurgeon_recurses_too_deep() -> None:
    lines = "\n".join(f"v{i + 1} = Neg (v{i})" for i in range(3000))
    model = ir.from_onnx_text(f"{HEAD}g (float[1] v0) => (float[1] v3000) {{ {lines} }}")
    with pytest.raises(PassError, match="too deep for graphsurgeon"):
        run(Scramble(really=True), model)


def test_extract_cuts_a_part_that_computes_the_same() -> None:
    model = ir.from_onnx_text(CHAIN)
    before = model_bytes(model)
    part = extract(model, ["x"], ["b"])
    assert [node.name for node in part.graph] == ["add", "first"]
    assert part.graph.initializers["w"].const_value is model.graph.initializers["w"].const_value
    feed = {"x": np.ones((2, 3), np.float32)}
    np.testing.assert_array_equal(Reference(part).run(feed)["b"], [[-2, -3, -4]] * 2)
    assert model_bytes(model) == before


def test_extract_from_a_value_in_the_middle() -> None:
    part = extract(ir.from_onnx_text(CHAIN), ["b"], ["y"])
    assert [value.name for value in part.graph.inputs] == ["b"]
    assert list(part.graph.initializers) == []
    np.testing.assert_array_equal(Reference(part).run({"b": np.full((2, 3), -2, np.float32)})["y"], np.full((2, 3), 2))


def test_extract_without_names_takes_the_inputs_and_outputs_of_the_model() -> None:
    assert [value.name for value in extract(ir.from_onnx_text(CHAIN), [], ["a"]).graph.inputs] == ["x"]
    assert [value.name for value in extract(ir.from_onnx_text(CHAIN), ["c"], []).graph.outputs] == ["y"]
    assert [value.name for value in extract(ir.from_onnx_text(BRANCHES), [], ["z"]).graph.inputs] == ["x"]


def test_extract_follows_branches_and_keeps_the_order_of_weights() -> None:
    model = ir.from_onnx_text(BRANCHES)
    part = extract(model, ["c", "x"], ["y"])
    assert list(part.graph.initializers) == ["w", "v"]
    onnx.checker.check_model(ir.to_proto(part), full_check=True)
    feed = {"c": np.array(True), "x": np.ones(2, np.float32)}
    np.testing.assert_array_equal(Reference(part).run(feed)["y"], [6, 12])


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        (["xx"], ["y"], r"value 'xx': no such value in the main graph; did you mean 'x'\?"),
        (["x"], ["ad"], "value 'ad': no such value in the main graph"),
        (["b"], ["y", "a"], "extract: the part also needs x; name it among the inputs"),
        (["x", "x"], ["y"], "input 'x': named twice"),
        (["x"], ["x"], "output 'x': is not computed by the part"),
        (["x"], ["w"], "output 'w': is not computed by the part"),
    ],
)
def test_extract_says_what_is_wrong(inputs: list[str], outputs: list[str], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        extract(ir.from_onnx_text(CHAIN), inputs, outputs)


def test_extract_needs_the_type_of_a_custom_operator_declared() -> None:
    text = CHAIN.replace('["" : 17]', '["" : 17, "mine" : 1]').replace("Neg (a)", "mine.Twist (a)")
    with pytest.raises(ModelError, match="value 'b': its type cannot be inferred"):
        extract(ir.from_onnx_text(text), ["b"], ["y"])


def test_extract_names_an_input_that_only_a_branch_needs() -> None:
    with pytest.raises(ModelError, match="also needs x"):
        extract(ir.from_onnx_text(BRANCHES), ["c"], ["y"])
