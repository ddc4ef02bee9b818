"""Models quantized by graphopt and by ONNX Runtime's own quantizers, and how far they are from what they were."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnxruntime.quantization import CalibrationDataReader, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from small_models import build, context

from graphopt.calibration import Dataset
from graphopt.model_io import ShapeBinding, input_specs, load_model, save_model
from graphopt.pass_base import PassResult
from graphopt.reference import Feed, Reference
from graphopt.runner import run_pass
from graphopt_passes.quant import Quant

SIZE = 3  # of dimensions that are open

MLP = """[one] h = MatMul(x, w1)  [bias] i = Add(h, b1)  [act] r = Relu(i)  [two] y = Gemm<transB = 1>(r, w2, b2)"""
MLP_WEIGHTS = {"w1": (64, 64), "b1": (64,), "w2": (32, 64), "b2": (32,)}
CNN = """
  [first] a = Conv<pads = [1,1,1,1]>(x, w1, b1)  [rectify] b = Relu(a)
  [second] c = Conv<pads = [1,1,1,1], group = 8>(b, w2, b2)  [third] e = Conv(c, w3)
  [residual] f = Add(e, b)  [last] z = Relu(f)
  [pool] p = MaxPool<kernel_shape = [2,2], strides = [2,2]>(z)  [mean] m = GlobalAveragePool(p)
  [flat] q = Flatten(m)  [classify] y = Gemm<transB = 1>(q, w4, b4)
"""
CNN_WEIGHTS = {
    "w1": (16, 3, 3, 3), "b1": (16,), "w2": (16, 2, 3, 3), "b2": (16,), "w3": (16, 16, 1, 1), "w4": (10, 16),
    "b4": (10,),
}  # fmt: skip


def mlp(opset: int = 17) -> ir.Model:
    return build("(float[N,64] x) => (float[N,32] y)", MLP, MLP_WEIGHTS, opset)


def cnn(opset: int = 17) -> ir.Model:
    return build("(float[N,3,8,8] x) => (float[N,10] y)", CNN, CNN_WEIGHTS, opset)


def samples(model: ir.Model, count: int = 6, seed: int = 3) -> Dataset:
    def read() -> Iterator[Feed]:
        rng = np.random.default_rng(seed)
        for _ in range(count):
            yield {
                spec.name: _random(rng, spec.dtype, spec.concrete(ShapeBinding(), SIZE)) for spec in input_specs(model)
            }

    return Dataset("samples", "0", read)


def _random(rng: np.random.Generator, dtype: ir.DataType, shape: tuple[int, ...]) -> np.ndarray:
    if dtype.is_floating_point():
        return (rng.standard_normal(shape) + 0.3).astype(dtype.numpy())  # off centre, so that zero points matter
    return np.asarray(rng.integers(0, 2, shape)).astype(dtype.numpy())


def quantize(model: ir.Model, *, data: bool = False, keep_opset: bool = False, **options: object) -> PassResult:
    """Run the pass as the host does, all checks included."""
    ctx = context(model, calibration=samples(model) if data else None, keep_opset=keep_opset)
    return run_pass(Quant(**options), ctx).result  # type: ignore[arg-type]


def decibels(before: ir.Model, after: ir.Model, count: int = 4) -> float:
    """Signal to noise of the worst output over random inputs; both models run as they are written."""
    left, right, worst = Reference(before, optimize=False), Reference(after, optimize=False), np.inf
    for feed in samples(before, count).feeds():
        expected, got = left.run(feed), right.run(feed)
        for name, reference in expected.items():
            assert got[name].shape == reference.shape
            noise = float(np.square(got[name].astype(np.float64) - reference).sum())
            worst = min(worst, 10 * np.log10(float(np.square(reference).sum()) / max(noise, 1e-30)))
    return worst


def actions(result: PassResult) -> dict[str, str]:
    return {change.site: change.action for change in result.changes}


def kinds(model: ir.Model) -> list[str]:
    return sorted(node.op_type for graph in model.graphs() for node in graph)


class _Reader(CalibrationDataReader):
    def __init__(self, model: ir.Model) -> None:
        self.feeds = iter(samples(model).feeds())

    def get_next(self) -> Any:
        return next(self.feeds, None)


def by_static(model: ir.Model, **options: Any) -> ir.Model:
    """What onnxruntime.quantization.quantize_static makes of a model."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "a.onnx", Path(folder) / "b.onnx"
        save_model(model, source)
        quantize_static(source, target, _Reader(model), **options)
        return load_model(target)


def by_dynamic(model: ir.Model, **options: Any) -> ir.Model:
    """What onnxruntime.quantization.quantize_dynamic makes of a model."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "a.onnx", Path(folder) / "b.onnx"
        save_model(model, source)
        quantize_dynamic(source, target, **options)
        return load_model(target)


def by_blocks(model: ir.Model, **options: Any) -> ir.Model:
    """What onnxruntime's MatMulNBitsQuantizer makes of a model."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "a.onnx", Path(folder) / "b.onnx"
        save_model(model, source)
        quantizer = MatMulNBitsQuantizer(onnx.load(source), **options)
        quantizer.process()
        quantizer.model.save_model_to_file(str(target))
        return load_model(target)


def optimized(model: ir.Model) -> list[str]:
    """Operators that ONNX Runtime runs a model with, subgraphs included."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "a.onnx", Path(folder) / "b.onnx"
        save_model(model, source)
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.optimized_model_filepath = 3, str(target)
        onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
        return kinds(ir.load(target))


def tensors(model: ir.Model) -> Mapping[str, ir.TensorProtocol]:
    found = {name: v.const_value for graph in model.graphs() for name, v in graph.initializers.items()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}
