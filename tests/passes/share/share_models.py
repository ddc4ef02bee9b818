"""Models with shared weights, and what tests ask of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from rewritten_models import data

from graphopt.pass_base import Context, PassResult
from graphopt.runner import run_pass
from graphopt.targets import Target
from graphopt_passes.share import Share

Array = np.ndarray
ORT = Target(name="ort")


def levels(*shape: int, entries: int = 16, axis: int | None = None, groups: int = 1, seed: int = 0) -> Array:
    """A weight of so few numbers that codebooks hold it exactly; with an axis each group of channels has its own."""
    rng = np.random.default_rng(seed)
    if axis is None:
        return (rng.standard_normal(entries) / 4).astype(np.float32)[rng.integers(0, entries, shape)]
    moved = (shape[axis], *(s for i, s in enumerate(shape) if i != axis % len(shape)))
    tables = (rng.standard_normal((groups, entries)) / 4).astype(np.float32)
    codes = rng.integers(0, entries, (groups, int(np.prod(shape)) // groups))
    members = np.take_along_axis(tables, codes, 1).reshape(moved)
    return np.ascontiguousarray(np.moveaxis(members, 0, axis))


def share(model: ir.Model, *, calibrated: bool = False, keep: bool = False, **options: Any) -> PassResult:
    """Run the pass as the host does, all checks included."""
    ctx = Context(model, ORT, calibration=data(model) if calibrated else None, keep_opset=keep)
    return run_pass(Share(**options), ctx).result


def stored(model: ir.Model) -> int:
    """Bytes of all initializers."""
    values = (value for graph in model.graphs() for value in graph.initializers.values())
    return sum(value.const_value.nbytes for value in values if value.const_value is not None)
