"""ONNX operators that work element by element, as expressions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt_backends._fold import is_constant, static_shape
from graphopt_backends.kernels.expression import Expression, as_type, call, clip, number, quantized
from graphopt_backends.network.integers import grid_of, real

__all__ = ["expression_of", "is_choice", "is_elementwise"]

Arguments = Sequence[Expression]
Rule = Callable[[ir.Node, Arguments], Expression | None]

_FLOATS = ("float32",)
_HALVES = ("float16", "bfloat16")
_KEEP_HALVES = frozenset({"Cast", "DequantizeLinear", "Dropout", "Identity", "QuantizeLinear"})
_SQRT_HALF = 0.7071067811865476


def is_elementwise(node: ir.Node) -> bool:
    """True for operators that this module knows."""
    known = (node.domain in ("", "ai.onnx") or node.domain == "com.microsoft") and node.op_type in _RULES
    return known and not is_choice(node)


def is_choice(node: ir.Node) -> bool:
    """A Where that takes one of two tensors as a whole."""
    if node.op_type != "Where" or node.domain not in ("", "ai.onnx") or is_constant(node.inputs[0]):
        return False
    condition = static_shape(node.inputs[0])
    return condition is not None and math.prod(condition) == 1 and not all(map(is_constant, node.inputs[1:]))


def expression_of(node: ir.Node, args: Arguments) -> Expression | None:
    """What a node computes; None where its attributes or types are none that kernels compute.

    Args:
        node: Its first output is what counts.
        args: Its inputs.
    """
    halves = [arg.dtype for arg in args if arg.dtype in _HALVES]
    if not halves or node.op_type in _KEEP_HALVES:
        return _RULES[node.op_type](node, args)
    # computed in float32, rounded as often as the graph says
    found = _RULES[node.op_type](node, [_widened(arg) for arg in args])
    return as_type(found, halves[0]) if found is not None and found.dtype == "float32" else found


def _widened(arg: Expression) -> Expression:
    if arg.dtype not in _HALVES:
        return arg
    return number(arg.value) if arg.op == "number" else as_type(arg, "float32")


def _unary(name: str) -> Rule:
    return lambda _, args: call(name, args[0]) if args[0].dtype in _FLOATS or name in _OF_INTEGERS else None


_OF_INTEGERS = frozenset({"abs", "bitwise_not", "neg", "not", "sign"})


def _folded(name: str) -> Rule:
    def rule(_: ir.Node, args: Arguments) -> Expression:
        value = args[0]
        for arg in args[1:]:
            value = call(name, value, arg)
        return value

    return rule


def _integer(name: str) -> Rule:
    """A rule for integers alone."""
    return lambda _, args: call(name, *args) if args[0].dtype not in (*_FLOATS, "bool") else None


def _relu(_: ir.Node, args: Arguments) -> Expression:
    return clip(args[0], 0, None)


def _clip(_: ir.Node, args: Arguments) -> Expression:
    value = args[0]
    if len(args) > 1 and not _is_absent(args[1]):
        value = call("max", value, args[1])
    return value if len(args) < 3 or _is_absent(args[2]) else call("min", value, args[2])


def _is_absent(arg: Expression) -> bool:
    return arg.op == "absent"


def _leaky(node: ir.Node, args: Arguments) -> Expression:
    slope = number(node.attributes.get_float("alpha", 0.01))
    return call("add", clip(args[0], 0, None), call("mul", slope, clip(args[0], None, 0)))


def _prelu(_: ir.Node, args: Arguments) -> Expression:
    return call("add", clip(args[0], 0, None), call("mul", args[1], clip(args[0], None, 0)))


def _elu(node: ir.Node, args: Arguments) -> Expression:
    grown = call("sub", call("exp", clip(args[0], None, 0)), number(1))
    scaled = call("mul", number(node.attributes.get_float("alpha", 1.0)), grown)
    return call("add", clip(args[0], 0, None), scaled)


def _hard_sigmoid(node: ir.Node, args: Arguments) -> Expression:
    alpha, beta = node.attributes.get_float("alpha", 0.2), node.attributes.get_float("beta", 0.5)
    return clip(call("add", call("mul", args[0], number(alpha)), number(beta)), 0, 1)


def _hard_swish(_: ir.Node, args: Arguments) -> Expression:
    part = clip(call("add", call("mul", args[0], number(1 / 6)), number(0.5)), 0, 1)
    return call("mul", args[0], part)


def _gelu(node: ir.Node, args: Arguments) -> Expression:
    x = args[0]
    if len(args) > 1:  # BiasGelu
        x = call("add", x, args[1])
    if node.attributes.get_string("approximate", "none") == "tanh" or node.op_type == "FastGelu":
        cube = call("mul", call("mul", call("mul", x, x), x), number(0.044715))
        inner = call("mul", call("add", x, cube), number(0.7978845608028654))
        part = call("tanh", inner)
    else:
        part = call("erf", call("mul", x, number(_SQRT_HALF)))
    return call("mul", call("mul", x, number(0.5)), call("add", part, number(1)))


def _softplus(_: ir.Node, args: Arguments) -> Expression:
    """log(1 + exp(x)) without overflow: max(x, 0) + log(1 + exp(-|x|))."""
    small = call("exp", call("neg", call("abs", args[0])))
    return call("add", clip(args[0], 0, None), call("log", call("add", small, number(1))))


def _mish(node: ir.Node, args: Arguments) -> Expression:
    return call("mul", args[0], call("tanh", _softplus(node, args)))


def _swish(node: ir.Node, args: Arguments) -> Expression:
    alpha = node.attributes.get_float("alpha", 1.0)
    scaled = args[0] if alpha == 1.0 else call("mul", args[0], number(alpha))
    return call("mul", args[0], call("sigmoid", scaled))


def _softsign(_: ir.Node, args: Arguments) -> Expression:
    return call("div", args[0], call("add", call("abs", args[0]), number(1)))


def _power(_: ir.Node, args: Arguments) -> Expression | None:
    base, exponent = args
    fixed = exponent.value if exponent.op == "number" else None
    if fixed in (1, 2, 3, 4):
        square = call("mul", base, base)
        return {1: base, 2: square, 3: call("mul", square, base), 4: call("mul", square, square)}[int(fixed)]
    if base.dtype != "float32":
        return None
    if fixed == 0.5:
        return call("sqrt", base)
    if fixed == -0.5:
        return call("reciprocal", call("sqrt", base))
    if fixed == -1:
        return call("reciprocal", base)
    return call("power", base, as_type(exponent, "float32"))


def _modulo(node: ir.Node, args: Arguments) -> Expression | None:
    dividend, divisor = args
    if dividend.dtype in _FLOATS:  # fmod: with the sign of the dividend
        return call("sub", dividend, call("mul", call("truncate", call("div", dividend, divisor)), divisor))
    if dividend.dtype in ("float64", "bool"):
        return None
    return call("remainder" if node.attributes.get_int("fmod", 0) else "modulo", dividend, _not_zero(divisor))


def _not_zero(divisor: Expression) -> Expression:
    """CPUs stop at a division of integers by zero."""
    if divisor.op == "number" and divisor.value:
        return divisor
    zero, one = number(0, divisor.dtype), number(1, divisor.dtype)
    return Expression("where", divisor.dtype, (call("equal", divisor, zero), one, divisor))


def _shift(node: ir.Node, args: Arguments) -> Expression:
    return call("shift_left" if node.attributes.get_string("direction", "LEFT") == "LEFT" else "shift_right", *args)


def _is_infinite(node: ir.Node, args: Arguments) -> Expression | None:
    if args[0].dtype not in _FLOATS:
        return None
    found, zero = call("is_infinite", args[0]), number(0, args[0].dtype)
    if not node.attributes.get_int("detect_negative", 1):
        found = call("and", found, call("greater", args[0], zero))
    if not node.attributes.get_int("detect_positive", 1):
        found = call("and", found, call("less", args[0], zero))
    return found


def _exclusive_or(_: ir.Node, args: Arguments) -> Expression:
    either, both = call("or", *args), call("and", *args)
    return call("and", either, call("not", both))


def _celu(node: ir.Node, args: Arguments) -> Expression:
    alpha = node.attributes.get_float("alpha", 1.0)
    grown = call("sub", call("exp", call("mul", clip(args[0], None, 0), number(1 / alpha))), number(1))
    return call("add", clip(args[0], 0, None), call("mul", number(alpha), grown))


def _selu(node: ir.Node, args: Arguments) -> Expression:
    alpha, gamma = node.attributes.get_float("alpha", 1.6732632), node.attributes.get_float("gamma", 1.0507010)
    grown = call("mul", call("sub", call("exp", clip(args[0], None, 0)), number(1)), number(alpha))
    return call("mul", number(gamma), call("add", clip(args[0], 0, None), grown))


def _thresholded(node: ir.Node, args: Arguments) -> Expression:
    above = call("greater", args[0], number(node.attributes.get_float("alpha", 1.0)))
    return Expression("where", args[0].dtype, (above, args[0], number(0, args[0].dtype)))


def _shrink(node: ir.Node, args: Arguments) -> Expression | None:
    if args[0].dtype not in _FLOATS:
        return None
    limit, bias = node.attributes.get_float("lambd", 0.5), node.attributes.get_float("bias", 0.0)
    up, down = call("add", args[0], number(bias)), call("sub", args[0], number(bias))
    kept = Expression("where", args[0].dtype, (call("less", args[0], number(-limit)), up, number(0)))
    return Expression("where", args[0].dtype, (call("greater", args[0], number(limit)), down, kept))


def _mean(node: ir.Node, args: Arguments) -> Expression | None:
    total = _folded("add")(node, args)
    return None if total is None else call("mul", total, number(1 / len(args), args[0].dtype))


def _cast(node: ir.Node, args: Arguments) -> Expression | None:
    wanted, value = ir.DataType(node.attributes.get_int("to", 0)), args[0]
    if wanted.bitwidth < 8 or wanted in (ir.DataType.STRING, ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
        return None
    dtype = str(wanted.numpy())
    if dtype not in _CASTS or value.dtype not in _CASTS:
        return None
    if value.dtype == dtype:
        return value
    if value.dtype in _HALVES:
        value = as_type(value, "float32")
    if dtype == "bool":
        return call("not", call("equal", value, number(0, value.dtype)))
    if value.dtype == "bool":
        return Expression("where", dtype, (value, number(1, dtype), number(0, dtype)))
    if value.dtype == "float32" and dtype in ("int8", "uint8", "int16", "uint16"):
        value = as_type(value, "int32")  # what no small integer holds keeps its last bits, as in ONNX Runtime
    if dtype in _HALVES and value.dtype != "float32":
        value = as_type(value, "float32")
    return as_type(value, dtype)


_CASTS = (
    "bool", "float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32",
    "uint64",
)  # fmt: skip


def _where(_: ir.Node, args: Arguments) -> Expression:
    return Expression("where", args[1].dtype, tuple(args))


def _same(_: ir.Node, args: Arguments) -> Expression:
    return args[0]


def _divide(_: ir.Node, args: Arguments) -> Expression | None:
    if args[0].dtype not in _FLOATS:
        return call("quotient", args[0], _not_zero(args[1])) if args[0].dtype not in ("float64", "bool") else None
    if args[1].op == "number" and args[1].value and np.log2(abs(args[1].value)) % 1 == 0:
        return call("mul", args[0], number(1 / args[1].value))  # exact, and cheaper
    return call("div", args[0], args[1])


def _not_equal(_: ir.Node, args: Arguments) -> Expression:
    return call("not", call("equal", args[0], args[1]))


def _quantize(node: ir.Node, args: Arguments) -> Expression | None:
    grid = grid_of(node)
    return None if grid is None else quantized(args[0], grid.scale, grid.zero_point, grid.dtype)


def _dequantize(node: ir.Node, args: Arguments) -> Expression | None:
    grid = grid_of(node)
    return None if grid is None else real(args[0], grid)


_RULES: Mapping[str, Rule] = {
    "Abs": _unary("abs"),
    "Acos": _unary("acos"),
    "Acosh": _unary("acosh"),
    "Add": _folded("add"),
    "And": _folded("and"),
    "Asin": _unary("asin"),
    "Asinh": _unary("asinh"),
    "Atan": _unary("atan"),
    "Atanh": _unary("atanh"),
    "BiasGelu": _gelu,
    "BitShift": _shift,
    "BitwiseAnd": _integer("bitwise_and"),
    "BitwiseNot": _integer("bitwise_not"),
    "BitwiseOr": _integer("bitwise_or"),
    "BitwiseXor": _integer("bitwise_xor"),
    "Cast": _cast,
    "Ceil": _unary("ceil"),
    "Celu": _celu,
    "Clip": _clip,
    "Cos": _unary("cos"),
    "Cosh": _unary("cosh"),
    "DequantizeLinear": _dequantize,
    "Div": _divide,
    "Dropout": _same,
    "Elu": _elu,
    "Equal": _folded("equal"),
    "Erf": _unary("erf"),
    "Exp": _unary("exp"),
    "FastGelu": _gelu,
    "Floor": _unary("floor"),
    "Gelu": _gelu,
    "Greater": _folded("greater"),
    "GreaterOrEqual": _folded("greater_or_equal"),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "Identity": _same,
    "IsInf": _is_infinite,
    "IsNaN": _unary("is_nan"),
    "LeakyRelu": _leaky,
    "Less": _folded("less"),
    "LessOrEqual": _folded("less_or_equal"),
    "Log": _unary("log"),
    "Max": _folded("max"),
    "Mean": _mean,
    "Min": _folded("min"),
    "Mish": _mish,
    "Mod": _modulo,
    "Mul": _folded("mul"),
    "Neg": _unary("neg"),
    "Not": lambda _, args: call("not", args[0]),
    "Or": _folded("or"),
    "PRelu": _prelu,
    "Pow": _power,
    "QuantizeLinear": _quantize,
    "Reciprocal": _unary("reciprocal"),
    "Relu": _relu,
    "Round": _unary("round"),
    "Selu": _selu,
    "Shrink": _shrink,
    "Sigmoid": _unary("sigmoid"),
    "Sign": _unary("sign"),
    "Sin": _unary("sin"),
    "Sinh": _unary("sinh"),
    "Softplus": _softplus,
    "Softsign": _softsign,
    "Sqrt": _unary("sqrt"),
    "Sub": _folded("sub"),
    "Sum": _folded("add"),
    "Swish": _swish,
    "Tan": _unary("tan"),
    "Tanh": _unary("tanh"),
    "ThresholdedRelu": _thresholded,
    "Where": _where,
    "Xor": _exclusive_or,
}
