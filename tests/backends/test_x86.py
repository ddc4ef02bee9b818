"""Libraries for this machine's x86 CPU: built, run, compared with ONNX Runtime."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from graphopt.backend_base import BuildOptions
from graphopt.errors import BackendError, DataError, UsageError
from graphopt.model_io import ShapeBinding, input_specs, load_model, save_model
from graphopt.reference import Feed, Reference, random_feed
from graphopt.targets import host_machine

pytestmark = pytest.mark.skipif(host_machine() != "x86_64", reason="this machine is not x86-64")


def _feeds(model: ir.Model, count: int = 3, binding: ShapeBinding | None = None) -> list[Feed]:
    specs = input_specs(model)
    return [random_feed(specs, binding or ShapeBinding(), np.random.default_rng(i)) for i in range(count)]


def _agree(model: ir.Model, feeds: list[Feed], outputs: list[Feed], tolerance: float = 1e-5) -> None:
    reference = Reference(model)
    for feed, output in zip(feeds, outputs, strict=True):
        for name, expected in reference.run(feed).items():
            assert output[name].shape == expected.shape
            assert output[name].dtype == expected.dtype
            np.testing.assert_allclose(
                output[name], expected, rtol=0, atol=tolerance * max(1.0, np.abs(expected).max())
            )


@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_compiled_model_agrees_with_onnx_runtime(name, request, backend, cache, tmp_path: Path) -> None:
    model = request.getfixturevalue(name)
    x86, target = backend("x86")
    build = x86.build(model, target, tmp_path, BuildOptions(cache=cache))
    feeds = _feeds(model)
    _agree(model, feeds, list(x86.run_all(tmp_path, target, feeds, 1)))
    assert build.kernel == "model.so"
    assert build.facts["fixed"] == "N = 1"
    assert all((tmp_path / name).is_file() for name in build.files)
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()} == set(build.files)


@pytest.mark.parametrize("activation", ["uint8", "int8"])
def test_quantized_cnn_gives_the_very_numbers_of_onnx_runtime(
    activation, quantized_cnn, backend, cache, tmp_path: Path
) -> None:
    model = quantized_cnn(activation)
    x86, target = backend("x86")
    x86.build(model, target, tmp_path, BuildOptions(cache=cache))
    feeds, reference = _feeds(model, 40), Reference(model, optimize=False)
    outputs = x86.run_all(tmp_path, target, feeds, 1)
    same = [np.array_equal(o["y"], reference.run(f)["y"]) for f, o in zip(feeds, outputs, strict=True)]
    assert sum(same) >= 38, f"only {sum(same)} of 40 are equal"


def test_same_model_gives_the_same_bytes_in_another_folder(cnn, backend, cache, tmp_path: Path) -> None:
    x86, target = backend("x86")
    digests = []
    for name in ("one", "another-name-of-another-length"):
        folder = tmp_path / name
        folder.mkdir()
        before = Path.cwd()
        os.chdir(folder)
        try:
            build = x86.build(cnn, target, folder, BuildOptions(cache=cache if name == "one" else tmp_path / "fresh"))
        finally:
            os.chdir(before)
        digests.append({f: hashlib.sha256((folder / f).read_bytes()).hexdigest() for f in build.files})
    assert digests[0] == digests[1]


def test_runner_and_example_of_the_bundle_work_from_the_command_line(mlp, backend, cache, tmp_path: Path) -> None:
    from graphopt_backends._tensors import read_tensors, write_tensors

    x86, target = backend("x86")
    build = x86.build(mlp, target, tmp_path, BuildOptions(cache=cache))
    feed = _feeds(mlp, 1)[0]
    write_tensors(tmp_path / "in", [("x", feed["x"])] * 2)
    subprocess.run(["./run", "model.so", "in", "out"], cwd=tmp_path, check=True)
    rows = [array for _, array in read_tensors(tmp_path / "out")]
    assert len(rows) == 2
    np.testing.assert_allclose(rows[1], Reference(mlp).run(feed)["y"], atol=1e-6)
    text = (tmp_path / "example.c").read_text()
    command = next(line for line in text.splitlines() if " -o example" in line).removeprefix(" *")
    told = subprocess.run(command, cwd=tmp_path, shell=True, check=True, capture_output=True, text=True).stdout
    assert told.startswith("float32 y:")
    assert str(build.facts["example"]) in command


def test_a_bundle_without_foreign_parts_needs_the_c_library_alone(mlp, backend, cache, tmp_path: Path) -> None:
    x86, target = backend("x86")
    build = x86.build(mlp, target, tmp_path, BuildOptions(cache=cache))
    assert not (tmp_path / "runtime").exists()
    told = subprocess.run(["ldd", str(tmp_path / "model.so")], capture_output=True, text=True, check=True).stdout
    assert {line.split()[0].split(".")[0] for line in told.splitlines()} <= {
        "linux-vdso", "libc", "libm", "libgcc_s", "libstdc++", "/lib64/ld-linux-x86-64",
    }, told  # fmt: skip
    assert build.facts["kernel_bytes"] < 100_000


def test_feed_of_another_shape_or_type_is_refused(mlp, backend, cache, tmp_path: Path) -> None:
    x86, target = backend("x86")
    x86.build(mlp, target, tmp_path, BuildOptions(cache=cache))
    run = x86.load(tmp_path, target, 1)
    with pytest.raises(DataError, match=r"compiled for \(1, 12\)"):
        run({"x": np.zeros((1, 13), np.float32)})
    with pytest.raises(DataError, match="takes float32"):
        run({"x": np.zeros((1, 12), np.float64)})


def test_batch_is_kept_where_it_is_given(mlp, backend, cache, tmp_path: Path) -> None:
    x86, target = backend("x86")
    binding = ShapeBinding(dims={"N": 3})
    build = x86.build(mlp, target, tmp_path, BuildOptions(binding=binding, cache=cache))
    feeds = _feeds(mlp, 2, binding)
    _agree(mlp, feeds, list(x86.run_all(tmp_path, target, feeds, 2)))
    assert "fixed" not in build.facts


def test_open_dimension_is_named_with_its_flags(backend, tmp_path: Path) -> None:
    x86, target = backend("x86")
    value = helper.make_tensor_value_info("ids", TensorProto.FLOAT, ["batch", "length"])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "length"])
    graph = helper.make_graph([helper.make_node("Relu", ["ids"], ["y"], "relu")], "g", [value], [out])
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    with pytest.raises(UsageError, match=r"'length' is dynamic.*--dim length=N or --shape ids=1xN"):
        x86.build(model, target, tmp_path, BuildOptions())
    assert list(tmp_path.iterdir()) == []


def test_operator_that_nothing_compiles_is_named_and_stops_the_build(det_model, backend, cache, tmp_path: Path) -> None:
    x86, target = backend("x86")
    with pytest.raises(BackendError, match=r"Det at 'determinant'.*--fallback ort"):
        x86.build(det_model, target, tmp_path, BuildOptions(cache=cache))
    assert list(tmp_path.iterdir()) == []


def test_operator_of_a_custom_domain_is_not_taken_for_the_standard_one(backend, tmp_path: Path) -> None:
    x86, target = backend("x86")
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"], "mine", domain="acme")], "g", [value], [out])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("acme", 1)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=8))
    with pytest.raises(BackendError, match=r"cannot take 1 operator: acme.Relu at 'mine'"):
        x86.build(model, target, tmp_path, BuildOptions())


def test_fallback_lets_onnx_runtime_run_what_nothing_compiles(det_model, backend, cache, tmp_path: Path) -> None:
    x86, target = backend("x86")
    build = x86.build(det_model, target, tmp_path, BuildOptions(cache=cache, fallback="ort"))
    assert [u.operator for u in build.fallbacks] == ["Det"]
    assert {"model.part0.so", "model.part1.onnx", "model.part2.so"} <= set(build.files)
    assert build.facts["nodes run by onnxruntime"] == 1
    feeds = _feeds(det_model)
    _agree(det_model, feeds, list(x86.run_all(tmp_path, target, feeds, 1)))


@pytest.mark.parametrize("threads", [1, 2])
def test_what_no_kernel_computes_is_lowered_by_tvm(threads, cnn, backend, cache, tmp_path: Path, monkeypatch) -> None:
    from graphopt_backends import _engines

    monkeypatch.setattr(_engines, "_without_kernel", lambda m: [str(n.name) for n in m.graph if n.op_type == "Relu"])
    x86, target = backend("x86")
    build = x86.build(cnn, target, tmp_path, BuildOptions(cache=cache))
    assert {"model.part0.so", "model.part1.so", "model.part2.so", "run_tvm"} <= set(build.files)
    assert build.facts["nodes run by tvm"] == 1
    assert {(r.operator, r.runner, r.nodes) for r in build.runners} >= {("Relu", "tvm", 1), ("Conv", "kernels", 3)}
    feeds = _feeds(cnn)
    _agree(cnn, feeds, list(x86.run_all(tmp_path, target, feeds, threads)))


def test_a_child_process_may_run_a_model_of_its_parent(cnn, backend, cache, tmp_path: Path) -> None:
    x86, target = backend("x86")
    x86.build(cnn, target, tmp_path, BuildOptions(cache=cache))
    feed = _feeds(cnn, 1)[0]
    run = x86.load(tmp_path, target, 2)
    expected = run(feed)["y"]
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(run(feed)["y"], expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert np.array_equal(run(feed)["y"], expected)


def test_the_library_itself_refuses_a_lesser_cpu(mlp, backend, cache, tmp_path: Path) -> None:
    from graphopt_backends import _library
    from graphopt_backends._engine import Engine

    x86, target = backend("x86:avx2")
    assert target.isa
    original, alien = _library._description, replace(target.isa, features=("+avx2", "+imaginary"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_library, "_description", lambda facts: original(replace(facts, isa=alien)))
        x86.build(mlp, target, tmp_path, BuildOptions(cache=cache))
    with pytest.raises(BackendError, match="compiled for x86:avx2: this CPU lacks imaginary"):
        Engine(tmp_path / "model.so")


def test_cpu_without_the_instructions_refuses_to_run(mlp, backend, cache, tmp_path: Path) -> None:
    x86, target = backend("x86:avx2")
    assert target.isa
    alien = replace(target, isa=replace(target.isa, features=("+avx2", "+imaginary")))
    assert x86.how(alien) == "compiled only"
    x86.build(mlp, target, tmp_path, BuildOptions(cache=cache))
    with pytest.raises(BackendError, match="this machine lacks imaginary"):
        x86.load(tmp_path, alien, 1)


def test_compiler_that_does_not_exist_is_one_clear_line(mlp, backend, cache, tmp_path: Path) -> None:
    x86, target = backend("x86")
    with pytest.raises(BackendError, match="--cc no-such-compiler: no such command"):
        x86.build(mlp, target, tmp_path, BuildOptions(cache=cache, cc="no-such-compiler"))


@pytest.mark.slow
def test_zig_links_too(mlp, backend, tmp_path: Path) -> None:
    pytest.importorskip("ziglang")
    import sys

    x86, target = backend("x86")
    cc = f"{sys.executable} -m ziglang c++ -target x86_64-linux-gnu.2.28"
    x86.build(mlp, target, tmp_path, BuildOptions(cc=cc))
    feeds = _feeds(mlp)
    _agree(mlp, feeds, list(x86.run_all(tmp_path, target, feeds, 1)))
    assert (
        shutil.which("ldd") is None
        or "not found"
        not in subprocess.run(["ldd", str(tmp_path / "run")], capture_output=True, text=True, check=True).stdout
    )


def test_weights_above_the_limit_lie_beside_the_library(cnn, backend, cache, tmp_path: Path, monkeypatch) -> None:
    from graphopt_backends import _library
    from graphopt_backends._tensors import read_tensors, write_tensors

    monkeypatch.setattr(_library, "EMBEDDED_BYTES", 100)
    x86, target = backend("x86")
    build = x86.build(cnn, target, tmp_path, BuildOptions(cache=cache))
    assert "model.weights" in build.files
    feeds = _feeds(cnn)
    outputs = list(x86.run_all(tmp_path, target, feeds, 1))
    _agree(cnn, feeds, outputs)
    write_tensors(tmp_path / "in", [("x", feeds[0]["x"])])
    subprocess.run(["./run", "model.so", "in", "out", "--weights", "model.weights"], cwd=tmp_path, check=True)
    np.testing.assert_array_equal(next(read_tensors(tmp_path / "out"))[1], outputs[0]["y"])
    whole = (tmp_path / "model.weights").read_bytes()
    for damaged, told in ((whole[:-2000], "cut short"), (b"x" + whole[1:], "belongs to another model")):
        (tmp_path / "model.weights").write_bytes(damaged)
        with pytest.raises(BackendError, match=told):
            x86.load(tmp_path, target, 1)
    (tmp_path / "model.weights").unlink()
    with pytest.raises(BackendError, match="cannot open the file of weights"):
        x86.load(tmp_path, target, 1)


def test_native_target_names_the_instructions_it_was_built_for(targets) -> None:
    native = targets.resolve("x86")
    assert native.device == "native"
    assert native.isa
    assert native.isa.name in ("avx2", "avx512", "avx512-vnni", "amx", "x86-64")


def test_resnet20_of_the_zoo_agrees(zoo, backend, cache, tmp_path: Path) -> None:
    folder = zoo("cifar10_resnet20")
    model = load_model(folder / "model.onnx")
    x86, target = backend("x86")
    save_model(model, tmp_path / "model.onnx")
    x86.build(model, target, tmp_path, BuildOptions(cache=cache))
    with np.load(folder / "eval.npz") as data:
        feeds = [{"input": data["input"][i : i + 1]} for i in range(20)]
    _agree(model, feeds, list(x86.run_all(tmp_path, target, feeds, 2)))


def test_emitted_source_and_assembly_lie_beside_the_library(mlp, backend, cache, tmp_path: Path) -> None:
    x86, target = backend("x86")
    build = x86.build(mlp, target, tmp_path, BuildOptions(cache=cache, emit=("source", "asm")))
    assert {"model.ll", "model.s"} <= set(build.files)
    assert "define" in (tmp_path / "model.ll").read_text()
    assert ".text" in (tmp_path / "model.s").read_text()


def test_running_a_library_leaves_this_process_its_cores(mlp, backend, cache, tmp_path: Path) -> None:
    x86, target = backend("x86")
    x86.build(mlp, target, tmp_path, BuildOptions(cache=cache))
    before = os.sched_getaffinity(0)
    x86.load(tmp_path, target, 1)(_feeds(mlp, 1)[0])
    assert os.sched_getaffinity(0) == before


def test_damaged_bundle_is_one_clear_line(mlp, backend, cache, tmp_path: Path) -> None:
    x86, target = backend("x86")
    x86.build(mlp, target, tmp_path, BuildOptions(cache=cache))
    (tmp_path / "model.so").write_bytes(b"no library")
    with pytest.raises(BackendError, match="cannot be loaded"):
        x86.load(tmp_path, target, 1)
    (tmp_path / "model.plan.json").write_text("{")
    with pytest.raises(BackendError, match="missing or damaged; compile the model again"):
        x86.load(tmp_path, target, 1)
