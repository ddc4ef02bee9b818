"""Sums of products of bytes are exact on every CPU, whatever instructions it has for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from kernel_case import Case, check
from kernel_program import ISAS, command_of, run_all
from kernel_runner import run, runnable
from onnx import helper

from graphopt.targets import Isa
from graphopt_backends.kernels.conv import Conv, Window
from graphopt_backends.kernels.dynamic import Range
from graphopt_backends.kernels.epilogue import Epilogue
from graphopt_backends.kernels.expression import operand
from graphopt_backends.kernels.gemm import Gemm
from graphopt_backends.kernels.multiply import Kind, Multiply, integer_kind

_LIMITS = {"uint8": (0, 255), "int8": (-128, 127)}
_SHAPES = ((1, 5, 3), (13, 70, 64), (5, 17, 130))
_WEIGHTS = ((-64, 64), (-127, 127), (-128, 127))


def _drawn(random: np.random.Generator, dtype: str, least: int, most: int, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of a range, all of them its ends where sums are to become as large as they can."""
    extreme = random.random() < 0.3
    return (random.choice([least, most], shape) if extreme else random.integers(least, most + 1, shape)).astype(dtype)


def _products(isa: Isa) -> list[Case]:
    """A x W + b in int32, for all types, ranges of weights and several shapes."""
    random, found = np.random.default_rng(11), list[Case]()
    for activation, limits in _LIMITS.items():
        for weights in _WEIGHTS:
            for rows, columns, depth in _SHAPES:
                a = _drawn(random, activation, *limits, (rows, depth))
                w = _drawn(random, "int8", *weights, (depth, columns))
                b = random.integers(-(2**20), 2**20, columns)
                kernel = Gemm(
                    isa, integer_kind(isa, activation, w), rows, columns, depth,
                    Epilogue(operand(0, "int32"), (), bias=True),
                )  # fmt: skip
                started = b - kernel.multiply.shift * w.sum(0, dtype=np.int64)
                arrays = [a, kernel.pack(w), kernel.pack_column(started.astype(np.int32))]
                expected = (a.astype(np.int64) @ w + b).astype(np.int32)
                found.append(Case(activation, kernel, arrays, expected))
    return found


def _convolutions(isa: Isa) -> list[Case]:
    """Convolutions whose border is a zero point, with tails in every direction."""
    random, found = np.random.default_rng(12), list[Case]()
    for activation, limits in _LIMITS.items():
        for window, channels, filters, groups in (
            (Window((3, 3), pads=(1, 1, 1, 1)), 5, 19, 1),
            (Window((2, 3), (2, 1), pads=(0, 2, 1, 0)), 24, 40, 1),
            (Window((3, 2), dilations=(1, 2)), 12, 14, 2),
        ):
            x = _drawn(random, activation, *limits, (2, 7, 9, channels))
            w = _drawn(random, "int8", -127, 127, (filters, channels // groups, *window.size))
            zero = int(random.integers(limits[0], limits[1]))
            kind: Kind = integer_kind(isa, activation, w)
            exact = Epilogue(operand(0, "int32"), (), bias=True)
            kernel = Conv(isa, kind, 2, 7, 9, channels, filters, window, groups, exact, zero)
            sums = w.reshape(filters, -1).sum(1, dtype=np.int64)
            start = -(zero + Multiply(isa, kind).shift) * sums
            arrays = [x, kernel.pack(w), kernel.pack_column(start.astype(np.int32))]
            found.append(Case(activation, kernel, arrays, _convolved(x, w, zero, window, groups)))
    return found


def _convolved(x: np.ndarray, w: np.ndarray, zero: int, window: Window, groups: int) -> np.ndarray:
    """ONNX Runtime's convolution of these integers as floats: all sums are below 2^24, so that they are exact."""
    node = helper.make_node(
        "Conv", ["x", "w"], ["y"], strides=window.strides, pads=window.pads, dilations=window.dilations, group=groups
    )
    real = [(x.astype(np.float64) - zero).transpose(0, 3, 1, 2), w.astype(np.float64)]
    values = [
        helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, v.shape) for n, v in zip("xw", real, strict=True)
    ]
    graph = helper.make_graph([node], "g", values, [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {n: v.astype(np.float32) for n, v in zip("xw", real, strict=True)})
    return np.round(np.asarray(found)).astype(np.int32).transpose(0, 2, 3, 1)


@pytest.mark.parametrize("device", sorted(ISAS))
def test_sums_of_bytes_are_exact(device: str, tmp_path: Path) -> None:
    isa = ISAS[device]
    if command_of(isa) is None:
        pytest.skip(f"nothing runs {device} here")
    cases = [*_products(isa), *_convolutions(isa)]
    for case, got in zip(cases, run_all(cases, isa, tmp_path), strict=True):
        check(case, got)


def test_weights_are_narrow_where_two_products_fit_16_bits() -> None:
    narrow, wide = np.int8([[64, -64]]), np.int8([[65, -64]])
    avx2, vnni, neon = ISAS["avx2"], ISAS["avx512-vnni"], ISAS["cortex-a53"]
    assert integer_kind(avx2, "uint8", narrow) == "u8s8-narrow"
    assert integer_kind(avx2, "uint8", wide) == "u8s8"
    assert integer_kind(neon, "int8", wide) == "s8s8-narrow"
    assert integer_kind(neon, "int8", np.int8([[-128]])) == "s8s8"
    assert integer_kind(vnni, "uint8", narrow) == "u8s8", "one kernel where it makes no difference"


def test_another_sign_is_what_the_start_of_sums_takes_away() -> None:
    shifts = {
        (device, kind): Multiply(ISAS[device], kind).shift
        for device in ("avx512-vnni", "cortex-a76", "neoverse-v1", "avx2")
        for kind in ("u8s8", "s8s8")
    }
    assert {key: shift for key, shift in shifts.items() if shift} == {
        ("avx512-vnni", "s8s8"): 128,
        ("cortex-a76", "u8s8"): -128,
    }


@pytest.mark.parametrize("isa", runnable(), ids=str)
@pytest.mark.parametrize("size", [1, 7, 4096, 10001])
def test_the_range_of_a_tensor_is_found_in_parts(isa: Isa, size: int) -> None:
    x = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    kernel = Range(isa, size)
    got = run(kernel, [x], np.empty((2, kernel.chunks), np.float32))
    parts = np.array_split(x, range(4096, size, 4096))
    assert got.tolist() == [[part.min() for part in parts], [part.max() for part in parts]]
