"""Bundles appear whole or not at all, and say when they are damaged."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from graphopt.bundle import (
    Bundle,
    Manifest,
    check_out,
    file_digests,
    new_folder,
    read_manifest,
    up_to_date,
    write_manifest,
)
from graphopt.errors import ModelError, UsageError, WriteError


def manifest(folder: Path, key: str | None = "k") -> Manifest:
    return Manifest("0", "m.onnx", "d", "ort", "fold", 0, key, files=file_digests(folder))


def fill(folder: Path, text: str = "x") -> None:
    (folder / "model.onnx").write_text(text)
    (folder / "measured").mkdir(exist_ok=True)
    (folder / "measured" / "bench.json").write_text("1")
    write_manifest(folder, manifest(folder))


def test_a_new_folder_takes_its_place_at_the_end(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a" / "out") as folder:
        fill(folder)
        assert not (tmp_path / "a" / "out").exists()
    assert (tmp_path / "a" / "out" / "model.onnx").read_text() == "x"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    out = tmp_path / "out"
    with new_folder(out) as folder:
        fill(folder, "old")
    with pytest.raises(error), new_folder(out) as folder:
        fill(folder, "new")
        raise error
    assert (out / "model.onnx").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_a_write_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="free some space") as caught, new_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.exit_code == 6
    assert list(tmp_path.iterdir()) == []


def test_digests_leave_out_what_was_measured(tmp_path: Path) -> None:
    fill(tmp_path)
    assert list(file_digests(tmp_path)) == ["model.onnx"]


def test_a_bundle_is_up_to_date_only_whole_and_with_its_key(tmp_path: Path) -> None:
    fill(tmp_path)
    assert up_to_date(tmp_path, "k") == read_manifest(tmp_path)
    assert up_to_date(tmp_path, "other") is None
    assert up_to_date(tmp_path, None) is None
    (tmp_path / "measured" / "bench.json").write_text("2")
    assert up_to_date(tmp_path, "k") is not None
    (tmp_path / "model.onnx").write_text("edited")
    assert up_to_date(tmp_path, "k") is None


def test_a_bundle_without_digest_is_never_up_to_date(tmp_path: Path) -> None:
    fill(tmp_path)
    write_manifest(tmp_path, manifest(tmp_path, key=None))
    assert up_to_date(tmp_path, None) is None


def test_only_what_graphopt_wrote_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="--overwrite"):
        check_out(tmp_path, [], overwrite=False)
    check_out(tmp_path, [], overwrite=True)
    fill(tmp_path)
    check_out(tmp_path, [], overwrite=False)


def test_an_output_folder_that_holds_the_input_is_refused(tmp_path: Path) -> None:
    fill(tmp_path)
    with pytest.raises(UsageError, match="holds the input"):
        check_out(tmp_path, [tmp_path / "model.onnx"], overwrite=True)


def test_opening_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a bundle"):
        Bundle.open(tmp_path)
    fill(tmp_path)
    (tmp_path / "model.onnx").write_text("edited")
    with pytest.raises(ModelError, match="not what was written"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', "\x00"])
def test_a_strange_manifest_is_no_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    assert read_manifest(tmp_path) is None
