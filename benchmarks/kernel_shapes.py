"""Single operators of ResNet-50, MobileNetV2, BERT-base and MiniLM as ONNX models, for benchmarks/kernels.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["Operator", "operators"]

_OPSET = 17
_STEP, _ZERO = 0.02, 110
"""Scale and zero point of quantized activations."""

_BLOCK = 32
"""Weights of 4 bits that share a scale."""


@dataclass(frozen=True)
class Operator:
    """What is timed.

    Attributes:
        name: What it is, and its sizes.
        type: `float`, `INT8` or `4-bit`.
        networks: Where it comes from.
        model: Makes the model; True: images are read and written with their channels together.
        feeds: Its inputs.
        operations: Multiplications and additions, or elements where there are none.
        image: It has images.
        tolerance: Largest error relative to the greatest element; for INT8 in steps.
    """

    name: str
    type: str
    networks: str
    model: Callable[[bool], onnx.ModelProto]
    feeds: Mapping[str, np.ndarray]
    operations: int
    image: bool = False
    tolerance: float = 1e-4


@dataclass
class _Graph:
    """A model in the making: one value is handed from node to node."""

    value: str = "x"
    nodes: list[onnx.NodeProto] = field(default_factory=list[onnx.NodeProto])
    weights: list[onnx.TensorProto] = field(default_factory=list[onnx.TensorProto])

    def constant(self, array: np.ndarray | np.generic) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def then(self, op: str, *others: str, domain: str = "", **attributes: Any) -> None:
        """Apply an operator to the value and others."""
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, [self.value, *others], [name], domain=domain, **attributes))
        self.value = name

    def dequantized(self, array: np.ndarray, scale: np.ndarray | float, zero: np.ndarray | int, axis: int) -> str:
        """A constant of integers as floats."""
        zeros = np.full(np.shape(scale), zero, array.dtype)
        names = [self.constant(a) for a in (array, np.asarray(scale, np.float32), zeros)]
        out = f"d{len(self.nodes)}"
        self.nodes.append(helper.make_node("DequantizeLinear", names, [out], axis=axis))
        return out

    def grid(self, op: str, scale: float) -> None:
        """Quantize or dequantize the value."""
        self.then(op, self.constant(np.float32(scale)), self.constant(np.uint8(_ZERO)))

    def finished(self, feeds: Mapping[str, np.ndarray]) -> onnx.ModelProto:
        """The model, with the shapes of what it reads; the result has the type of the input."""
        kinds = {name: _KINDS[feed.dtype.name] for name, feed in feeds.items()}
        sources = [helper.make_tensor_value_info(name, kinds[name], feed.shape) for name, feed in feeds.items()]
        result = helper.make_tensor_value_info(self.value, kinds["x"], None)
        graph = helper.make_graph(self.nodes, "operator", sources, [result], self.weights)
        imports = [helper.make_opsetid("", _OPSET), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=9)
        return onnx.shape_inference.infer_shapes(model)


_KINDS = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8}
_RANDOM = np.random.default_rng(0)


def _floats(*shape: int) -> np.ndarray:
    return _RANDOM.standard_normal(shape, dtype=np.float32)


def _signed(*shape: int) -> np.ndarray:
    return _RANDOM.integers(-127, 128, shape).astype(np.int8)


def _wrapped(feed: np.ndarray, channels_last: bool, body: Callable[[_Graph], None]) -> onnx.ModelProto:
    """A model of an image; transpositions to the order that ours computes in are no work for it."""
    graph = _Graph()
    if channels_last:
        graph.then("Transpose", perm=[0, 3, 1, 2])
    body(graph)
    if channels_last:
        graph.then("Transpose", perm=[0, 2, 3, 1])
    return graph.finished({"x": feed.transpose(0, 2, 3, 1) if channels_last else feed})


# ---------------------------------------------------------------- convolutions


@dataclass(frozen=True)
class _Conv:
    size: int
    channels: int
    filters: int
    taps: int = 1
    stride: int = 1
    groups: int = 1
    chain: int = 1

    @property
    def name(self) -> str:
        """Taps, image and channels."""
        what = f"depthwise {self.taps}x{self.taps}" if self.groups > 1 else f"conv {self.taps}x{self.taps}"
        channels = f"{self.channels}" if self.groups > 1 else f"{self.channels}-{self.filters}"
        stride = f" /{self.stride}" if self.stride > 1 else ""
        return f"{what}{stride} {self.size}x{self.size} {channels}{f' x{self.chain}' if self.chain > 1 else ''}"

    @property
    def depth(self) -> int:
        """Terms of a sum."""
        return self.channels // self.groups * self.taps * self.taps

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * (self.size // self.stride) ** 2 * self.filters * self.depth * self.chain

    def attributes(self) -> dict[str, Any]:
        """Of the node."""
        pad = self.taps // 2
        sizes = {"kernel_shape": [self.taps] * 2, "strides": [self.stride] * 2, "pads": [pad] * 4}
        return {**sizes, "group": self.groups}

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.filters, self.channels // self.groups, self.taps, self.taps


def _float_conv(conv: _Conv, networks: str) -> Operator:
    weights = [_floats(*conv.shape) / np.float32(math.sqrt(conv.depth)) for _ in range(conv.chain)]
    biases, feed = [_floats(conv.filters) for _ in weights], _floats(1, conv.channels, conv.size, conv.size)

    def body(graph: _Graph) -> None:
        for weight, bias in zip(weights, biases, strict=True):
            graph.then("Conv", graph.constant(weight), graph.constant(bias), **conv.attributes())
            graph.then("Relu")

    return Operator(
        conv.name, "float", networks, lambda last: _wrapped(feed, last, body), {"x": feed}, conv.operations, image=True
    )


def _byte_conv(conv: _Conv, networks: str) -> Operator:
    weights = [_signed(*conv.shape) for _ in range(conv.chain)]
    # so that results fill the grid that the next layer reads
    wide = 73 * math.sqrt(conv.depth)
    scales = [(_RANDOM.random(conv.filters) + 0.5).astype(np.float32) / np.float32(wide) for _ in weights]
    feed = _RANDOM.integers(0, 256, (1, conv.channels, conv.size, conv.size)).astype(np.uint8)

    def body(graph: _Graph) -> None:
        for weight, scale in zip(weights, scales, strict=True):
            graph.grid("DequantizeLinear", _STEP)
            bias = np.zeros(conv.filters, np.int32)
            held = graph.dequantized(weight, scale, 0, 0), graph.dequantized(bias, scale * np.float32(_STEP), 0, 0)
            graph.then("Conv", *held, **conv.attributes())
            graph.grid("QuantizeLinear", _STEP)

    return Operator(
        conv.name, "INT8", networks, lambda last: _wrapped(feed, last, body), {"x": feed}, conv.operations, image=True,
        tolerance=1.0,
    )  # fmt: skip


_RESNET, _MOBILE, _BERT, _MINILM = "ResNet-50", "MobileNetV2", "BERT-base", "MiniLM"

_CONVS: Sequence[tuple[_Conv, str]] = [
    (_Conv(224, 3, 64, 7, 2), _RESNET),
    (_Conv(56, 64, 64, 3, chain=4), _RESNET),
    (_Conv(28, 128, 128, 3, chain=4), _RESNET),
    (_Conv(14, 256, 256, 3, chain=4), _RESNET),
    (_Conv(7, 512, 512, 3, chain=4), _RESNET),
    (_Conv(56, 128, 128, 3, 2), _RESNET),
    (_Conv(56, 64, 64), _RESNET),
    (_Conv(56, 64, 256), _RESNET),
    (_Conv(56, 256, 64), _RESNET),
    (_Conv(56, 256, 512, 1, 2), _RESNET),
    (_Conv(28, 512, 128), _RESNET),
    (_Conv(28, 128, 512), _RESNET),
    (_Conv(14, 1024, 256), _RESNET),
    (_Conv(14, 256, 1024), _RESNET),
    (_Conv(7, 2048, 512), _RESNET),
    (_Conv(7, 512, 2048), _RESNET),
    (_Conv(224, 3, 32, 3, 2), _MOBILE),
    (_Conv(112, 32, 32, 3, groups=32, chain=4), _MOBILE),
    (_Conv(112, 96, 96, 3, 2, groups=96), _MOBILE),
    (_Conv(56, 144, 144, 3, groups=144, chain=4), _MOBILE),
    (_Conv(56, 144, 144, 3, 2, groups=144), _MOBILE),
    (_Conv(14, 384, 384, 3, groups=384, chain=4), _MOBILE),
    (_Conv(7, 960, 960, 3, groups=960, chain=4), _MOBILE),
    (_Conv(112, 16, 96), _MOBILE),
    (_Conv(56, 24, 144), _MOBILE),
    (_Conv(56, 144, 24), _MOBILE),
    (_Conv(28, 32, 192), _MOBILE),
    (_Conv(14, 64, 384), _MOBILE),
    (_Conv(14, 576, 96), _MOBILE),
    (_Conv(7, 160, 960), _MOBILE),
    (_Conv(7, 320, 1280), _MOBILE),
]

# ---------------------------------------------------------------- products

_GEMMS: Sequence[tuple[int, int, int, str]] = [
    (1, 1000, 2048, _RESNET), (1, 1000, 1280, _MOBILE),
    (128, 768, 768, _BERT), (128, 3072, 768, _BERT), (128, 768, 3072, _BERT),
    (128, 384, 384, _MINILM), (128, 1536, 384, _MINILM), (128, 384, 1536, _MINILM),
]  # fmt: skip
"""Rows, columns, terms of a sum."""


def _float_gemm(rows: int, columns: int, depth: int, networks: str, *, gelu: bool = False) -> Operator:
    weight, bias = _floats(depth, columns) / np.float32(math.sqrt(depth)), _floats(columns)
    feed = _floats(rows, depth)

    def model(_: bool) -> onnx.ModelProto:
        graph = _Graph()
        graph.then("MatMul", graph.constant(weight))
        graph.then("Add", graph.constant(bias))
        if gelu:
            sums = graph.value
            graph.then("Div", graph.constant(np.float32(math.sqrt(2))))
            graph.then("Erf")
            graph.then("Add", graph.constant(np.float32(1)))
            graph.then("Mul", sums)
            graph.then("Mul", graph.constant(np.float32(0.5)))
        return graph.finished({"x": feed})

    name = f"gemm{' + GELU' if gelu else ''} {rows}x{columns}x{depth}"
    return Operator(name, "float", networks, model, {"x": feed}, 2 * rows * columns * depth)


def _byte_gemm(rows: int, columns: int, depth: int, networks: str) -> Operator:
    weight, wide = _signed(depth, columns), 73 * math.sqrt(depth)
    scale = (_RANDOM.random(columns) + 0.5).astype(np.float32) / np.float32(wide)
    feed = _RANDOM.integers(0, 256, (rows, depth)).astype(np.uint8)

    def model(_: bool) -> onnx.ModelProto:
        graph = _Graph()
        graph.grid("DequantizeLinear", _STEP)
        bias = graph.dequantized(np.zeros(columns, np.int32), scale * np.float32(_STEP), 0, 0)
        graph.then("Gemm", graph.dequantized(weight, scale, 0, 1), bias)
        graph.grid("QuantizeLinear", _STEP)
        return graph.finished({"x": feed})

    name = f"gemm {rows}x{columns}x{depth}"
    return Operator(name, "INT8", networks, model, {"x": feed}, 2 * rows * columns * depth, tolerance=1.0)


def _nibble_gemm(rows: int, columns: int, depth: int, level: int, networks: str) -> Operator:
    """MatMulNBits; at level 4 activations are rounded to bytes, by both in their own way."""
    blocks = depth // _BLOCK
    weight = _RANDOM.integers(0, 256, (columns, blocks, _BLOCK // 2)).astype(np.uint8)
    scales, feed = (_RANDOM.random((columns, blocks)) / 50).astype(np.float32), _floats(rows, depth)

    def model(_: bool) -> onnx.ModelProto:
        graph = _Graph()
        held = graph.constant(weight), graph.constant(scales.reshape(-1))
        sizes = {"K": depth, "N": columns, "bits": 4, "block_size": _BLOCK, "accuracy_level": level}
        graph.then("MatMulNBits", *held, domain="com.microsoft", **sizes)
        return graph.finished({"x": feed})

    name = f"gemm {rows}x{columns}x{depth}, {'INT8' if level else 'float'} activations"
    operations = 2 * rows * columns * depth
    return Operator(name, "4-bit", networks, model, {"x": feed}, operations, tolerance=2e-2 if level else 1e-4)


# ---------------------------------------------------------------- attention and rows


def _attention(heads: int, tokens: int, size: int, networks: str) -> Iterator[Operator]:
    """Both products of two activations."""
    for name, rows, columns, depth in (("scores", tokens, tokens, size), ("weighed values", tokens, size, tokens)):
        feeds = {"x": _floats(1, heads, rows, depth), "y": _floats(1, heads, depth, columns)}

        def model(_: bool, feeds: Mapping[str, np.ndarray] = feeds) -> onnx.ModelProto:
            graph = _Graph()
            graph.then("MatMul", "y")
            return graph.finished(feeds)

        operations = 2 * heads * rows * columns * depth
        yield Operator(f"{name} {heads}x{rows}x{columns}x{depth}", "float", networks, model, feeds, operations)


def _row(op: str, rows: int, columns: int, networks: str) -> Operator:
    feed, scale, bias = _floats(rows, columns), _floats(columns), _floats(columns)

    def model(_: bool) -> onnx.ModelProto:
        graph = _Graph()
        if op == "Softmax":
            graph.then(op, axis=-1)
        else:
            graph.then(op, graph.constant(scale), graph.constant(bias), axis=-1, epsilon=1e-5)
        return graph.finished({"x": feed})

    return Operator(f"{op} {rows}x{columns}", "float", networks, model, {"x": feed}, rows * columns)


def operators() -> Mapping[str, Sequence[Operator]]:
    """All of them by type."""
    floats = [_float_conv(conv, networks) for conv, networks in _CONVS]
    floats += [_float_gemm(*gemm) for gemm in _GEMMS]
    floats += [_float_gemm(128, 3072, 768, _BERT, gelu=True), _float_gemm(128, 1536, 384, _MINILM, gelu=True)]
    floats += [*_attention(12, 128, 64, _BERT), *_attention(12, 128, 32, _MINILM)]
    floats += [_row("Softmax", 12 * 128, 128, f"{_BERT}, {_MINILM}"), _row("Softmax", 1, 1000, _RESNET)]
    floats += [_row("LayerNormalization", 128, 768, _BERT), _row("LayerNormalization", 128, 384, _MINILM)]
    nibbles = [
        _nibble_gemm(rows, columns, depth, level, networks)
        for _, columns, depth, networks in _GEMMS[2:]
        for rows in (1, 16, 128)
        for level in (0, 4)
    ]
    integers = [_byte_conv(conv, networks) for conv, networks in _CONVS]
    return {"float": floats, "INT8": [*integers, *(_byte_gemm(*gemm) for gemm in _GEMMS)], "4-bit": nibbles}
