"""Models on disk: what is kept on the way in and out, and what is refused with one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.errors import ExitCode, ModelError, UsageError, WriteError
from graphopt.model_io import (
    InputSpec,
    ShapeBinding,
    check_binding,
    external_files,
    input_specs,
    load_model,
    model_bytes,
    model_digest,
    model_files,
    save_model,
    weight_bytes,
)
from graphopt.reference import Reference

FEED = {"x": np.arange(8, dtype=np.float32).reshape(2, 4)}


def linear(weight: np.ndarray | None = None, **model_options: object) -> onnx.ModelProto:
    """x [batch, 4] times a weight [4, 300], plus a bias."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4, 300), np.float32) if weight is None else weight
    bias = rng.standard_normal(300, np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "weight"], ["p"], "mul"),
            helper.make_node("Add", ["p", "bias"], ["y"], "add"),
        ],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 300])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")],
        doc_string="kept",
    )
    options = {"opset_imports": [helper.make_opsetid("", 17)], "ir_version": 8, **model_options}
    return helper.make_model(graph, **options)


def save_external(folder: Path, proto: onnx.ModelProto | None = None) -> Path:
    path = folder / "model.onnx"
    onnx.save(proto or linear(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(path)
    assert caught.value.exit_code == ExitCode.USAGE
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- kept


def test_a_model_survives_loading_and_saving(tmp_path: Path) -> None:
    onnx.save(linear(), tmp_path / "a.onnx")
    model = load_model(tmp_path / "a.onnx")
    assert save_model(model, tmp_path / "b.onnx") == (tmp_path / "b.onnx",)
    again = onnx.load(tmp_path / "b.onnx")
    onnx.checker.check_model(again)
    assert again.graph.doc_string == "kept"
    assert [node.name for node in again.graph.node] == ["mul", "add"]
    before, after = (Reference(tmp_path / f"{name}.onnx").run(FEED)["y"] for name in "ab")
    assert np.array_equal(before, after)


def test_saving_twice_gives_the_same_bytes(fixtures: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_model(load_model(fixtures / "digits_transformer" / "model.onnx"), tmp_path / f"{name}.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_external_weights_stay_on_disk_and_can_be_embedded(tmp_path: Path) -> None:
    model = load_model(save_external(tmp_path))
    weight = model.graph.initializers["weight"].const_value
    assert isinstance(weight, ir.ExternalTensor)
    assert weight.raw is None, "the check for NaN must let go of its memory map"
    assert external_files(model) == (tmp_path / "weights.bin",)
    (tmp_path / "out").mkdir()
    save_model(model, tmp_path / "out" / "model.onnx")
    assert isinstance(model.graph.initializers["weight"].const_value, ir.ExternalTensor), "saving must not embed"
    embedded = Reference(tmp_path / "out" / "model.onnx").run(FEED)["y"]
    assert np.array_equal(embedded, Reference(tmp_path / "model.onnx").run(FEED)["y"])


def test_weights_above_the_limit_are_written_beside_the_model(tmp_path: Path) -> None:
    onnx.save(linear(), tmp_path / "a.onnx")
    model = load_model(tmp_path / "a.onnx")
    files = save_model(model, tmp_path / "b.onnx", embed_limit=1000)
    assert files == (tmp_path / "b.onnx", tmp_path / "b.onnx.data")
    assert all(file.is_file() for file in files)
    assert files[0].stat().st_size < weight_bytes(model)
    assert model_files(tmp_path / "b.onnx") == files
    outputs = [Reference(tmp_path / f"{name}.onnx").run(FEED)["y"] for name in "ab"]
    assert np.array_equal(*outputs)
    assert weight_bytes(load_model(tmp_path / "b.onnx")) == weight_bytes(model) == 4 * 300 * 5


def test_a_tensor_renamed_with_its_value_keeps_the_file_valid(tmp_path: Path) -> None:
    onnx.save(linear(), tmp_path / "a.onnx")
    model = load_model(tmp_path / "a.onnx")
    model.graph.initializers["weight"].name = "renamed"
    onnx.checker.check_model(onnx.ModelProto.FromString(model_bytes(model)))


def test_two_values_that_share_one_tensor_keep_their_own_names(tmp_path: Path) -> None:
    onnx.save(linear(), tmp_path / "a.onnx")
    model = load_model(tmp_path / "a.onnx")
    model.graph.initializers["bias"].const_value = shared = ir.tensor(np.ones(300, np.float32), name="shared")
    twin = ir.Value(name="twin", const_value=shared)
    model.graph.register_initializer(twin)
    proto = onnx.ModelProto.FromString(model_bytes(model))
    assert sorted(tensor.name for tensor in proto.graph.initializer) == ["bias", "twin", "weight"]


def test_weights_listed_among_the_inputs_become_constants_in_old_files(tmp_path: Path) -> None:
    proto = linear(opset_imports=[helper.make_opsetid("", 8)], ir_version=3)
    proto.graph.input.append(helper.make_tensor_value_info("weight", TensorProto.FLOAT, [4, 300]))
    proto.graph.input.append(helper.make_tensor_value_info("bias", TensorProto.FLOAT, [300]))
    onnx.save(proto, tmp_path / "old.onnx")
    model = load_model(tmp_path / "old.onnx")
    assert [value.name for value in model.graph.inputs] == ["x"]
    onnx.checker.check_model(onnx.ModelProto.FromString(model_bytes(model)))
    assert np.array_equal(Reference(model).run(FEED)["y"], Reference(tmp_path / "old.onnx").run(FEED)["y"])


def test_weights_that_callers_may_replace_stay_inputs_in_newer_files(tmp_path: Path) -> None:
    proto = linear()
    proto.graph.input.append(helper.make_tensor_value_info("bias", TensorProto.FLOAT, [300]))
    onnx.save(proto, tmp_path / "a.onnx")
    model = load_model(tmp_path / "a.onnx")
    assert [value.name for value in model.graph.inputs] == ["x", "bias"]
    assert [spec.name for spec in input_specs(model)] == ["x"]


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_infinities_pass(tmp_path: Path, value: float) -> None:
    onnx.save(linear(np.full((4, 300), value, np.float32)), tmp_path / "a.onnx")
    load_model(tmp_path / "a.onnx")


def test_external_tensors_of_constant_nodes_are_taken_in(tmp_path: Path) -> None:
    value = np.arange(4, dtype=np.float32)
    (tmp_path / "c.bin").write_bytes(value.tobytes())
    tensor = TensorProto(name="c", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="c.bin")
    graph = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=tensor), helper.make_node("Add", ["x", "c"], ["y"])],
        "constant",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "a.onnx").write_bytes(proto.SerializeToString())
    model = load_model(tmp_path / "a.onnx")
    assert model_files(tmp_path / "a.onnx") == (tmp_path / "a.onnx", tmp_path / "c.bin")
    assert np.array_equal(Reference(model).run(FEED)["y"], FEED["x"] + value)


# ---------------------------------------------------------------- refused


def _truncated(path: Path) -> None:
    content = linear().SerializeToString()
    path.write_bytes(content[: len(content) // 2])


def _sparse(path: Path) -> None:
    proto = linear()
    values = helper.make_tensor("values", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("indices", TensorProto.INT64, [1], [0])
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [3]))
    onnx.save(proto, path)


def _training(path: Path) -> None:
    proto = linear()
    proto.training_info.add()
    onnx.save(proto, path)


def _short_raw(path: Path) -> None:
    proto = linear()
    proto.graph.initializer[0].raw_data = proto.graph.initializer[0].raw_data[:100]
    onnx.save(proto, path)


def _no_opset(path: Path) -> None:
    proto = linear()
    del proto.opset_import[:]
    onnx.save(proto, path)


def _nan(path: Path) -> None:
    weight = np.zeros((4, 300), np.float32)
    weight[3, 299] = np.nan
    onnx.save(linear(weight), path)


def _nan_in_a_constant_node(path: Path) -> None:
    tensor = numpy_helper.from_array(np.array([0, np.nan], np.float32))
    graph = helper.make_graph(
        [helper.make_node("Constant", [], ["y"], "constant", value=tensor)],
        "constant",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
    )
    onnx.save(helper.make_model(graph), path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "no such file"),
        (Path.mkdir, "is a folder, not a model"),
        (lambda path: path.write_text("this is a text\n" * 50), "not an ONNX model, or cut short; export it again"),
        (lambda path: path.write_bytes(b""), "not an ONNX model, or an empty one; export it again"),
        (_truncated, "not an ONNX model, or cut short; export it again"),
        (_sparse, "holds sparse_initializer tensors, which would be lost; export dense weights"),
        (_training, "holds training_info, which would be lost; export it for inference"),
        (_no_opset, "does not say which opset it uses; check it with onnx.checker"),
        (_nan, "tensor 'weight': holds NaN; the training diverged; export a sound checkpoint"),
        (_nan_in_a_constant_node, "tensor of node 'constant': holds NaN"),
    ],
    ids=lambda value: getattr(value, "__name__", "") if callable(value) else None,
)
def test_a_model_that_cannot_be_used_is_refused(tmp_path: Path, write: Callable[[Path], object], message: str) -> None:
    path = tmp_path / "model.onnx"
    write(path)
    assert refusal(path).startswith(f"{path}: {message}")


def test_a_weight_shorter_than_its_shape_is_refused(tmp_path: Path) -> None:
    _short_raw(tmp_path / "model.onnx")
    assert "tensor 'weight': unreadable" in refusal(tmp_path / "model.onnx")


def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    assert "cannot be read: File name too long" in refusal(tmp_path / ("x" * 5000))


def test_a_lone_nan_in_a_constant_node_is_something_to_compare_with(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Constant", [], ["y"], value=numpy_helper.from_array(np.array(np.nan, np.float32)))],
        "constant",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])],
    )
    onnx.save(helper.make_model(graph), tmp_path / "a.onnx")
    load_model(tmp_path / "a.onnx")


def test_nan_in_external_and_16_bit_weights_is_found(tmp_path: Path) -> None:
    weight = np.zeros((4, 300), np.float32)
    weight[2, 2] = np.nan
    assert "tensor 'weight': holds NaN" in refusal(save_external(tmp_path, linear(weight)))
    proto = linear()
    proto.graph.initializer.append(numpy_helper.from_array(np.array([1, np.nan], np.float16), "half"))
    onnx.save(proto, tmp_path / "half.onnx")
    assert "tensor 'half': holds NaN" in refusal(tmp_path / "half.onnx")


def test_missing_weights_are_named_with_their_file(tmp_path: Path) -> None:
    path = save_external(tmp_path)
    (tmp_path / "weights.bin").unlink()
    message = refusal(path)
    assert message == f"{path}: tensor 'weight': its data file 'weights.bin' is missing; copy it beside the model"


def test_weights_cut_short_are_named_with_their_file(tmp_path: Path) -> None:
    path = save_external(tmp_path)
    os.truncate(tmp_path / "weights.bin", 4 * 300 * 4 - 1)
    message = refusal(path)
    assert message == f"{path}: tensor 'weight': its data file 'weights.bin' is cut short; copy it again"


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/hostname"])
def test_weights_outside_the_folder_of_the_model_are_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(10_000))
    (tmp_path / "models").mkdir()
    path = save_external(tmp_path / "models")
    proto = onnx.load(path, load_external_data=False)
    next(e for e in proto.graph.initializer[0].external_data if e.key == "location").value = location
    path.write_bytes(proto.SerializeToString())
    assert "lies outside the model's folder" in refusal(path)


def test_damaged_bytes_are_refused_or_read_but_never_crash(fixtures: Path, tmp_path: Path) -> None:
    content = (fixtures / "digits_transformer" / "model.onnx").read_bytes()
    rng = np.random.default_rng(0)
    path, refused = tmp_path / "model.onnx", 0
    for _ in range(60):
        damaged = bytearray(content)
        for at in rng.integers(0, len(damaged), 30):
            damaged[at] = rng.integers(0, 256)
        path.write_bytes(bytes(damaged))
        try:
            load_model(path)
        except ModelError:
            refused += 1
    assert refused > 0


def test_a_full_disk_is_a_write_error(tmp_path: Path) -> None:
    onnx.save(linear(), tmp_path / "a.onnx")
    with pytest.raises(WriteError) as caught:
        save_model(load_model(tmp_path / "a.onnx"), Path("/dev/full"))
    assert str(caught.value).startswith("/dev/full: No space left on device; free some space")
    assert caught.value.exit_code == ExitCode.CANNOT_WRITE


def test_a_folder_that_is_a_file_is_a_write_error(tmp_path: Path) -> None:
    onnx.save(linear(), tmp_path / "a.onnx")
    with pytest.raises(WriteError, match="Not a directory"):
        save_model(load_model(tmp_path / "a.onnx"), tmp_path / "a.onnx" / "b.onnx", embed_limit=0)


# ---------------------------------------------------------------- digests, inputs, shapes


def test_the_digest_covers_the_weights_beside_the_model(tmp_path: Path) -> None:
    path = save_external(tmp_path)
    first = model_digest(path)
    assert first == model_digest(path)
    content = bytearray((tmp_path / "weights.bin").read_bytes())
    content[-1] ^= 1
    (tmp_path / "weights.bin").write_bytes(bytes(content))
    assert model_digest(path) != first


def test_inputs_show_sizes_and_names_of_dimensions(fixtures: Path) -> None:
    specs = input_specs(load_model(fixtures / "digits_cnn" / "model.onnx"))
    assert [(spec.name, spec.dtype, spec.shape) for spec in specs] == [
        ("image", ir.DataType.FLOAT, ("batch", 1, 8, 8)),
    ]
    assert specs[0].rank == 4


SPEC = InputSpec("x", ir.DataType.FLOAT, ("batch", None, 4))


@pytest.mark.parametrize(
    ("binding", "bound", "concrete"),
    [
        (ShapeBinding(), ("batch", None, 4), (1, 1, 4)),
        (ShapeBinding(dims={"batch": 3}), (3, None, 4), (3, 1, 4)),
        (ShapeBinding(shapes={"x": (2, 5, 4)}), (2, 5, 4), (2, 5, 4)),
        (ShapeBinding(shapes={"z": (2, 5, 4)}, dims={"seq": 9}), ("batch", None, 4), (1, 1, 4)),
    ],
)
def test_a_binding_fixes_dimensions(
    binding: ShapeBinding, bound: tuple[int | str | None, ...], concrete: tuple[int, ...]
) -> None:
    assert SPEC.bound(binding) == bound
    assert SPEC.concrete(binding) == concrete


def test_a_binding_is_true_if_it_fixes_anything() -> None:
    assert not ShapeBinding()
    assert ShapeBinding(dims={"batch": 1})


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        (ShapeBinding(shapes={"w": (1,)}), "--shape w: the model has no such input; known: x"),
        (ShapeBinding(shapes={"x": (1, 4)}), "--shape x: 1x4 does not fit batchx?x4"),
        (ShapeBinding(shapes={"x": (1, 2, 5)}), "--shape x: 1x2x5 does not fit batchx?x4"),
        (ShapeBinding(dims={"batc": 1}), "--dim batc: no input has a dimension of that name; did you mean 'batch'?"),
    ],
)
def test_a_binding_that_does_not_fit_is_refused(binding: ShapeBinding, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_binding([SPEC], binding)
    assert str(caught.value) == message


def test_a_binding_that_fits_passes() -> None:
    check_binding([SPEC], ShapeBinding(shapes={"x": (2, 3, 4)}, dims={"batch": 2}))
    check_binding([InputSpec("x", ir.DataType.FLOAT, None)], ShapeBinding(shapes={"x": (7,)}))


def test_unnamed_nodes_are_named_after_what_they_compute(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    unnamed (float[2] x) => (float[2] y) { h = Relu(x) y = Neg(h) }
    """
    ir.save(ir.from_onnx_text(text), tmp_path / "m.onnx")
    assert [node.name for node in load_model(tmp_path / "m.onnx").graph] == ["h", "y"]
