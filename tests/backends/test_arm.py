"""Libraries for ARM: built here, run under qemu where it is installed."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from passes.share.share_models import share
from text_models import build

from graphopt.backend_base import BuildOptions
from graphopt.errors import BackendError
from graphopt.model_io import input_specs, load_model
from graphopt.reference import Reference, random_feed
from graphopt_backends._link import known_linkers

_AARCH64, _ARM = 183, 40


def _machine(path: Path) -> int:
    head = path.read_bytes()[:20]
    assert head[:4] == b"\x7fELF"
    return struct.unpack_from("<H", head, 18)[0]


@pytest.fixture
def arm(backend):
    found = backend("arm")
    if not known_linkers(found[1].isa):
        pytest.skip("no C++ compiler for aarch64: apt-get install g++-aarch64-linux-gnu")
    return found


def test_library_runner_and_runtime_are_aarch64(cnn, arm, arm_cache: Path, tmp_path: Path) -> None:
    backend, target = arm
    build = backend.build(cnn, target, tmp_path, BuildOptions(cache=arm_cache))
    for name in ("model.so", "run"):
        assert name in build.files
        assert _machine(tmp_path / name) == _AARCH64
    assert build.facts["isa"] == "cortex-a76"


@pytest.mark.parametrize("device", ["arm:cortex-a76", "arm:cortex-a53"])
def test_quantized_cnn_under_qemu_gives_the_numbers_of_onnx_runtime(
    device, quantized_cnn, arm, backend, arm_cache: Path, tmp_path: Path
) -> None:
    engine, target = backend(device)
    if engine.how(target) == "compiled only":
        pytest.skip("compiled only: qemu-aarch64 not found")
    model = quantized_cnn(target.integers.activation)
    engine.build(model, target, tmp_path, BuildOptions(cache=arm_cache))
    feeds = [{"x": np.random.default_rng(i).standard_normal((1, 3, 16, 16)).astype(np.float32)} for i in range(20)]
    outputs, reference = engine.run_all(tmp_path, target, feeds, 1), Reference(model, optimize=False)
    same = [np.array_equal(o["y"], reference.run(f)["y"]) for f, o in zip(feeds, outputs, strict=True)]
    assert sum(same) >= 19, f"only {sum(same)} of 20 are equal"
    assert engine.how(target) in ("emulated", "executed")


@pytest.mark.parametrize("device", ["arm:cortex-a76", "arm:cortex-a53"])
def test_shared_weights_stay_codes_and_give_the_numbers_of_onnx_runtime(
    device, backend, arm_cache: Path, tmp_path: Path
) -> None:
    engine, target = backend(device)
    if engine.how(target) == "compiled only":
        pytest.skip("compiled only: qemu-aarch64 not found")
    text = """g (float[3,160] x) => (float[3,200] y) {
        a = MatMul(x, u)  b = Relu(a)  c = Gemm<transB = 1>(b, v, e)  y = MatMul(c, w) }"""
    rng = np.random.default_rng(0)
    shapes = {"u": (160, 240), "v": (320, 240), "e": (320,), "w": (320, 200)}
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    model = build(text, **weights)
    assert share(model, channels=8, int8=True).modified
    engine.build(model, target, tmp_path, BuildOptions(cache=arm_cache))
    floats = 4 * sum(array.size for array in weights.values())
    assert (tmp_path / "model.so").stat().st_size < floats / 4
    feeds = [{"x": rng.standard_normal((3, 160)).astype(np.float32)} for _ in range(4)]
    outputs, reference = engine.run_all(tmp_path, target, feeds, 1), Reference(model, optimize=False)
    for feed, output in zip(feeds, outputs, strict=True):
        expected = reference.run(feed)["y"]
        np.testing.assert_allclose(output["y"], expected, atol=2e-5 * float(np.abs(expected).max()))


def test_fallback_runs_its_parts_on_the_host_and_the_rest_under_qemu(
    det_model, arm, arm_cache: Path, tmp_path: Path
) -> None:
    engine, target = arm
    if engine.how(target) == "compiled only":
        pytest.skip("compiled only: qemu-aarch64 not found")
    engine.build(det_model, target, tmp_path, BuildOptions(cache=arm_cache, fallback="ort"))
    feed = {"x": np.random.default_rng(0).standard_normal((6, 4, 4)).astype(np.float32)}
    output = engine.load(tmp_path, target, 1)(feed)
    np.testing.assert_allclose(output["y"], Reference(det_model).run(feed)["y"], atol=1e-6)


@pytest.fixture
def relu_for_tvm(monkeypatch) -> None:
    """As if no kernel computed Relu."""
    from graphopt_backends import _engines

    monkeypatch.setattr(_engines, "_without_kernel", lambda m: [str(n.name) for n in m.graph if n.op_type == "Relu"])


@pytest.mark.usefixtures("relu_for_tvm")
def test_a_part_that_tvm_lowers_runs_under_qemu(cnn, arm, arm_cache: Path, tmp_path: Path) -> None:
    engine, target = arm
    if engine.how(target) == "compiled only":
        pytest.skip("compiled only: qemu-aarch64 not found")
    build = engine.build(cnn, target, tmp_path, BuildOptions(cache=arm_cache))
    for name in ("run_tvm", "runtime/libtvm_runtime.so", "runtime/libtvm_ffi.so"):
        assert name in build.files
        assert _machine(tmp_path / name) == _AARCH64
    feed = {"x": np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32)}
    output = engine.load(tmp_path, target, 1)(feed)
    np.testing.assert_allclose(output["y"], Reference(cnn).run(feed)["y"], atol=1e-6)


@pytest.mark.usefixtures("relu_for_tvm")
def test_without_the_runtime_the_error_says_which_command_gets_it(cnn, arm, tmp_path: Path) -> None:
    engine, target = arm
    (tmp_path / "bundle").mkdir()
    with pytest.raises(BackendError, match="run: graphopt doctor --fetch arm"):
        engine.build(cnn, target, tmp_path / "bundle", BuildOptions(cache=tmp_path / "empty"))
    assert list((tmp_path / "bundle").iterdir()) == []


def test_without_qemu_load_says_compiled_only(cnn, arm, arm_cache: Path, tmp_path: Path, monkeypatch) -> None:
    from graphopt_backends import arm as module

    engine, target = arm
    engine.build(cnn, target, tmp_path, BuildOptions(cache=arm_cache))
    monkeypatch.setattr(module, "_emulator", lambda: None)
    monkeypatch.setattr(module, "host_machine", lambda: "x86_64")
    assert engine.how(target) == "compiled only"
    with pytest.raises(BackendError, match="compiled only: qemu-aarch64 not found"):
        engine.load(tmp_path, target, 1)


def test_doctor_says_how_to_get_what_is_missing(arm, tmp_path: Path) -> None:
    engine, _ = arm
    findings = {f.subject: f for f in engine.doctor(tmp_path)}
    assert findings["arm runtime"].hint == "graphopt doctor --fetch arm"
    assert not findings["arm runtime"].ok
    assert findings["TVM"].ok
    assert findings["LLVM"].ok
    assert all(f.hint for f in findings.values() if not f.ok)


def test_resnet20_of_the_zoo_agrees_under_qemu(zoo, arm, arm_cache: Path, tmp_path: Path) -> None:
    engine, target = arm
    if engine.how(target) == "compiled only":
        pytest.skip("compiled only: qemu-aarch64 not found")
    model = load_model(zoo("cifar10_resnet20") / "model.onnx")
    engine.build(model, target, tmp_path, BuildOptions(cache=arm_cache))
    from graphopt.model_io import ShapeBinding

    feed = random_feed(input_specs(model), ShapeBinding(), np.random.default_rng(0))
    output = engine.load(tmp_path, target, 2)(feed)
    np.testing.assert_allclose(output["logits"], Reference(model).run(feed)["logits"], atol=1e-4)


@pytest.mark.parametrize("device", ["arm:armv7", "arm:android"])
def test_what_is_linked_elsewhere_ships_as_object_code_and_sources(
    device, cnn, backend, cache: Path, tmp_path: Path
) -> None:
    engine, target = backend(device)
    engine.ready(target, BuildOptions(cache=cache))
    build = engine.build(cnn, target, tmp_path, BuildOptions(cache=cache))
    assert build.kernel == "build/kernels.o"
    assert {"build/build.sh", "build/model.c", "build/runtime.c", "graphopt.h", "example.c"} <= set(build.files)
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()} == {
        *build.files, "model.plan.json"
    }  # fmt: skip
    assert engine.how(target) == "compiled only"
    with pytest.raises(BackendError, match="linked elsewhere"):
        engine.load(tmp_path, target, 1)


@pytest.mark.slow
def test_the_script_of_a_32_bit_bundle_links_it(cnn, backend, cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("ziglang")
    engine, target = backend("arm:armv7")
    engine.build(cnn, target, tmp_path, BuildOptions(cache=cache))
    compiler = f"{sys.executable} -m ziglang cc -target arm-linux-gnueabihf -mcpu=cortex_a7"
    subprocess.run(["sh", tmp_path / "build" / "build.sh"], env={**os.environ, "CC": compiler}, check=True)
    head = (tmp_path / "model.so").read_bytes()[:20]
    assert struct.unpack_from("<H", head, 18)[0] == _ARM
