"""Epilogues of products with their operands, and NumPy's idea of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from graphopt_backends.kernels.epilogue import SUM, Epilogue
from graphopt_backends.kernels.expression import (
    Expression,
    as_type,
    call,
    clip,
    number,
    operand,
    parameters,
    quantized,
    substituted,
)

__all__ = ["Tail", "bound", "float_tails", "gelu", "integer_tails", "requantized"]

_FEW_COLUMNS = 20
_ERF = np.vectorize(math.erf)


@dataclass(frozen=True)
class Tail:
    """An epilogue.

    Attributes:
        epilogue: What a kernel is given.
        arrays: Its operands.
        bias: What sums begin with, or None.
        function: What it does to exact sums [rows, columns], bias included.
        tolerance: Of its result; 0: NumPy's is equal bit by bit if the sums are.
    """

    epilogue: Epilogue
    arrays: tuple[np.ndarray, ...]
    bias: np.ndarray | None
    function: Callable[[np.ndarray], np.ndarray]
    tolerance: float = 0.0

    def of(self, sums: np.ndarray) -> np.ndarray:
        """The result for sums without bias."""
        result = self.function(sums if self.bias is None else sums + self.bias)
        return np.ascontiguousarray(result.astype(self.epilogue.dtype))


def gelu(x: Expression) -> Expression:
    """The exact form: half of x times one plus the error function."""
    half = call("mul", x, number(0.5))
    return call("mul", half, call("add", call("erf", call("mul", x, number(math.sqrt(0.5)))), number(1.0)))


@st.composite
def float_tails(draw: DrawFn, rows: int, columns: int, seed: int, *, bias: bool = True, exact: bool = False) -> Tail:
    """Epilogues of sums of floats.

    Args:
        draw: Given by hypothesis.
        rows: Rows of the result.
        columns: Its columns.
        seed: Of random operands.
        bias: Whether there may be one.
        exact: Sums are whole numbers, and so are operands.
    """
    rng = np.random.default_rng(seed)
    kinds = ["none", "relu", "clip", "residual", "column", "row"]
    # code for a polynomial on every accumulator of a large tile takes seconds to compile
    kind = draw(st.sampled_from(kinds + ["gelu"] * (not exact and columns <= _FEW_COLUMNS)))

    def drawn(*shape: int) -> np.ndarray:
        values = rng.standard_normal(shape, dtype=np.float32)
        return np.rint(values * 50) if exact else values

    start = drawn(columns) if bias and draw(st.booleans()) else None
    expressions: dict[str, tuple[Expression, Callable[[Any], Any]]] = {
        "none": (SUM, lambda s: s),
        "relu": (call("max", SUM, number(0)), lambda s: np.maximum(s, 0)),
        "clip": (clip(SUM, -2.0, 6.0), lambda s: np.clip(s, -2, 6)),
        "gelu": (gelu(SUM), lambda s: s * 0.5 * (1 + _ERF(s * math.sqrt(0.5)))),
    }
    if kind in expressions:
        expression, function = expressions[kind]
        return Tail(Epilogue(expression, (), start is not None), (), start, function, 0.0 if exact else 1e-5)
    shape, strides = {
        "residual": ((rows, columns), (columns, 1)), "column": ((1, columns), (0, 1)), "row": ((rows, 1), (1, 0)),
    }[kind]  # fmt: skip
    added = drawn(*shape)
    expression = call("max", call("add", SUM, operand(1)), number(0))
    tail = Epilogue(expression, (strides,), start is not None)
    return Tail(tail, (added,), start, lambda s: np.maximum(s + added, 0), 0.0 if exact else 1e-5)


@st.composite
def integer_tails(draw: DrawFn, rows: int, columns: int, seed: int) -> Tail:
    """Epilogues of sums of integers: as they are, or brought to another scale and rounded to bytes."""
    rng = np.random.default_rng(seed)
    bias = rng.integers(-1000, 1000, columns).astype(np.int32) if draw(st.booleans()) else None
    kind = draw(st.sampled_from(["none", "requantize", "residual"]))
    if kind == "none":
        return Tail(Epilogue(operand(0, "int32"), (), bias is not None), (), bias, lambda s: s)
    dtype = draw(st.sampled_from(["uint8", "int8"]))
    scales = (rng.random(columns) * 1e-3 + 1e-5).astype(np.float32)
    residual = rng.integers(0, 255, (rows, columns)).astype(np.uint8) if kind == "residual" else None
    return requantized(scales, 0.07, draw(st.integers(-100, 100)) + 128 * (dtype == "uint8"), dtype, bias, residual)


def requantized(
    scales: np.ndarray, scale: float, zero_point: int, dtype: str, bias: np.ndarray | None,
    residual: np.ndarray | None = None,
) -> Tail:  # fmt: skip
    """Sums of integers on the grid of the next tensor.

    Args:
        scales: What a step of the sums is worth, by column.
        scale: Step of the result.
        zero_point: Of the result.
        dtype: Of the result.
        bias: What sums begin with.
        residual: uint8 elements to add, a step of which is worth 0.05.
    """
    value = call("mul", as_type(operand(0, "int32"), "float32"), operand(1))
    strides = [(0, 1)]
    arrays = [scales]
    if residual is not None:
        value = call("add", value, call("mul", as_type(operand(2, "uint8"), "float32"), number(0.05)))
        strides.append((residual.shape[1], 1))
        arrays.append(residual)
    expression, held = bound(quantized(value, scale, zero_point, dtype), len(arrays) + 1)
    epilogue = Epilogue(expression, (*strides, *((0, 0) for _ in held)), bias is not None)
    limits = np.iinfo(dtype)

    def function(sums: np.ndarray) -> np.ndarray:
        steps = sums.astype(np.float32) * scales
        if residual is not None:
            steps = steps + residual.astype(np.float32) * np.float32(0.05)
        whole = np.rint(steps * np.float32(1 / scale)).astype(np.int64) + zero_point
        return np.clip(whole, limits.min, limits.max)

    # a product and a sum in one instruction are rounded once, which may be another step of the grid
    return Tail(epilogue, (*arrays, *held), bias, function, 0.0 if residual is None else 1.0 / 100)


def bound(expression: Expression, first: int) -> tuple[Expression, tuple[np.ndarray, ...]]:
    """An expression that reads its parameters from operands, `first` and on, and these."""
    found = parameters(expression)
    operands = {p: operand(first + i, p.dtype) for i, p in enumerate(found)}
    return substituted(expression, operands), tuple(np.array([p.value], p.dtype) for p in found)
