"""Structure, labels and failures of benchmarks; no test here depends on how long anything takes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.bench import ONNX_RUNTIME, Plan, Subject, bench, bundle_subjects, feeds_for, this_machine
from graphopt.bench.child import peak_memory_mb
from graphopt.bench.process import Child, Job
from graphopt.bundle import Manifest, write_manifest
from graphopt.calibration import open_calibration
from graphopt.cli.benching import bench_subjects
from graphopt.errors import BackendError, UsageError
from graphopt.measured import Measured, Measurement
from graphopt.model_io import ShapeBinding, input_specs, load_model, save_model

ONCE = Plan(warmup=0, repeats=1, rounds=1)
MODEL = """
<ir_version: 8, opset_import: ["" : 17]>
scale (float[N,3] x) => (float[N,3] y) <float[3] w = {1.0, 2.0, 3.0}> { y = Mul(x, w) }
"""
BROKEN = MODEL.replace("Mul(x, w)", "NoSuchOperator(x, w)")

PLUGIN = '''
import os
import numpy as np
from graphopt.backend_base import Backend, Build
from graphopt.markers import hookimpl
from graphopt.reference import Reference
from graphopt.targets import Target


class Fake(Backend):
    """Runs model.onnx; the device says what it pretends to be."""

    name = "fake"

    def unsupported(self, model, target, options):
        return ()

    def build(self, model, target, folder, options):
        return Build()

    def how(self, target):
        words = {"emulated": "emulated", "compiled": "compiled only"}
        return words.get(target.device, "executed")

    def load(self, folder, target, threads):
        print("a runtime that prints to stdout", flush=True)
        model = Reference(folder / "model.onnx", threads=threads)
        if target.device == "crash":
            os.kill(os.getpid(), 9)
        return lambda feed: {name: value + np.float32(0.25) for name, value in model.run(feed).items()}


@hookimpl
def graphopt_backends():
    return [Fake()]


@hookimpl
def graphopt_targets():
    return [Target(name="fake", device=d, backend="fake") for d in ("executed", "emulated", "compiled", "crash")]
'''


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "scale.onnx")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "scale.fake")


@pytest.fixture(scope="module")
def fake_rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Measurement]:
    """Rows of one benchmark of a backend in a distribution of its own, which child processes find as any plugin."""
    folder = tmp_path_factory.mktemp("site")
    info = folder / "fake_backend-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-backend\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[graphopt]\nfake = fake_backend\n")
    (folder / "fake_backend.py").write_text(PLUGIN)
    bundle = make_bundle(folder / "scale.fake")
    reference, kernel = bundle_subjects(bundle, "fake:executed", "fake", "model.so")
    devices = ("executed", "emulated", "compiled", "crash")
    subjects = [replace(kernel, target=f"fake:{device}") for device in devices]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        patch.delenv("GRAPHOPT_PLUGINS", raising=False)
        rows = bench([reference, *subjects, replace(kernel, engine="unknown")], feeds(), ONCE).rows
    return dict(zip(("reference", *devices, "unknown"), rows, strict=True))


def make_bundle(folder: Path) -> Path:
    folder.mkdir()
    write_model(folder / "model.onnx")
    (folder / "model.so").write_bytes(b"12345")
    return folder


def write_model(path: Path, text: str = MODEL) -> Path:
    path.write_bytes(ir.to_proto(ir.from_onnx_text(text)).SerializeToString())
    return path


def feeds(count: int = 3) -> list[dict[str, np.ndarray]]:
    return [{"x": np.full((1, 3), i, np.float32)} for i in range(count)]


def test_rows_come_in_order_for_each_number_of_threads(model: Path) -> None:
    subjects = [Subject("one", model), Subject("two", model, "result")]
    measured = bench(subjects, feeds(), replace(ONCE, threads=(1, 2)))
    assert [(r.subject, r.side, r.threads) for r in measured.rows] == [
        ("one", "original", 1),
        ("two", "result", 1),
        ("one", "original", 2),
        ("two", "result", 2),
    ]
    assert {r.how for r in measured.rows} == {"executed"}
    assert {r.engine for r in measured.rows} == {ONNX_RUNTIME}


def test_a_row_says_how_often_it_ran_and_what_its_process_held(model: Path) -> None:
    row = bench([Subject("m", model)], feeds(), Plan(warmup=1, repeats=4, rounds=2)).rows[0]
    assert (row.warmup, row.repeats, row.rounds, row.samples) == (1, 4, 2, 3)
    assert row.file_bytes == model.stat().st_size
    assert row.peak_memory_mb is not None
    assert row.base_memory_mb is not None
    assert row.peak_memory_mb >= row.base_memory_mb > 0
    times = row.times
    assert times is not None
    assert 0 < times.minimum <= times.low <= times.high <= times.maximum
    assert times.minimum <= times.median <= times.maximum


def test_a_benchmark_survives_json(model: Path) -> None:
    measured = bench([Subject("m", model)], feeds(), ONCE)
    assert Measured.from_json(measured.to_json()) == measured


def test_a_round_ends_early_when_its_time_is_over(model: Path) -> None:
    row = bench([Subject("m", model)], feeds(), Plan(warmup=5, repeats=1000, rounds=1, round_seconds=0.0)).rows[0]
    assert row.repeats == 3


def test_a_model_that_cannot_run_says_why_and_stops_no_other(model: Path, tmp_path: Path) -> None:
    broken = write_model(tmp_path / "broken.onnx", BROKEN)
    rows = bench([Subject("broken", broken), Subject("fine", model)], feeds(), ONCE).rows
    assert rows[0].times is None
    assert rows[0].not_run is not None
    assert rows[0].not_run.startswith("not run: ")
    assert "NoSuchOperator" in rows[0].not_run
    assert rows[1].times is not None


def test_feeds_that_do_not_fit_are_a_reason_and_not_a_crash(model: Path) -> None:
    row = bench([Subject("m", model)], [{"x": np.zeros((1, 4), np.float32)}], ONCE).rows[0]
    assert row.times is None
    assert row.not_run is not None
    assert "ONNX Runtime cannot run it" in row.not_run


def test_a_backend_that_executes_is_timed_and_compared_with_the_bundles_model(
    fake_rows: dict[str, Measurement],
) -> None:
    reference, compiled = fake_rows["reference"], fake_rows["executed"]
    assert (reference.engine, compiled.engine) == (ONNX_RUNTIME, "fake")
    assert reference.agrees is None
    assert compiled.agrees == 0.25
    assert compiled.times is not None
    assert compiled.file_bytes == 5


def test_an_emulated_backend_is_compared_and_never_timed(fake_rows: dict[str, Measurement]) -> None:
    row = fake_rows["emulated"]
    assert row.how == "emulated"
    assert row.agrees == 0.25
    assert (row.times, row.peak_memory_mb, row.repeats, row.rounds) == (None, None, 0, 0)
    assert row.not_run is None


def test_what_is_only_compiled_is_neither_timed_nor_compared(fake_rows: dict[str, Measurement]) -> None:
    row = fake_rows["compiled"]
    assert row.how == "compiled only"
    assert (row.times, row.agrees) == (None, None)
    assert row.not_run == "compiled only: this machine cannot run it"


def test_a_backend_that_crashes_takes_only_its_row_with_it(fake_rows: dict[str, Measurement]) -> None:
    row = fake_rows["crash"]
    assert row.times is None
    assert row.not_run is not None
    assert "died with signal 9" in row.not_run
    assert fake_rows["reference"].times is not None


def test_an_unknown_backend_is_a_reason(fake_rows: dict[str, Measurement]) -> None:
    assert fake_rows["unknown"].not_run == "not run: no plugin brings the backend 'unknown'"


def test_a_bundle_without_a_kernel_is_its_model_alone(bundle: Path) -> None:
    assert [s.engine for s in bundle_subjects(bundle, "ort", "ort", None)] == [ONNX_RUNTIME]
    assert [s.engine for s in bundle_subjects(bundle, "ort", None, None)] == [ONNX_RUNTIME]


def test_weights_beside_the_kernel_and_beside_the_model_count_as_deployed(bundle: Path, tmp_path: Path) -> None:
    (bundle / "model.weights").write_bytes(b"123")
    assert bundle_subjects(bundle, "fake:executed", "fake", "model.so")[1].deployed_bytes() == 8
    (bundle / "runtime").mkdir()
    for name in ("model.part1.so", "model.part2.onnx", "runtime/libtvm_runtime.so", "model.part1.s", "run"):
        (bundle / name).write_bytes(b"1234")
    assert bundle_subjects(bundle, "fake:executed", "fake", "model.so")[1].deployed_bytes() == 8 + 3 * 4
    model = ir.from_onnx_text(MODEL)
    model.graph.initializers["w"].const_value = ir.tensor(np.zeros(2000, np.float32), name="w")
    files = save_model(model, tmp_path / "large.onnx", embed_limit=100)
    assert len(files) == 2
    assert Subject("large", files[0]).deployed_bytes() == sum(file.stat().st_size for file in files)


def test_a_bundle_is_run_with_the_sizes_that_it_was_made_with(bundle: Path) -> None:
    text = MODEL.replace("y = Mul(x, w)", "four = Constant<value_ints=[4, 3]>() s = Reshape(x, four) y = Mul(s, w)")
    write_model(bundle / "model.onnx", text)
    write_manifest(bundle, Manifest("0", "m.onnx", "d", "ort", "", 0, None, shapes={"N": "4"}))

    def run(**given: Any) -> Measurement:
        sizes = {"shapes": {}, "dims": {}, **given}
        return bench_subjects([bundle], data=None, plan=ONCE, disable=(), **sizes).rows[0]

    assert run().not_run is None
    assert run(shapes={"x": (4, 3)}).not_run is None
    assert "cannot run it" in str(run(dims={"N": 5}).not_run)


def test_without_inputs_there_is_one_clear_line(model: Path) -> None:
    with pytest.raises(UsageError, match="bench: there are no inputs to run"):
        bench([Subject("m", model)], [], ONCE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": 0}, "--repeats: 0 is too small; give at least 1"),
        ({"rounds": 0}, "--rounds: 0 is too small; give at least 1"),
        ({"warmup": -1}, "--warmup: -1 is too small; give at least 0"),
        ({"threads": ()}, "--threads: .* are not thread counts"),
        ({"threads": (0,)}, "--threads: .* are not thread counts"),
    ],
)
def test_a_plan_that_measures_nothing_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Plan(**options)


def test_random_inputs_are_the_same_every_time(model: Path) -> None:
    first, second = (feeds_for(model, None, ShapeBinding(dims={"N": 4}), 2) for _ in range(2))
    assert len(first) == 2
    assert all(np.array_equal(a["x"], b["x"]) for a, b in zip(first, second, strict=True))
    assert first[0]["x"].shape == (4, 3)


def test_the_users_samples_are_used_where_there_are_some(model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "calib.npz", x=np.arange(12, dtype=np.float32).reshape(4, 3))
    dataset = open_calibration(str(tmp_path / "calib.npz"), input_specs(load_model(model)), ShapeBinding())
    found = feeds_for(model, dataset, ShapeBinding(), 2)
    assert [feed["x"].tolist() for feed in found] == [[[0, 1, 2]], [[3, 4, 5]]]


def test_peak_memory_does_not_count_what_the_parent_holds() -> None:
    ballast = np.ones(300_000_000, np.uint8)
    code = "from graphopt.bench.child import peak_memory_mb; print(peak_memory_mb())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert peak_memory_mb() > 300
    assert float(done.stdout) < 300
    assert ballast[-1] == 1


def test_the_machine_is_described() -> None:
    machine = this_machine()
    assert machine.cpu
    assert machine.cores >= 1
    assert machine.memory_mb > 0
    assert {"python", "onnxruntime", "numpy"} <= set(machine.versions)
    assert machine.date.endswith("UTC")


def test_leaving_the_block_ends_the_child(model: Path, tmp_path: Path) -> None:
    job = Job("m", str(model), "", "", 1, str(tmp_path), str(tmp_path))
    with Child(job) as child:
        child.answer()
        pid = child.pid
        assert Path(f"/proc/{pid}").exists()
    assert not Path(f"/proc/{pid}").exists()


def test_asking_a_dead_child_is_an_error_with_its_signal(model: Path, tmp_path: Path) -> None:
    with Child(Job("m", str(model), "", "", 1, str(tmp_path), str(tmp_path))) as child:
        child.answer()
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(BackendError, match="m: its process died with signal 9"):
            child.ask("end")
            child.answer()


def test_an_interrupt_ends_all_children(model: Path) -> None:
    code = (
        "import sys, numpy as np; from pathlib import Path; from graphopt.bench import Plan, Subject, bench\n"
        "plan = Plan(repeats=10**9, rounds=1, round_seconds=1e9)\n"
        f"bench([Subject(n, Path({str(model)!r})) for n in 'ab'], [{{'x': np.zeros((1, 3), np.float32)}}], plan)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as parent:
        assert waited(lambda: len(children(parent.pid)) == 2)
        running = children(parent.pid)
        parent.send_signal(signal.SIGINT)
        _, errors = parent.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors
    assert waited(lambda: not any(Path(f"/proc/{pid}").exists() for pid in running))


def children(pid: int) -> list[int]:
    return [int(part) for part in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def waited(condition: Callable[[], bool]) -> bool:
    for _ in range(300):
        if condition():
            return True
        time.sleep(0.1)
    return False
