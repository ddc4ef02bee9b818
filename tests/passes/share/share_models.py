"""Models with shared weights, and what tests ask of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.calibration import Dataset
from graphopt.model_io import ShapeBinding, input_specs
from graphopt.pass_base import Context, PassResult
from graphopt.reference import Feed, Reference
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


def data(model: ir.Model, count: int = 8, size: int = 5, rows: int = 6) -> Dataset:
    """Random feeds whose features go together; integers are indices below `rows`."""

    def read() -> Iterator[Feed]:
        rng = np.random.default_rng(3)
        shapes = {spec.name: spec.concrete(ShapeBinding(), size) for spec in input_specs(model)}
        mix = {n: rng.standard_normal((s[-1],) * 2) * rng.lognormal(0, 1, s[-1]) for n, s in shapes.items() if s}
        for _ in range(count):
            feed: Feed = {}
            for spec in input_specs(model):
                shape, kind = shapes[spec.name], spec.dtype
                if kind.is_floating_point():
                    feed[spec.name] = (rng.standard_normal(shape) @ mix[spec.name]).astype(kind.numpy())
                else:
                    most = 2 if kind == ir.DataType.BOOL else rows
                    feed[spec.name] = np.asarray(rng.integers(0, most, shape), kind.numpy())
            yield feed

    return Dataset("samples", "0", read)


def share(model: ir.Model, *, calibrated: bool = False, keep: bool = False, **options: Any) -> PassResult:
    """Run the pass as the host does, all checks included."""
    ctx = Context(model, ORT, calibration=data(model) if calibrated else None, keep_opset=keep)
    return run_pass(Share(**options), ctx).result


def outputs(model: ir.Model, count: int = 4) -> list[Feed]:
    session = Reference(model)
    return [session.run(feed) for feed in data(model, count).feeds()]


def assert_exact(before: ir.Model, after: ir.Model) -> None:
    for wanted, got in zip(outputs(before), outputs(after), strict=True):
        for name, reference in wanted.items():
            np.testing.assert_allclose(got[name], reference, atol=2e-5 * max(1.0, float(np.abs(reference).max())))


def sqnr(before: ir.Model, after: ir.Model) -> float:
    """The least over outputs and random inputs, in dB."""
    worst = np.inf
    for wanted, got in zip(outputs(before), outputs(after), strict=True):
        for name, reference in wanted.items():
            noise = float(np.square(got[name] - reference).sum())
            worst = min(worst, 10 * np.log10(float(np.square(reference).sum()) / max(noise, 1e-30)))
    return worst


def kinds(model: ir.Model) -> Counter[str]:
    """Operators of a model, subgraphs included."""
    return Counter(node.op_type for graph in model.graphs() for node in graph)


def stored(model: ir.Model) -> int:
    """Bytes of all initializers."""
    values = (value for graph in model.graphs() for value in graph.initializers.values())
    return sum(value.const_value.nbytes for value in values if value.const_value is not None)


def actions(result: PassResult) -> dict[str, str]:
    return {change.site: change.action for change in result.changes}
