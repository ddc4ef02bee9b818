"""Random networks of every operator that the compiler knows, by seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from network_case import FEEDS, Case, Drawing, Rejected, Tensor
from network_layers import LAYERS
from network_moves import MOVES

__all__ = ["drawn"]

Maker = Callable[[Drawing], Any]

_OPSETS = (17, 20, 21)
_MOST_REFUSALS = 60
_NAMES = ("a b", "x/y:0", "größe", 'quote"d', "back\\slash", "per%cent", "??/", "1", "new\nline", "long" * 60)


def drawn(seed: int, least: int = 5, most: int = 40) -> Case:
    """A network of so many nodes, about.

    Args:
        seed: Decides everything.
        least: Fewest nodes.
        most: Most nodes.
    """
    rng = np.random.default_rng(seed)
    g = Drawing(seed, int(rng.choice(_OPSETS)))
    count, refused = int(np.exp(g.rng.uniform(np.log(least), np.log(most)))), 0
    # a network is mostly of few kinds of operators, or they rarely meet
    makers = [maker for maker, share in _MAKERS for _ in range(share if g.maybe(0.6) else 0)] or [_unary]
    while len(g.steps) < count and refused < _MOST_REFUSALS:
        before = len(g.steps)
        try:
            g.one(makers)(g)
        except Rejected:
            refused += len(g.steps) == before
    if not g.steps:
        _unary(g)
    return Case(seed, g.opset, tuple(g.steps), g.tensors, _outputs(g), _names(g))


def _outputs(g: Drawing) -> tuple[str, ...]:
    """Most of what nobody reads, some of what is read, and rarely an input, a constant, or the same one twice."""
    read = {name for step in g.steps for name in step.reads}
    made = [name for step in g.steps for name in step.outputs if name]
    leaves = [name for name in made if name not in read]
    chosen = [name for name in leaves if g.maybe(0.85)] or leaves[-1:]
    chosen += [name for name in made if name in read and g.maybe(0.06)]
    if g.maybe(0.05):
        chosen.append(g.one(list(g.tensors)))
    g.rng.shuffle(chosen)
    return tuple(dict.fromkeys(chosen))


def _names(g: Drawing) -> dict[str, str]:
    if not g.maybe(0.1):
        return {}
    return {str(name): f"{g.one(_NAMES)}{i}" for i, name in enumerate(g.tensors) if g.maybe(0.3)}


# arithmetic

_UNARY: Sequence[tuple[str, dict[str, Any]]] = (
    ("Abs", {}), ("Atan", {}), ("Asinh", {}), ("Celu", {"alpha": 1.5}), ("Cos", {}), ("Elu", {"alpha": 0.7}),
    ("Erf", {}), ("Exp", {}), ("Gelu", {}), ("Gelu", {"approximate": "tanh"}), ("HardSigmoid", {}),
    ("HardSigmoid", {"alpha": 0.3, "beta": 0.4}), ("HardSwish", {}), ("Identity", {}), ("LeakyRelu", {"alpha": 0.2}),
    ("LeakyRelu", {"alpha": -0.5}), ("Mish", {}), ("Neg", {}), ("Relu", {}), ("Relu", {}), ("Selu", {}),
    ("Shrink", {"lambd": 0.3, "bias": 0.1}), ("Sigmoid", {}), ("Sign", {}), ("Sin", {}), ("Softplus", {}),
    ("Softsign", {}), ("Tanh", {}), ("ThresholdedRelu", {"alpha": 0.4}), ("Ceil", {}), ("Floor", {}), ("Round", {}),
    ("Sinh", {}), ("Cosh", {}), ("Tan", {}), ("Dropout", {}), ("IsNaN", {}), ("IsInf", {}),
)  # fmt: skip


def _unary(g: Drawing) -> Tensor:
    op, attributes = g.one(_UNARY)
    return g.add(op, g.floats(), **attributes)


def _positive(g: Drawing) -> Tensor:
    """Functions that are not defined everywhere."""
    x = g.add(*g.one([("Abs",), ("Exp",), ("Softplus",)]), g.floats())
    op = g.one(["Sqrt", "Log", "Reciprocal", "Acosh", "Pow"])
    if op == "Pow":
        return g.add(op, x, g.constant(np.float32(g.one([0.5, -0.5, 1.7, -1.0]))))
    above = g.add("Add", x, g.constant(np.float32(g.one([0.01, 1.0]))))
    return g.add(op, above)


def _bounded(g: Drawing) -> Tensor:
    return g.add(g.one(["Asin", "Acos", "Atanh"]), g.add("Mul", g.add("Tanh", g.floats()), g.constant(np.float32(0.9))))


def _other(g: Drawing, x: Tensor, *, small: bool = False) -> Tensor:
    """A second operand of the same type, there already or new, that is repeated to the shape of the first or beyond."""
    found = g.find(lambda t: t.dtype == x.dtype and _fits(t.shape, x.shape), 0.7)
    if found is not None:
        return found
    shape = tuple(1 if g.maybe(0.25) else size for size in x.shape)[g.one([0, 0, 0, x.rank // 2, x.rank]) :]
    if not small and x.rank < 5 and g.maybe(0.05):
        shape = (g.number(1, 3), *((1,) * (x.rank - len(shape))), *shape)
    arrays = [_array(g, shape, x.dtype) for _ in range(FEEDS)]
    return g.constant(arrays[0]) if g.maybe(0.6) else g.input(arrays)


def _fits(shape: Sequence[int], wide: Sequence[int]) -> bool:
    return len(shape) <= len(wide) and all(a in (1, b) for a, b in zip(shape[::-1], wide[::-1], strict=False))


def _array(g: Drawing, shape: Sequence[int], dtype: str) -> np.ndarray:
    if dtype == "bool":
        return g.rng.random(shape) < 0.5
    if dtype.startswith("float"):
        return g.rng.standard_normal(shape).astype(dtype)
    return g.rng.integers(0 if dtype[0] == "u" else -9, 10, shape).astype(dtype)


def _binary(g: Drawing) -> Tensor:
    op = g.one(["Add", "Add", "Sub", "Mul", "Mul", "Div", "Max", "Min", "Mod", "PRelu", "Mean", "Sum", "Pow"])
    x = g.floats()
    if op == "Pow":
        return g.add(op, x, g.constant(g.one([np.float32(2), np.float32(3), np.int64(2), np.float32([1])])))
    y = _other(g, x, small=op == "PRelu")
    if op in ("Div", "Mod"):
        y = g.add("Add", g.add("Abs", y), g.constant(np.float32(0.3)))
    if op in ("Max", "Min", "Mean", "Sum") and g.maybe(0.3):
        return g.add(op, x, y, _other(g, x))
    swap = op != "PRelu" and g.maybe(0.3)
    return g.add(op, *((y, x) if swap else (x, y)), **({"fmod": 1} if op == "Mod" else {}))


def _clip(g: Drawing) -> Tensor:
    x = g.floats()
    least, most = (g.constant(np.float32(limit)) if g.maybe(0.8) else None for limit in (-0.4, g.one([0.7, 6.0])))
    return g.add("Clip", x, least, most) if most else g.add("Clip", x, least)


def _compare(g: Drawing) -> Tensor:
    x = g.floats() if g.maybe() else _integers(g)
    return g.add(g.one(["Greater", "Less", "GreaterOrEqual", "LessOrEqual", "Equal"]), x, _other(g, x))


def _booleans(g: Drawing) -> Tensor:
    found = g.find(lambda t: t.dtype == "bool", 0.95)
    return found or (_compare(g) if g.maybe() else g.input([_array(g, shape, "bool") for shape in [g.shape()] * FEEDS]))


def _logic(g: Drawing) -> Tensor:
    x = _booleans(g)
    op = g.one(["And", "Or", "Xor", "Not", "Equal"])
    return g.add(op, x) if op == "Not" else g.add(op, x, _other(g, x))


def _where(g: Drawing) -> Tensor:
    condition = _booleans(g)
    x = g.find(lambda t: t.dtype != "bool" and _fits(condition.shape, t.shape), 0.7)
    x = x or g.input(g.normal(condition.shape))
    y = _other(g, x)
    return g.add("Where", condition, *((y, x) if g.maybe(0.3) else (x, y)))


_INTEGERS = ("int32", "int64", "uint8", "int8", "int32", "int64")


def _integers(g: Drawing, kinds: Sequence[str] = _INTEGERS) -> Tensor:
    found = g.find(lambda t: t.dtype in kinds, 0.9)
    kind, shape = g.one(kinds), g.shape()
    return found or g.input([_array(g, shape, kind) for _ in range(FEEDS)])


def _arithmetic(g: Drawing) -> Tensor:
    """On integers."""
    op = g.one(["Add", "Sub", "Mul", "Div", "Mod", "Mod", "Max", "Min", "Neg", "Abs", "Sign", "Bits", "Clip"])
    x = _integers(g, ("int32", "int64") if op not in ("Max", "Min", "Mod") else _INTEGERS)
    if op in ("Neg", "Abs", "Sign"):
        return g.add(op, x)
    if op == "Clip":
        return g.add(op, x, g.constant(np.array(-3, x.dtype)), g.constant(np.array(g.one([4, 2**31 - 1]), x.dtype)))
    if op == "Bits":
        op = g.one(["BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot"])
        return g.add(op, x) if op == "BitwiseNot" else g.add(op, x, _other(g, x))
    y = _other(g, x)
    if op in ("Div", "Mod"):
        y = g.add("Add", g.add("Abs", y), g.constant(np.array(1, x.dtype))) if x.dtype != "uint8" else g.constant(
            g.rng.integers(1, 9, x.shape).astype(x.dtype)
        )  # fmt: skip
    return g.add(op, x, y, **({"fmod": 1} if op == "Mod" and g.maybe() else {}))


def _shift(g: Drawing) -> Tensor:
    x = _integers(g, ("uint8",))
    by = g.constant(g.rng.integers(0, 8, x.shape).astype(np.uint8))
    return g.add("BitShift", x, by, direction=g.one(["LEFT", "RIGHT"]))


_TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "float64": 11}


def _cast(g: Drawing) -> Tensor:
    x = g.find(lambda t: t.dtype in _TYPES, 0.9) or g.floats()
    to = g.one(["float32", "float32", "float32", "uint8", "int8", "int32", "int64", "bool", "float16"])
    least, most = {"uint8": (0, 255), "int8": (-128, 127)}.get(to, (-(2**30), 2**30))
    if any(array.size and (array.min() < least or array.max() > most) for array in x.arrays if array.dtype != bool):
        raise Rejected("range")  # numbers that the type does not hold are not defined
    made = g.add("Cast", x, to=_TYPES[to])
    return made if to != "float16" else g.add("Cast", made, to=1)


_MAKERS: Sequence[tuple[Maker, int]] = (
    (_unary, 6), (_binary, 8), (_positive, 1), (_bounded, 1), (_clip, 1), (_compare, 1), (_logic, 1), (_where, 2),
    (_arithmetic, 3), (_shift, 1), (_cast, 2), *LAYERS, *MOVES,
)  # fmt: skip
