"""Kernels of any shape with operands and what NumPy says that they compute: hypothesis strategies, by family."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from kernel_case import SEEDS, Case, apart, drawn_pitch, floats, kinds_of, operand_pair, widened
from kernel_epilogues import Tail, float_tails, integer_tails

from graphopt.targets import Isa
from graphopt_backends.kernels.batched import Batched
from graphopt_backends.kernels.blockwise import Blockwise
from graphopt_backends.kernels.codebook import Codebook
from graphopt_backends.kernels.conv import Conv, Window
from graphopt_backends.kernels.depthwise import Depthwise
from graphopt_backends.kernels.epilogue import Epilogue
from graphopt_backends.kernels.expression import call, number, operand
from graphopt_backends.kernels.gemm import Gemm
from graphopt_backends.kernels.lookup import Lookup
from graphopt_backends.kernels.loops import Loops, merged_axes
from graphopt_backends.kernels.multiply import Kind, Multiply
from graphopt_backends.kernels.pool import Pool
from graphopt_backends.kernels.reduce import Reduce
from graphopt_backends.kernels.resample import Resample
from graphopt_backends.kernels.rows import Normalize, Softmax
from graphopt_backends.kernels.tables import SIZES

__all__ = ["FAMILIES", "convolved"]


def _tail(draw: DrawFn, kind: Kind, rows: int, columns: int, seed: int) -> Tail:
    drawn = float_tails if kind == "f32" else integer_tails
    return draw(drawn(rows, columns, seed))


def _packed(
    kernel: Any, source: np.ndarray, weight: np.ndarray, start: np.ndarray | None, tail: Tail
) -> list[np.ndarray]:
    bias = [] if start is None else [kernel.pack_column(start)]
    return [source, kernel.pack(weight), *bias, *tail.arrays]


def _begun(multiply: Multiply, tail: Tail, columns: np.ndarray) -> tuple[Epilogue, np.ndarray | None]:
    """The epilogue and what sums begin with, for a weight whose columns are those of the result."""
    if not multiply.shift:
        return tail.epilogue, tail.bias
    start = (0 if tail.bias is None else tail.bias) - multiply.shift * columns.sum(0, dtype=np.int32)
    return replace(tail.epilogue, bias=True), start.astype(np.int32)


def _tolerance(kind: Kind, tail: Tail) -> float:
    return 2e-5 if kind == "f32" else tail.tolerance


# ---------------------------------------------------------------- products and convolutions


@st.composite
def _gemm(draw: DrawFn, isa: Isa) -> Case:
    kind, seed = draw(kinds_of(isa)), draw(SEEDS)
    rows, columns = draw(st.integers(1, 70)), draw(st.integers(1, 150))
    depth = draw(st.one_of(st.integers(1, 90), st.sampled_from([512, 1024, 2048])))
    a, w = operand_pair(seed, Multiply(isa, kind), (rows, depth), (depth, columns))
    tail = _tail(draw, kind, rows, columns, seed)
    epilogue, start = _begun(Multiply(isa, kind), tail, w)
    source_pitch, result_pitch = drawn_pitch(draw, depth), drawn_pitch(draw, columns)
    kernel = Gemm(isa, kind, rows, columns, depth, epilogue, source_pitch, result_pitch)
    arrays = _packed(kernel, apart(a, source_pitch or depth), w, start, tail)
    expected = tail.of(widened(a) @ widened(w))
    return Case(kind, kernel, arrays, expected, result_pitch, _tolerance(kind, tail))


def convolved(x: np.ndarray, w: np.ndarray, window: Window, groups: int, border: float) -> np.ndarray:
    """Convolve [batch, height, width, channels] with [filters, channels / groups, height, width], tap by tap."""
    top, left, bottom, right = window.pads
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=border)
    height, width = window.result(*x.shape[1:3])
    parts = np.split(widened(w), groups)
    total = np.zeros((x.shape[0], height, width, w.shape[0]), parts[0].dtype)
    for (i, j), seen in _taps(padded, window, (height, width)):
        images = np.split(widened(seen), groups, axis=-1)
        total += np.concatenate([a @ part[:, :, i, j].T for a, part in zip(images, parts, strict=True)], axis=-1)
    return total


def _taps(padded: np.ndarray, window: Window, size: tuple[int, int]) -> list[tuple[tuple[int, int], np.ndarray]]:
    """What each tap sees of an image with its border."""
    found: list[tuple[tuple[int, int], np.ndarray]] = []
    for i in range(window.size[0]):
        for j in range(window.size[1]):
            y, x = i * window.dilations[0], j * window.dilations[1]
            rows = slice(y, y + (size[0] - 1) * window.strides[0] + 1, window.strides[0])
            columns = slice(x, x + (size[1] - 1) * window.strides[1] + 1, window.strides[1])
            found.append(((i, j), padded[:, rows, columns]))
    return found


_windows = st.builds(
    Window,
    st.one_of(st.tuples(st.integers(1, 4), st.integers(1, 4)), st.sampled_from([(1, 1), (3, 3), (5, 5), (1, 7)])),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.one_of(st.just((0, 0, 0, 0)), st.tuples(*[st.integers(0, 3)] * 4)),
)


def _image(draw: DrawFn, window: Window) -> tuple[int, int, int]:
    """Batch, height and width of an image that the window fits into."""
    height, width = draw(st.integers(1, 24)), draw(st.integers(1, 40))
    assume(min(window.result(height, width)) > 0)
    return draw(st.integers(1, 3)), height, width


@st.composite
def _conv(draw: DrawFn, isa: Isa) -> Case:
    kind, seed, window = draw(kinds_of(isa)), draw(SEEDS), draw(_windows)
    batch, height, width = _image(draw, window)
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = groups * draw(st.one_of(st.integers(1, 17), st.just(64)))
    filters = groups * draw(st.integers(1, 70))
    shape = (filters, channels // groups, *window.size)
    x, w = operand_pair(seed, Multiply(isa, kind), (batch, height, width, channels), shape)
    border = 0 if kind == "f32" else draw(st.integers(int(np.iinfo(x.dtype).min), int(np.iinfo(x.dtype).max)))
    size = window.result(height, width)
    tail = _tail(draw, kind, batch * size[0] * size[1], filters, seed)
    epilogue, start = _begun(Multiply(isa, kind), tail, w.reshape(filters, -1).T)
    source_pitch, result_pitch = drawn_pitch(draw, channels), drawn_pitch(draw, filters)
    kernel = Conv(
        isa, kind, batch, height, width, channels, filters, window, groups, epilogue, border, source_pitch,
        result_pitch,
    )  # fmt: skip
    arrays = _packed(kernel, apart(x, source_pitch or channels), w, start, tail)
    sums = convolved(x, w, window, groups, border).reshape(-1, filters)
    return Case(kind, kernel, arrays, tail.of(sums), result_pitch, _tolerance(kind, tail))


@st.composite
def _depthwise(draw: DrawFn, isa: Isa) -> Case:
    dtype, seed, window = draw(st.sampled_from(["float32", "uint8", "int8"])), draw(SEEDS), draw(_windows)
    batch, height, width = _image(draw, window)
    channels = draw(st.integers(1, 80))
    kind: Kind = "f32" if dtype == "float32" else "u8s8" if dtype == "uint8" else "s8s8"
    x, w = operand_pair(seed, Multiply(isa, kind), (batch, height, width, channels), (channels, 1, *window.size))
    zero = 0 if kind == "f32" else draw(st.integers(int(np.iinfo(x.dtype).min), int(np.iinfo(x.dtype).max)))
    size = window.result(height, width)
    tail = draw(float_tails(batch * size[0] * size[1], channels, seed, exact=kind != "f32"))
    source_pitch, result_pitch = drawn_pitch(draw, channels), drawn_pitch(draw, channels)
    kernel = Depthwise(
        isa, batch, height, width, channels, window, tail.epilogue, dtype, zero, source_pitch, result_pitch
    )
    arrays = _packed(kernel, apart(x, source_pitch or channels), w, tail.bias, tail)
    sums = convolved(widened(x) - zero, w, window, channels, 0).reshape(-1, channels)
    return Case(dtype, kernel, arrays, tail.of(sums), result_pitch, _tolerance(kind, tail))


def _strided(draw: DrawFn, array: np.ndarray, orders: Sequence[tuple[int, ...]]) -> np.ndarray:
    """The same elements as a view of memory in another order of axes, with something behind every row."""
    order = draw(st.sampled_from(orders))
    moved = array.transpose(order)
    held = apart(moved, moved.shape[-1] + draw(st.sampled_from([0, 0, 5])))
    view = held.reshape(*moved.shape[:-1], held.shape[-1])[..., : moved.shape[-1]]
    return view.transpose(np.argsort(order))


def _elements(array: np.ndarray) -> tuple[int, ...]:
    """Strides in elements."""
    return tuple(step // array.itemsize for step in array.strides)


def _memory(array: np.ndarray) -> np.ndarray:
    """What a view lies in."""
    return array if array.base is None else _memory(array.base)


@st.composite
def _batched(draw: DrawFn, isa: Isa) -> Case:
    batch, seed = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2))), draw(SEEDS)
    rows, columns, depth = (draw(st.integers(1, most)) for most in (40, 70, 70))
    a, b = floats(seed, *batch, rows, depth), floats(seed + 1, *batch, depth, columns)
    own = tuple(range(a.ndim))
    swapped = (*own[:-2], own[-1], own[-2])
    heads_inside = (own[0], own[-2], *own[1:-2], own[-1])
    left = _strided(draw, a, [own, heads_inside])
    right = _strided(draw, b, [own, swapped, heads_inside])
    tail = draw(float_tails(rows, columns, seed, bias=False))
    shape = (*batch, rows, columns)
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    kernel = Batched(
        isa, batch, rows, columns, depth, _elements(left)[:-1], _elements(right), strides[:-1], tail.epilogue,
        tuple((0,) * len(batch) for _ in tail.arrays),
    )  # fmt: skip
    sums = (widened(a) @ widened(b)).reshape(-1, rows, columns)
    expected = np.stack([tail.of(product) for product in sums]).reshape(shape)
    return Case("f32", kernel, [_memory(left), _memory(right), *tail.arrays], expected, 0, 2e-5)


@st.composite
def _blockwise(draw: DrawFn, isa: Isa) -> Case:
    """Weights of 4 bits; with activations of bytes all numbers are whole, and a step of theirs is one."""
    rows, columns, depth = draw(st.integers(1, 24)), draw(st.integers(1, 150)), draw(st.integers(1, 300))
    block, seed, shifted = draw(st.sampled_from([16, 32, 64])), draw(SEEDS), draw(st.booleans())
    activations = draw(st.sampled_from(["float32", "int8"]))
    rng, blocks = np.random.default_rng(seed), -(-depth // block)
    codes = rng.integers(0, 16, (depth, columns)).astype(np.uint8)
    scales, shifts = floats(seed, blocks, columns), floats(seed + 1, blocks, columns)
    a = floats(seed + 2, rows, depth)
    if activations == "int8":
        scales, shifts = np.ones_like(scales), np.rint(shifts)
        a = rng.integers(-127, 128, (rows, depth)).astype(np.float32)
        a[:, ::block] = 127
    dense = (codes.astype(np.float64) - 8) * scales.repeat(block, 0)[:depth]
    dense += shifts.repeat(block, 0)[:depth] if shifted else 0
    source_pitch, result_pitch = drawn_pitch(draw, depth), drawn_pitch(draw, columns)
    kernel = Blockwise(
        isa, activations, rows, columns, depth, block, shifted, source_pitch=source_pitch, result_pitch=result_pitch
    )
    assume(kernel.is_known)
    arrays = [apart(a, source_pitch or depth), kernel.pack(codes, scales, shifts if shifted else None)]
    expected = (a @ dense).astype(np.float32)
    return Case(activations, kernel, arrays, expected, result_pitch, 0.0 if activations == "int8" else 2e-5)


@st.composite
def _codebook(draw: DrawFn, isa: Isa) -> Case:
    """Weights looked up in tables, one for some neighbouring columns."""
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 70))
    depth = draw(st.one_of(st.integers(1, 400), st.sampled_from([256, 768])))
    entries, span, seed = draw(st.sampled_from(SIZES)), draw(st.integers(1, columns)), draw(SEEDS)
    rng, number = np.random.default_rng(seed), -(-columns // span)
    codes = rng.integers(0, entries, (depth, columns)).astype(np.uint8)
    a, tables = floats(seed, rows, depth), floats(seed + 1, number, entries)
    tail = draw(float_tails(rows, columns, seed))
    source_pitch, result_pitch = drawn_pitch(draw, depth), drawn_pitch(draw, columns)
    kernel = Codebook(isa, rows, columns, depth, entries, span, tail.epilogue, source_pitch, result_pitch)
    assume(kernel.is_known)
    bias = [] if tail.bias is None else [kernel.pack_column(tail.bias)]
    arrays = [apart(a, source_pitch or depth), kernel.pack(codes), kernel.pack_tables(tables), *bias, *tail.arrays]
    expected = tail.of(widened(a) @ tables[np.arange(columns) // span, codes])
    return Case(f"{entries} entries", kernel, arrays, expected, result_pitch, 2e-5)


# ---------------------------------------------------------------- images and rows


@st.composite
def _pool(draw: DrawFn, isa: Isa) -> Case:
    kind, window, seed = draw(st.sampled_from(["max", "mean"])), draw(_windows), draw(SEEDS)
    dtype = draw(st.sampled_from([np.float32, np.uint8, np.int8]))
    batch, height, width = _image(draw, window)
    # every window must see a pixel, as ONNX wants
    assume(all(max(window.pads[i], window.pads[i + 2]) < window.size[i] for i in range(2)))
    assume(window.dilations == (1, 1) or not any(window.pads))
    channels, counts = draw(st.integers(1, 80)), draw(st.booleans())
    x = (floats(seed, batch, height, width, channels) * 50).astype(dtype)
    size, source_pitch, result_pitch = (
        window.result(height, width),
        drawn_pitch(draw, channels),
        drawn_pitch(draw, channels),
    )
    kernel = Pool(
        isa, kind, np.dtype(dtype).name, batch, height, width, channels, window, size, counts, source_pitch,
        result_pitch, call("mul", operand(0), number(0.5)) if kind == "mean" else operand(0),
    )  # fmt: skip
    top, left, bottom, right = window.pads
    border = ((0, 0), (top, bottom), (left, right), (0, 0))
    least = -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min
    if kind == "max":
        seen = _taps(np.pad(x, border, constant_values=least), window, size)
        expected = np.max([tap for _, tap in seen], axis=0)
    else:
        total = np.sum([tap for _, tap in _taps(np.pad(widened(x), border), window, size)], axis=0)
        there = np.sum([tap for _, tap in _taps(np.pad(np.ones(x.shape), border), window, size)], axis=0)
        expected = (0.5 * total / (math.prod(window.size) if counts else there)).astype(np.float32)
    flat = expected.reshape(-1, channels)
    return Case(np.dtype(dtype).name, kernel, [apart(x, source_pitch or channels)], flat, result_pitch, 1e-6)


@st.composite
def _resample(draw: DrawFn, isa: Isa) -> Case:
    batch, height, width, channels = (draw(st.integers(1, most)) for most in (3, 12, 12, 40))
    rows, columns, seed = draw(st.integers(1, 20)), draw(st.integers(1, 20)), draw(SEEDS)
    taps = draw(st.sampled_from([(1, 1), (2, 2), (4, 4), (1, 2)]))
    dtype = draw(st.sampled_from(["float32", "uint8"])) if taps == (1, 1) else "float32"
    pitch, rng = drawn_pitch(draw, channels), np.random.default_rng(seed)
    x = (rng.random((batch, height, width, channels)) * 100).astype(dtype)
    tables = [rng.integers(0, size, (n, t)).astype(np.int32) for size, n, t in
              ((height, rows, taps[0]), (width, columns, taps[1]))]  # fmt: skip
    weights = [rng.random(table.shape, dtype=np.float32) for table in tables]
    kernel = Resample(isa, dtype, batch, (height, width), channels, (rows, columns), taps, pitch)
    arrays = [apart(x, pitch or channels), *tables]
    if taps == (1, 1):
        return Case(dtype, kernel, arrays, x[:, tables[0]][:, :, 0][:, :, tables[1]][:, :, :, 0])
    high, wide = (np.zeros((len(table), size)) for table, size in zip(tables, (height, width), strict=True))
    for matrix, table, weight in zip((high, wide), tables, weights, strict=True):
        for row, (places, parts) in enumerate(zip(table, weight, strict=True)):
            np.add.at(matrix[row], places, parts)
    expected = np.einsum("ih,jw,bhwc->bijc", high, wide, x).astype(np.float32)
    return Case(dtype, kernel, [*arrays, *weights], expected, 0, 1e-5)


@st.composite
def _softmax(draw: DrawFn, isa: Isa) -> Case:
    rows, columns, logarithm = draw(st.integers(1, 20)), draw(st.integers(1, 300)), draw(st.booleans())
    x = floats(draw(SEEDS), rows, columns) * np.float32(draw(st.sampled_from([1, 8, 100])))
    shifted = widened(x - x.max(1, keepdims=True))
    expected = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    expected = (expected if logarithm else np.exp(expected)).astype(np.float32)
    return Case("f32", Softmax(isa, rows, columns, logarithm), [x], expected, 0, 4e-6)


@st.composite
def _normalize(draw: DrawFn, isa: Isa) -> Case:
    rows, columns, seed = draw(st.integers(1, 20)), draw(st.integers(1, 300)), draw(SEEDS)
    kind, bias = draw(st.sampled_from(["layer", "rms"])), draw(st.booleans())
    x, scale, shift = floats(seed, rows, columns), floats(seed + 1, columns), floats(seed + 2, columns)
    wide = widened(x)
    centred = wide - wide.mean(1, keepdims=True) if kind == "layer" else wide
    expected = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5) * scale + (shift if bias else 0)
    kernel = Normalize(isa, kind, rows, columns, 1e-5, bias)
    # the mean of one element takes all of it away, and errors are divided by the square root of epsilon
    return Case("f32", kernel, [x, scale, shift][: 2 + bias], expected.astype(np.float32), 0, 1e-4)


_REDUCTIONS: Mapping[str, Callable[..., np.ndarray]] = {"sum": np.sum, "mean": np.mean, "max": np.max, "min": np.min}


@st.composite
def _reduce(draw: DrawFn, isa: Isa) -> Case:
    outer, inner = draw(st.integers(1, 9)), draw(st.one_of(st.just(1), st.integers(1, 70)))
    reduced, operator = draw(st.integers(1, 200)), draw(st.sampled_from(sorted(_REDUCTIONS)))
    dtype = draw(st.sampled_from(["float32", "uint8", "int8"]))
    x = floats(draw(SEEDS), outer, reduced, inner)
    x = x if dtype == "float32" else (x * 30).astype(dtype)
    squared, root = draw(st.booleans()), draw(st.booleans())
    value = operand(0)
    before = call("mul", value, value) if squared else value
    after = call("sqrt", call("abs", value)) if root else value
    expected = _REDUCTIONS[operator](widened(x) ** 2 if squared else widened(x), axis=1)
    expected = np.sqrt(np.abs(expected)) if root else expected
    # a root of a sum near zero keeps half of its digits only
    tolerance = 2e-2 if root and not squared else 1e-5
    kernel = Reduce(isa, operator, outer, reduced, inner, before, after, dtype)
    return Case(dtype, kernel, [x], expected.astype(np.float32), 0, tolerance)


@st.composite
def _loops(draw: DrawFn, isa: Isa) -> Case:
    """Views in any order of axes, repeated along some, slices of others, in types of any width."""
    shape = tuple(draw(st.lists(st.integers(1, 20), min_size=1, max_size=4)))
    dtype, seed = draw(st.sampled_from(["float32", "int32", "int64", "uint8"])), draw(SEEDS)
    views: list[np.ndarray] = []
    for i in range(draw(st.integers(1, 3))):
        order = draw(st.permutations(range(len(shape))))
        kept = [1 if draw(st.booleans()) and i else shape[axis] for axis in order]
        steps = [draw(st.sampled_from([1, 1, 1, 2])) for _ in kept]
        held = (floats(seed + i, *(size * step for size, step in zip(kept, steps, strict=True))) * 20).astype(dtype)
        view = held[tuple(slice(None, None, step) for step in steps)]
        views.append(np.broadcast_to(view.transpose(np.argsort(order)), shape))
    order = draw(st.permutations(range(len(shape))))
    result = np.empty([shape[axis] for axis in order], dtype).transpose(np.argsort(order))
    operators = [draw(st.sampled_from(["add", "mul", "max", "min", "sub"])) for _ in views[1:]]
    expression, expected = operand(0, dtype), views[0]
    for i, operator in enumerate(operators, 1):
        expression = call(operator, expression, operand(i, dtype))
        expected = _NUMPY[operator](expected, views[i])
    sizes, strides = merged_axes(shape, [_elements(view) for view in (*views, result)])
    kernel = Loops(isa, expression, sizes, strides[-1], strides[:-1])
    flat = np.ascontiguousarray(expected.transpose(order))
    # products of several factors may be rounded once instead of twice
    tolerance = 1e-5 if dtype == "float32" and "mul" in operators else 0.0
    return Case(dtype, kernel, [_memory(view) for view in views], flat, 0, tolerance)


_NUMPY: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum, "sub": np.subtract,
}  # fmt: skip


@st.composite
def _lookup(draw: DrawFn, isa: Isa) -> Case:
    outer, length, inner, count = (draw(st.integers(1, most)) for most in (4, 30, 70, 12))
    dtype, numbers = draw(st.sampled_from(["float32", "uint8", "int64"])), draw(st.sampled_from(["int64", "int32"]))
    rng = np.random.default_rng(draw(SEEDS))
    x = (rng.random((outer, length, inner)) * 200).astype(dtype)
    rows = rng.integers(-length, length, count).astype(numbers)
    return Case(dtype, Lookup(isa, dtype, outer, length, inner, count, numbers), [x, rows], x[:, rows])


FAMILIES: Mapping[str, Callable[[Isa], SearchStrategy[Case]]] = {
    "gemm": _gemm, "conv": _conv, "depthwise": _depthwise, "batched": _batched, "blockwise": _blockwise,
    "codebook": _codebook, "pool": _pool, "resample": _resample, "softmax": _softmax, "normalize": _normalize,
    "reduce": _reduce, "loops": _loops, "lookup": _lookup,
}  # fmt: skip
"""Cases of each family for a CPU."""
