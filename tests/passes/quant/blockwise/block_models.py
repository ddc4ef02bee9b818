"""Models with weights in blocks, and what tests ask of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.calibration import Dataset
from graphopt.model_io import ShapeBinding, input_specs, model_bytes
from graphopt.pass_base import Context, PassResult
from graphopt.reference import Feed, Reference
from graphopt.runner import run_pass
from graphopt.targets import Target
from graphopt_passes.quant import Quant

Array = np.ndarray
ORT = Target(name="ort")


def on_grid(*shape: int, axis: int, group: int = 32, bits: int = 4, symmetric: bool = False, seed: int = 0) -> Array:
    """A weight that blocks along an axis hold exactly: each group reaches both ends of its grid."""
    rng = np.random.default_rng(seed)
    top, moved = 2**bits - 1, [shape[axis], *(s for i, s in enumerate(shape) if i != axis % len(shape))]
    codes = rng.integers(1 if symmetric else 0, top + 1, moved)
    real = np.empty(moved, np.float32)
    for start in range(0, shape[axis], group):
        part = codes[start : start + group]
        part[0], part[-1] = (1 if symmetric else 0), top
        zero = 2 ** (bits - 1) if symmetric else rng.integers(0, top + 1, moved[1:])
        real[start : start + group] = (part - zero) * np.exp2(rng.integers(-6, -3, moved[1:]))
    return np.ascontiguousarray(np.moveaxis(real, 0, axis))


def data(model: ir.Model, count: int = 8, size: int = 5, rows: int = 6) -> Dataset:
    """Random feeds, their features of different sizes; integers are indices below `rows`."""

    def read() -> Iterator[Feed]:
        rng = np.random.default_rng(3)
        shapes = {spec.name: spec.concrete(ShapeBinding(), size) for spec in input_specs(model)}
        mix = {n: rng.standard_normal((s[-1],) * 2) * rng.lognormal(0, 1, s[-1]) for n, s in shapes.items() if s}
        for _ in range(count):
            feed: Feed = {}
            for spec in input_specs(model):
                shape = shapes[spec.name]
                if spec.dtype.is_floating_point():
                    feed[spec.name] = (rng.standard_normal(shape) @ mix[spec.name]).astype(np.float32)
                elif spec.dtype == ir.DataType.BOOL:
                    feed[spec.name] = np.asarray(rng.integers(0, 2, shape), bool)
                else:
                    feed[spec.name] = np.asarray(rng.integers(0, rows, shape), spec.dtype.numpy())
            yield feed

    return Dataset("samples", "0", read)


def quantize(model: ir.Model, *, calibrated: bool = False, keep: bool = False, **options: object) -> PassResult:
    """Run the pass as the host does, all checks included; 4 bits unless told otherwise, whatever the outputs lose."""
    ctx = Context(model, ORT, calibration=data(model) if calibrated else None, keep_opset=keep)
    return run_pass(Quant(**{"bits": 4, "min_output_sqnr": -99.0, **options}), ctx).result  # type: ignore[arg-type]


def assert_exact(before: ir.Model, after: ir.Model, count: int = 4) -> None:
    """Both models compute the same, without ONNX Runtime's fusions, which round activations."""
    left, right = Reference(before), Reference(after, optimize=False)
    for feed in data(before, count).feeds():
        expected, got = left.run(feed), right.run(feed)
        for name, reference in expected.items():
            np.testing.assert_allclose(got[name], reference, atol=2e-5 * max(1.0, float(np.abs(reference).max())))


def sqnr(before: ir.Model, after: ir.Model) -> float:
    """The least over outputs and random inputs, in dB, as ONNX Runtime runs them."""
    left, right, worst = Reference(before), Reference(after), np.inf
    for feed in data(before, 4).feeds():
        expected, got = left.run(feed), right.run(feed)
        for name, reference in expected.items():
            noise = float(np.square(got[name] - reference).sum())
            worst = min(worst, 10 * np.log10(float(np.square(reference).sum()) / max(noise, 1e-30)))
    return worst


def optimized(model: ir.Model, folder: Path) -> Counter[str]:
    """Operators that ONNX Runtime makes of a model, subgraphs included."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimized.onnx"), 4
    onnxruntime.InferenceSession(model_bytes(model), options, providers=["CPUExecutionProvider"])
    return kinds(ir.from_proto(onnx.load(folder / "optimized.onnx")))


def kinds(model: ir.Model) -> Counter[str]:
    """Operators of a model, subgraphs included."""
    return Counter(node.op_type for graph in model.graphs() for node in graph)


def actions(result: PassResult) -> dict[str, str]:
    return {change.site: change.action for change in result.changes}
