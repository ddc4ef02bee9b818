"""Bundles for an NPU and its host: what C, libraries and ONNX Runtime compute together with the NPU."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import onnx_ir as ir
import pytest
from host_check import Find, needs_compiler, no_npu, strict_compiler
from text_models import build
from tosa_files import EXTRA

from graphopt.backend_base import Build, BuildOptions
from graphopt.errors import BackendError, ExitCode
from graphopt.model_io import ShapeBinding, load_model
from graphopt.reference import Reference
from graphopt.targets import TargetTable
from graphopt_backends import graphopt_backends, graphopt_targets
from graphopt_backends._lower import lower
from graphopt_backends._plan import read_plan
from graphopt_backends.arm import TARGETS
from graphopt_backends.npu.host import load
from graphopt_backends.npu.host.c_run import HEADER, SOURCE, Compiled
from graphopt_backends.npu.host.parts import divide
from graphopt_backends.npu.options import NpuOptions
from graphopt_backends.npu.raw import read_raw
from graphopt_backends.npu.tosa import inputs_of, outputs_of, run_reference

needs_npu = pytest.mark.usefixtures("npu")
BODY = """g (float[1,3,8,8] x) => (float[1,4,8,8] y, int64[1,1,8,8] best) {
  xq = QuantizeLinear(x, s, z)   xd = DequantizeLinear(xq, s, z)  wd = DequantizeLinear(w, t)
  a = Conv<pads = [1, 1, 1, 1]>(xd, wd)
  aq = QuantizeLinear(a, s, z)   ad = DequantizeLinear(aq, s, z)  MIDDLE
  bq = QuantizeLinear(b, s, z)   bd = DequantizeLinear(bq, s, z)  vd = DequantizeLinear(v, t)  c = Conv(bd, vd)
  cq = QuantizeLinear(c, s, z)   y = DequantizeLinear(cq, s, z)   best = ArgMax<axis = 1>(y)
}"""


@pytest.fixture
def npu() -> None:
    pytest.importorskip("ethosu.vela", reason=EXTRA)
    pytest.importorskip("tosa_serializer", reason=EXTRA)


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A compiler that takes every warning for an error."""
    return strict_compiler(tmp_path_factory.mktemp("strict"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Build, Path]:
    """Convolutions on the NPU and a sum between them in C."""
    pytest.importorskip("ethosu.vela", reason=EXTRA)
    pytest.importorskip("tosa_serializer", reason=EXTRA)
    known, folder = TargetTable(graphopt_targets()), tmp_path_factory.mktemp("bundle")
    npu = next(backend for backend in graphopt_backends() if backend.name == "npu")
    return npu.build(_sums(), known.resolve("npu"), folder, BuildOptions()), folder


def _network(middle: str, **weights: Any) -> ir.Model:
    """Two convolutions for the NPU, and between them what stands there."""
    rng = np.random.default_rng(3)
    kernels = {"w": (4, 3, 3, 3), "v": (4, 4, 1, 1)}
    made = {name: rng.integers(-127, 128, shape).astype(np.int8) for name, shape in kernels.items()}
    grid = {"s": np.array(0.05, np.float32), "z": np.array(3, np.int8), "t": np.array(0.004, np.float32)}
    return build(BODY.replace("MIDDLE", middle), **made, **grid, **weights)


def _sums(model: str = "b = CumSum(ad, axis)") -> ir.Model:
    return _network(model, axis=np.array(2, np.int64))


def _bundle(model: ir.Model, folder: Path, backend: Find, device: str = "ethos-u55-128", **options: Any) -> Build:
    found, target = backend(f"npu:{device}")
    fallback = options.pop("fallback", None)
    folder.mkdir(exist_ok=True)
    return found.build(model, target, folder, BuildOptions(target=NpuOptions(**options), fallback=fallback))


def test_every_arm_cpu_can_be_the_host() -> None:
    choices = set(get_args(get_type_hints(NpuOptions)["host"]))
    assert choices == {"c", "onnxruntime", *(target.device for target in TARGETS)}


_NMS = """ad1 = Reshape(ad, boxes)  picked = NonMaxSuppression(ad1, scores, most)  pf = Cast<to = 1>(picked)
  n = ReduceSum<keepdims = 0>(pf)  b = Add(ad, n)"""


def _with_a_stored_output() -> ir.Model:
    model = _sums()
    stored = ir.Value(name="stored", const_value=ir.tensor(np.arange(6, dtype=np.float32), name="stored"))
    stored.type, stored.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([6])
    model.graph.register_initializer(stored)
    model.graph.outputs.append(stored)
    return model


@needs_npu
@needs_compiler
@pytest.mark.parametrize("host", ["c", "onnxruntime"])
def test_what_a_model_returns_as_it_is_stored_is_the_hosts(host: str, backend: Find, tmp_path: Path) -> None:
    _bundle(_with_a_stored_output(), tmp_path / "b", backend, host=host)
    _agrees(_with_a_stored_output(), tmp_path / "b", backend)


def _suppressing() -> ir.Model:
    scores = np.linspace(0, 1, 64, dtype=np.float32).reshape(1, 1, 64)
    return _network(_NMS, boxes=np.array([1, 64, 4], np.int64), scores=scores, most=np.array(3, np.int64))


def test_an_operator_that_has_no_c_is_named(backend: Find) -> None:
    model, (_, target) = lower(_suppressing(), ShapeBinding(), "npu").model, backend("npu")
    with pytest.raises(BackendError) as caught:
        divide(model, target, BuildOptions())
    assert caught.value.exit_code == ExitCode.BACKEND
    assert "NonMaxSuppression" in caught.value.fact
    assert "no fixed shape" in caught.value.fact
    assert "--fallback ort" in str(caught.value.hint)
    assert "host=onnxruntime" in str(caught.value.hint)


def test_an_operator_without_a_kernel_is_named_for_an_arm_host(backend: Find) -> None:
    model, (_, target) = lower(_suppressing(), ShapeBinding(), "npu").model, backend("npu:ethos-u65-256")
    with pytest.raises(BackendError, match=r"\(cortex-a55\) can take .*NonMaxSuppression"):
        divide(model, target, BuildOptions(target=NpuOptions(host="cortex-a55")))


@needs_npu
@needs_compiler
def test_fallback_leaves_to_onnx_runtime_what_has_no_c(backend: Find, tmp_path: Path) -> None:
    made = _bundle(_suppressing(), tmp_path / "b", backend, fallback="ort")
    engines = {part.engine for part in read_plan(tmp_path / "b").parts}
    assert engines == {"npu", "c", "onnxruntime"}
    assert "NonMaxSuppression" in {refused.operator for refused in made.fallbacks}
    assert "model_run(" not in (tmp_path / "b" / HEADER).read_text(), "C cannot run all parts"
    _agrees(_suppressing(), tmp_path / "b", backend)


@needs_compiler
def test_model_run_runs_npu_and_host_in_order(bundle: tuple[Build, Path], strict: str, backend: Find) -> None:
    made, folder = bundle
    plan = read_plan(folder)
    assert [part.engine for part in plan.parts] == ["c", "npu", "c", "npu", "c"]
    assert {"model.c", "model.h", "model.npu.h", "model.host2.onnx"} <= set(made.files)
    assert all((folder / name).is_file() for name in made.files)
    assert made.fallbacks == ()
    assert [refused.operator for refused in made.declined] == ["CumSum"]
    assert "compiled by" in str(made.facts["host parts run here by"])
    assert ("CumSum", "c") in {(runner.operator, runner.runner) for runner in made.runners}
    header = (folder / HEADER).read_text()
    assert "int model_run(const float *x, float *y, int64_t *best);" in header
    assert re.search(r"part 1:.*\n.*inputs\[0\]: bq, int8_t, 1 x 4 x 8 x 8", header)
    assert "int32_t, 1 x 1 x 8 x 8" in header, "the NPU counts in 32 bits"
    Compiled(folder, strict, no_npu)
    _agrees(_sums(), folder, backend)


@needs_compiler
def test_c_and_onnx_runtime_compute_the_same(
    bundle: tuple[Build, Path], backend: Find, monkeypatch: pytest.MonkeyPatch
) -> None:
    npu, target = backend("npu")
    feed = {"x": np.random.default_rng(1).standard_normal((1, 3, 8, 8)).astype(np.float32)}
    in_c = npu.load(bundle[1], target, 1)(feed)
    monkeypatch.setattr(load, "c_compiler", lambda: None)
    assert load.host_runner(read_plan(bundle[1])) == "ONNX Runtime, for want of a C compiler"
    apart = npu.load(bundle[1], target, 1)(feed)
    assert {name: array.tobytes() for name, array in in_c.items()} == {n: array.tobytes() for n, array in apart.items()}


@needs_compiler
def test_what_the_npu_fails_at_is_raised_behind_the_c(
    bundle: tuple[Build, Path], backend: Find, monkeypatch: pytest.MonkeyPatch
) -> None:
    npu, target = backend("npu")

    def broken(*_: Any) -> Any:
        raise BackendError("TOSA reference model", "says no")

    monkeypatch.setattr(sys.modules[type(npu).__module__], "run_reference", broken)
    run = npu.load(bundle[1], target, 1)
    with pytest.raises(BackendError, match="says no"):
        run({"x": np.zeros((1, 3, 8, 8), np.float32)})


@needs_npu
def test_parts_can_stay_models_for_onnx_runtime(backend: Find, tmp_path: Path) -> None:
    made = _bundle(_sums(), tmp_path / "b", backend, host="onnxruntime")
    assert {part.engine for part in read_plan(tmp_path / "b").parts} == {"npu", "onnxruntime"}
    assert SOURCE not in made.files
    assert made.facts["host parts run here by"] == "ONNX Runtime"
    assert [refused.operator for refused in made.fallbacks] == ["CumSum"]
    _agrees(_sums(), tmp_path / "b", backend)


@needs_npu
def test_an_arm_host_gets_a_library_for_each_part(backend: Find, tmp_path: Path) -> None:
    if shutil.which("aarch64-linux-gnu-g++") is None:
        pytest.skip("there is no linker for aarch64")
    made = _bundle(_sums(), tmp_path / "b", backend, "ethos-u65-256", host="cortex-a55")
    parts = read_plan(tmp_path / "b").parts
    assert [part.engine for part in parts] == ["kernels", "npu", "kernels", "npu", "kernels"]
    assert parts[2].file == "model.host2.cortex-a55.so"
    assert str(made.facts["host parts run here by"]) in ("libraries, emulated", "ONNX Runtime, for want of an emulator")
    _agrees(_sums(), tmp_path / "b", backend, "ethos-u65-256")


@needs_npu
def test_an_android_host_gets_object_code_and_sources_for_each_part(backend: Find, tmp_path: Path) -> None:
    made = _bundle(_sums(), tmp_path / "b", backend, "ethos-u65-256", host="android")
    scripts = sorted(name for name in made.files if name.endswith("build.sh"))
    assert scripts == ["host0/build/build.sh", "host2/build/build.sh", "host4/build/build.sh"]
    assert all((tmp_path / "b" / name).is_file() for name in made.files)
    _agrees(_sums(), tmp_path / "b", backend, "ethos-u65-256")


@needs_npu
@needs_compiler
def test_keyword_spotting_runs_in_c_with_the_reference_model_as_its_npu(
    zoo: Callable[..., Path], backend: Find, tmp_path: Path
) -> None:
    import graphopt

    data = zoo("tiny_kws", samples=32, limit=32)
    made = graphopt.optimize(
        data / "model.onnx", "fold,quant", target="npu", calibration=data / "calib.npz", out=tmp_path / "out"
    )
    assert {part.engine for part in read_plan(made.path).parts} == {"npu", "c"}
    _agrees(load_model(made.path / "model.onnx"), made.path, backend, shape=(1, 1, 49, 10))


def _agrees(
    model: ir.Model, folder: Path, backend: Find, device: str = "ethos-u55-128", shape: tuple[int, ...] = (1, 3, 8, 8)
) -> None:
    """Runs a bundle four times; floats may be one step away where ONNX Runtime rounds a tie the other way."""
    npu, target = backend(f"npu:{device}")
    run, reference, rng = npu.load(folder, target, 1), Reference(model), np.random.default_rng(2)
    name, step = str(model.graph.inputs[0].name), 0.051
    for _ in range(4):
        feed = {name: rng.standard_normal(shape).astype(np.float32)}
        made, wanted = run(feed), reference.run(feed)
        for key, array in wanted.items():
            assert made[key].dtype == array.dtype
            away = np.abs(made[key].astype(np.float64) - array)
            assert np.mean(away > (step if array.dtype == np.float32 else 0)) < 0.02, key


_DRIVER_H = """
#include <stddef.h>
#include <stdint.h>
struct ethosu_driver;
struct ethosu_driver *ethosu_reserve_driver(void);
void ethosu_release_driver(struct ethosu_driver *driver);
int ethosu_invoke(struct ethosu_driver *driver, const void *commands, const int size, uint64_t *const address,
                  const size_t *sizes, const int regions);
"""
_DRIVER_C = """
#include "ethosu_driver.h"
struct ethosu_driver { int reserved; } only;
int (*on_invoke)(int, uint64_t *);
struct ethosu_driver *ethosu_reserve_driver(void) { return only.reserved++ ? NULL : &only; }
void ethosu_release_driver(struct ethosu_driver *driver) { driver->reserved--; }
int ethosu_invoke(struct ethosu_driver *driver, const void *commands, const int size, uint64_t *const address,
                  const size_t *sizes, const int regions) {
  (void)commands, (void)sizes, (void)regions;
  return driver->reserved == 1 ? on_invoke(size, address) : -2;
}
"""


@needs_compiler
def test_the_source_for_arms_driver_hands_over_what_the_npu_reads_and_makes(
    bundle: tuple[Build, Path], strict: str, backend: Find, tmp_path: Path
) -> None:
    folder = bundle[1]
    (tmp_path / "ethosu_driver.h").write_text(_DRIVER_H)
    (tmp_path / "driver.c").write_text(_DRIVER_C)
    sources = [str(folder / SOURCE), str(folder / "model.npu.c"), "driver.c"]
    words = [strict, "-std=c99", "-fPIC", "-shared", "-I.", "-o", "whole.so", *sources, "-lm"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    library = ctypes.CDLL(str(tmp_path / "whole.so"))
    plan = read_plan(folder)
    raws = {(raw := read_raw(folder / p.file)).commands: (raw, p.file) for p in plan.parts if p.engine == "npu"}
    by_size = {len(commands): found for commands, found in raws.items()}
    assert len(by_size) == 2, "the stand-in tells parts apart by the size of their commands"

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_uint64))
    def invoke(size: int, address: Any) -> int:
        raw, file = by_size[size]
        blob = (folder / file.replace("_vela.npz", ".tosa")).read_bytes()
        scratch = address[raw.scratch.region]
        given = [
            np.frombuffer(ctypes.string_at(scratch + place.offset, place.elements), np.int8).reshape(shape)
            for place, (_, shape) in zip(raw.inputs, inputs_of(blob), strict=True)
        ]
        for place, array in zip(raw.outputs, run_reference(blob, given, outputs_of(blob)), strict=True):
            ctypes.memmove(scratch + place.offset, array.tobytes(), array.nbytes)
        return 0

    ctypes.c_void_p.in_dll(library, "on_invoke").value = ctypes.cast(invoke, ctypes.c_void_p).value
    npu, target = backend("npu")
    feed = {"x": np.random.default_rng(1).standard_normal((1, 3, 8, 8)).astype(np.float32)}
    wanted = npu.load(folder, target, 1)(feed)
    made = {name: np.empty_like(array) for name, array in wanted.items()}
    arrays = (feed["x"], made["y"], made["best"])
    assert library.model_run(*(ctypes.c_void_p(array.ctypes.data) for array in arrays)) == 0
    assert {name: array.tobytes() for name, array in made.items()} == {n: a.tobytes() for n, a in wanted.items()}
