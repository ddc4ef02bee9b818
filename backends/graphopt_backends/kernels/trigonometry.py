"""Trigonometric and hyperbolic functions of float32 vectors.

Arguments of sine and cosine are reduced by multiples of a quarter turn in float64, which is exact enough up to some
millions of turns; polynomials are those of Cephes (Moshier 1989).
"""

from __future__ import annotations

import math
from typing import Any

from graphopt_backends.kernels.emit import bind, cast, constant, sealed, tirx
from graphopt_backends.kernels.functions import exp, log, polynomial

__all__ = ["acos", "acosh", "asin", "asinh", "atan", "atanh", "cos", "cosh", "sin", "sinh", "tan"]

_SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
_ATAN = (8.05374449538e-2, -1.38776856032e-1, 1.99777106478e-1, -3.33329491539e-1)
_SINH = (2.03721912945e-4, 8.33028376239e-3, 1.66667160211e-1)
_ATANH = (1.81740078349e-1, 8.24370301058e-2, 1.46691431730e-1, 1.99782164500e-1, 3.33337300303e-1)


def _number(value: float, lanes: int) -> Any:
    return constant(value, "float32", lanes)


def sin(x: Any, lanes: int) -> Any:
    """Sine of radians."""
    return _wave(x, 0, lanes)


def cos(x: Any, lanes: int) -> Any:
    """Cosine of radians."""
    return _wave(x, 1, lanes)


def tan(x: Any, lanes: int) -> Any:
    """Tangent of radians."""
    return bind(sin(x, lanes) / cos(x, lanes))


def _wave(x: Any, quarter: int, lanes: int) -> Any:
    """Sine of `x` and some quarters of a turn."""
    wide = cast(x, "float64", lanes)
    turns = bind(tirx.nearbyint(wide * constant(2 / math.pi, "float64", lanes)))
    rest = sealed(cast(wide - turns * constant(math.pi / 2, "float64", lanes), "float32", lanes), lanes)
    number = bind(cast(turns, "int32", lanes) + constant(quarter, "int32", lanes))
    square = bind(rest * rest)
    of_sine = bind(polynomial(_SIN, square, lanes) * square * rest + rest)
    near_one = _number(1.0, lanes) - _number(0.5, lanes) * square
    of_cosine = bind(polynomial(_COS, square, lanes) * square * square + near_one)
    one, two = (constant(i, "int32", lanes) for i in (1, 2))
    value = tirx.Select(tirx.bitwise_and(number, one) == one, of_cosine, of_sine)
    return tirx.Select(tirx.bitwise_and(number, two) == two, _number(0.0, lanes) - value, value)


def atan(x: Any, lanes: int) -> Any:
    """Arcus tangent, in radians."""
    x = sealed(x, lanes)
    size = sealed(tirx.abs(x), lanes)
    far, middle = size > _number(math.tan(3 * math.pi / 8), lanes), size > _number(math.tan(math.pi / 8), lanes)
    one = _number(1.0, lanes)
    near = tirx.Select(middle, bind((size - one) / (size + one)), size)
    moved = sealed(tirx.Select(far, bind(_number(-1.0, lanes) / size), near), lanes)
    start = tirx.Select(middle, _number(math.pi / 4, lanes), _number(0.0, lanes))
    start = tirx.Select(far, _number(math.pi / 2, lanes), start)
    square = bind(moved * moved)
    value = bind(start + (polynomial(_ATAN, square, lanes) * square * moved + moved))
    return _with_sign(value, x, lanes)


def asin(x: Any, lanes: int) -> Any:
    """Arcus sine, in radians."""
    one = _number(1.0, lanes)
    half = atan(x / (one + tirx.sqrt((one - x) * (one + x))), lanes)
    return bind(half + half)


def acos(x: Any, lanes: int) -> Any:
    """Arcus cosine, in radians."""
    one = _number(1.0, lanes)
    half = atan(tirx.sqrt((one - x) / (one + x)), lanes)
    return bind(half + half)


def sinh(x: Any, lanes: int) -> Any:
    """Hyperbolic sine."""
    square = bind(x * x)
    near = polynomial(_SINH, square, lanes) * square * x + x
    grown, shrunk = _half_exponentials(x, lanes)
    return tirx.Select(tirx.abs(x) < _number(1.0, lanes), near, grown - shrunk)


def cosh(x: Any, lanes: int) -> Any:
    """Hyperbolic cosine."""
    grown, shrunk = _half_exponentials(x, lanes)
    return bind(grown + shrunk)


def _half_exponentials(x: Any, lanes: int) -> tuple[Any, Any]:
    """exp(x) / 2 and exp(-x) / 2, which are float32 where exp(x) is not."""
    half = bind(_number(0.5, lanes) * x)
    up, down = exp(half, lanes), exp(_number(0.0, lanes) - half, lanes)
    return bind(_number(0.5, lanes) * up * up), bind(_number(0.5, lanes) * down * down)


def asinh(x: Any, lanes: int) -> Any:
    """Inverse hyperbolic sine: atanh(x / sqrt(x^2 + 1)) near 0, a logarithm elsewhere."""
    one, size = _number(1.0, lanes), sealed(tirx.abs(x), lanes)
    root = bind(tirx.sqrt(x * x + one))
    far = log(size + root, lanes)
    huge = log(size, lanes) + _number(math.log(2), lanes)  # the square is no float32
    far = tirx.Select(size > _number(1e18, lanes), huge, far)
    near = tirx.abs(atanh(x / root, lanes))
    return _with_sign(tirx.Select(size < _number(0.5, lanes), near, far), x, lanes)


def acosh(x: Any, lanes: int) -> Any:
    """Inverse hyperbolic cosine; not a number below 1."""
    one = _number(1.0, lanes)
    value = log(x + tirx.sqrt((x - one) * (x + one)), lanes)
    huge = log(x, lanes) + _number(math.log(2), lanes)
    return tirx.Select(x > _number(1e18, lanes), huge, value)


def atanh(x: Any, lanes: int) -> Any:
    """Inverse hyperbolic tangent."""
    x = sealed(x, lanes)
    one, square = _number(1.0, lanes), bind(x * x)
    near = polynomial(_ATANH, square, lanes) * square * x + x
    far = _number(0.5, lanes) * log((one + x) / (one - x), lanes)
    return tirx.Select(tirx.abs(x) < _number(0.5, lanes), near, far)


def _with_sign(value: Any, x: Any, lanes: int) -> Any:
    return tirx.Select(x < _number(0.0, lanes), _number(0.0, lanes) - value, value)
