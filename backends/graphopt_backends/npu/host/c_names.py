"""Names, types and numbers as they are written in C."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["C_TYPES", "MATH", "helper", "helpers", "identifier", "literal"]

C_TYPES: Mapping[str, str] = {
    "bool": "bool", "int8": "int8_t", "int16": "int16_t", "int32": "int32_t", "int64": "int64_t", "uint8": "uint8_t",
    "uint16": "uint16_t", "uint32": "uint32_t", "uint64": "uint64_t", "float32": "float", "float64": "double",
}  # fmt: skip
"""Element types by NumPy's names."""

MATH = frozenset(
    {
        "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "ceil", "cos", "cosh", "erf", "exp", "exp2", "fabs",
        "floor", "fmod", "hypot", "log", "log10", "log1p", "log2", "nearbyint", "pow", "round", "sin", "sinh", "sqrt",
        "tan", "tanh", "trunc",
    }
)  # fmt: skip
"""Functions of math.h for float64; those for float32 have an `f` behind."""

_WORDS = frozenset(
    {
        "asm", "auto", "bool", "break", "case", "catch", "char", "class", "const", "continue", "default",
        "delete", "do", "double", "else", "enum", "explicit", "export", "extern", "false", "float", "for",
        "friend", "goto", "if", "inline", "int", "long", "main", "mutable", "namespace", "new", "operator",
        "private", "protected", "public", "register", "restrict", "return", "short", "signed", "sizeof",
        "static", "struct", "switch", "template", "this", "throw", "true", "try", "typedef", "typename",
        "union", "unsigned", "using", "virtual", "void", "volatile", "while", "INFINITY", "NAN", "NULL",
        "isfinite", "isinf", "isnan", "memcpy",
    }
)  # fmt: skip
_RESERVED = _WORDS | MATH | {f"{name}f" for name in MATH} | set(C_TYPES.values())
"""What names nothing of a model, in C or where C++ reads a header."""

_LONGEST = 48


def identifier(text: str, taken: set[str]) -> str:
    """A name in C made of any text; it is added to those that are taken."""
    plain = re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_")[:_LONGEST].rstrip("_") or "value"
    plain = f"value_{plain}" if plain[0].isdigit() else plain
    name, count = plain, 1
    while name in taken or name in _RESERVED:
        name, count = f"{plain}_{count}", count + 1
    taken.add(name)
    return name


def helpers() -> set[str]:
    """Names of all functions that printed ones may call."""
    return {f"{kind}_{dtype}" for kind in ("min", "max") for dtype in C_TYPES}


def helper(name: str) -> str:
    """Definition of one of them."""
    kind, _, dtype = name.partition("_")
    ctype, sign = C_TYPES[dtype], "<" if kind == "min" else ">"
    return f"static inline {ctype} {name}({ctype} a, {ctype} b) {{ return a {sign} b ? a : b; }}"


def literal(value: Any, dtype: str) -> str:
    """A number in C that is read back as it was."""
    if dtype.startswith("float"):
        return _float(float(value), dtype)
    if dtype == "bool":
        return "true" if value else "false"
    number = int(value)
    if dtype in ("int64", "uint64"):
        lowest = number == np.iinfo(np.int64).min
        return "INT64_MIN" if lowest else f"{'U' if dtype == 'uint64' else ''}INT64_C({number})"
    if dtype == "int32" and number == np.iinfo(np.int32).min:
        return "INT32_MIN"
    return f"{number}u" if dtype == "uint32" else str(number)


def _float(value: float, dtype: str) -> str:
    if np.isnan(value):
        return "NAN"
    if np.isinf(value):
        return "INFINITY" if value > 0 else "-INFINITY"
    # the shortest text that is nearest to this number and no other
    text = str(np.float32(value)) if dtype == "float32" else repr(value)
    text = text if "." in text or "e" in text else f"{text}.0"
    return f"{text}f" if dtype == "float32" else text
