"""One small QDQ graph for every operator that the NPU takes, and for every way it is used."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from npu_makers import (
    Case,
    concat,
    convolution,
    gemm,
    integers,
    matmul,
    one_input,
    resize,
    split,
    two_inputs,
    with_constant,
)
from quantized_graphs import Drawing

__all__ = ["CASES", "REFUSED", "SIXTEEN", "model"]

CASES: dict[str, Case] = {}
_RELU, _RELU6 = ("Relu", {}), ("Clip", {"min": np.float32(0), "max": np.float32(6)})


def model(*names: str, dtype: str = "int8") -> ir.Model:
    """The graphs of cases, side by side, with activations of 8 or 16 bits."""
    drawing = Drawing(sum(map(ord, names[0])), dtype)
    return drawing.output(*[CASES[name](drawing) for name in names])


IMAGE = (1, 3, 9, 7)

_convolutions = {
    "conv": convolution(IMAGE, (5, 3, 3, 3), pads=[1, 1, 1, 1]),
    "conv, one scale": convolution(IMAGE, (5, 3, 3, 3), axis=None),
    "conv without bias": convolution(IMAGE, (5, 3, 1, 1), bias=False),
    "conv, relu": convolution(IMAGE, (4, 3, 3, 3), act=_RELU),
    "conv, relu6": convolution(IMAGE, (4, 3, 3, 3), act=_RELU6),
    "conv, clip": convolution(IMAGE, (4, 3, 3, 3), act=("Clip", {"min": np.float32(-1.5), "max": np.float32(0.7)})),
    "conv, strides": convolution(IMAGE, (5, 3, 3, 2), strides=[2, 3], pads=[0, 1, 2, 1]),
    "conv, stride that leaves over": convolution((1, 3, 8, 8), (4, 3, 1, 1), strides=[2, 2]),
    "conv, long steps along one axis": convolution((1, 3, 9, 21), (4, 3, 3, 4), strides=[2, 5], pads=[1, 2, 0, 3],
                                             dilations=[1, 2]),
    "conv, long steps in groups": convolution((1, 4, 13, 13), (4, 2, 3, 3), strides=[4, 4], group=2),
    "depthwise, long steps": convolution((1, 5, 13, 11), (5, 1, 4, 4), group=5, strides=[4, 4], pads=[1, 1, 1, 1]),
    "conv, patches": convolution((1, 3, 16, 16), (6, 3, 8, 8), strides=[8, 8]),
    "conv, patches of 4 with a rest": convolution((1, 3, 15, 13), (6, 3, 4, 4), strides=[4, 4]),
    "conv, stride 5 of 7": convolution((1, 3, 21, 19), (4, 3, 7, 7), strides=[5, 4], pads=[3, 3, 3, 3]),
    "conv, dilated": convolution((1, 3, 12, 12), (4, 3, 3, 3), dilations=[2, 3], pads=[2, 3, 2, 3]),
    "conv, dilated by 6": convolution((1, 3, 17, 16), (4, 3, 3, 3), dilations=[6, 6], pads=[6, 6, 6, 6]),
    "conv, same upper": convolution(IMAGE, (4, 3, 3, 2), strides=[2, 2], auto_pad="SAME_UPPER"),
    "conv, same lower": convolution(IMAGE, (4, 3, 4, 2), strides=[1, 2], auto_pad="SAME_LOWER"),
    "conv, valid": convolution(IMAGE, (4, 3, 3, 2), auto_pad="VALID"),
    "conv, two samples": convolution((2, 3, 6, 5), (4, 3, 3, 3), pads=[1, 0, 1, 0]),
    "conv, groups": convolution((1, 6, 7, 5), (8, 3, 3, 3), group=2, pads=[1, 1, 1, 1]),
    "conv of a row": convolution((1, 4, 19), (6, 4, 5), pads=[2, 1], strides=[2]),
    "conv of a row, groups": convolution((2, 4, 19), (4, 2, 3), group=2, dilations=[2]),
    "conv larger than the image": convolution((1, 3, 4, 4), (4, 3, 5, 5), pads=[2, 2, 2, 2]),
    "depthwise": convolution((1, 6, 9, 7), (6, 1, 3, 3), group=6, pads=[1, 1, 1, 1], act=_RELU6),
    "depthwise, strides": convolution((1, 6, 9, 8), (6, 1, 3, 3), group=6, strides=[2, 2], pads=[0, 0, 1, 1]),
    "depthwise, two of each": convolution((1, 5, 8, 7), (10, 1, 3, 3), group=5, pads=[1, 1, 1, 1]),
    "depthwise, dilated": convolution((1, 5, 8, 9), (5, 1, 3, 3), group=5, dilations=[2, 2]),
    "depthwise, one channel": convolution((1, 1, 8, 9), (3, 1, 3, 3)),
    "depthwise of a row": convolution((1, 6, 21), (6, 1, 9), group=6, pads=[4, 4]),
    "depthwise, two samples": convolution((2, 6, 7, 5), (6, 1, 3, 3), group=6),
    "deconv": convolution((1, 4, 5, 6), (4, 3, 3, 3), 1, kind="ConvTranspose", strides=[2, 2], pads=[1, 1, 1, 1]),
    "deconv, larger": convolution(
        (1, 4, 5, 6), (4, 3, 3, 3), 1, kind="ConvTranspose", strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1]
    ),
    "deconv by one": convolution((1, 4, 5, 6), (4, 3, 3, 2), 1, kind="ConvTranspose", pads=[1, 0, 0, 1]),
    "deconv, 2 x 2": convolution((2, 4, 5, 6), (4, 3, 2, 2), 1, kind="ConvTranspose", strides=[2, 2]),
    "deconv, same": convolution((1, 4, 5, 6), (4, 3, 4, 3), 1, kind="ConvTranspose", strides=[2, 2],
                                auto_pad="SAME_UPPER"),
    "deconv, shape": convolution(
        (1, 4, 5, 6), (4, 3, 3, 3), 1, kind="ConvTranspose", strides=[2, 2], output_shape=[10, 12]
    ),
    "deconv, shape, same upper": convolution((1, 4, 5, 6), (4, 3, 3, 3), 1, kind="ConvTranspose", strides=[2, 2],
                                       output_shape=[10, 12], auto_pad="SAME_UPPER"),
    "deconv, same lower": convolution((1, 4, 5, 6), (4, 3, 3, 5), 1, kind="ConvTranspose", strides=[2, 2],
                                auto_pad="SAME_LOWER"),
    "deconv, strides of 3": convolution((2, 4, 5, 6), (4, 3, 5, 5), 1, kind="ConvTranspose", strides=[3, 3],
                                  pads=[1, 2, 0, 1]),
    "deconv, depthwise of 8": convolution((1, 8, 4, 3), (8, 1, 16, 16), None, kind="ConvTranspose", strides=[8, 8],
                                    pads=[4, 4, 4, 4], group=8),
    "deconv, groups": convolution((1, 4, 5, 6), (4, 3, 3, 3), 1, kind="ConvTranspose", strides=[2, 2], group=2),
    "deconv, depthwise": convolution((1, 12, 5, 6), (12, 1, 4, 4), None, kind="ConvTranspose", strides=[2, 2],
                               pads=[1, 1, 1, 1], group=12),
    "deconv, wide strides": convolution((1, 4, 5, 6), (4, 3, 4, 4), 1, kind="ConvTranspose", strides=[4, 4]),
    "deconv, strides differ": convolution((1, 4, 5, 6), (4, 3, 3, 4), 1, kind="ConvTranspose", strides=[1, 2]),
    "deconv, dilated": convolution((1, 4, 5, 6), (4, 3, 3, 2), 1, kind="ConvTranspose", dilations=[2, 3]),
    "deconv of a row": convolution((1, 4, 9), (4, 3, 4), 1, kind="ConvTranspose", strides=[2], pads=[1, 1]),
}  # fmt: skip


_products = {
    "gemm": gemm((3, 10), (10, 7), (7,), 1),
    "gemm, turned": gemm((3, 10), (7, 10), (7,), 0, transB=1, act=_RELU),
    "gemm, both turned": gemm((10, 3), (7, 10), (1, 7), transA=1, transB=1),
    "gemm, alpha and beta": gemm((3, 10), (10, 7), (7,), 1, alpha=0.37, beta=1.9),
    "gemm, one number": gemm((1, 10), (10, 7), ()),
    "matmul of rows": matmul((4, 10), (10, 6), 1),
    "matmul, rank 3": matmul((2, 5, 10), (10, 6)),
    "matmul, rank 4": matmul((1, 2, 5, 10), (10, 6), 1),
    "matmul with a batch of weights": with_constant("MatMul", (2, 5, 6), (2, 6, 4), stored=True),
    "matmul of weights": with_constant("MatMul", (1, 6, 4), (5, 6), stored=True, first=True),
    "matmul of one vector": matmul((1, 10), (10, 6), 1),
    "matmul, long": matmul((3, 300), (300, 20), 1),
    "matmul of two": two_inputs("MatMul", (4, 9), (9, 5)),
    "matmul of two, batch": two_inputs("MatMul", (3, 4, 9), (3, 9, 5)),
    "matmul of two, heads": two_inputs("MatMul", (1, 2, 6, 8), (1, 2, 8, 6)),
    "matmul of two, repeated": two_inputs("MatMul", (2, 3, 4, 9), (3, 9, 5)),
    "matmul of two, repeated left": two_inputs("MatMul", (1, 4, 9), (2, 9, 5)),
}

_elements: dict[str, Case] = {
    "sum": two_inputs("Add", IMAGE, IMAGE),
    "sum, relu": two_inputs("Add", IMAGE, IMAGE, act=_RELU),
    "sum of equal grids": two_inputs("Add", IMAGE, IMAGE, alike=True),
    "sum of rows": two_inputs("Add", (5, 7), (5, 7)),
    "sum of cubes": two_inputs("Add", (2, 5, 7), (2, 5, 7)),
    "sum, two samples": two_inputs("Add", (2, 3, 4, 5), (2, 3, 4, 5)),
    "sum, broadcast channels": two_inputs("Add", IMAGE, (1, 3, 1, 1)),
    "sum, broadcast rows": two_inputs("Add", (1, 4, 6), (6,)),
    "sum, broadcast both": two_inputs("Add", (1, 3, 1, 7), (1, 1, 9, 7)),
    "sum, broadcast samples": two_inputs("Add", (2, 3, 4, 5), (1, 3, 4, 5)),
    "sum, missing axes": two_inputs("Add", IMAGE, (9, 7)),
    "difference": two_inputs("Sub", IMAGE, IMAGE),
    "difference, broadcast": two_inputs("Sub", (1, 3, 1, 1), IMAGE),
    "product": two_inputs("Mul", IMAGE, IMAGE),
    "product, relu6": two_inputs("Mul", IMAGE, IMAGE, act=_RELU6),
    "product, squeezed": two_inputs("Mul", IMAGE, (1, 3, 1, 1)),
    "product, spread": two_inputs("Mul", IMAGE, (1, 1, 9, 7)),
    "product, rows": two_inputs("Mul", (2, 4, 6), (2, 4, 1)),
    "maximum": two_inputs("Max", IMAGE, IMAGE),
    "maximum, equal grids": two_inputs("Max", IMAGE, IMAGE, alike=True),
    "minimum": two_inputs("Min", IMAGE, (1, 3, 1, 1)),
    "sum with a number": with_constant("Add", IMAGE, ()),
    "sum with a number of rank 1": with_constant("Add", IMAGE, (1,)),
    "sum with a number, stored": with_constant("Add", IMAGE, (), stored=True),
    "product with a number, stored": with_constant("Mul", IMAGE, (1,), stored=True),
    "sum with channels": with_constant("Add", IMAGE, (1, 3, 1, 1), span=2),
    "sum with channels, stored": with_constant("Add", IMAGE, (3, 1, 1), stored=True),
    "sum with a constant": with_constant("Add", IMAGE, IMAGE[1:]),
    "sum with a constant, stored": with_constant("Add", IMAGE, IMAGE[1:], stored=True),
    "sum with a constant of several scales": lambda d: d.op(
        "Add", d.input(*IMAGE), d.dequantized(d.rng.integers(-128, 128, (3, 1, 1)), "int8", [0.1, 0.2, 0.3], axis=0)),
    "product with a constant of several scales": lambda d: d.op(
        "Mul", d.input(*IMAGE), d.dequantized(d.rng.integers(-128, 128, IMAGE), "int8", [0.1, 0.2, 0.3], axis=1)),
    "sum with positions": with_constant("Add", (1, 6, 8), (1, 6, 8)),
    "difference with channels": with_constant("Sub", IMAGE, (1, 3, 1, 1), act=_RELU),
    "difference from channels": with_constant("Sub", IMAGE, (1, 3, 1, 1), first=True),
    "difference from a number": with_constant("Sub", IMAGE, (), first=True),
    "difference from a constant": with_constant("Sub", IMAGE, IMAGE, first=True),
    "product with a number": with_constant("Mul", IMAGE, ()),
    "product with channels": with_constant("Mul", IMAGE, (1, 3, 1, 1)),
    "product with channels, stored": with_constant("Mul", IMAGE, (3, 1, 1), stored=True),
    "product with the last axis": with_constant("Mul", (2, 5, 7), (7,)),
    "product with a constant": with_constant("Mul", IMAGE, IMAGE[1:]),
    "product with a constant, stored": with_constant("Mul", IMAGE, IMAGE[1:], stored=True),
    "quotient by channels": with_constant("Div", IMAGE, (1, 3, 1, 1)),
    "prelu, steep": lambda d: d.op("PRelu", d.input(*IMAGE), d.constant([[[1.5]], [[2.0]], [[1.0]]])),
    "quotient by a constant": with_constant("Div", (2, 3), (2, 3), span=4),
    "sum with one of another shape": with_constant("Add", (1, 3, 1, 1), (1, 1, 4, 5), stored=True),
    "prelu": with_constant("PRelu", IMAGE, (3, 1, 1), span=0.3),
    "prelu, stored": with_constant("PRelu", IMAGE, (3, 1, 1), stored=True, span=0.2),
    "prelu, one slope": with_constant("PRelu", IMAGE, (1,)),
    "prelu, rows": with_constant("PRelu", (2, 6), (6,), span=0.3),
    "relu": one_input("Relu", IMAGE),
    "clip": one_input("Clip", IMAGE, np.float32(-0.5), np.float32(1.25)),
    "clip below": one_input("Clip", IMAGE, np.float32(-0.5)),
    "norm": lambda d: d.op("BatchNormalization", d.input(*IMAGE), *(
        d.constant(d.rng.uniform(0.2, 2, 3) * sign) for sign in (-1, 1, 1, 1))),
    "norm of rows": lambda d: d.op("BatchNormalization", d.input(5, 4), *(
        d.constant(d.rng.uniform(0.2, 2, 4)) for _ in range(4))),
    "another grid": lambda d: d.op("Identity", d.input(*IMAGE), grid=(0.031, 17)),
}  # fmt: skip

_CURVES: dict[str, dict] = {
    "Sigmoid": {}, "Tanh": {}, "HardSwish": {}, "Gelu": {}, "LeakyRelu": {"alpha": 0.1}, "Elu": {}, "Erf": {},
    "Exp": {}, "HardSigmoid": {}, "Softplus": {}, "Abs": {}, "Neg": {}, "Sin": {}, "Mish": {}, "Floor": {}, "Sign": {},
}  # fmt: skip

_curves: dict[str, Case] = {
    **{f"curve {kind}": one_input(kind, IMAGE, **attributes) for kind, attributes in _CURVES.items()},
    "curve of rows": one_input("Sigmoid", (3, 5)),
    "swish": lambda d: d.chain(d.input(*IMAGE), ("Sigmoid", (), {}), ("Mul", ("x",), {})),
    "hard swish in pieces": lambda d: d.chain(
        d.input(*IMAGE), ("Add", (3.0,), {}), ("Clip", (0.0, 6.0), {}), ("Mul", ("x",), {}), ("Div", (6.0,), {})
    ),
    "gelu in pieces": lambda d: d.chain(
        d.input(2, 5, 6), ("Div", (1.4142135,), {}), ("Erf", (), {}), ("Add", (1.0,), {}), ("Mul", ("x",), {}),
        ("Mul", (0.5,), {})),
    "square": lambda d: (lambda x: d.op("Mul", x, x))(d.input(*IMAGE)),
}  # fmt: skip


_pools = {
    "max pool": one_input("MaxPool", IMAGE, kernel_shape=[3, 2], strides=[2, 2]),
    "max pool, pads": one_input("MaxPool", IMAGE, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    "max pool, ceil": one_input("MaxPool", (1, 3, 10, 8), kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    "max pool, same": one_input("MaxPool", (1, 3, 10, 7), kernel_shape=[2, 2], strides=[2, 2], auto_pad="SAME_UPPER"),
    "max pool of a row": one_input("MaxPool", (2, 3, 20), kernel_shape=[4], strides=[4]),
    "max pool, wide strides": one_input("MaxPool", (1, 3, 16, 15), kernel_shape=[4, 5], strides=[4, 5]),
    "max pool, dilated": one_input("MaxPool", IMAGE, kernel_shape=[2, 2], dilations=[2, 2]),
    "average pool": one_input("AveragePool", IMAGE, kernel_shape=[3, 2], strides=[2, 2]),
    "average pool, relu": one_input("AveragePool", IMAGE, kernel_shape=[2, 2], act=_RELU),
    "average pool, borders": one_input("AveragePool", IMAGE, kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    "average pool, borders count": one_input("AveragePool", IMAGE, kernel_shape=[3, 3], pads=[1, 1, 1, 1],
                                        count_include_pad=1),
    "average pool, ceil": one_input("AveragePool", (1, 3, 10, 8), kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    "average pool, ceil and count": one_input("AveragePool", (1, 3, 10, 8), kernel_shape=[3, 3], strides=[2, 2],
                                         pads=[1, 0, 1, 0], ceil_mode=1, count_include_pad=1),
    "average pool, same": one_input("AveragePool", (1, 3, 10, 7), kernel_shape=[3, 2], strides=[2, 2],
                               auto_pad="SAME_LOWER"),
    "average pool of a row": one_input("AveragePool", (2, 3, 20), kernel_shape=[3], strides=[2]),
    "average pool, wide strides": one_input("AveragePool", (1, 3, 16, 20), kernel_shape=[4, 5], strides=[4, 5]),
    "global average": one_input("GlobalAveragePool", IMAGE),
    "global average, two samples": one_input("GlobalAveragePool", (2, 5, 6, 6)),
    "global average of a row": one_input("GlobalAveragePool", (1, 5, 13)),
    "global average, tall": one_input("GlobalAveragePool", (1, 2, 80, 3)),
    "global maximum": one_input("GlobalMaxPool", IMAGE),
    "mean of an image": one_input("ReduceMean", IMAGE, integers(2, 3), keepdims=0),
    "mean of rows": one_input("ReduceMean", (2, 5, 7), integers(1)),
    "mean of channels": one_input("ReduceMean", IMAGE, integers(1)),
    "mean of the last axis": one_input("ReduceMean", (2, 5, 7), integers(-1), keepdims=0),
    "mean of all": one_input("ReduceMean", (1, 5, 7), keepdims=1),
    "mean of height": one_input("ReduceMean", IMAGE, integers(2)),
    "sum of an image": one_input("ReduceSum", IMAGE, integers(2, 3)),
    "sum of channels": one_input("ReduceSum", IMAGE, integers(1), keepdims=0),
    "sum of the last axis": one_input("ReduceSum", (5, 7), integers(-1), act=_RELU),
    "sum of nothing": one_input("ReduceSum", (5, 7), noop_with_empty_axes=1),
    "maximum of an image": one_input("ReduceMax", IMAGE, integers(2, 3), keepdims=0),
    "maximum of channels": one_input("ReduceMax", IMAGE, integers(-3)),
    "minimum of rows": one_input("ReduceMin", (2, 5, 7), integers(1)),
    "argmax": one_input("ArgMax", (1, 12), axis=1),
    "argmax of channels": one_input("ArgMax", IMAGE, axis=1, keepdims=0),
    "argmax of rows": one_input("ArgMax", (1, 4, 9), axis=-1),
    "argmax of height": one_input("ArgMax", IMAGE, axis=2),
    "argmax, two samples": one_input("ArgMax", (2, 9), axis=1, keepdims=0),
}  # fmt: skip


_moves = {
    "concat": concat(1, IMAGE, (1, 2, 9, 7)),
    "concat of equal grids": concat(1, IMAGE, (1, 2, 9, 7), alike=True),
    "concat of width": concat(-1, IMAGE, (1, 3, 9, 2), IMAGE),
    "concat of rows": concat(0, (2, 5), (3, 5)),
    "concat with a constant": concat(1, (1, 4, 6), constant=(1, 2, 6)),
    "split": split(1, (1, 6, 5, 4), [2, 1, 3]),
    "split of rows": split(-1, (2, 9), [4, 5]),
    "slice": one_input("Slice", IMAGE, integers(1, 2), integers(7, 6), integers(2, 3)),
    "slice of channels": one_input("Slice", IMAGE, integers(1), integers(3), integers(1)),
    "slice from the end": one_input("Slice", IMAGE, integers(-5), integers(-1), integers(-2)),
    "slice, steps": one_input("Slice", IMAGE, integers(1, 0), integers(9, 7), integers(2, 3), integers(2, 3)),
    "slice, steps of rows": one_input("Slice", (4, 11), integers(0), integers(1000), integers(1), integers(2)),
    "slice backwards": one_input("Slice", IMAGE, integers(-1), integers(-100), integers(3), integers(-1)),
    "slice of rank 5": one_input("Slice", (1, 2, 3, 4, 5), integers(1), integers(4), integers(3)),
    "pad": one_input("Pad", IMAGE, integers(0, 0, 1, 2, 0, 1, 0, 3)),
    "pad with a number": one_input("Pad", IMAGE, integers(0, 0, 1, 2, 0, 0, 0, 3), np.float32(0.61)),
    "pad axes": one_input("Pad", (2, 5), integers(1, 2), np.float32(-0.2), integers(-1)),
    "reshape": one_input("Reshape", (1, 6, 4), integers(1, 2, 3, 4)),
    "reshape an image": one_input("Reshape", IMAGE, integers(1, 3, 63)),
    "reshape to an image": one_input("Reshape", (1, 24), integers(1, 2, 3, 4)),
    "flatten": one_input("Flatten", (2, 3, 4, 5)),
    "flatten, axis": one_input("Flatten", (2, 3, 4, 5), axis=2),
    "squeeze": one_input("Squeeze", (1, 3, 1, 5), integers(2)),
    "unsqueeze": one_input("Unsqueeze", (3, 5), integers(0, 2)),
    "transpose": one_input("Transpose", IMAGE, perm=[0, 2, 3, 1]),
    "transpose rows": one_input("Transpose", (4, 7)),
    "transpose cubes": one_input("Transpose", (2, 4, 7), perm=[2, 0, 1]),
    "transpose heads": one_input("Transpose", (1, 6, 2, 4), perm=[0, 2, 1, 3]),
    "transpose samples": one_input("Transpose", (2, 3, 4, 5), perm=[3, 2, 1, 0]),
    "depth to space": one_input("DepthToSpace", (1, 12, 3, 4), blocksize=2),
    "depth to space, crd": one_input("DepthToSpace", (2, 12, 3, 4), blocksize=2, mode="CRD"),
    "space to depth": one_input("SpaceToDepth", (2, 3, 4, 6), blocksize=2),
}

_softmaxes = {
    "softmax": one_input("Softmax", (1, 10)),
    "softmax of channels": one_input("Softmax", (1, 5, 4, 3), axis=1),
    "softmax of height": one_input("Softmax", (1, 5, 4, 3), axis=2),
    "softmax of rows": one_input("Softmax", (2, 6, 9), axis=-1),
    "softmax of heads": one_input("Softmax", (1, 2, 6, 6), axis=-1),
    "softmax, long": one_input("Softmax", (2, 1000)),
    "softmax, two numbers": one_input("Softmax", (7, 2)),
}


def _resizes() -> Iterator[tuple[str, Case]]:
    ways = ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
    for way in ways:
        for mode in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil"):
            for sizes in ((8, 10), (7, 9), (2, 3)):
                name = f"resize {way}, {mode}, {sizes[0]} x {sizes[1]}"
                yield name, resize((1, 3, 4, 5), (1, 3, *sizes), coordinate_transformation_mode=way, nearest_mode=mode)
        for sizes in ((8, 10), (16, 20), (12, 15), (7, 9), (2, 3), (7, 5)):
            name = f"interpolate {way}, {sizes[0]} x {sizes[1]}"
            yield name, resize((1, 3, 4, 5), (1, 3, *sizes), coordinate_transformation_mode=way, mode="linear")


for _group in (
    _convolutions, _products, _elements, _curves, _pools, _moves, _softmaxes, dict(_resizes()),
    {"resize by scales": one_input("Resize", (1, 3, 4, 5), "", np.array([1, 1, 2, 2], np.float32)),
     "resize, odd scales": one_input("Resize", (1, 3, 4, 5), "", np.array([1, 1, 1.7, 2.3], np.float32)),
     "interpolate by scales": one_input("Resize", (2, 3, 4, 5), "", np.array([1, 1, 2, 2], np.float32), mode="linear")},
):  # fmt: skip
    CASES |= _group

_UNEVEN = "it does not enlarge by a whole number"
REFUSED: dict[str, dict[str, str]] = {
    "u85": {"max pool, dilated": "its window is dilated"},
    "u55": {
        "max pool, dilated": "its window is dilated",
        **{f"interpolate {way}, {size}": _UNEVEN
           for way in ("half_pixel", "asymmetric", "pytorch_half_pixel") for size in ("7 x 9", "2 x 3", "7 x 5")},
        **{f"interpolate align_corners, {size}": _UNEVEN for size in ("8 x 10", "16 x 20", "12 x 15")},
    },
}  # fmt: skip
"""What an NPU does not compute, and why not."""
REFUSED["u65"] = REFUSED["u55"]

_EIGHT = {
    "another grid", "average pool, borders", "average pool, ceil", "average pool, ceil and count", "average pool, same",
    "product with a constant", "product with a constant of several scales", "quotient by a constant", "swish",
    "matmul with a batch of weights", "matmul of weights", "hard swish in pieces", "gelu in pieces",
}  # fmt: skip
SIXTEEN = [
    name
    for name in CASES
    if name not in _EIGHT | set(REFUSED["u55"])
    and not name.startswith(("curve", "softmax", "matmul of two", "argmax", "resize "))
]
"""Cases with activations of 16 bits that all NPUs take."""
