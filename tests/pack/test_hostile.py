"""Containers made to harm, and models with what a container cannot hold, are refused before anything is written."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from packed_models import parts, save, weights, whole

from graphopt.errors import ModelError, UsageError, WriteError
from graphopt.pack import array, pack, unpack, writer
from graphopt.pack.decoder import Container, ContainerError

Change = Callable[[Any], object]


def changed(folder: Path, change: Change) -> Path:
    """A container with another index, and checksums that fit."""
    model = save(folder / "model.onnx", external=True)
    pack(model, folder / "model.gopt")
    index, blocks = parts((folder / "model.gopt").read_bytes())
    change(index)
    (folder / "changed.gopt").write_bytes(whole(index, blocks))
    return folder / "changed.gopt"


def model_of(path: Path, *tensors: TensorProto) -> Path:
    path.write_bytes(helper.make_model(helper.make_graph([], "g", [], [], tensors)).SerializeToString())
    return path


def outside(name: str, dtype: int, count: int, **place: str) -> TensorProto:
    """A tensor whose elements lie in another file."""
    tensor = TensorProto(name=name, data_type=dtype, dims=(count,), data_location=TensorProto.EXTERNAL)
    for key, value in place.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/x", "a/../../x", "..", "a\\..\\x", "C:x", "x\0y", "a//b", "./a", "", "a\n", "\ud800", "a" * 256],
)
def test_a_file_outside_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    path = changed(tmp_path, lambda index: index["files"][1].__setitem__(0, name))
    with pytest.raises(ModelError, match="would lie outside the folder"):
        unpack(path, tmp_path / "deep" / "unpacked")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["changed.gopt", "model.gopt", "model.onnx", "model.onnx.data"]
    )


def test_a_file_that_is_a_folder_as_well_is_refused(tmp_path: Path) -> None:
    path = changed(tmp_path, lambda index: index["files"][1].__setitem__(0, "model.onnx/data"))
    with pytest.raises(ModelError, match="a file is a folder as well"):
        unpack(path, tmp_path / "unpacked")


def test_a_shape_of_many_large_numbers_is_refused_at_once(tmp_path: Path) -> None:
    """Their product alone would take minutes."""
    view = ["view", 1, [1 << 61] * 100_000, 0, 0, 4]
    path = changed(tmp_path, lambda index: index["views"].append(view))
    begin = time.monotonic()
    with pytest.raises(ModelError, match="'view' has too many axes"):
        array(path, "small")
    assert time.monotonic() - begin < 5


def test_few_bytes_that_claim_to_be_more_than_memory_are_refused(tmp_path: Path) -> None:
    """A thousand blocks of one value are a container of kilobytes; they are counted before one is decoded."""
    resource = pytest.importorskip("resource")
    pack(model_of(tmp_path / "model.onnx", numpy_helper.from_array(np.zeros(1 << 20), "w")), tmp_path / "model.gopt")
    index, blocks = parts((tmp_path / "model.gopt").read_bytes())
    (tensor,), (file,) = index["tensors"], index["files"]
    block, times, rest = tensor[7][0], 4000, sum(part[2] for part in file[3])
    file[1] += tensor[5] * (times - 1)
    tensor[2], tensor[5], tensor[7] = [times << 20], tensor[5] * times, [block] * times
    path = tmp_path / "claims.gopt"
    path.write_bytes(whole(index, blocks[:rest] + blocks[rest:] * times))
    assert path.stat().st_size < 200_000
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 34, before[1]))
    try:
        with pytest.raises(ModelError, match="'w' has 33554432000 bytes, more than memory holds"):
            array(path, "w")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_threads_may_share_a_container(tmp_path: Path) -> None:
    pack(save(tmp_path / "model.onnx", external=True), tmp_path / "model.gopt")
    expected, wrong = weights(), list[str]()

    def read(opened: Container, seed: int) -> None:
        for name in np.random.default_rng(seed).choice(list(expected), 60):
            try:
                if not np.array_equal(opened.array(name), expected[name]):
                    wrong.append(name)
            except ContainerError as e:
                wrong.append(str(e))

    with Container(tmp_path / "model.gopt") as opened:
        threads = [threading.Thread(target=read, args=(opened, seed)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_nothing_is_replaced_where_a_folder_stands_in_the_way(tmp_path: Path) -> None:
    pack(save(tmp_path / "model.onnx", external=True), tmp_path / "model.gopt")
    (tmp_path / "out" / "model.onnx.data").mkdir(parents=True)
    (tmp_path / "out" / "model.onnx").write_text("something of somebody")
    with pytest.raises(WriteError, match="is a directory"):
        unpack(tmp_path / "model.gopt", tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx").read_text() == "something of somebody"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.onnx", "model.onnx.data"]


@pytest.mark.parametrize("name", ["a:b.onnx", "a\\b.onnx", "a\n.onnx"])
def test_a_model_with_a_name_that_cannot_be_unpacked_is_not_packed(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match="has a name that not every system knows; rename it"):
        pack(save(tmp_path / name), tmp_path / "model.gopt")
    assert not (tmp_path / "model.gopt").exists()


def test_a_data_file_may_be_spelled_with_a_dot(tmp_path: Path) -> None:
    model = save(tmp_path / "model.onnx", external=True)
    proto = onnx.load(model, load_external_data=False)
    for tensor in proto.graph.initializer[::2]:
        for entry in tensor.external_data:
            entry.value = f"./{entry.value}" if entry.key == "location" else entry.value
    onnx.save(proto, model)
    assert pack(model, tmp_path / "model.gopt").files == ("model.onnx", "model.onnx.data")
    for path in unpack(tmp_path / "model.gopt", tmp_path / "unpacked"):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


@pytest.mark.parametrize("location", ["a/../w.bin", "/w.bin", "../w.bin"])
def test_a_data_file_that_is_reached_from_elsewhere_is_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(400))
    (tmp_path / "a").mkdir()
    with pytest.raises(ModelError, match="lies outside the model's folder"):
        pack(model_of(tmp_path / "model.onnx", outside("w", 1, 100, location=location)), tmp_path / "model.gopt")


@pytest.mark.parametrize(
    "tensor",
    [
        outside("w", 99, 100, location="w.bin"),
        outside("w", 1, 100, location="w.bin", length="1000"),
        outside("w", 1, 100, location="w.bin", offset="somewhere"),
    ],
    ids=["type", "length", "offset"],
)
def test_a_data_file_is_packed_even_if_a_tensor_in_it_is_not_understood(tmp_path: Path, tensor: TensorProto) -> None:
    (tmp_path / "w.bin").write_bytes(np.random.default_rng(0).bytes(1000))
    report = pack(model_of(tmp_path / "model.onnx", tensor), tmp_path / "model.gopt")
    assert report.files == ("model.onnx", "w.bin")
    _, data = unpack(tmp_path / "model.gopt", tmp_path / "unpacked")
    assert data.read_bytes() == (tmp_path / "w.bin").read_bytes()


def test_a_tensor_of_more_axes_than_numpy_has_comes_back_with_its_file(tmp_path: Path) -> None:
    tensor = numpy_helper.from_array(np.arange(300, dtype=np.float32), "w")
    tensor.dims[:] = [1] * 70 + [300]
    model = model_of(tmp_path / "model.onnx", tensor)
    assert pack(model, tmp_path / "model.gopt").tensors == ()
    assert unpack(tmp_path / "model.gopt", tmp_path / "unpacked")[0].read_bytes() == model.read_bytes()


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_a_container_replaces_no_file_of_its_model(tmp_path: Path, name: str) -> None:
    model = save(tmp_path / "model.onnx", external=True)
    before = (tmp_path / name).read_bytes()
    with pytest.raises(UsageError, match="is a file of the model; choose another file"):
        pack(model, tmp_path / name)
    assert (tmp_path / name).read_bytes() == before


def test_more_tensors_than_an_index_lists_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "INDEX", 100)
    with pytest.raises(ModelError, match="has more tensors than a container lists"):
        pack(save(tmp_path / "model.onnx"), tmp_path / "model.gopt")
    assert not (tmp_path / "model.gopt").exists()
