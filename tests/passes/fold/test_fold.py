"""Constants, shapes, branches and clean-up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.model_io import model_bytes
from graphopt.testing import check_pass
from graphopt_passes.fold import Fold

GOLDEN = Path(__file__).parent.parent.parent.parent / "fixtures" / "golden"


@pytest.mark.parametrize("before", sorted(GOLDEN.glob("fold_*.before.onnxtxt")), ids=lambda path: path.stem)
def test_fold_writes_the_golden_text(bench: Any, before: Path) -> None:
    model = ir.from_onnx_text(before.read_text("utf8"))
    bench.check(model)
    after = before.with_name(before.name.replace(".before.", ".after."))
    assert ir.to_onnx_text(model) + "\n" == after.read_text("utf8")


def test_fold_says_when_there_is_nothing_to_do(bench: Any) -> None:
    result = bench.check(bench.model("g (float[2,3] x) => (float[2,3] y) { y = Relu(x) }"))
    assert not result.modified
    assert result.changes == ()


def test_fold_reports_the_constants_it_drops(bench: Any) -> None:
    model = bench.model("g (float[2] x) => (float[2] y) <float[3] w = {1, 2, 3}> { y = Relu(x) }")
    result = bench.check(model)
    assert [change.action for change in result.changes] == ["dropped constants that nobody reads"]
    assert not model.graph.initializers


def test_fold_gives_the_same_bytes_twice(bench: Any) -> None:
    models = [bench.model(SHAPES_TEXT), bench.model(SHAPES_TEXT)]
    for model in models:
        bench.fold(model)
    assert model_bytes(models[0]) == model_bytes(models[1])


SHAPES_TEXT = """g (float[N,4,6] x) => (float[N,24] y) {
  zero = Constant <value_int = 0>()
  one = Constant <value_int = 1>()
  two = Constant <value_int = 2>()
  axis = Constant <value_ints = [0]>()
  s = Shape(x)
  n = Gather(s, zero)
  c = Gather(s, one)
  l = Gather(s, two)
  cl = Mul(c, l)
  n1 = Unsqueeze(n, axis)
  cl1 = Unsqueeze(cl, axis)
  target = Concat <axis = 0> (n1, cl1)
  y = Reshape(x, target)
}"""


def test_fold_settles_a_reshape_of_a_dynamic_batch(bench: Any) -> None:
    model = bench.model(SHAPES_TEXT)
    bench.check(model)
    assert bench.operators(model) == ["Reshape"]
    target = model.graph[0].inputs[1]
    assert target is not None and target.const_value is not None
    assert target.const_value.numpy().tolist() == [-1, 24]


def test_fold_copies_two_dynamic_dimensions_by_zero(bench: Any) -> None:
    model = bench.model(
        """g (float[N,T,24] x) => (float[N,T,4,6] y) {
          s = Shape <end = 2> (x)
          rest = Constant <value_ints = [4, 6]>()
          target = Concat <axis = 0> (s, rest)
          y = Reshape(x, target)
        }"""
    )
    bench.check(model)
    assert model.graph[0].inputs[1].const_value.numpy().tolist() == [0, 0, 4, 6]  # type: ignore[union-attr]


def test_fold_leaves_a_reshape_with_two_unknown_dimensions(bench: Any) -> None:
    model = bench.model(
        """g (float[N,T,4] x, float[N,T,2,2] z) => (float[M,K,2,2] y) {
          s = Shape <end = 2> (x)
          flipped = Constant <value_ints = [1, 0]>()
          t = Gather(s, flipped)
          rest = Constant <value_ints = [2, 2]>()
          target = Concat <axis = 0> (t, rest)
          y = Reshape(z, target)
        }"""
    )
    result = bench.check(model)
    assert "more than one dimension of its target is unknown" in str(bench.reasons(result))


def test_fold_reads_the_start_of_a_shape(bench: Any) -> None:
    """graphsurgeon's own shape folding takes `Shape <start = 1>` for the whole shape."""
    model = bench.model(
        "g (float[2,3,5] x) => (int64[2] y) { s = Shape <start = 1> (x) \n z = Identity(s) \n y = Neg(z) }"
    )
    bench.check(model)
    value = model.graph.initializers["y_constant"].const_value
    assert value is not None and value.numpy().tolist() == [-3, -5]


def test_fold_keeps_float_arithmetic_between_integer_casts(bench: Any) -> None:
    """graphsurgeon's cast elision turns a factor of 0.5 between integer casts into 0."""
    model = bench.model(
        """g (float[N,4,6] x) => (int64[3] y) {
          s = Shape(x)
          f = Cast <to = 1> (s)
          half = Constant <value_float = 0.5>()
          h = Mul(f, half)
          y = Cast <to = 7> (h)
        }"""
    )
    bench.check(model)
    assert bench.operators(model) == ["Shape", "Cast", "Mul", "Cast"]


def test_fold_does_not_freeze_random_numbers(bench: Any) -> None:
    model = bench.model(
        """g (float[2] x) => (float[2] y) {
          r = RandomNormal <shape = [2]> ()
          u = RandomUniformLike(r)
          z = Mul(r, u)
          y = Add(x, z)
        }"""
    )
    result = bench.fold(model)
    assert bench.operators(model) == ["RandomNormal", "RandomUniformLike", "Mul", "Add"]
    assert not result.modified


def test_fold_respects_the_size_limit(bench: Any) -> None:
    body = """g (float[64,64] x) => (float[64,64] y) {
      shape = Constant <value_ints = [64, 64]>()
      zeros = ConstantOfShape <value = float[1] {0.5}> (shape)
      y = Add(x, zeros)
    }"""
    small, large = bench.model(body), bench.model(body)
    result = bench.check(small, limit=1000)
    assert bench.operators(small) == ["ConstantOfShape", "Add"]
    assert "limit=1000" in bench.reasons(result)["zeros"]
    bench.check(large)
    assert bench.operators(large) == ["Add"]


def test_fold_transposes_a_weight_above_the_limit_because_nothing_grows(bench: Any) -> None:
    model = bench.model(
        "g (float[2,32] x, float[16,32] w) => (float[2,16] y) { t = Transpose <perm = [1,0]> (w) \n y = MatMul(x, t) }"
    )
    weight = np.random.default_rng(0).standard_normal((16, 32)).astype(np.float32)
    bench.check(bench.with_weights(model, w=weight), limit=0)
    assert bench.operators(model) == ["MatMul"]


@pytest.mark.parametrize(
    ("node", "shape"),
    [("t = Transpose <perm = [1,0]> (w)", (16, 32)), ("t = Transpose (w)", (16, 32)), ("t = Reshape(w, k)", (16, 32))],
)
def test_fold_moves_large_weights_only_when_they_are_written(
    bench: Any, monkeypatch: pytest.MonkeyPatch, node: str, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr("graphopt_passes.fold._large.LARGE", 100)
    constants = "int64[2] k = {32, 16}"
    model = bench.model(
        f"g (float[2,32] x, float[16,32] w) => (float[2,16] y) <{constants}> {{ {node} \n y = MatMul(x, t) }}"
    )
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    bench.check(bench.with_weights(model, w=weight), limit=0)
    assert bench.operators(model) == ["MatMul"]
    assert isinstance(model.graph.initializers["t"].const_value, ir.LazyTensor)


def test_fold_does_not_believe_sizes_left_from_a_fixed_batch(bench: Any) -> None:
    """A file whose batch was made dynamic by hand still says 1 for its intermediate values."""
    model = bench.model(
        """g (float[N,6] x) => (float[N,6] y, int64[2] z) <float[1,6] h> {
          h = Relu(x)
          s = Shape(h)
          z = Identity(s)
          y = Reshape(h, s)
        }"""
    )
    assert str(model.graph[0].outputs[0].shape) == "[1,6]"
    bench.check(model)
    assert "Shape" in bench.operators(model)


@pytest.mark.parametrize("name", ["digits_cnn", "digits_transformer"])
def test_fold_fulfils_the_contract_of_a_pass(fixtures: Path, name: str) -> None:
    result = check_pass(Fold(), fixtures / name / "model.onnx")
    assert result.modified


def test_fold_leaves_quantization_of_constants_alone(bench: Any) -> None:
    model = bench.model(
        """g (float[2,4] x) => (float[2,4] y)
        <int8[4] w = {1,2,3,4}, float s = {0.5}, int8 z = {0}> {
          d = DequantizeLinear(w, s, z)
          y = Add(x, d)
        }"""
    )
    result = bench.check(model)
    assert not result.modified
    assert "runtimes fuse" in bench.reasons(result)["d"]


def test_fold_leaves_four_bit_constants_alone(bench: Any) -> None:
    model = bench.model(
        "g (float[4] x) => (float[4] y) { d = Cast <to = 1> (w) \n y = Add(x, d) }".replace(
            "(float[4] x)", "(float[4] x, float[4] w)"
        ),
        '<ir_version: 10, opset_import: ["" : 21]>\n',
    )
    value = next(v for v in model.graph.inputs if v.name == "w")
    model.graph.inputs.remove(value)
    packed = ir.PackedTensor(np.array([0x21, 0x43], np.uint8), ir.DataType.INT4, shape=ir.Shape([4]), name="w")
    value.const_value, value.type = packed, ir.TensorType(ir.DataType.INT4)
    model.graph.register_initializer(value)
    result = bench.check(model)
    assert not result.modified
    assert "INT4" in bench.reasons(result)["d"]


def test_fold_keeps_constants_that_a_caller_may_replace(bench: Any) -> None:
    model = bench.model("g (float[2] x, float[2] b) => (float[2] y) { n = Neg(b) \n y = Add(x, n) }")
    value = next(v for v in model.graph.inputs if v.name == "b")
    value.const_value = ir.Tensor(np.ones(2, np.float32), name="b")
    model.graph.register_initializer(value)
    assert not bench.fold(model).modified


def test_fold_keeps_a_constant_output_the_output_of_a_node(bench: Any) -> None:
    model = bench.model(
        "g (float[2] x) => (float[2] y, float[2] c) <float[2] w = {1, 2}> { y = Relu(x) \n c = Neg(w) }"
    )
    bench.check(model)
    assert bench.operators(model) == ["Relu", "Identity"]


@pytest.mark.parametrize(
    ("node", "extra"),
    [
        ("y = Identity(h)", ""),
        ("y = Dropout(h)", ""),
        ("y = Cast <to = 1> (h)", ""),
        ("y = Transpose <perm = [0, 1]> (h)", ""),
        ("y = Flatten <axis = 1> (h)", ""),
        ("y = Concat <axis = 0> (h)", ""),
        ("y = Reshape(h, t)", "int64[2] t = {-1, 6}"),
        ("y = Reshape(h, t)", "int64[2] t = {0, -1}"),
        ("y = Expand(h, t)", "int64[2] t = {1, 1}"),
        ("y = Tile(h, t)", "int64[2] t = {1, 1}"),
        ("y = Pad(h, t)", "int64[4] t = {0, 0, 0, 0}"),
        ("y = Slice(h, a, b)", "int64[1] a = {0}, int64[1] b = {9223372036854775807}"),
        ("y = Add(h, t)", "float t = {0}"),
        ("y = Mul(t, h)", "float[1] t = {1}"),
        ("y = Div(h, t)", "float t = {1}"),
        ("y = Sub(h, t)", "float t = {0}"),
    ],
)
def test_fold_removes_what_changes_nothing(bench: Any, node: str, extra: str) -> None:
    model = bench.model(f"g (float[N,6] x) => (float[N,6] y) <{extra}> {{ h = Relu(x) \n {node} }}".replace("<>", ""))
    bench.check(model)
    assert bench.operators(model) == ["Relu"]


@pytest.mark.parametrize(
    ("node", "extra"),
    [
        ("y = Sub(t, h)", "float t = {0}"),
        ("y = Mul(h, t)", "float[1,1,1] t = {1}"),
        ("y = Slice(h, a, b)", "int64[1] a = {0}, int64[1] b = {1}"),
        ("y = Slice(h, a, b, c, d)", "int64[1] a = {-1}, int64[1] b = {-100}, int64[1] c = {0}, int64[1] d = {-1}"),
        ("y = Tile(h, t)", "int64[2] t = {1, 2}"),
        ("y = Reshape(h, t)", "int64[2] t = {6, -1}"),
        ("y = Expand(h, t)", "int64[3] t = {1, 1, 1}"),
        ("y = Dropout(h, r, t)", "float r = {0.5}, bool t = {1}"),
    ],
)
def test_fold_keeps_what_changes_something(bench: Any, node: str, extra: str) -> None:
    model = bench.model(f"g (float[N,6] x) => (float y) <{extra}> {{ h = Relu(x) \n {node} }}")
    model.graph.outputs[0].shape = None
    bench.fold(model)
    assert len(model.graph) == 2


def test_fold_never_joins_an_input_to_an_output(bench: Any) -> None:
    model = bench.model(
        "g (float[2] x) => (float[2] y, float[2] a, float[2] b) { y = Identity(x) \n a = Relu(x) \n b = Identity(a) }"
    )
    result = bench.check(model)
    assert not result.modified
    assert "straight to an output" in bench.reasons(result)["y"]
    assert "an output already" in bench.reasons(result)["b"]


def test_fold_merges_transposes_and_duplicates(bench: Any) -> None:
    model = bench.model(
        """g (float[2,3,4] x) => (float[4,3,2] y, float[2,3,4] z) {
          a = Transpose <perm = [1, 2, 0]> (x)
          y = Transpose <perm = [1, 0, 2]> (a)
          r = Relu(x)
          q = Relu(x)
          z = Add(r, q)
        }"""
    )
    bench.check(model)
    assert bench.operators(model) == ["Transpose", "Relu", "Add"]


def test_fold_takes_the_branch_that_is_always_taken(bench: Any) -> None:
    model = bench.model(
        """g (float[2] x) => (float[2] y) <bool c = {1}> {
          y = If (c) <
            then_branch = t () => (float[2] u) { k = Constant <value = float[2] {1, 2}> () \n u = Add(x, k) },
            else_branch = e () => (float[2] v) { v = Neg(x) }
          >
        }"""
    )
    bench.check(model)
    assert bench.operators(model) == ["Add"]


def test_fold_works_inside_branches_that_share_names(bench: Any) -> None:
    """Two branches may use one name for different things, so what is known of the name is known of neither."""
    model = bench.model(
        """g (bool c, float[2,3] x) => (float y) {
          y = If (c) <
            then_branch = t () => (float[2,3] r) {
              s = Shape(x) \n f = Cast <to = 1> (x) \n r = Relu(f)
            },
            else_branch = e () => (float[3,2] r) {
              f = Transpose <perm = [1, 0]> (x) \n s = Shape(f) \n r = Reshape(x, s)
            }
          >
        }"""
    )
    model.graph.outputs[0].shape = None
    bench.check(model)


def test_fold_does_not_trust_shapes_inside_a_loop(bench: Any) -> None:
    model = bench.model(
        """g (float[1] x) => (float y) <int64 n = {3}, bool go = {1}> {
          y = Loop (n, go, x) <body = b (int64 i, bool c, float[1] h) => (bool d, float k) {
            d = Identity(c)
            s = Shape(h)
            f = Cast <to = 1> (s)
            m = Add(h, f)
            k = Concat <axis = 0> (h, m)
          }>
        }"""
    )
    model.graph.outputs[0].shape = None
    body = model.graph[0].attributes["body"].as_graph()
    bench.fold(model)
    assert [node.op_type for node in body] == ["Identity", "Shape", "Cast", "Add", "Concat"]
