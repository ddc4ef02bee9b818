"""Products and convolutions of any shape equal those of NumPy and ONNX Runtime."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from kernel_runner import run, runnable
from onnx import helper

from graphopt.reference import Reference
from graphopt.targets import Isa
from graphopt_backends.kernels.conv import Conv, Window
from graphopt_backends.kernels.depthwise import Depthwise
from graphopt_backends.kernels.epilogue import Epilogue
from graphopt_backends.kernels.expression import call, number, operand
from graphopt_backends.kernels.gemm import Gemm

ISAS = runnable()
pytestmark = pytest.mark.skipif(not ISAS, reason="this CPU runs none of the kernels")
few = settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)
isas = st.sampled_from(ISAS or [None])
sizes = st.integers(1, 70)


def _drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@few
@given(isas, sizes, st.integers(1, 150), st.integers(1, 90), st.integers(0, 99))
def test_a_product_of_any_size_equals_numpy(isa: Isa, rows: int, columns: int, depth: int, seed: int) -> None:
    a, w, b = _drawn(seed, rows, depth), _drawn(seed + 1, depth, columns), _drawn(seed + 2, columns)
    kernel = Gemm(isa, "f32", rows, columns, depth, Epilogue(call("max", operand(0), number(0)), (), bias=True))
    got = run(kernel, [a, kernel.pack(w), kernel.pack_column(b)], np.empty((rows, columns), np.float32))
    np.testing.assert_allclose(got, np.maximum(a @ w + b, 0), rtol=1e-4, atol=1e-4)


@few
@given(isas, st.sampled_from([256, 512, 1024]), st.integers(2, 40), st.integers(0, 9))
def test_rows_that_fight_for_places_in_the_cache_are_copied_and_right(
    isa: Isa, depth: int, rows: int, seed: int
) -> None:
    kernel = Gemm(isa, "f32", rows, 50, depth * 2)
    assert kernel.scratch > 0
    a, w = _drawn(seed, rows, depth * 2), _drawn(seed + 1, depth * 2, 50)
    np.testing.assert_allclose(
        run(kernel, [a, kernel.pack(w)], np.empty((rows, 50), np.float32)), a @ w, rtol=1e-4, atol=1e-3
    )


@few
@given(isas, st.integers(17, 70), st.integers(1, 100), st.sampled_from([576, 640, 768, 1024]), st.integers(0, 9))
def test_sums_are_put_aside_between_blocks_of_a_depth_that_no_cache_holds(
    isa: Isa, rows: int, columns: int, depth: int, seed: int
) -> None:
    a, w, b = _drawn(seed, rows, depth), _drawn(seed + 1, depth, columns), _drawn(seed + 2, columns)
    small = replace(isa, level2_bytes=8 << 10)
    kernel = Gemm(small, "f32", rows, columns, depth, Epilogue(call("max", operand(0), number(0)), (), bias=True))
    got = run(kernel, [a, kernel.pack(w), kernel.pack_column(b)], np.empty((rows, columns), np.float32))
    np.testing.assert_allclose(got, np.maximum(a @ w + b, 0), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("size", [7, 11])
def test_a_convolution_whose_weight_no_cache_holds_is_right(isa: Isa, size: int) -> None:
    x, w, b = _drawn(1, 1, 20, size, size), _drawn(2, 70, 20, 3, 3), _drawn(3, 70)
    window = Window((3, 3), pads=(1, 1, 1, 1))
    small = replace(isa, level2_bytes=8 << 10)
    kernel = Conv(small, "f32", 1, size, size, 20, 70, window, epilogue=Epilogue(bias=True))
    operands = [x.transpose(0, 2, 3, 1), kernel.pack(w), kernel.pack_column(b)]
    got = run(kernel, operands, np.empty((1, size, size, 70), np.float32))
    np.testing.assert_allclose(got.transpose(0, 3, 1, 2), _convolved(x, w, b, window, 1), rtol=1e-4, atol=1e-4)


@few
@given(isas, sizes, st.integers(1, 100), st.integers(0, 99))
def test_an_epilogue_reads_columns_rows_numbers_and_tensors(isa: Isa, rows: int, columns: int, seed: int) -> None:
    scaled = call("mul", call("mul", operand(0), operand(1)), call("mul", operand(2), operand(3)))
    kernel = Gemm(
        isa, "f32", rows, columns, 16,
        Epilogue(call("tanh", call("add", scaled, operand(4))), ((0, 1), (1, 0), (0, 0), (columns, 1))),
    )  # fmt: skip
    a, w, column = _drawn(seed, rows, 16), _drawn(seed + 1, 16, columns) / 4, _drawn(seed + 2, columns)
    row, single, tensor = _drawn(seed + 3, rows), _drawn(seed + 4, 1), _drawn(seed + 5, rows, columns)
    operands = [a, kernel.pack(w), column, row, single, tensor]
    expected = np.tanh((a @ w) * column * row[:, None] * single + tensor)
    np.testing.assert_allclose(
        run(kernel, operands, np.empty((rows, columns), np.float32)), expected, rtol=1e-4, atol=1e-5
    )


def _convolved(x: np.ndarray, w: np.ndarray, b: np.ndarray, window: Window, groups: int) -> np.ndarray:
    node = helper.make_node(
        "Conv", ["x", "w", "b"], ["y"], strides=window.strides, pads=window.pads, dilations=window.dilations,
        group=groups,
    )  # fmt: skip
    values = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, v.shape)
        for name, v in zip("xwb", (x, w, b), strict=True)
    ]
    out = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    model = helper.make_model(
        helper.make_graph([node], "g", values, [out]), opset_imports=[helper.make_opsetid("", 17)]
    )
    model.ir_version = 9
    return Reference(ir.from_proto(model), threads=1).run({"x": x, "w": w, "b": b})["y"]


windows = st.builds(
    Window,
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.tuples(*[st.integers(0, 3)] * 4),
)


@few
@given(isas, windows, st.integers(8, 21), st.integers(8, 40), st.integers(1, 3), st.integers(1, 3), st.data())
def test_a_convolution_of_any_shape_equals_onnx_runtime(
    isa: Isa, window: Window, height: int, width: int, batch: int, groups: int, data: st.DataObject
) -> None:
    channels, filters = groups * data.draw(st.integers(1, 9)), groups * data.draw(st.integers(1, 40))
    x, b = _drawn(1, batch, channels, height, width), _drawn(3, filters)
    w = _drawn(2, filters, channels // groups, *window.size)
    kernel = Conv(isa, "f32", batch, height, width, channels, filters, window, groups, Epilogue(bias=True))
    operands = [x.transpose(0, 2, 3, 1), kernel.pack(w), kernel.pack_column(b)]
    got = run(kernel, operands, np.empty((batch, *kernel.result_size, filters), np.float32))
    np.testing.assert_allclose(got.transpose(0, 3, 1, 2), _convolved(x, w, b, window, groups), rtol=1e-4, atol=1e-4)


@few
@given(isas, windows, st.integers(8, 21), st.integers(8, 40), st.integers(1, 3), st.integers(1, 50))
def test_a_depthwise_convolution_of_any_shape_equals_onnx_runtime(
    isa: Isa, window: Window, height: int, width: int, batch: int, channels: int
) -> None:
    x, w, b = _drawn(1, batch, channels, height, width), _drawn(2, channels, 1, *window.size), _drawn(3, channels)
    kernel = Depthwise(isa, batch, height, width, channels, window, Epilogue(bias=True))
    operands = [x.transpose(0, 2, 3, 1), kernel.pack(w), kernel.pack_column(b)]
    got = run(kernel, operands, np.empty((batch, *kernel.result_size, channels), np.float32))
    np.testing.assert_allclose(got.transpose(0, 3, 1, 2), _convolved(x, w, b, window, channels), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("window", [Window((3, 3), pads=(1, 1, 1, 1)), Window((5, 5), (2, 2), pads=(2, 1, 2, 1))])
def test_a_depthwise_convolution_of_many_channels_goes_strip_by_strip(isa: Isa, window: Window) -> None:
    height, width, channels = 9, 37, 331
    kernel = Depthwise(isa, 2, height, width, channels, window, Epilogue(bias=True))
    for seed in range(4):
        x, w = _drawn(seed, 2, channels, height, width), _drawn(seed + 4, channels, 1, *window.size)
        b = _drawn(seed + 8, channels)
        operands = [x.transpose(0, 2, 3, 1), kernel.pack(w), kernel.pack_column(b)]
        got = run(kernel, operands, np.empty((2, *kernel.result_size, channels), np.float32), tasks=3)
        expected = _convolved(x, w, b, window, channels)
        np.testing.assert_allclose(got.transpose(0, 3, 1, 2), expected, rtol=1e-4, atol=1e-4)
