"""What is computed element by element: epilogues of products and convolutions, and loops of their own.

An expression is a tree of operators over numbered operands. It is built from the graph, compared and printed as a
value, and evaluated on vectors of any width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graphopt_backends.kernels import functions, trigonometry
from graphopt_backends.kernels.emit import bind, cast, constant, intrinsic, reinterpret, sealed, tirx

__all__ = [
    "BINARY", "UNARY", "Expression", "as_type", "call", "clip", "evaluate", "number", "operand", "operands",
    "parameter", "parameters", "quantized", "simplified", "substituted",
]  # fmt: skip

Vector = Any


@dataclass(frozen=True)
class Expression:
    """A node of the tree.

    Attributes:
        op: `operand`, `number`, `parameter`, `cast`, `nearest` (float to int32), `where`, `power`, or a name in `UNARY`
            or `BINARY`.
        dtype: Element type of the result.
        args: What it is computed from.
        value: Of a number or parameter.
        index: Of an operand.
    """

    op: str
    dtype: str
    args: tuple[Expression, ...] = ()
    value: float = 0.0
    index: int = 0

    def __post_init__(self) -> None:
        # trees share branches, so that hashing one from its leaves would take exponential time
        object.__setattr__(self, "_hash", hash((self.op, self.dtype, self.args, self.value, self.index)))

    def __hash__(self) -> int:
        """Known since the node was made."""
        return self._hash  # pyright: ignore[reportAttributeAccessIssue]

    def __str__(self) -> str:
        """The tree as text, short enough for a comment in a listing."""
        if self.op == "operand":
            return f"%{self.index}"
        if self.op in _CONSTANTS:
            return f"{self.value:g}"
        name = self.dtype if self.op == "cast" else self.op
        return f"{name}({', '.join(map(str, self.args))})"


def operand(index: int, dtype: str = "float32") -> Expression:
    """The operand with a number."""
    return Expression("operand", dtype, index=index)


def number(value: float, dtype: str = "float32") -> Expression:
    """A constant."""
    return Expression("number", dtype, value=float(value))


def call(op: str, *args: Expression) -> Expression:
    """An operator on expressions of one type; comparisons make booleans."""
    dtype = "bool" if op in _COMPARISONS or op in _TESTS else args[-1].dtype
    return Expression(op, dtype, args)


def as_type(value: Expression, dtype: str) -> Expression:
    """Convert elements."""
    return value if value.dtype == dtype else Expression("cast", dtype, (value,))


def clip(value: Expression, least: float | None, most: float | None) -> Expression:
    """Limit to a range; None leaves a side open."""
    if least is not None:
        value = call("max", value, number(least, value.dtype))
    return value if most is None else call("min", value, number(most, value.dtype))


def parameter(value: float, dtype: str = "float32") -> Expression:
    """A constant that kernels read from memory, so that those that differ in it alone are one."""
    return Expression("parameter", dtype, value=float(value))


def quantized(value: Expression, scale: float, zero_point: int, dtype: str) -> Expression:
    """QuantizeLinear: divided by the scale, limited to what the type holds, rounded half to even, shifted."""
    least, most = (0, 255) if dtype == "uint8" else (-128, 127)
    steps = call("max", call("mul", value, parameter(1 / scale)), parameter(least - zero_point))
    whole = Expression("nearest", "int32", (call("min", steps, parameter(most - zero_point)),))
    return as_type(call("add", whole, parameter(zero_point, "int32")), dtype)


def substituted(expression: Expression, others: Mapping[Expression, Expression]) -> Expression:
    """An expression with others in place of parts of it."""
    if expression in others:
        return others[expression]
    return replace(expression, args=tuple(substituted(arg, others) for arg in expression.args))


def simplified(expression: Expression) -> Expression:
    """The same with constants brought together: factors behind a limit go before it, limits of limits become one."""
    e = replace(expression, args=tuple(simplified(arg) for arg in expression.args))
    steps = _rounded_and_back(e)
    if steps is not None:
        return steps
    if len(e.args) != 2 or e.args[1].op not in _CONSTANTS or e.args[0].op not in ("mul", "max", "min"):
        return e
    inner, outer = e.args[0], e.args[1]
    if inner.args[1].op not in _CONSTANTS:
        return e
    if e.op == "mul" and inner.op == "mul":
        return call("mul", inner.args[0], _product(inner.args[1], outer))
    if e.op == "mul" and outer.value > 0 and outer.dtype == "float32":
        before = simplified(call("mul", inner.args[0], outer))
        return call(inner.op, before, _product(inner.args[1], outer))
    if e.op == inner.op and e.op in ("max", "min"):
        kept = max if e.op == "max" else min
        return call(e.op, inner.args[0], kept(inner.args[1], outer, key=lambda constant: constant.value))
    return e


def _rounded_and_back(e: Expression) -> Expression | None:
    """Steps of a grid that became bytes and floats again, the zero point taken away: floats rounded."""
    value, zero = (e.args[0], e.args[1].value) if e.op == "sub" and e.args[1].op == "parameter" else (e, 0.0)
    for dtype in ("float32", "int32", "bytes"):
        if value.op != "cast" or (dtype != value.dtype and dtype != "bytes"):
            return None
        value = value.args[0]
    if value.op != "add" or value.args[0].op != "nearest" or value.args[1] != parameter(zero, "int32"):
        return None
    return call("round", value.args[0].args[0])


_CONSTANTS = ("number", "parameter")


def _product(a: Expression, b: Expression) -> Expression:
    value = a.value * b.value
    return number(value, a.dtype) if value == 0 or a.op == b.op == "number" else parameter(value, a.dtype)


def parameters(expression: Expression) -> tuple[Expression, ...]:
    """All parameters of an expression, each once."""
    if expression.op == "parameter":
        return (expression,)
    return tuple(dict.fromkeys(p for arg in expression.args for p in parameters(arg)))


def operands(expression: Expression) -> dict[int, str]:
    """Element types of the operands of an expression, by number."""
    if expression.op == "operand":
        return {expression.index: expression.dtype}
    found: dict[int, str] = {}
    for arg in expression.args:
        found |= operands(arg)
    return dict(sorted(found.items()))


def evaluate(expression: Expression, values: Mapping[int, Vector] | Sequence[Vector], lanes: int) -> Vector:
    """Emit the code of an expression.

    Args:
        expression: What to compute.
        values: Vectors of the operands.
        lanes: Elements of a vector; 1: scalars.
    """
    known: dict[Expression, Vector] = {}

    def value_of(e: Expression) -> Vector:
        if e not in known:
            known[e] = _emit(e, [value_of(arg) for arg in e.args], values, lanes)
        return known[e]

    return value_of(expression)


def _emit(e: Expression, args: list[Vector], values: Mapping[int, Vector] | Sequence[Vector], lanes: int) -> Vector:
    if e.op == "operand":
        return values[e.index]
    if e.op == "number":
        return constant(e.value, e.dtype, lanes)
    if e.op == "cast":
        value = functions.from_bfloat16(args[0], lanes) if e.args[0].dtype == "bfloat16" else args[0]
        to_bits = e.dtype == "bfloat16"
        return bind(functions.to_bfloat16(value, lanes) if to_bits else cast(value, e.dtype, lanes))
    if e.op == "nearest":
        # rounds half to even as it converts: one instruction
        suffix = f"v{lanes}i32.v{lanes}f32" if lanes > 1 else "i32.f32"
        return bind(intrinsic(f"llvm.lrint.{suffix}", "int32", lanes, args[0]))
    if e.op in _COMPARISONS or e.op in ("max", "min", "sign", "where"):
        args = [_sealed(arg, value, lanes) for arg, value in zip(e.args, args, strict=True)]
    if e.op == "where":
        chosen = tirx.Select(*args)
        return sealed(chosen, lanes) if e.dtype == "float32" else bind(chosen)
    if e.op == "power":
        return functions.power(args[0], args[1], lanes)
    value = BINARY[e.op](*args) if e.op in BINARY else UNARY[e.op](args[0], lanes, e.dtype)
    return value if e.dtype == "bool" else bind(value)  # TVM's simplifier fails on a named vector of booleans


def _sealed(e: Expression, value: Vector, lanes: int) -> Vector:
    """What was computed before a comparison is none of the simplifier's business."""
    return sealed(value, lanes) if e.args and e.dtype == "float32" else value


def _plain(function: Callable[[Vector], Vector]) -> Callable[[Vector, int, str], Vector]:
    return lambda x, _lanes, _dtype: function(x)


def _of_floats(function: Callable[[Vector, int], Vector]) -> Callable[[Vector, int, str], Vector]:
    return lambda x, lanes, _dtype: sealed(function(sealed(x, lanes), lanes), lanes)


def _test(function: Callable[[Vector, int], Vector]) -> Callable[[Vector, int, str], Vector]:
    return lambda x, lanes, _dtype: function(sealed(x, lanes), lanes)


def _sign(x: Vector, lanes: int, dtype: str) -> Vector:
    zero = constant(0, dtype, lanes)
    up, down = tirx.Select(x > zero, constant(1, dtype, lanes), x), constant(-1, dtype, lanes)
    return tirx.Select(x < zero, down, up)


def _size_bits(x: Vector, lanes: int) -> Vector:
    """The bits of a float32 without its sign."""
    return tirx.bitwise_and(reinterpret(x, "int32", lanes), constant(0x7FFFFFFF, "int32", lanes))


def _is_nan(x: Vector, lanes: int) -> Vector:
    # TVM takes a number that differs from itself for impossible
    return _size_bits(x, lanes) > constant(_INFINITY, "int32", lanes)


def _is_infinite(x: Vector, lanes: int) -> Vector:
    return _size_bits(x, lanes) == constant(_INFINITY, "int32", lanes)


_INFINITY = 0x7F800000


UNARY: Mapping[str, Callable[[Vector, int, str], Vector]] = {
    "abs": _plain(tirx.abs),
    "bitwise_not": _plain(tirx.bitwise_not),
    "ceil": _plain(tirx.ceil),
    "erf": _of_floats(functions.erf),
    "exp": _of_floats(functions.exp),
    "floor": _plain(tirx.floor),
    "is_infinite": _test(_is_infinite),
    "is_nan": _test(_is_nan),
    "log": _of_floats(functions.log),
    "neg": lambda x, lanes, dtype: constant(0, dtype, lanes) - x,
    "not": _plain(tirx.Not),
    "reciprocal": lambda x, lanes, dtype: constant(1, dtype, lanes) / x,
    "round": _plain(tirx.nearbyint),
    "sigmoid": _of_floats(functions.sigmoid),
    "sign": _sign,
    "sqrt": _plain(tirx.sqrt),
    "tanh": _of_floats(functions.tanh),
    "truncate": _plain(tirx.trunc),
    **{name: _of_floats(getattr(trigonometry, name)) for name in trigonometry.__all__},
}
"""Operators of one operand."""

_TESTS = ("is_infinite", "is_nan")

_COMPARISONS: Mapping[str, Callable[[Vector, Vector], Vector]] = {
    "equal": lambda a, b: a == b,
    "greater": lambda a, b: a > b,
    "greater_or_equal": lambda a, b: a >= b,
    "less": lambda a, b: a < b,
    "less_or_equal": lambda a, b: a <= b,
}

BINARY: Mapping[str, Callable[[Vector, Vector], Vector]] = {
    "add": lambda a, b: a + b,
    "and": tirx.And,
    "bitwise_and": tirx.bitwise_and,
    "bitwise_or": tirx.bitwise_or,
    "bitwise_xor": tirx.bitwise_xor,
    "div": lambda a, b: a / b,
    "max": functions.at_least,
    "min": functions.at_most,
    "modulo": tirx.floormod,
    "mul": lambda a, b: a * b,
    "or": tirx.Or,
    "quotient": tirx.truncdiv,
    "remainder": tirx.truncmod,
    "shift_left": tirx.shift_left,
    "shift_right": tirx.shift_right,
    "sub": lambda a, b: a - b,
    **_COMPARISONS,
}
"""Operators of two operands."""
