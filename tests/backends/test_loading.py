"""Loading and running what was compiled, as its users do it: the right file, the right inputs, or one clear line."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.backend_base import BuildOptions, Runnable
from graphopt.errors import BackendError, DataError, WriteError
from graphopt.reference import Reference
from graphopt.targets import host_machine
from graphopt_backends._engine import Engine
from graphopt_backends._tensors import write_tensors

pytestmark = pytest.mark.skipif(host_machine() != "x86_64", reason="this machine is not x86-64")


def scale(*weights: float) -> ir.Model:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    scale (float[2,3] x) => (float[2,3] y) <float[3] w = {%s}> { y = Mul(x, w) }
    """
    return ir.from_onnx_text(text % ", ".join(map(str, weights)))


@pytest.fixture
def built(backend, cache, tmp_path: Path):
    """Builds a model into the folder `bundle`, in place of what was there, and loads it."""
    x86, target = backend("x86")

    def build(model: ir.Model, threads: int = 1) -> Runnable:
        bundle, made = tmp_path / "bundle", tmp_path / "new"
        made.mkdir()
        x86.build(model, target, made, BuildOptions(cache=cache))
        if bundle.exists():
            bundle.rename(tmp_path / "old")
        made.rename(bundle)
        return x86.load(bundle, target, threads)

    return build


def test_a_bundle_that_was_built_again_is_loaded_again(built) -> None:
    x = np.ones((2, 3), np.float32)
    first = built(scale(1.0, 2.0, 3.0))
    assert first({"x": x})["y"][0].tolist() == [1, 2, 3]
    second = built(scale(4.0, 5.0, 6.0))
    assert second({"x": x})["y"][0].tolist() == [4, 5, 6]
    assert first({"x": x})["y"][0].tolist() == [1, 2, 3]


def test_arrays_may_lie_anywhere_in_any_order(built) -> None:
    run = built(scale(1.0, 2.0, 3.0))
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    odd = np.zeros(x.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(2, 3)
    odd[...] = x
    locked = x.copy()
    locked.flags.writeable = False
    for given in (x, np.asfortranarray(x), np.repeat(x, 2, axis=1)[:, ::2], odd, locked):
        assert run({"x": given})["y"].tolist() == [[0, 2, 6], [3, 8, 15]]


def test_nan_comes_out_where_it_went_in(built) -> None:
    y = built(scale(1.0, 2.0, 3.0))({"x": np.array([[1, np.nan, 1]] * 2, np.float32)})["y"]
    assert np.isnan(y).tolist() == [[False, True, False]] * 2


def test_a_feed_that_does_not_fit_is_one_clear_line(built) -> None:
    run, good = built(scale(1.0, 2.0, 3.0)), np.zeros((2, 3), np.float32)
    for feed, message in [
        ({}, "input 'x': is missing from the feed"),
        ({"X": good}, "input 'X': is none of the compiled model's; known: x"),
        ({"x": good, "z": good}, "input 'z': is none of the compiled model's"),
        ({"x": [[1, 2, 3]] * 2}, "input 'x': is a list, not a NumPy array"),
        ({"x": np.zeros((2, 3))}, "input 'x': is float64, the compiled model takes float32"),
        ({"x": np.zeros((2, 3), ">f4")}, "input 'x': is >f4, the compiled model takes float32"),
        ({"x": np.zeros((2, 4), np.float32)}, r"input 'x': has shape \(2, 4\)"),
    ]:
        with pytest.raises(DataError, match=message):
            run(feed)


def test_threads_may_share_a_model(built, cnn) -> None:
    run, reference = built(cnn, threads=2), Reference(cnn)
    feeds = [{"x": np.random.default_rng(i).standard_normal((1, 3, 16, 16)).astype(np.float32)} for i in range(4)]
    expected = [reference.run(feed)["y"] for feed in feeds]
    right: list[int] = []

    def work(which: int) -> None:
        right.append(sum(np.allclose(run(feeds[which])["y"], expected[which], atol=1e-5) for _ in range(200)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [200] * 4


def test_a_file_that_is_no_model_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "library.c").write_text("int f(void) { return 1; }")
    subprocess.run(["cc", "-shared", "-fPIC", "library.c", "-o", "library.so"], cwd=tmp_path, check=True)
    with pytest.raises(BackendError, match=r"library.so: is not a compiled model; compile the model again"):
        Engine(tmp_path / "library.so")
    with pytest.raises(BackendError, match=r"absent.so: cannot be loaded: No such file"):
        Engine(tmp_path / "absent.so")
    (tmp_path / "text.so").write_text("text")
    with pytest.raises(BackendError, match=r"text.so: cannot be loaded: file too short"):
        Engine(tmp_path / "text.so")


def test_a_library_for_another_cpu_says_so(built, tmp_path: Path) -> None:
    built(scale(1.0, 2.0, 3.0))
    data = bytearray((tmp_path / "bundle" / "model.so").read_bytes())
    data[18:20] = (183).to_bytes(2, "little")  # aarch64, in the header of the file
    (tmp_path / "other.so").write_bytes(data)
    with pytest.raises(BackendError, match="cannot be loaded: it is for another CPU"):
        Engine(tmp_path / "other.so")


def test_names_of_tensors_survive_in_the_library(built, tmp_path: Path) -> None:
    odd = 'a"b\\u00zz\x01f??/é'
    model = scale(1.0, 2.0, 3.0)
    model.graph.inputs[0].name = odd
    assert built(model)({odd: np.ones((2, 3), np.float32)})["y"][0].tolist() == [1, 2, 3]
    (tmp_path / "names.c").write_text(
        '#include <stdio.h>\n#include "graphopt.h"\nint main(void) { puts(graphopt_describe()->inputs[0].name); }'
    )
    bundle = tmp_path / "bundle"
    subprocess.run(["cc", "-I", bundle, "names.c", bundle / "model.so", "-o", "names"], cwd=tmp_path, check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(bundle)}
    told = subprocess.run([tmp_path / "names"], env=environment, capture_output=True, check=True).stdout
    assert told.decode() == f"{odd}\n"


def test_the_program_of_a_bundle_says_what_is_wrong_with_its_files(built, tmp_path: Path) -> None:
    built(scale(1.0, 2.0, 3.0))
    write_tensors(tmp_path / "good", [("x", np.ones((2, 3), np.float32))])
    write_tensors(tmp_path / "int32", [("x", np.ones((2, 3), np.int32))])
    write_tensors(tmp_path / "larger", [("x", np.ones((2, 4), np.float32))])
    whole = (tmp_path / "good").read_bytes()
    (tmp_path / "cut").write_bytes(whole[:140])
    (tmp_path / "huge").write_bytes(whole.replace(b" 24 x", b" 18446744073709551000 x"))

    def told(inputs: str, outputs: str = "out") -> str:
        command = [tmp_path / "bundle" / "run", tmp_path / "bundle" / "model.so", inputs, outputs]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == (1 if done.stderr else 0)
        return done.stderr.strip()

    assert told("good") == ""
    assert told("absent") == "run: cannot read absent"
    assert told("int32") == "run: input x takes 24 bytes of float32, not 24 of int32"
    assert told("larger") == "run: input x takes 24 bytes of float32, not 32 of float32"
    assert told("cut") == "run: cut is damaged"
    assert told("huge") == "run: huge is damaged"
    assert told("good", "/dev/full") == "run: cannot write /dev/full"


def test_a_cache_that_cannot_be_written_is_one_clear_line(backend, tmp_path: Path) -> None:
    x86, target = backend("x86")
    (tmp_path / "cache").write_text("a file")
    (tmp_path / "bundle").mkdir()
    with pytest.raises(WriteError, match=r"cache/engine/x86_64: not a directory; set XDG_CACHE_HOME to a folder"):
        x86.build(scale(1.0, 2.0, 3.0), target, tmp_path / "bundle", BuildOptions(cache=tmp_path / "cache"))
    assert list((tmp_path / "bundle").iterdir()) == []


def test_a_disk_that_is_full_when_the_linker_writes_is_one_clear_line(backend, tmp_path: Path) -> None:
    x86, target = backend("x86")
    (tmp_path / "bundle").mkdir()
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho ld: error: final link failed: No space left on device >&2\nexit 1\n")
    compiler.chmod(0o755)
    options = BuildOptions(cache=tmp_path / "cache", cc=str(compiler))
    with pytest.raises(WriteError, match="compiler: no space left on device; free some space"):
        x86.build(scale(1.0, 2.0, 3.0), target, tmp_path / "bundle", options)
    assert list((tmp_path / "bundle").iterdir()) == []
