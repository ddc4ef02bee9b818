"""Small QDQ graphs of one operator, by what it reads."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from quantized_graphs import Drawing

__all__ = [
    "Case", "concat", "convolution", "gemm", "integers", "matmul", "one_input", "resize", "split", "two_inputs",
    "with_constant",
]  # fmt: skip

Case = Callable[[Drawing], str]
"""Draws a graph, and says what it makes."""


def convolution(shape, weight, axis=0, bias=True, act=None, kind="Conv", **attributes) -> Case:
    def case(d: Drawing) -> str:
        x, w = d.input(*shape), d.weight(*weight, axis=axis)
        groups = attributes.get("group", 1)
        size = weight[0] if kind == "Conv" else weight[1] * groups
        b = [d.bias(x, w, size)] if bias and (kind == "Conv" or groups == 1) else []
        return d.op(kind, x, w, *b, act=act, **attributes)

    return case


def one_input(kind, shape, *constants, act=None, **attributes) -> Case:
    def case(d: Drawing) -> str:
        given = [c if isinstance(c, str) else d.constant(c, np.asarray(c).dtype) for c in constants]
        return d.op(kind, d.input(*shape), *given, act=act, **attributes)

    return case


def two_inputs(kind, left, right, act=None, alike=False) -> Case:
    def case(d: Drawing) -> str:
        a, b = d.input(*left), d.input(*right)
        if alike:
            d.grids[b] = d.grids[a]
        return d.op(kind, a, b, act=act)

    return case


def with_constant(kind, shape, constant, stored=False, first=False, span=1.0, act=None) -> Case:
    """An activation and a constant, of floats or of int8 on a grid."""

    def case(d: Drawing) -> str:
        x = d.input(*shape)
        if stored:
            c = d.dequantized(d.rng.integers(-128, 128, constant), "int8", d.rng.uniform(0.5, 1) * span / 64, zero=-3)
        else:
            c = d.constant(d.rng.standard_normal(constant) * span)
        return d.op(kind, *((c, x) if first else (x, c)), act=act)

    return case


def gemm(rows, weight, bias=None, axis=None, act=None, **attributes) -> Case:
    def case(d: Drawing) -> str:
        x, w = d.input(*rows), d.weight(*weight, axis=axis)
        b = [] if bias is None else [d.constant(d.rng.standard_normal(bias))]
        return d.op("Gemm", x, w, *b, act=act, **attributes)

    return case


def matmul(left, weight, axis=None) -> Case:
    return lambda d: d.op("MatMul", d.input(*left), d.weight(*weight, axis=axis))


def integers(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def concat(axis, *shapes, alike=False, constant=None) -> Case:
    def case(d: Drawing) -> str:
        names = [d.input(*shape) for shape in shapes]
        if constant is not None:
            names.append(d.dequantized(d.rng.integers(-128, 128, constant), "int8", 0.05, zero=4))
        for name in names[1:] if alike else ():
            d.grids[name] = d.grids[names[0]]
        return d.op("Concat", *names, axis=axis, grid=names[0] if alike else None)

    return case


def split(axis, shape, sizes) -> Case:
    def case(d: Drawing) -> str:
        before = len(d.nodes)
        d.op("Split", d.input(*shape), d.constant(sizes, "int64"), axis=axis, results=len(sizes))
        made = [n.output[0] for n in d.nodes[before:] if n.op_type == "QuantizeLinear"]
        d.outputs += made[1:]
        return made[0]

    return case


def resize(shape, sizes, **attributes) -> Case:
    return one_input("Resize", shape, "", "", integers(*sizes), **attributes)
