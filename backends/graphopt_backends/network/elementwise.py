"""ONNX operators that work element by element, as expressions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt_backends.kernels.expression import Expression, as_type, call, clip, number, quantized
from graphopt_backends.network.integers import grid_of, real

__all__ = ["expression_of", "is_elementwise"]

Arguments = Sequence[Expression]
Rule = Callable[[ir.Node, Arguments], Expression | None]

_FLOATS = ("float32",)
_SQRT_HALF = 0.7071067811865476


def is_elementwise(node: ir.Node) -> bool:
    """True for operators that this module knows."""
    return (node.domain in ("", "ai.onnx") or node.domain == "com.microsoft") and node.op_type in _RULES


def expression_of(node: ir.Node, args: Arguments) -> Expression | None:
    """What a node computes; None where its attributes or types are none that kernels compute.

    Args:
        node: Its first output is what counts.
        args: Its inputs.
    """
    return _RULES[node.op_type](node, args)


def _unary(name: str) -> Rule:
    return lambda _, args: call(name, args[0]) if args[0].dtype in _FLOATS or name in ("abs", "neg") else None


def _folded(name: str) -> Rule:
    def rule(_: ir.Node, args: Arguments) -> Expression:
        value = args[0]
        for arg in args[1:]:
            value = call(name, value, arg)
        return value

    return rule


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
    exponent = args[1]
    if exponent.op != "number" or args[0].dtype != "float32":
        return None
    if exponent.value == 2:
        return call("mul", args[0], args[0])
    if exponent.value == 3:
        return call("mul", call("mul", args[0], args[0]), args[0])
    if exponent.value == 0.5:
        return call("sqrt", args[0])
    return None


def _cast(node: ir.Node, args: Arguments) -> Expression | None:
    wanted = ir.DataType(node.attributes.get_int("to", 0))
    dtype = str(wanted.numpy())
    if dtype not in _CASTS or args[0].dtype not in _CASTS:
        return None
    if dtype == "bool":
        return call("not", call("equal", args[0], number(0, args[0].dtype)))
    if args[0].dtype == "bool":
        return Expression("where", dtype, (args[0], number(1, dtype), number(0, dtype)))
    return as_type(args[0], dtype)


_CASTS = ("bool", "float32", "int32", "int64", "uint8", "int8")


def _where(_: ir.Node, args: Arguments) -> Expression:
    return Expression("where", args[1].dtype, tuple(args))


def _same(_: ir.Node, args: Arguments) -> Expression:
    return args[0]


def _divide(_: ir.Node, args: Arguments) -> Expression | None:
    if args[0].dtype not in _FLOATS:
        return None
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
    "Add": _folded("add"),
    "And": _folded("and"),
    "BiasGelu": _gelu,
    "Cast": _cast,
    "Ceil": _unary("ceil"),
    "Clip": _clip,
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
    "LeakyRelu": _leaky,
    "Less": _folded("less"),
    "LessOrEqual": _folded("less_or_equal"),
    "Log": _unary("log"),
    "Max": _folded("max"),
    "Min": _folded("min"),
    "Mish": _mish,
    "Mul": _folded("mul"),
    "Neg": _unary("neg"),
    "Not": lambda _, args: call("not", args[0]),
    "Or": _folded("or"),
    "PRelu": _prelu,
    "QuantizeLinear": _quantize,
    "Pow": _power,
    "Reciprocal": _unary("reciprocal"),
    "Relu": _relu,
    "Round": _unary("round"),
    "Sigmoid": _unary("sigmoid"),
    "Sign": _unary("sign"),
    "Softplus": _softplus,
    "Softsign": _softsign,
    "Sqrt": _unary("sqrt"),
    "Sub": _folded("sub"),
    "Sum": _folded("add"),
    "Swish": _swish,
    "Tanh": _unary("tanh"),
    "Where": _where,
}
