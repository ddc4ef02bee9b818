"""Reports that look like real ones, and one whose every name is hostile."""

from __future__ import annotations

from dataclasses import replace

import pytest

from graphopt.backend_base import Unsupported
from graphopt.measured import Machine, Measured, Measurement, Times
from graphopt.pass_base import Change
from graphopt.report.data import (
    Accuracy,
    Agreement,
    BackendReport,
    Data,
    Fidelity,
    FileEntry,
    LayerCost,
    LayerNote,
    LayerRow,
    Limit,
    ModelSummary,
    OutputFidelity,
    Port,
    Report,
    StepReport,
    Totals,
)

_WIDTHS = (16, 16, 16, 32, 32, 32, 64, 64, 64)
HOSTILE = "<script>alert('x')</script>&\"[bold red]\x1b[31m\u202e"


def _layers() -> tuple[LayerRow, ...]:
    rows: list[LayerRow] = []
    for i, width in enumerate(_WIDTHS):
        before = LayerCost(width * width * 9 * 1024 // (width // 16) ** 2, width * width * 9, width * width * 36)
        kept = width * 3 // 4 if i % 3 else width
        after = LayerCost(before.macs * kept // width, before.params * kept // width, before.params * kept // width)
        prune = LayerNote("prune", f"kept {kept} of {width} channels", done=True)
        if not i % 3:
            prune = LayerNote("prune", "skipped: its channels feed a residual Add", done=False)
        quant = LayerNote("quant", "int8 per channel", done=True)
        rows.append(LayerRow(f"stage{i // 3 + 1}.block{i % 3}/Conv", "Conv", before, after, (prune, quant)))
    kept_float = LayerNote("quant", "skipped: weight is not constant", done=False)
    cost = LayerCost(640, 650, 2600)
    rows.append(LayerRow("classifier/Gemm", "Gemm", cost, cost, (kept_float,)))
    rows.append(LayerRow("head/BatchNormalization", "BatchNormalization", LayerCost(0, 256, 1024), None))
    return tuple(rows)


def _steps(layers: tuple[LayerRow, ...]) -> tuple[StepReport, ...]:
    def changes(name: str) -> tuple[Change, ...]:
        notes = [(row.name, note) for row in layers for note in row.notes if note.step == name]
        return tuple(Change(site, note.action, note.done, {"channels_before": 64}) for site, note in notes)

    pruned, quantized = Totals(803_000, 200_750, 28_691_000, 48), Totals(212_540, 200_990, 28_691_000, 131)
    return (
        StepReport("fold", "fold", modified=False, lossy=False, after=Totals(1_078_888, 269_722, 40_813_184, 48)),
        StepReport("prune{ratio=0.3}", "prune", True, True, changes("prune"), {"macs_removed": 0.297}, pruned),
        StepReport("quant", "quant", True, True, changes("quant"), {"layers": 9}, quantized),
    )


@pytest.fixture
def report() -> Report:
    layers = _layers()
    port = (Port("input", "float32", "batch x 3 x 32 x 32"),)
    result = (Port("logits", "float32", "batch x 10"),)
    operators = {"Relu": 19, "Conv": 21, "Add": 9}
    quantized = {**operators, "QuantizeLinear": 40, "DequantizeLinear": 82}
    opset = {"ai.onnx": 13}
    float_totals, totals = Totals(1_078_888, 269_722, 40_813_184, 48), Totals(212_540, 200_990, 28_691_000, 131)
    before = ModelSummary(1_093_412, float_totals, (), operators, opset, port, result)
    after = ModelSummary(262_144, totals, (), quantized, opset, port, result)
    output = OutputFidelity("logits", 3.21, 0.187, -14.2, 21.9, 24.3, 0.9981, 97.6)
    backend = BackendReport(
        "arm", "arm:cortex-a76", "emulated", "model.so", 412_380, ("model.so", "runtime/libtvm_ffi.so"),
        {"engine": "TVM Relax", "triple": "aarch64-linux-gnu", "vector bits": 128, "integer kernels": True},
        (), Agreement("evaluation data", 64, 0.0117, 0.02, True, 100.0),
    )  # fmt: skip
    return Report(
        version="0.1.0",
        model="resnet20.onnx",
        digest="6f0d3f4f6a5ee7b4a9f0a3d3a2c1a64d2f2b3c4d5e6f708192a3b4c5d6e7f809",
        target="arm:cortex-a76",
        pipeline="fold,prune{ratio=0.3},quant",
        seed=0,
        before=before,
        after=after,
        steps=_steps(layers),
        fidelity=Fidelity("evaluation data", 1000, (output,)),
        accuracy=Accuracy("top1", 92.4, 91.7, 0.7, 1000),
        limits=(Limit("--max-drop", 1.0, 0.7, True, "points"), Limit("--max-size", 0.3, 0.24, True, "x")),
        backend=backend,
        layers=layers,
        files=(FileEntry("model.onnx", 262_144), FileEntry("model.so", 412_380)),
        notes=("the classifier stays in float: its weight is computed by the graph",),
        command="graphopt resnet20.onnx --passes 'fold,prune{ratio=0.3},quant' --target arm --calibration calib.npz",
        data=(Data("calibration", "calib.npz", "ab" * 32, 256), Data("evaluation", "eval.npz", None, 1000)),
        versions={"onnxruntime": "1.31.1", "onnx-ir": "1.1.0", "apache-tvm": "0.27.0"},
        shapes={"batch": "1"},
    )  # fmt: skip


@pytest.fixture
def hostile(report: Report) -> Report:
    """Everything that a model or a plugin supplies as text is an attack."""
    name = HOSTILE
    port = (Port(name, "float32", name),)
    summary = replace(
        report.before, operators={name: 1}, opsets={name: 1}, inputs=port, outputs=port, macs_unknown=(name,)
    )
    step = StepReport(
        name, name, True, True, (Change(name, name, True, {name: name}), Change.skipped(name, name)), {name: name}
    )  # fmt: skip
    backend = BackendReport(
        name, name, "compiled only", name, 1, (name,), {name: name}, (Unsupported(name, name, name),), None, name
    )
    notes = (LayerNote(name, name, True), LayerNote(name, name, False))
    return replace(
        report, version=name, model=name, digest=name, target=name, pipeline=name, before=summary, after=summary,
        steps=(step,),
        fidelity=Fidelity("random inputs", 1, (OutputFidelity(name, 0.1, 0.1, 0, 1, 20, 1),)),
        accuracy=Accuracy(name, 1, 2, 3, 4), limits=(Limit(name, 1, 2, False, name),), verdict=name, backend=backend,
        layers=(LayerRow(name, name, LayerCost(1, 2, 3), None, notes),), files=(FileEntry(name, 1),), notes=(name,),
        command=name, data=(Data(name, name, name),), versions={name: name}, shapes={name: name},
    )  # fmt: skip


@pytest.fixture
def nothing_run(report: Report) -> Report:
    """The least a run can say: no data, no backend, nothing compared."""
    totals = Totals(0, 0, None, 1)
    summary = ModelSummary(120, totals, ("MatMul_0",), {"Relu": 1})
    return replace(
        report, before=summary, after=summary, steps=(), accuracy=None, limits=(), backend=None, layers=(),
        data=(), shapes={}, fidelity=Fidelity("random inputs", 0, not_run="not checked: needs 12 GB"), notes=(),
        command="",
    )  # fmt: skip


@pytest.fixture
def measured() -> Measured:
    machine = Machine("Example CPU", 2, "Linux x86_64", 8192, {"onnxruntime": "1.31.1"}, "2026-01-31 12:00 UTC")
    slow, fast = Times(4.0, 3.8, 3.9, 4.2, 5.1), Times(2.0, 1.9, 1.95, 2.1, 2.6)
    ort = "onnxruntime"
    original = Measurement(ort, "resnet20.onnx", "original", "executed", 1, 1_093_412, 8, 3, 10, 5, slow, 71.5)
    result = Measurement(ort, "resnet20.arm", "result", "executed", 1, 262_144, 8, 3, 10, 5, fast, 68.25)
    emulated = Measurement("arm", "resnet20.arm", "result", "emulated", 1, 412_380, 8, agrees=0.0117)
    return Measured((original, result, emulated), machine)
