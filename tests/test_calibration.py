"""Calibration and evaluation data: every layout that is read, and every way in which data does not fit."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.calibration import Dataset, open_calibration, open_evaluation
from graphopt.errors import DataError, ExitCode
from graphopt.model_io import InputSpec, ShapeBinding

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
IMAGE = InputSpec("image", FLOAT, ("batch", 1, 4, 4))
WIDE = InputSpec("image", FLOAT, ("batch", 1, 4, 16))
FREE = ShapeBinding()


def images(count: int = 6, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    return np.arange(count * 16).reshape(count, 1, 4, 4).astype(dtype)


@pytest.fixture
def npz(tmp_path: Path) -> Callable[..., str]:
    def save(**arrays: Any) -> str:
        path = tmp_path / "data.npz"
        np.savez(path, **{name.replace("__", "."): array for name, array in arrays.items()})
        return str(path)

    return save


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Write a module of the user's, importable from the working directory; returns its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    written: list[str] = []

    def write(source: str) -> str:
        name = f"users_module_{tmp_path.name}_{len(written)}".replace("-", "_").replace("[", "_").replace("]", "_")
        (tmp_path / f"{name}.py").write_text(source)
        written.append(name)
        return name

    yield write
    for name in written:
        sys.modules.pop(name, None)


# ---------------------------------------------------------------- what is read


def test_samples_stacked_on_the_first_axis_are_read_one_by_one(npz: Callable[..., str]) -> None:
    data = open_calibration(npz(image=images()), [IMAGE], FREE)
    feeds = list(data.feeds())
    assert [feed["image"].shape for feed in feeds] == [(1, 1, 4, 4)] * 6
    assert np.array_equal(np.concatenate([feed["image"] for feed in feeds]), images())
    assert data.stacked


def test_data_can_be_read_again_and_cut_short(npz: Callable[..., str]) -> None:
    data = open_calibration(npz(image=images()), [IMAGE], FREE)
    assert len(list(data.feeds(2))) == 2
    assert len(list(data.feeds())) == 6
    assert len(list(data.feeds(100))) == 6
    assert list(data.feeds(0)) == []


def test_stacked_samples_are_joined_into_batches(npz: Callable[..., str]) -> None:
    data = open_calibration(npz(image=images()), [IMAGE], FREE)
    assert [len(batch["image"]) for batch in data.batches(4)] == [4, 2]
    assert [len(batch["image"]) for batch in data.batches(4, limit=5)] == [4, 1]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_large_arrays_stay_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: Literal["C", "F"], save: Callable[..., None]
) -> None:
    monkeypatch.setattr("graphopt.sample_files._MAPPED", 1)
    source, stored = tmp_path / "data.npz", np.asarray(images(), order=order)
    save(source, image=stored)
    dataset = open_calibration(source, [IMAGE], FREE)
    for _ in range(2):
        np.testing.assert_array_equal(np.concatenate([feed["image"] for feed in dataset.feeds()]), images())
    content = bytearray(source.read_bytes())
    content[-200] ^= 1  # in the packed data; the list of contents comes after it
    source.write_bytes(bytes(content))
    with pytest.raises(DataError, match="damaged"):
        open_calibration(source, [IMAGE], FREE)


def _samples_on_disk(form: str, folder: Path, samples: np.ndarray[Any, Any]) -> str:
    if form in ("npz", "packed npz"):
        save = np.savez if form == "npz" else np.savez_compressed
        save(folder / "data.npz", image=samples)
        return str(folder / "data.npz")
    if form == "npy":
        np.save(folder / "image.npy", samples)
    else:
        (folder / "image").mkdir()
        for number, part in enumerate(np.array_split(samples, 50)):
            np.save(folder / "image" / f"{number:02}.npy", part)
    return str(folder)


@pytest.mark.parametrize("form", ["npz", "packed npz", "npy", "one npy a sample"])
def test_a_pass_over_large_files_leaves_nothing_of_them_in_memory(form: str, tmp_path: Path) -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc to read the resident memory from")

    def resident() -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmRSS"))

    source = _samples_on_disk(form, tmp_path, np.ones((80_000, 1, 4, 16), np.float32))  # 20 MB
    before, most = resident(), 0
    dataset = open_calibration(source, [WIDE], FREE)
    for number, feed in enumerate(dataset.feeds()):
        assert feed["image"].all()
        most = max(most, resident()) if number % 5000 == 0 else most
    assert most - before < 5_000


def test_one_axis_more_holds_a_whole_feed_per_entry(npz: Callable[..., str]) -> None:
    data = open_calibration(npz(image=images(6).reshape(2, 3, 1, 4, 4)), [IMAGE], FREE)
    assert [feed["image"].shape for feed in data.feeds()] == [(3, 1, 4, 4)] * 2
    assert not data.stacked
    assert [len(batch["image"]) for batch in data.batches(4)] == [3, 3]


def test_a_fixed_first_axis_takes_that_many_rows_at_a_time(npz: Callable[..., str]) -> None:
    fixed = InputSpec("image", FLOAT, (2, 1, 4, 4))
    data = open_calibration(npz(image=images()), [fixed], FREE)
    assert [feed["image"].shape for feed in data.feeds()] == [(2, 1, 4, 4)] * 3
    assert not data.stacked


def test_a_dimension_fixed_by_the_user_sets_the_rows(npz: Callable[..., str]) -> None:
    data = open_calibration(npz(image=images()), [IMAGE], ShapeBinding(dims={"batch": 3}))
    assert [len(feed["image"]) for feed in data.feeds()] == [3, 3]


def test_a_scalar_input_takes_one_value_a_sample(npz: Callable[..., str]) -> None:
    rate = InputSpec("rate", INT64, ())
    data = open_calibration(npz(image=images(2), rate=np.array([8, 16])), [IMAGE, rate], FREE)
    assert [feed["rate"].shape for feed in data.feeds()] == [(), ()]
    assert [int(feed["rate"]) for feed in data.feeds()] == [8, 16]


def test_text_inputs_become_objects(npz: Callable[..., str]) -> None:
    text = InputSpec("text", ir.DataType.STRING, ("n",))
    feed = next(open_calibration(npz(text=np.array(["a", "bc"])), [text], FREE).feeds())
    assert feed["text"].dtype == object
    assert feed["text"].tolist() == ["a"]


def test_an_input_of_unknown_rank_takes_samples_from_the_first_axis(npz: Callable[..., str]) -> None:
    spec = InputSpec("image", FLOAT, None)
    assert len(list(open_calibration(npz(image=images()), [spec], FREE).feeds())) == 6


def test_a_folder_of_npy_files_is_read(tmp_path: Path) -> None:
    np.save(tmp_path / "image.npy", images(3))
    data = open_calibration(str(tmp_path), [IMAGE], FREE)
    assert len(list(data.feeds())) == 3


def test_a_folder_with_one_file_a_sample_is_read_in_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "image").mkdir()
    for i in (2, 0, 1):
        np.save(tmp_path / "image" / f"{i}.npy", images(3)[i])
    data = open_calibration(str(tmp_path), [IMAGE], FREE)
    assert np.array_equal(np.concatenate([feed["image"] for feed in data.feeds()]), images(3))


def test_labels_in_a_folder_may_be_one_file_a_sample(tmp_path: Path) -> None:
    for name, values in (("image", images(3)), ("labels", np.array([2, 0, 1]))):
        (tmp_path / name).mkdir()
        for i in range(3):
            np.save(tmp_path / name / f"{i}.npy", values[i])
    data = open_evaluation(str(tmp_path), [IMAGE], ["scores"], FREE)
    assert data.labels is not None
    assert data.labels.tolist() == [2, 0, 1]


def test_text_in_a_folder_becomes_objects(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for i, word in enumerate(("ab", "cd")):
        np.save(tmp_path / "text" / f"{i}.npy", np.array(word))
    data = open_calibration(str(tmp_path), [InputSpec("text", ir.DataType.STRING, ("n",))], FREE)
    assert [feed["text"].tolist() for feed in data.feeds()] == [["ab"], ["cd"]]
    assert next(data.feeds())["text"].dtype == object


def test_a_function_yields_feeds_anew_each_time(module: Callable[[str], str]) -> None:
    name = module("import numpy as np\ndef feeds():\n    for i in range(3):\n"
                  "        yield {'image': np.full((1, 1, 4, 4), i, np.float32)}\n")  # fmt: skip
    data = open_calibration(f"{name}:feeds", [IMAGE], FREE)
    assert [float(feed["image"].max()) for feed in data.feeds()] == [0, 1, 2]
    assert len(list(data.feeds())) == 3
    assert data.digest is not None
    assert len(data.digest) == 64


def test_synthetic_data_follows_from_its_seed() -> None:
    one, same, other = (open_calibration(f"synthetic:{seed}", [IMAGE], FREE) for seed in (1, 1, 2))
    assert one.synthetic
    assert len(list(one.feeds())) == 64
    first, again, different = (next(data.feeds())["image"] for data in (one, same, other))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, different)
    assert one.digest == same.digest != other.digest


def test_the_digest_follows_the_content(npz: Callable[..., str]) -> None:
    first = open_calibration(npz(image=images()), [IMAGE], FREE).digest
    again = open_calibration(npz(image=images()), [IMAGE], FREE).digest
    other = open_calibration(npz(image=images() + 1), [IMAGE], FREE).digest
    assert first == again != other


def test_the_digest_of_a_folder_follows_the_content(tmp_path: Path) -> None:
    np.save(tmp_path / "image.npy", images())
    first = open_calibration(str(tmp_path), [IMAGE], FREE).digest
    assert first == open_calibration(str(tmp_path), [IMAGE], FREE).digest
    np.save(tmp_path / "image.npy", images() + 1)
    assert first != open_calibration(str(tmp_path), [IMAGE], FREE).digest


def test_the_digest_of_text_in_memory_follows_the_content() -> None:
    spec = InputSpec("text", ir.DataType.STRING, ("n",))
    digests = [
        open_calibration({"text": np.array(words, dtype=object)}, [spec], FREE).digest
        for words in (["ab", "cd"], ["ab", "cd"], ["ab", "ce"])
    ]
    assert digests[0] == digests[1] != digests[2]


def test_a_plugin_is_asked_before_files(npz: Callable[..., str]) -> None:
    mine = Dataset("acme:x", "d", lambda: iter([{"image": images(1)}]))
    assert open_calibration("acme:x", [IMAGE], FREE, lambda uri: [mine] if uri == "acme:x" else []).origin == "acme:x"
    assert open_calibration(npz(image=images()), [IMAGE], FREE, lambda uri: []).stacked


def test_arrays_in_memory_are_read_as_an_npz_is() -> None:
    data = open_calibration({"image": images(3)}, [IMAGE], FREE)
    assert len(list(data.feeds())) == 3
    assert data.digest == open_calibration({"image": images(3)}, [IMAGE], FREE).digest


def test_evaluation_keeps_labels_that_calibration_drops(npz: Callable[..., str]) -> None:
    uri = npz(image=images(), labels=np.arange(6), reference__scores=np.zeros((6, 3), np.float32))
    data = open_evaluation(uri, [IMAGE], ["scores"], FREE)
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert list(data.references) == ["scores"]
    bare = open_calibration(uri, [IMAGE], FREE)
    assert bare.labels is None
    assert not bare.references


def test_an_input_called_labels_is_an_input(npz: Callable[..., str]) -> None:
    spec = InputSpec("labels", INT64, ("n",))
    data = open_calibration(npz(labels=np.arange(3)), [spec], FREE)
    assert [feed["labels"].tolist() for feed in data.feeds()] == [[0], [1], [2]]


# ---------------------------------------------------------------- what does not fit

MASK = InputSpec("mask", INT64, ("batch", "seq"))


@pytest.mark.parametrize(
    ("arrays", "inputs", "message"),
    [
        ({}, [IMAGE], "holds no arrays; needs: image"),
        ({"labels": np.arange(3)}, [IMAGE], "holds no arrays; needs: image"),
        ({"imgae": images()}, [IMAGE], "array 'imgae' is not an input of the model; did you mean 'image'?"),
        ({"image": images()}, [IMAGE, MASK], "has no array for the input 'mask'; it holds: image"),
        (
            {"image": images()[:, 0]},
            [InputSpec("image", FLOAT, ("n", 5))],
            "a sample of 'image' has shape 4x4, the input takes nx5",
        ),
        (
            {"image": images()[0, 0]},
            [IMAGE],
            "array 'image' has rank 2, the input has rank 4; stack samples on the first axis: batchx1x4x4",
        ),
        (
            {"rate": np.array(8)},
            [InputSpec("rate", INT64, ())],
            "array 'rate' has rank 0, the input has rank 0; give one value a sample",
        ),
        (
            {"image": images(dtype=np.float64)},
            [IMAGE],
            "array 'image' is float64, the input takes float32; convert it with .astype('float32')",
        ),
        ({"image": images()[..., :3]}, [IMAGE], "a sample of 'image' has shape 1x1x4x3, the input takes batchx1x4x4"),
        ({"image": images(0)}, [IMAGE], "holds no samples"),
        (
            {"image": images(3), "mask": np.zeros((4, 5), np.int64)},
            [IMAGE, MASK],
            "arrays hold different numbers of samples: {'image': 3, 'mask': 4}",
        ),
        (
            {"image": images(5)},
            [InputSpec("image", FLOAT, (2, 1, 4, 4))],
            "array 'image' holds 5 rows, the model takes 2 at a time; give a multiple of 2",
        ),
    ],
)
def test_an_npz_that_does_not_fit_is_refused(
    npz: Callable[..., str], arrays: dict[str, Any], inputs: list[InputSpec], message: str
) -> None:
    uri = npz(**arrays)
    with pytest.raises(DataError) as caught:
        open_calibration(uri, inputs, FREE)
    assert str(caught.value) == f"{uri}: {message}"
    assert caught.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize(
    "content",
    [b"", b"not a zip", b"\x93NUMPY\x01\x00", b"PK\x03\x04" + bytes(40)],
    ids=["empty", "text", "half an npy", "half a zip"],
)
def test_a_file_that_is_no_npz_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"not an \.npz file of plain arrays, or damaged; write it with numpy\.savez"):
        open_calibration(str(path), [IMAGE], FREE)


def test_a_plain_npy_under_the_name_of_an_npz_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "data.npz").open("wb") as stream:
        np.save(stream, images())
    with pytest.raises(DataError, match=r"not an \.npz file"):
        open_calibration(str(tmp_path / "data.npz"), [IMAGE], FREE)


def test_a_damaged_compressed_npz_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez_compressed(path, image=np.random.default_rng(0).random((50, 1, 4, 4), np.float32))
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(60)
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"not an \.npz file"):
        open_calibration(str(path), [IMAGE], FREE)


def test_a_packed_npz_without_room_to_unpack_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full to write to")
    monkeypatch.setattr("graphopt.sample_files._MAPPED", 1)
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: full.open("r+b", buffering=0))
    np.savez_compressed(tmp_path / "data.npz", image=images())
    with pytest.raises(DataError, match=r"cannot be unpacked to .*: No space left on device; set TMPDIR"):
        open_calibration(tmp_path / "data.npz", [IMAGE], FREE)


@pytest.mark.parametrize("broken", [b"not an npy", b""])
def test_a_damaged_file_of_a_sample_is_refused(tmp_path: Path, broken: bytes) -> None:
    (tmp_path / "image").mkdir()
    np.save(tmp_path / "image" / "0.npy", images(1)[0])
    (tmp_path / "image" / "1.npy").write_bytes(broken)
    with pytest.raises(DataError, match=r"an \.npy file cannot be read"):
        open_calibration(str(tmp_path), [IMAGE], FREE)


def test_a_file_of_a_sample_that_was_cut_is_refused(tmp_path: Path) -> None:
    (tmp_path / "image").mkdir()
    np.save(tmp_path / "image" / "0.npy", images(1)[0])
    file = tmp_path / "image" / "1.npy"
    np.save(file, images(1)[0])
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"an \.npy file cannot be read: 1\.npy ends too early"):
        open_calibration(str(tmp_path), [IMAGE], FREE)


def test_samples_of_different_types_in_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "image").mkdir()
    np.save(tmp_path / "image" / "0.npy", images(1)[0])
    np.save(tmp_path / "image" / "1.npy", images(1)[0].astype(np.float64))
    with pytest.raises(DataError, match=r"an \.npy file cannot be read: types differ: float32, float64"):
        open_calibration(str(tmp_path), [IMAGE], FREE)


def test_a_file_that_changes_between_two_passes_is_named(tmp_path: Path) -> None:
    (tmp_path / "image").mkdir()
    np.save(tmp_path / "image" / "0.npy", images(1)[0])
    data = open_calibration(str(tmp_path), [IMAGE], FREE)
    np.save(tmp_path / "image" / "0.npy", images(1)[0, :, :2])
    with pytest.raises(DataError, match="changed while it was in use; run again"):
        list(data.feeds())


def test_pickled_objects_are_never_loaded(npz: Callable[..., str]) -> None:
    uri = npz(image=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="plain arrays"):
        open_calibration(uri, [IMAGE], FREE)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("nowhere.npz", "nowhere.npz: no such file"),
        (
            "nowhere",
            "nowhere: no such file, folder or module:function; give an .npz with arrays named after the inputs",
        ),
        ("synthetic:", "synthetic:: '' is not a whole number; write synthetic:0"),
        ("synthetic:²", "synthetic:²: '²' is not a whole number; write synthetic:0"),
        ("synthetic:-1", "synthetic:-1: '-1' is not a whole number; write synthetic:0"),
    ],
)
def test_data_that_is_not_there_is_refused(
    uri: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        open_calibration(uri, [IMAGE], FREE)
    assert str(caught.value) == message


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no arrays"):
        open_calibration(str(tmp_path), [IMAGE], FREE)


def test_samples_of_different_shapes_in_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "image").mkdir()
    np.save(tmp_path / "image" / "0.npy", images(1)[0])
    np.save(tmp_path / "image" / "1.npy", images(1)[0, :, :2])
    with pytest.raises(DataError, match=r"an \.npy file cannot be read: all input arrays must have the same shape"):
        open_calibration(str(tmp_path), [IMAGE], FREE)


@pytest.mark.parametrize(
    ("source", "function", "message"),
    [
        ("def feeds():\n    return None\n", "feeds", "raises TypeError: 'NoneType' object is not iterable"),
        ("def feeds():\n    yield 3\n", "feeds", "yields int, not dictionaries of arrays"),
        ("def feeds():\n    raise RuntimeError('no disk')\n    yield\n", "feeds", "raises RuntimeError: no disk"),
        ("def feeds(path):\n    yield {}\n", "feeds", "missing 1 required positional argument"),
        ("def feeds():\n    return []\n", "feeds", "holds no samples"),
        ("def feeds():\n    yield {'image': 1.0}\n", "feeds", "array 'image' is float64"),
        (
            "def feeds():\n    yield {'imag': 1.0}\n",
            "feeds",
            "'imag' is not an input of the model; did you mean 'image'",
        ),
        ("def feeds():\n    yield {}\n", "feeds", "has no array for the input 'image'"),
        ("def feeds():\n    yield {}\n", "feed", "the module has no function 'feed'; did you mean 'feeds'?"),
        ("feeds = (\n", "feeds", "cannot be imported: SyntaxError"),
        ("import a_module_that_is_not_installed\n", "feeds", "No module named 'a_module_that_is_not_installed'"),
    ],
)
def test_a_function_that_does_not_fit_is_refused(
    module: Callable[[str], str], source: str, function: str, message: str
) -> None:
    name = module(source)
    with pytest.raises(DataError) as caught:
        open_calibration(f"{name}:{function}", [IMAGE], FREE)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_module_that_is_missing_is_named() -> None:
    with pytest.raises(DataError, match="module 'a_module_nobody_has' cannot be imported"):
        open_calibration("a_module_nobody_has:feeds", [IMAGE], FREE)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "has neither labels nor reference.<output> arrays; add one, or leave --eval out"),
        (
            {"reference__score": np.zeros(6)},
            "reference.score: the model has no such output; did you mean 'scores'?",
        ),
    ],
)
def test_evaluation_data_without_truth_is_refused(
    npz: Callable[..., str], arrays: dict[str, Any], message: str
) -> None:
    uri = npz(image=images(), **arrays)
    with pytest.raises(DataError) as caught:
        open_evaluation(uri, [IMAGE], ["scores"], FREE)
    assert str(caught.value) == f"{uri}: {message}"
