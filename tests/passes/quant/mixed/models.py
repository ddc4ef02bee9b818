"""Models whose layers differ in how much they matter, and how to quantize them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from small_models import build

from graphopt.calibration import Dataset
from graphopt.model_io import ShapeBinding
from graphopt.pass_base import Context, PassResult
from graphopt.reference import Feed
from graphopt.runner import run_pass
from graphopt.targets import Target
from graphopt_passes.quant import Quant

WIDTH = 64
QUIET = 0.02  # how much of the branch reaches the output


def branches(opset: int = 17) -> ir.Model:
    """Two layers in a row, and two whose result is almost nothing beside theirs."""
    body = """
    [loud] a = MatMul(x, w1)
    r = Relu(a)
    [loud2] b = MatMul(r, w2)
    [quiet] c = MatMul(x, w3)
    q = Relu(c)
    [quiet2] d = MatMul(q, w4)
    s = Mul(d, little)
    y = Add(b, s)
    """
    shapes = dict.fromkeys(("w1", "w2", "w3", "w4"), (WIDTH, WIDTH))
    model = build(f"(float[N,{WIDTH}] x) => (float[N,{WIDTH}] y)", body, {**shapes, "little": (1,)}, opset)
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        array = np.full(1, QUIET, np.float32) if name == "little" else tensor.numpy() / 8
        value.const_value = ir.tensor(array, name=name)
    return model


def samples(shape: tuple[int, ...] = (4, WIDTH), count: int = 8) -> Dataset:
    def read() -> Iterator[Feed]:
        rng = np.random.default_rng(5)
        for _ in range(count):
            yield {"x": rng.standard_normal(shape).astype(np.float32)}

    return Dataset("samples", "0", read)


def bound(model: ir.Model, *, data: bool = True, target: Target | None = None) -> Context:
    calibration = samples() if data else None
    sizes = ShapeBinding(dims={"N": 4})
    return Context(model, target or Target(name="ort"), calibration=calibration, binding=sizes)


def quantize(model: ir.Model, *, data: bool = True, **options: object) -> PassResult:
    """Run the pass as the host does, all checks included."""
    return run_pass(Quant(**options), bound(model, data=data)).result  # type: ignore[arg-type]
