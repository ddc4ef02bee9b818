"""Transcendental functions of float32 vectors, as polynomials: a few units in the last place, no calls, no branches.

Ranges are reduced as in Cephes (Moshier 1989); erf and tanh are the rational approximations that Eigen uses. What is
no number stays none: limits are compared so that the operand is kept where a comparison fails.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from graphopt_backends.kernels.emit import bind, cast, constant, reinterpret, sealed, tirx

__all__ = [
    "at_least", "at_most", "erf", "exp", "exp_of_negative", "from_bfloat16", "log", "polynomial", "power", "sigmoid",
    "tanh", "to_bfloat16",
]  # fmt: skip

_DTYPE = "float32"
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_EXP_LEAST, _EXP_MOST = -104.0, 89.0  # beyond them lie 0 and infinity
_EXP2 = (1.535336188319500e-4, 1.339887440266574e-3, 9.618437357674640e-3, 5.550332471162809e-2, 2.402264791363012e-1,
         6.931472028550421e-1)  # fmt: skip
_EXP2_LEAST = -127.0  # 1 with this exponent taken off has the bits of 0
_LEAST_NORMAL = 1.17549435e-38
_LOG = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
    2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
_ERF_UP = (
    -2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05, -7.34990630326855e-04,
    -2.95459980854025e-03, -1.60960333262415e-02,
)  # fmt: skip
_ERF_DOWN = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)
_TANH_UP = (
    -2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08, 1.48572235717979e-05,
    6.37261928875436e-04, 4.89352455891786e-03,
)  # fmt: skip
_TANH_DOWN = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)
_TANH_MOST, _TANH_LEAST = 7.90531110763549805, 4e-4
_ERF_MOST = 4.0


def at_least(x: Any, least: Any) -> Any:
    """The greater of two numbers; `x` if that is none."""
    return tirx.max(least, x)  # the second is what TVM takes where a comparison fails


def at_most(x: Any, most: Any) -> Any:
    """The smaller of two numbers; `x` if that is none."""
    return tirx.min(most, x)


def from_bfloat16(bits: Any, lanes: int) -> Any:
    """Float32 numbers from the bits of bfloat16 ones, their upper half."""
    upper = tirx.shift_left(cast(bits, "uint32", lanes), constant(16, "uint32", lanes))
    return reinterpret(upper, _DTYPE, lanes)


def to_bfloat16(x: Any, lanes: int) -> Any:
    """Bits of the nearest bfloat16 numbers, half to even; what is no number stays none."""

    def number(value: int) -> Any:
        return constant(value, "uint32", lanes)

    bits = bind(reinterpret(x, "uint32", lanes))
    upper = bind(tirx.shift_right(bits, number(16)))
    rounded = tirx.shift_right(bits + tirx.bitwise_and(upper, number(1)) + number(0x7FFF), number(16))
    none = tirx.bitwise_and(bits, number(0x7FFFFFFF)) > number(0x7F800000)
    return cast(tirx.Select(none, tirx.bitwise_or(upper, number(0x40)), rounded), "uint16", lanes)


def exp(x: Any, lanes: int) -> Any:
    """Exponential."""

    def number(value: float) -> Any:
        return constant(value, _DTYPE, lanes)

    kept = bind(at_most(at_least(x, number(_EXP_LEAST)), number(_EXP_MOST)))
    turns = bind(tirx.nearbyint(kept * number(1.44269504088896341)))
    rest = bind(kept - turns * number(_LN2_HIGH) - turns * number(_LN2_LOW))
    return _scaled_exp(rest, cast(turns, "int32", lanes), lanes)


def _scaled_exp(rest: Any, turns: Any, lanes: int) -> Any:
    """exp(rest) * 2^turns."""
    result = bind(polynomial(_EXP, rest, lanes) * rest * rest + rest + constant(1.0, _DTYPE, lanes))
    # two factors: 2^128 is no float32, and the result may still be one
    turns = bind(turns)
    half = bind(tirx.shift_right(turns, constant(1, "int32", lanes)))
    return bind(result * _power_of_two(half, lanes) * _power_of_two(bind(turns - half), lanes))


def exp_of_negative(x: Any, lanes: int) -> Any:
    """Exponential of numbers that are not positive, as softmax takes it: cheaper, and exactly 0 where normals end.

    The error grows with |x|, as the result shrinks: it stays below 1e-7 of the 1 that is the greatest result.
    """

    def number(value: float) -> Any:
        return constant(value, _DTYPE, lanes)

    binary = bind(at_least(x * number(1.44269504088896341), number(_EXP2_LEAST)))
    turns = bind(tirx.nearbyint(binary))
    rest = bind(binary - turns)
    result = reinterpret(polynomial(_EXP2, rest, lanes) * rest + number(1.0), "int32", lanes)
    exponent = tirx.shift_left(cast(turns, "int32", lanes), constant(23, "int32", lanes))
    return bind(reinterpret(result + exponent, _DTYPE, lanes))


def _power_of_two(exponent: Any, lanes: int) -> Any:
    biased = tirx.shift_left(exponent + constant(127, "int32", lanes), constant(23, "int32", lanes))
    return reinterpret(biased, _DTYPE, lanes)


def log(x: Any, lanes: int) -> Any:
    """Natural logarithm; minus infinity at zero, not a number below it."""

    def number(value: float) -> Any:
        return constant(value, _DTYPE, lanes)

    x = sealed(x, lanes)
    turns, low, high = _log_parts(x, lanes)
    result = sealed(high + (low + turns * number(_LN2_LOW)) + turns * number(_LN2_HIGH), lanes)
    result = tirx.Select(x < number(float("inf")), result, x)  # infinity, and what is no number
    result = tirx.Select(x == number(0.0), number(float("-inf")), result)
    return tirx.Select(x < number(0.0), number(float("nan")), result)


def _log_parts(x: Any, lanes: int) -> tuple[Any, Any, Any]:
    """`turns, low, high` with log(x) = turns * log(2) + low + high, for positive normal numbers."""

    def number(value: float) -> Any:
        return constant(value, _DTYPE, lanes)

    def integer(value: int) -> Any:
        return constant(value, "int32", lanes)

    bits = bind(reinterpret(at_least(x, number(_LEAST_NORMAL)), "int32", lanes))
    mantissa = tirx.bitwise_or(tirx.bitwise_and(bits, integer(0x007FFFFF)), integer(0x3F000000))
    mantissa = sealed(reinterpret(mantissa, _DTYPE, lanes), lanes)
    small = mantissa < number(0.707106781186547524)
    exponent = tirx.shift_right(bits, integer(23)) - integer(126)
    turns = bind(cast(exponent, _DTYPE, lanes) - tirx.Select(small, number(1.0), number(0.0)))
    rest = bind(mantissa + tirx.Select(small, mantissa, number(0.0)) - number(1.0))
    square = bind(rest * rest)
    return turns, bind(polynomial(_LOG, rest, lanes) * rest * square - number(0.5) * square), rest


def power(x: Any, y: Any, lanes: int) -> Any:
    """A number to the power of another; the product in the exponent is a float64 with enough digits behind it."""

    def number(value: float) -> Any:
        return constant(value, _DTYPE, lanes)

    def double(value: Any) -> Any:
        return cast(value, "float64", lanes) if not isinstance(value, float) else constant(value, "float64", lanes)

    zero, one = number(0.0), number(1.0)
    size = tirx.abs(x)
    edge = tirx.Select(x == zero, number(-math.inf), tirx.Select(size < number(math.inf), zero, size))
    edge = tirx.Select(y == zero, zero, edge)
    turns, low, high = _log_parts(size, lanes)
    logarithm = double(turns) * double(math.log(2)) + double(low) + double(high + edge)
    exponent = bind(at_most(at_least(double(y) * logarithm, double(_EXP_LEAST)), double(_EXP_MOST)))
    whole = bind(tirx.nearbyint(exponent * double(1 / math.log(2))))
    rest = bind(cast(exponent - whole * double(math.log(2)), _DTYPE, lanes))
    nearest = bind(tirx.nearbyint(y))
    odd = tirx.bitwise_and(cast(nearest, "int32", lanes), constant(1, "int32", lanes)) == constant(1, "int32", lanes)
    sign = tirx.Select(odd, number(-1.0), one)
    sign = tirx.Select(nearest == y, sign, number(math.nan))
    return bind(_scaled_exp(rest, cast(whole, "int32", lanes), lanes) * tirx.Select(x < zero, sign, one))


def sigmoid(x: Any, lanes: int) -> Any:
    """Logistic function."""
    one = constant(1.0, _DTYPE, lanes)
    return bind(one / (one + exp(constant(0.0, _DTYPE, lanes) - x, lanes)))


def tanh(x: Any, lanes: int) -> Any:
    """Hyperbolic tangent."""
    most = constant(_TANH_MOST, _DTYPE, lanes)
    kept = bind(at_most(at_least(x, constant(-_TANH_MOST, _DTYPE, lanes)), most))
    square = bind(kept * kept)
    result = sealed(kept * polynomial(_TANH_UP, square, lanes) / polynomial(_TANH_DOWN, square, lanes), lanes)
    return tirx.Select(tirx.abs(x) < constant(_TANH_LEAST, _DTYPE, lanes), x, result)


def erf(x: Any, lanes: int) -> Any:
    """Error function."""
    most = constant(_ERF_MOST, _DTYPE, lanes)
    kept = bind(at_most(at_least(x, constant(-_ERF_MOST, _DTYPE, lanes)), most))
    square = bind(kept * kept)
    return bind(kept * polynomial(_ERF_UP, square, lanes) / polynomial(_ERF_DOWN, square, lanes))


def polynomial(coefficients: Sequence[float], x: Any, lanes: int) -> Any:
    """Horner's scheme, the coefficient of the highest power first."""
    result = constant(coefficients[0], _DTYPE, lanes)
    for coefficient in coefficients[1:]:
        result = bind(result * x + constant(coefficient, _DTYPE, lanes))
    return result
