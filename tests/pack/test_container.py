"""What is packed comes back to the byte, whatever it is."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from packed_models import container, mutant, outcome, save, weights

from graphopt.errors import ModelError, UsageError, WriteError
from graphopt.pack import Packed, array, pack, unpack
from graphopt.pack import decoder as decoding
from graphopt.pack.decoder import BLOCK, HEADER, MAGIC, Container


def packed(model: Path) -> tuple[Packed, Path]:
    out = model.with_suffix(".gopt")
    return pack(model, out), out


def assert_comes_back(model: Path, out: Path) -> None:
    for path in unpack(out, model.parent / "unpacked"):
        assert path.read_bytes() == (model.parent / path.name).read_bytes()


@pytest.mark.parametrize("external", [False, True])
def test_a_model_comes_back_to_the_byte(tmp_path: Path, external: bool) -> None:
    model = save(tmp_path / "model.onnx", external=external)
    report, out = packed(model)
    assert_comes_back(model, out)
    assert report.packed == out.stat().st_size
    assert report.bytes == sum((tmp_path / name).stat().st_size for name in report.files)
    assert len(report.files) == (2 if external else 1)


def test_every_coding_is_used_and_named(tmp_path: Path) -> None:
    report, _ = packed(save(tmp_path / "model.onnx"))
    codings = {row.name: row.coding for row in report.tensors}
    assert codings["clustered"] == "codebook waves"
    assert codings["sparse"].startswith("gaps ans rotated ")
    assert codings["plain"] == "rotated ans raw raw raw"
    assert codings["bytes"] == "signed ans"
    assert (codings["repeating"], codings["random"], codings["nibbles"]) == ("xz", "raw", "ans")


@pytest.mark.parametrize("native", [True, False])
def test_tensors_are_read_by_name(tmp_path: Path, native: bool) -> None:
    model = save(tmp_path / "model.onnx", external=True)
    with Container(packed(model)[1], native=native) as opened:
        for name, expected in weights().items():
            found = opened.array(name)
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected)
        held = numpy_helper.to_array(onnx.load(model).graph.node[0].attribute[0].t)
        np.testing.assert_array_equal(opened.array("held"), held)
        assert opened.array("nibbles").shape == (40, 30)
        assert opened.array("nibbles").max() < 16


def test_reading_one_tensor_leaves_the_others_alone(tmp_path: Path) -> None:
    _, out = packed(save(tmp_path / "model.onnx"))
    with Container(out) as opened:
        block = opened.tensors["sparse"].blocks[0]
    content = bytearray(out.read_bytes())
    content[block.position + 5] ^= 1
    out.write_bytes(content)
    np.testing.assert_array_equal(array(out, "clustered"), weights()["clustered"])
    with pytest.raises(ModelError, match="'sparse' is damaged"):
        array(out, "sparse")


def test_an_unknown_tensor_is_named_with_the_nearest(tmp_path: Path) -> None:
    _, out = packed(save(tmp_path / "model.onnx"))
    with pytest.raises(ModelError, match="has no tensor 'clusterd'; did you mean 'clustered'"):
        array(out, "clusterd")


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    model = save(tmp_path / "model.onnx")
    first = packed(model)[1].read_bytes()
    assert packed(model)[1].read_bytes() == first


def test_the_decoder_stands_alone(tmp_path: Path) -> None:
    model = save(tmp_path / "model.onnx", external=True)
    _, out = packed(model)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(decoding.__file__, alone / "decoder.py")
    program = (
        "import sys; sys.modules['constriction'] = None; sys.argv[0] = 'decoder.py'\n"
        "import decoder; decoder.main(); assert not decoder.has_native()\n"
        "assert not [name for name in sys.modules if name.startswith(('graphopt', 'onnx'))]"
    )
    command = [sys.executable, "-c", program, str(out), "-o", str(alone / "model")]
    subprocess.run(command, cwd=alone, check=True, capture_output=True)
    for name in ("model.onnx", "model.onnx.data"):
        assert (alone / "model" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_tensors_of_all_types_and_odd_shapes_come_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = []
    for kind, bits in decoding.BITS.items():
        for dims in ((), (0, 3), (7,), (511, 3), (5, 3, 11), (16, 3, 3, 3), (3, 1, 1, 211)):
            size = -(-int(np.prod(dims)) * bits // 8)
            few = rng.integers(0, 256, (4, 16)).astype(np.uint8).tobytes()
            raw = (few * (size // 64 + 1))[:size] if rng.random() < 0.3 else rng.bytes(size)
            tensors.append(TensorProto(name=f"{kind}x{len(dims)}", data_type=kind, dims=dims, raw_data=raw))
    model = helper.make_model(helper.make_graph([], "g", [], [], tensors))
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    _, out = packed(path)
    assert_comes_back(path, out)
    with Container(out) as opened:
        for name, tensor in opened.tensors.items():
            assert opened.array(name).shape == tensor.dims


def test_weights_as_typed_fields_in_subgraphs_and_without_names_come_back(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=400)
    typed = helper.make_tensor("typed", TensorProto.FLOAT, (20, 20), values.tolist())
    double = helper.make_tensor("", TensorProto.DOUBLE, (400,), values.tolist())
    same = numpy_helper.from_array(values.astype(np.float32), "same")
    inner = helper.make_graph([], "inner", [], [], [same, double, double])
    branch = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    model = helper.make_model(helper.make_graph([branch], "g", [], [], [typed, same]))
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    _, out = packed(path)
    assert_comes_back(path, out)
    with Container(out) as opened:
        assert {"typed", "same", "same#2", "same#3", "y", "y#2"} <= set(opened.tensors)
        np.testing.assert_array_equal(opened.array("same#3"), values.astype(np.float32))


def test_text_empty_and_sparse_tensors_and_those_without_names_come_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = numpy_helper.from_array(rng.normal(size=300).astype(np.float32), "")
    places = numpy_helper.from_array(np.sort(rng.choice(10_000, 300, replace=False)), "")
    sparse = helper.make_sparse_tensor(values, places, (100, 100))
    words = [f"token {i}".encode() for i in range(400)]
    text = TensorProto(name="text", data_type=TensorProto.STRING, dims=(400,), string_data=words)
    empty = numpy_helper.from_array(np.zeros((0, 5), np.float32), "empty")
    graph = helper.make_graph([], "", [], [], [text, empty, values, values], sparse_initializer=[sparse])
    path = tmp_path / "model.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    report, out = packed(path)
    assert_comes_back(path, out)
    assert {row.name for row in report.tensors} == {"tensor", "tensor#2", "tensor#3", "tensor#4"}
    assert array(out, "empty").shape == (0, 5)


def test_no_tensor_takes_more_than_its_bytes(tmp_path: Path) -> None:
    """Small ones, and such with as many values as elements, are where tables cost more than they save."""
    rng = np.random.default_rng(0)
    tensors = []
    for kind in ("<f4", "<f2", "<f8", "<i4", "<u2", "u1"):
        for size in (520, 700, 1100, 2300):
            count = size // np.dtype(kind).itemsize
            for spread in (count, 200, 50):
                numbers = rng.integers(0, 256, (spread, np.dtype(kind).itemsize)).astype(np.uint8)
                raw = numbers[rng.integers(spread, size=count)].tobytes()
                dtype = {"<f4": 1, "<f2": 10, "<f8": 11, "<i4": 6, "<u2": 4, "u1": 2}[kind]
                tensors.append(TensorProto(name=f"{kind}{size}_{spread}", data_type=dtype, dims=(count,), raw_data=raw))
    path = tmp_path / "model.onnx"
    path.write_bytes(helper.make_model(helper.make_graph([], "g", [], [], tensors)).SerializeToString())
    report, out = packed(path)
    assert len(report.tensors) == 72
    assert [row.name for row in report.tensors if row.packed > row.bytes + 3] == []
    assert_comes_back(path, out)


def test_indices_into_a_codebook_run_as_before(tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    rng = np.random.default_rng(0)
    book, indices = rng.normal(size=16).astype(np.float32), rng.binomial(15, 0.4, (64, 64)).astype(np.uint8)
    nibbles = (indices.reshape(-1)[::2] | indices.reshape(-1)[1::2] << 4).tobytes()
    nodes = [
        helper.make_node("Cast", ["indices"], ["places"], to=TensorProto.INT32),
        helper.make_node("Gather", ["book", "places"], ["weight"]),
        helper.make_node("MatMul", ["x", "weight"], ["y"]),
    ]
    stored = helper.make_tensor("indices", TensorProto.UINT4, (64, 64), nibbles, raw=True)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, (3, 64)) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], [stored, numpy_helper.from_array(book, "book")])
    path = tmp_path / "model.onnx"
    opset = helper.make_opsetid("", 21)
    path.write_bytes(helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString())
    _, out = packed(path)
    (unpacked,) = unpack(out, tmp_path / "unpacked")
    sessions = [ort.InferenceSession(str(p), providers=["CPUExecutionProvider"]) for p in (path, unpacked)]
    for seed in range(4):
        sample = np.random.default_rng(seed).normal(size=(3, 64)).astype(np.float32)
        before, after = (session.run(None, {"x": sample})[0] for session in sessions)
        np.testing.assert_array_equal(after, before)
        np.testing.assert_allclose(after, sample @ book[indices], rtol=1e-4, atol=1e-4)


def test_tensors_that_share_bytes_are_packed_once(tmp_path: Path) -> None:
    shared = np.random.default_rng(0).normal(size=(64, 64)).astype("<f4")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "w.bin").write_bytes(b"head" + shared.tobytes() + b"tail")
    tensors = []
    for name, dims, offset in (("whole", (64, 64), 4), ("again", (4096,), 4), ("part", (32, 64), 4 + 32 * 256)):
        tensor = TensorProto(name=name, data_type=1, dims=dims, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", "data/w.bin"), ("offset", offset), ("length", int(np.prod(dims)) * 4)):
            tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
    path = tmp_path / "model.onnx"
    path.write_bytes(helper.make_model(helper.make_graph([], "g", [], [], tensors)).SerializeToString())
    report, out = packed(path)
    assert len(report.tensors) == 1
    files = unpack(out, tmp_path / "unpacked")
    assert files[1].read_bytes() == (tmp_path / "data" / "w.bin").read_bytes()
    np.testing.assert_array_equal(array(out, "part"), shared[32:])
    np.testing.assert_array_equal(array(out, "again"), shared.reshape(-1))


def test_a_tensor_above_one_block_is_cut_between_its_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    large = numpy_helper.from_array(rng.integers(0, 4, (3000, 700)).astype(np.uint8), "large")
    row = numpy_helper.from_array(rng.integers(0, 4, (1, BLOCK + 5)).astype(np.uint8), "row")
    path = tmp_path / "model.onnx"
    path.write_bytes(helper.make_model(helper.make_graph([], "g", [], [], [large, row])).SerializeToString())
    _, out = packed(path)
    assert_comes_back(path, out)
    with Container(out) as opened:
        sizes = [block.elements for block in opened.tensors["large"].blocks]
        assert max(sizes) <= BLOCK
        assert all(size % 700 == 0 for size in sizes)
        assert len(opened.tensors["row"].blocks) == 2


def test_clustered_weights_take_less_than_their_entropy(tmp_path: Path) -> None:
    """Contexts see that large weights stand beside large ones."""
    report, _ = packed(save(tmp_path / "model.onnx"))
    row = next(row for row in report.tensors if row.name == "clustered")
    _, counts = np.unique(weights()["clustered"], return_counts=True)
    entropy = -(counts * np.log2(counts / counts.sum())).sum() / 8
    assert row.packed < entropy


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "is cut short"),
        (lambda content: content[:30], "is cut short"),
        (lambda content: content + b"\0", "is longer than it was"),
        (lambda content: b"PK" + content[2:], "is not a packed model"),
        (lambda content: content[:8] + b"\2\0" + content[10:], "has version 2 of the format"),
        (lambda content: content[:50] + b"\0" + content[51:], "its index is damaged"),
        (lambda content: content[:-9] + b"\0\0" + content[-7:], "is damaged"),
        (lambda content: b"", "is not a packed model"),
    ],
)
def test_damage_is_refused_and_nothing_is_written(tmp_path: Path, damage, message: str) -> None:
    _, out = packed(save(tmp_path / "model.onnx"))
    out.write_bytes(damage(out.read_bytes()))
    with pytest.raises(ModelError, match=message):
        unpack(out, tmp_path / "unpacked")
    assert not (tmp_path / "unpacked").exists()


def test_mutants_are_refused_or_right(tmp_path: Path) -> None:
    originals = [container(tmp_path / str(seed), seed) for seed in range(2)]
    found = set()
    for seed in range(300):
        content, files = originals[seed % 2]
        damaged = mutant(content, np.random.default_rng(seed))
        found.add(outcome(damaged, files, tmp_path / "mutant", native=seed % 4 < 2))
    assert found == {"refused", "right"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"no model at all", "is not an ONNX model"),
        (HEADER.pack(MAGIC, *[0] * 7), "is packed already"),
        (None, "does not exist"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        pack(tmp_path / "model.onnx", tmp_path / "model.gopt")
    assert not (tmp_path / "model.gopt").exists()


def test_a_cut_data_file_and_one_outside_are_refused(tmp_path: Path) -> None:
    model = save(tmp_path / "model.onnx", external=True)
    data = tmp_path / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(ModelError, match="is cut short"):
        packed(model)
    model.write_bytes(model.read_bytes().replace(b"model.onnx.data", b"../../etc/thing"))
    with pytest.raises(ModelError, match="lies outside the model's folder"):
        packed(model)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no model\.onnx; name an ONNX file"):
        pack(tmp_path, tmp_path / "model.gopt")


def test_a_file_that_cannot_grow_leaves_what_was_there(tmp_path: Path) -> None:
    """A limit on the size of files fails in the middle of writing, as a full disk does."""
    resource = pytest.importorskip("resource")
    model = save(tmp_path / "model.onnx")
    _, out = packed(model)
    before = out.read_bytes()
    (tmp_path / "half").mkdir()
    program = (
        "import resource, sys; from graphopt.errors import WriteError; from graphopt.pack import pack, unpack\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))\n"
        "for act, args in ((pack, sys.argv[1:3]), (unpack, sys.argv[2:4]), (unpack, (sys.argv[2], sys.argv[4]))):\n"
        "    try: act(*args); sys.exit('was written')\n"
        "    except WriteError as e: print(e)\n"
    )
    paths = [str(path) for path in (model, out, tmp_path / "new", tmp_path / "half")]
    done = subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, text=True, check=True)
    assert done.stdout.count("file too large") == 3
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    assert out.read_bytes() == before
    assert not (tmp_path / "new").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half", "model.gopt", "model.onnx"]
    assert not list((tmp_path / "half").iterdir())


def test_without_the_coder_packing_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.pack.writer.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs the package constriction; install it with pip install"):
        packed(save(tmp_path / "model.onnx"))


def test_a_container_that_does_not_fit_on_the_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, out = packed(save(tmp_path / "model.onnx"))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(WriteError, match="no space left"):
        unpack(out, tmp_path / "unpacked")
    assert not (tmp_path / "unpacked").exists()
