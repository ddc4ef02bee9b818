"""What tests of passes that rewrite weights ask of models: random data, what they compute, what they are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from graphopt.calibration import Dataset
from graphopt.model_io import ShapeBinding, input_specs
from graphopt.pass_base import PassResult
from graphopt.reference import Feed, Reference


def data(model: ir.Model, count: int = 8, size: int = 5, rows: int = 6) -> Dataset:
    """Random feeds whose features go together and differ in size; integers are indices below `rows`."""

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


def outputs(model: ir.Model, count: int = 4, *, optimize: bool = True) -> list[Feed]:
    """What a model makes of random data; without ONNX Runtime's fusions, which may round activations, on request."""
    session = Reference(model, optimize=optimize)
    return [session.run(feed) for feed in data(model, count).feeds()]


def assert_exact(before: ir.Model, after: ir.Model, count: int = 4, *, optimize: bool = True) -> None:
    """Both models compute the same."""
    pairs = zip(outputs(before, count), outputs(after, count, optimize=optimize), strict=True)
    for wanted, got in pairs:
        for name, reference in wanted.items():
            np.testing.assert_allclose(got[name], reference, atol=2e-5 * max(1.0, float(np.abs(reference).max())))


def sqnr(before: ir.Model, after: ir.Model) -> float:
    """The least over outputs and random inputs, in dB, as ONNX Runtime runs them."""
    worst = np.inf
    for wanted, got in zip(outputs(before), outputs(after), strict=True):
        for name, reference in wanted.items():
            noise = float(np.square(got[name] - reference).sum())
            worst = min(worst, 10 * np.log10(float(np.square(reference).sum()) / max(noise, 1e-30)))
    return worst


def kinds(model: ir.Model) -> Counter[str]:
    """Operators of a model, subgraphs included."""
    return Counter(node.op_type for graph in model.graphs() for node in graph)


def actions(result: PassResult) -> dict[str, str]:
    """What was done at each site, or why nothing was."""
    return {change.site: change.action for change in result.changes}
