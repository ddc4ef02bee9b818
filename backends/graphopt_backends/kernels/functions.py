"""Transcendental functions of float32 vectors, as polynomials: a few units in the last place, no calls, no branches.

Ranges are reduced as in Cephes (Moshier 1989); erf and tanh are the rational approximations that Eigen uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphopt_backends.kernels.emit import bind, cast, constant, reinterpret, tirx

__all__ = ["erf", "exp", "exp_of_negative", "log", "sigmoid", "tanh"]

_DTYPE = "float32"
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_EXP_LEAST, _EXP_MOST = -87.33654, 88.72283
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


def exp(x: Any, lanes: int) -> Any:
    """Exponential; what float32 cannot hold becomes its least normal or its greatest number."""

    def number(value: float) -> Any:
        return constant(value, _DTYPE, lanes)

    kept = bind(tirx.min(tirx.max(x, number(_EXP_LEAST)), number(_EXP_MOST)))
    power = bind(tirx.nearbyint(kept * number(1.44269504088896341)))
    rest = bind(kept - power * number(_LN2_HIGH) - power * number(_LN2_LOW))
    result = bind(_polynomial(_EXP, rest, lanes) * rest * rest + rest + number(1.0))
    # two factors: 2^128 is no float32, and the result may still be one
    half = bind(tirx.shift_right(cast(power, "int32", lanes), constant(1, "int32", lanes)))
    other = bind(cast(power, "int32", lanes) - half)
    return bind(result * _power_of_two(half, lanes) * _power_of_two(other, lanes))


def exp_of_negative(x: Any, lanes: int) -> Any:
    """Exponential of numbers that are not positive, as softmax takes it: cheaper, and 0 where float32 ends."""

    def number(value: float) -> Any:
        return constant(value, _DTYPE, lanes)

    kept = bind(tirx.max(x, number(_EXP_LEAST)))
    power = bind(tirx.nearbyint(kept * number(1.44269504088896341)))
    rest = bind(kept - power * number(_LN2_HIGH) - power * number(_LN2_LOW))
    result = _polynomial(_EXP, rest, lanes) * rest * rest + rest + number(1.0)
    return bind(result * _power_of_two(cast(power, "int32", lanes), lanes))


def _power_of_two(exponent: Any, lanes: int) -> Any:
    biased = tirx.shift_left(exponent + constant(127, "int32", lanes), constant(23, "int32", lanes))
    return reinterpret(biased, _DTYPE, lanes)


def log(x: Any, lanes: int) -> Any:
    """Natural logarithm; minus infinity at zero, not a number below it."""

    def number(value: float) -> Any:
        return constant(value, _DTYPE, lanes)

    bits = bind(reinterpret(tirx.max(x, number(1.17549435e-38)), "int32", lanes))
    mantissa = reinterpret(
        tirx.bitwise_or(
            tirx.bitwise_and(bits, constant(0x007FFFFF, "int32", lanes)), constant(0x3F000000, "int32", lanes)
        ),
        _DTYPE,
        lanes,
    )
    mantissa = bind(mantissa)
    small = mantissa < number(0.707106781186547524)
    exponent = tirx.shift_right(bits, constant(23, "int32", lanes)) - constant(126, "int32", lanes)
    power = bind(cast(exponent, _DTYPE, lanes) - tirx.Select(small, number(1.0), number(0.0)))
    rest = bind(mantissa + tirx.Select(small, mantissa, number(0.0)) - number(1.0))
    square = bind(rest * rest)
    tail = bind(_polynomial(_LOG, rest, lanes) * rest * square + power * number(_LN2_LOW) - number(0.5) * square)
    result = bind(rest + tail + power * number(_LN2_HIGH))
    infinite = number(float("inf"))
    result = tirx.Select(x == infinite, infinite, result)
    result = tirx.Select(x == number(0.0), number(float("-inf")), result)
    return bind(tirx.Select(x < number(0.0), number(float("nan")), result))


def sigmoid(x: Any, lanes: int) -> Any:
    """Logistic function."""
    one = constant(1.0, _DTYPE, lanes)
    return bind(one / (one + exp(constant(0.0, _DTYPE, lanes) - x, lanes)))


def tanh(x: Any, lanes: int) -> Any:
    """Hyperbolic tangent."""
    most = constant(_TANH_MOST, _DTYPE, lanes)
    kept = bind(tirx.min(tirx.max(x, constant(-_TANH_MOST, _DTYPE, lanes)), most))
    square = bind(kept * kept)
    result = kept * _polynomial(_TANH_UP, square, lanes) / _polynomial(_TANH_DOWN, square, lanes)
    return bind(tirx.Select(tirx.abs(x) < constant(_TANH_LEAST, _DTYPE, lanes), x, result))


def erf(x: Any, lanes: int) -> Any:
    """Error function."""
    most = constant(_ERF_MOST, _DTYPE, lanes)
    kept = bind(tirx.min(tirx.max(x, constant(-_ERF_MOST, _DTYPE, lanes)), most))
    square = bind(kept * kept)
    return bind(kept * _polynomial(_ERF_UP, square, lanes) / _polynomial(_ERF_DOWN, square, lanes))


def _polynomial(coefficients: Sequence[float], x: Any, lanes: int) -> Any:
    """Horner's scheme, the coefficient of the highest power first."""
    result = constant(coefficients[0], _DTYPE, lanes)
    for coefficient in coefficients[1:]:
        result = bind(result * x + constant(coefficient, _DTYPE, lanes))
    return result
