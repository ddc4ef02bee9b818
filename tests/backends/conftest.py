"""Small models that the backend tests share, made here with fixed weights."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from graphopt.backend_base import Backend
from graphopt.targets import Target, TargetTable
from graphopt_backends import graphopt_backends, graphopt_targets

Make = Callable[..., ir.Model]


@pytest.fixture(scope="session")
def targets() -> TargetTable:
    return TargetTable(graphopt_targets())


@pytest.fixture(scope="session")
def backend(targets: TargetTable) -> Callable[[str], tuple[Backend, Target]]:
    known = {b.name: b for b in graphopt_backends()}

    def find(text: str) -> tuple[Backend, Target]:
        target = targets.resolve(text)
        assert target.backend
        return known[target.backend], target

    return find


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def arm_cache(cache: Path, backend) -> Path:
    """A cache with the aarch64 runtime, where it can be had."""
    from graphopt.errors import BackendError

    arm, target = backend("arm")
    user = Path.home() / ".cache" / "graphopt"
    from graphopt_backends._runtime import LIBRARIES, cached_runtime

    if all((cached_runtime("aarch64", user) / name).is_file() for name in LIBRARIES):
        return user
    try:
        arm.fetch(target, cache)
    except BackendError as e:
        pytest.skip(f"no aarch64 runtime: {e}")
    return cache


def build_model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    weights: dict[str, np.ndarray],
    opset: int = 17,
    domains: Sequence[str] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes), "small", list(inputs), list(outputs), [numpy_helper.from_array(v, k) for k, v in weights.items()]
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def cnn_proto(batch: int | str = "N") -> onnx.ModelProto:
    """Conv, ReLU, MaxPool, depthwise Conv, residual Add, global pooling, Gemm."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    weights = {
        "w1": draw(8, 3, 3, 3), "b1": draw(8, 1).reshape(8), "w2": draw(8, 1, 3, 3), "w3": draw(8, 8, 1, 1),
        "wf": draw(10, 8), "bf": draw(10, 1).reshape(10),
    }  # fmt: skip
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["c1"], "conv1", pads=[1, 1, 1, 1]),
        node("Relu", ["c1"], ["r1"], "relu1"),
        node("MaxPool", ["r1"], ["p1"], "pool1", kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["p1", "w2"], ["c2"], "conv2", auto_pad="SAME_UPPER", group=8),
        node("Conv", ["c2", "w3"], ["c3"], "conv3"),
        node("Add", ["c3", "p1"], ["s"], "add"),
        node("GlobalAveragePool", ["s"], ["g"], "gap"),
        node("Flatten", ["g"], ["f"], "flatten"),
        node("Gemm", ["f", "wf", "bf"], ["y"], "fc", transB=1),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 16, 16])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 10])
    return build_model(nodes, [x], [y], weights)


def mlp_proto() -> onnx.ModelProto:
    rng = np.random.default_rng(1)
    weights = {
        "w1": rng.standard_normal((12, 32)).astype(np.float32),
        "b1": rng.standard_normal(32).astype(np.float32),
        "w2": rng.standard_normal((32, 5)).astype(np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["m"], "matmul1"),
        helper.make_node("Add", ["m", "b1"], ["a"], "add"),
        helper.make_node("Tanh", ["a"], ["t"], "tanh"),
        helper.make_node("MatMul", ["t", "w2"], ["l"], "matmul2"),
        helper.make_node("Softmax", ["l"], ["y"], "softmax", axis=-1),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 12])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5])
    return build_model(nodes, [x], [y], weights)


class _Reader(CalibrationDataReader):
    def __init__(self) -> None:
        rng = np.random.default_rng(2)
        self._feeds = iter([{"x": rng.standard_normal((1, 3, 16, 16)).astype(np.float32)} for _ in range(8)])

    def get_next(self) -> dict[str, np.ndarray] | None:  # type: ignore[override]
        return next(self._feeds, None)


@pytest.fixture(scope="session")
def cnn() -> ir.Model:
    return ir.from_proto(cnn_proto())


@pytest.fixture(scope="session")
def mlp() -> ir.Model:
    return ir.from_proto(mlp_proto())


@pytest.fixture(scope="session")
def quantized_cnn(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ir.Model]:
    """The small CNN with QDQ pairs by ONNX Runtime's own quantizer, weights per channel."""
    folder = tmp_path_factory.mktemp("quantized")
    source = folder / "float.onnx"
    onnx.save(cnn_proto(), source)

    def make(activation: str) -> ir.Model:
        path = folder / f"{activation}.onnx"
        kind = QuantType.QUInt8 if activation == "uint8" else QuantType.QInt8
        quantize_static(
            str(source), str(path), _Reader(), quant_format=QuantFormat.QDQ, per_channel=True, activation_type=kind
        )
        return ir.load(path)

    return make


@pytest.fixture(scope="session")
def det_model() -> ir.Model:
    """An operator that only ONNX Runtime runs, between two that compile."""
    nodes = [
        helper.make_node("Mul", ["x", "half"], ["h"], "scale"),
        helper.make_node("Det", ["h"], ["d"], "determinant"),
        helper.make_node("Relu", ["d"], ["y"], "relu"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [6, 4, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [6])
    return ir.from_proto(build_model(nodes, [x], [y], {"half": np.float32(0.5)}))


def in_subprocess(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
