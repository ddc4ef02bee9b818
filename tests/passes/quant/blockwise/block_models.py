"""Models with weights in blocks, and what tests ask of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import rewritten_models
from rewritten_models import data, kinds

from graphopt.model_io import model_bytes
from graphopt.pass_base import Context, PassResult
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


def quantize(model: ir.Model, *, calibrated: bool = False, keep: bool = False, **options: object) -> PassResult:
    """Run the pass as the host does, all checks included; 4 bits unless told otherwise, whatever the outputs lose."""
    ctx = Context(model, ORT, calibration=data(model) if calibrated else None, keep_opset=keep)
    return run_pass(Quant(**{"bits": 4, "min_output_sqnr": -99.0, **options}), ctx).result  # type: ignore[arg-type]


def assert_exact(before: ir.Model, after: ir.Model, count: int = 4) -> None:
    """Both models compute the same, without ONNX Runtime's fusions, which round activations."""
    rewritten_models.assert_exact(before, after, count, optimize=False)


def optimized(model: ir.Model, folder: Path) -> Counter[str]:
    """Operators that ONNX Runtime makes of a model, subgraphs included."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimized.onnx"), 4
    onnxruntime.InferenceSession(model_bytes(model), options, providers=["CPUExecutionProvider"])
    return kinds(ir.from_proto(onnx.load(folder / "optimized.onnx")))
