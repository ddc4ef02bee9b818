"""Lowered TVM functions printed as C99.

TVM's own generator of C cannot be used for this: it prints 7 digits of a float32, which needs 9, asks for headers of
TVM's runtime, and keeps large temporaries on the stack. Loops, loads and arithmetic are all that is left to print here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tvm import tirx

from graphopt_backends.npu.host.c_names import C_TYPES, MATH, helpers, identifier, literal

__all__ = ["CannotPrint", "Printed", "Room", "print_function"]

_ATOM, _UNARY, _PRODUCT, _SUM, _SHIFT, _ORDER, _EQUAL, _BIT, _AND, _OR, _CHOICE = range(11, 0, -1)
_BINARY: Mapping[str, tuple[str, int, int]] = {
    "Mul": ("*", _PRODUCT, _PRODUCT), "Div": ("/", _PRODUCT, _PRODUCT), "Mod": ("%", _PRODUCT, _PRODUCT),
    "Add": ("+", _SUM, _SUM), "Sub": ("-", _SUM, _SUM), "LShift": ("<<", _SHIFT, _UNARY),
    "RShift": (">>", _SHIFT, _UNARY), "LT": ("<", _ORDER, _SUM), "LE": ("<=", _ORDER, _SUM),
    "GT": (">", _ORDER, _SUM), "GE": (">=", _ORDER, _SUM), "EQ": ("==", _EQUAL, _SUM), "NE": ("!=", _EQUAL, _SUM),
    "BitwiseAnd": ("&", _BIT, _UNARY), "BitwiseOr": ("|", _BIT, _UNARY), "BitwiseXor": ("^", _BIT, _UNARY),
    "And": ("&&", _AND, _EQUAL), "Or": ("||", _OR, _EQUAL),
}  # fmt: skip
"""What is written between two operands, how strongly it binds, and how strongly the first of them must.

Compilers ask for more brackets than C does where bits, comparisons and conditions are mixed.
"""

_CHOICES = ("prim.if_then_else", "tirx.if_then_else")
_TRANSPARENT = ("tirx.likely", "prim.likely")
_REMAINDERS = {"float32": "fmodf", "float64": "fmod"}
_NARROW = ("int8", "int16", "uint8", "uint16")


class CannotPrint(Exception):  # noqa: N818  a result, as StopIteration is
    """There is no C for something; its text says for what."""


@dataclass(frozen=True)
class Room:
    """Memory for a temporary of a function.

    Attributes:
        dtype: Element type.
        size: Elements.
        first: First stage of the function that uses it.
        last: Last stage.
    """

    dtype: str
    size: int
    first: int
    last: int


@dataclass(frozen=True)
class Printed:
    """A function in C; it takes its tensors, in the order of its parameters, and behind them its temporaries.

    Attributes:
        name: Of the function.
        text: Its definition.
        rooms: Its temporaries.
        stages: Statements, one after the other, that temporaries live in.
        helpers: Functions that it calls, as `min_float32`.
    """

    name: str
    text: str
    rooms: tuple[Room, ...]
    stages: int
    helpers: frozenset[str]


def print_function(function: Any, name: str) -> Printed:
    """Print a flat, lowered PrimFunc.

    Raises:
        CannotPrint: There is something in it that has no C.
    """
    return _Printer(name).function(function)


@dataclass
class _Temporary:
    name: str
    dtype: str
    size: int
    first: int = sys.maxsize
    last: int = 0


@dataclass
class _Printer:
    name: str
    lines: list[str] = field(default_factory=list[str])
    indent: int = 1
    names: dict[Any, str] = field(default_factory=dict[Any, str])
    taken: set[str] = field(default_factory=helpers)
    temporaries: dict[str, _Temporary] = field(default_factory=dict[str, _Temporary])
    written: set[str] = field(default_factory=set[str])
    used: set[str] = field(default_factory=set[str])
    helpers: set[str] = field(default_factory=set[str])
    bindings: dict[str, int] = field(default_factory=dict[str, int])  # lines of names that nothing reads yet
    stage: int = 0

    def function(self, function: Any) -> Printed:
        parameters: list[tuple[str, str]] = []
        for parameter in function.params:
            name = identifier(parameter.name, self.taken)
            self.names[parameter] = name
            offset = parameter.ty.elem_offset
            if not isinstance(offset, tirx.IntImm):  # only whole tensors are ever handed over
                self.names[offset] = "0"
            parameters.append((_type(parameter.ty.dtype), name))
        for stage, statement in enumerate(_flat(function.body)):
            self.stage = stage
            self.statement(statement)
        held = list(self.temporaries.values())
        parameters += [(_type(room.dtype), room.name) for room in held]
        self.written |= {room.name for room in held}
        typed = ", ".join(self.parameter(kind, name) for kind, name in parameters)
        unused = [f"  (void){name};" for _, name in parameters if name not in self.used]
        unread = set(self.bindings.values())
        lines = [line for number, line in enumerate(self.lines) if number not in unread]
        text = "\n".join([f"static void {self.name}({typed}) {{", *unused, *lines, "}"])
        rooms = tuple(Room(room.dtype, room.size, min(room.first, room.last), room.last) for room in held)
        return Printed(self.name, text, rooms, self.stage + 1, frozenset(self.helpers))

    def parameter(self, kind: str, name: str) -> str:
        """Tensors do not overlap with anything; temporaries of different stages share memory."""
        constant, alone = "" if name in self.written else "const ", "" if name in self.temporaries else "restrict "
        return f"{constant}{kind} *{alone}{name}"

    # statements

    def statement(self, node: Any) -> None:
        print_it = _STATEMENTS.get(type(node).__name__)
        if print_it is None:
            raise CannotPrint(f"a statement {type(node).__name__}")
        print_it(self, node)

    def line(self, text: str) -> None:
        self.lines.append("  " * self.indent + text)

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        self.line(f"{head} {{")
        self.indent += 1
        yield
        self.indent -= 1
        self.line("}")

    def sequence(self, node: Any) -> None:
        for statement in node.seq:
            self.statement(statement)

    def loop(self, node: Any) -> None:
        dtype = str(node.loop_var.ty.dtype)
        name = self.bound(node.loop_var)
        end = node.extent if _is_zero(node.min) else node.min + node.extent
        first, last = self.expression(node.min), self.operand(end, _ORDER)
        with self.block(f"for ({_type(dtype)} {name} = {first}; {name} < {last}; ++{name})"):
            self.statement(node.body)

    def choice(self, node: Any) -> None:
        with self.block(f"if ({self.expression(node.condition)})"):
            self.statement(node.then_case)
        if node.else_case is not None:
            with self.block("else"):
                self.statement(node.else_case)

    def repeat(self, node: Any) -> None:
        with self.block(f"while ({self.expression(node.condition)})"):
            self.statement(node.body)

    def store(self, node: Any) -> None:
        place = self.element(node.buffer, node.indices)
        self.written.add(self.names[node.buffer])
        self.line(f"{place} = {self.expression(node.value)};")

    def allocate(self, node: Any) -> None:
        sizes = [int(size) for size in node.buffer.ty.shape]
        name = identifier(node.buffer.name, self.taken)
        self.names[node.buffer] = name
        size = int(np.prod(sizes, dtype=np.int64))
        self.temporaries[name] = _Temporary(name, str(node.buffer.ty.dtype), size)

    def declare(self, node: Any) -> None:
        """Another shape of a buffer, which changes nothing where all of them are flat."""
        source = node.data.args[0] if _is_call(node.data, "tirx.buffer_data") else node.data
        if source not in self.names or str(source.ty.dtype) != str(node.buffer.ty.dtype):
            raise CannotPrint("a view of other memory")
        self.names[node.buffer] = self.names[source]

    def bind(self, node: Any) -> None:
        value = self.expression(node.value)
        name = self.bound(node.var)
        self.line(f"const {_type(node.var.ty.dtype)} {name} = {value};")
        self.bindings[name] = len(self.lines) - 1

    def inner(self, node: Any) -> None:
        self.statement(node.body)

    def evaluate(self, node: Any) -> None:
        if not isinstance(node.value, (tirx.IntImm, tirx.FloatImm)):
            raise CannotPrint(f"a call of {_called(node.value)}")

    # expressions

    def bound(self, variable: Any) -> str:
        self.names[variable] = identifier(variable.name, self.taken)
        return self.names[variable]

    def expression(self, node: Any) -> str:
        return self.rated(node)[0]

    def operand(self, node: Any, least: int) -> str:
        """An expression, in brackets if it binds less than it must."""
        text, binds = self.rated(node)
        return text if binds >= least else f"({text})"

    def rated(self, node: Any) -> tuple[str, int]:
        """An expression, and how strongly it binds."""
        kind = type(node).__name__
        if kind in _BINARY:
            return self.binary(node, *_BINARY[kind])
        print_it = _EXPRESSIONS.get(kind)
        if print_it is None:
            raise CannotPrint(f"an expression {kind}")
        return print_it(self, node)

    def binary(self, node: Any, sign: str, binds: int, least: int) -> tuple[str, int]:
        left, right = self.operand(node.a, least), self.operand(node.b, max(least, binds + 1))
        text, dtype = f"{left} {sign} {right}", str(node.ty.dtype)
        if dtype in _REMAINDERS and sign == "%":
            return f"{_REMAINDERS[dtype]}({self.expression(node.a)}, {self.expression(node.b)})", _ATOM
        return (f"({C_TYPES[dtype]})({text})", _UNARY) if dtype in _NARROW else (text, binds)

    def extreme(self, node: Any) -> tuple[str, int]:
        name = f"{type(node).__name__.lower()}_{node.ty.dtype}"
        self.helpers.add(name)
        return f"{name}({self.expression(node.a)}, {self.expression(node.b)})", _ATOM

    def convert(self, node: Any) -> tuple[str, int]:
        return f"({_type(node.ty.dtype)}){self.operand(node.value, _UNARY)}", _UNARY

    def load(self, node: Any) -> tuple[str, int]:
        return self.element(node.source, node.indices), _ATOM

    def element(self, buffer: Any, indices: Sequence[Any]) -> str:
        name = self.names.get(buffer)
        if name is None or len(indices) != 1:
            raise CannotPrint("memory that is not flat")
        self.used.add(name)
        if room := self.temporaries.get(name):
            room.first, room.last = min(room.first, self.stage), max(room.last, self.stage)
        return f"{name}[{self.expression(indices[0])}]"

    def variable(self, node: Any) -> tuple[str, int]:
        if node not in self.names:
            raise CannotPrint(f"a size that is open, {node.name}")
        self.bindings.pop(self.names[node], None)
        return self.names[node], _ATOM

    def number(self, node: Any) -> tuple[str, int]:
        text = literal(node.value, str(node.ty.dtype))
        return text, _UNARY if text.startswith("-") else _ATOM

    def let(self, node: Any) -> tuple[str, int]:
        """A name within an expression: its value stands where the name is read, as C has no other place for it."""
        self.names[node.var] = f"({self.expression(node.value)})"
        return self.rated(node.body)

    def negate(self, node: Any) -> tuple[str, int]:
        return f"!{self.operand(node.a, _UNARY)}", _UNARY

    def either(self, node: Any) -> tuple[str, int]:
        return self.chosen(node.condition, node.true_value, node.false_value)

    def chosen(self, condition: Any, yes: Any, no: Any) -> tuple[str, int]:
        words = self.operand(condition, _OR), self.operand(yes, _CHOICE + 1), self.operand(no, _CHOICE + 1)
        return "{} ? {} : {}".format(*words), _CHOICE

    def call(self, node: Any) -> tuple[str, int]:
        name, arguments = _called(node), list(node.args)
        if name in _CHOICES:
            return self.chosen(*arguments)
        if name in _TRANSPARENT:
            return self.rated(arguments[0])
        if name == "tirx.bitwise_not":
            return f"~{self.operand(arguments[0], _UNARY)}", _UNARY
        if name in ("tirx.call_pure_extern", "tirx.call_extern"):
            name, arguments = str(arguments[0].value), arguments[1:]
        plain, dtype = name.removeprefix("tirx."), str(node.ty.dtype)
        words = ", ".join(map(self.expression, arguments))
        if plain in ("isnan", "isinf", "isfinite"):
            return f"{plain}({words})", _ATOM
        if dtype == "float32" and (plain in MATH or plain.removesuffix("f") in MATH):
            return f"{plain if plain not in MATH else f'{plain}f'}({words})", _ATOM
        if dtype == "float64" and plain in MATH:
            return f"{plain}({words})", _ATOM
        raise CannotPrint(f"a call of {name}")


def _flat(node: Any) -> Iterator[Any]:
    """Statements that follow one another at the top."""
    if type(node).__name__ == "SeqStmt":
        for statement in node.seq:
            yield from _flat(statement)
    else:
        yield node


def _type(dtype: Any) -> str:
    if str(dtype) not in C_TYPES:
        raise CannotPrint(f"numbers of type {dtype}")
    return C_TYPES[str(dtype)]


def _is_zero(node: Any) -> bool:
    return isinstance(node, tirx.IntImm) and int(node.value) == 0


def _called(node: Any) -> str:
    return str(getattr(getattr(node, "op", None), "name", type(node).__name__))


def _is_call(node: Any, name: str) -> bool:
    return type(node).__name__ == "Call" and _called(node) == name


_STATEMENTS: Mapping[str, Callable[[_Printer, Any], None]] = {
    "SeqStmt": _Printer.sequence, "For": _Printer.loop, "IfThenElse": _Printer.choice, "While": _Printer.repeat,
    "BufferStore": _Printer.store, "AllocBuffer": _Printer.allocate, "DeclBuffer": _Printer.declare,
    "Bind": _Printer.bind, "AttrStmt": _Printer.inner, "Evaluate": _Printer.evaluate,
}  # fmt: skip
_EXPRESSIONS: Mapping[str, Callable[[_Printer, Any], tuple[str, int]]] = {
    "Min": _Printer.extreme, "Max": _Printer.extreme, "Cast": _Printer.convert, "TensorLoad": _Printer.load,
    "Var": _Printer.variable, "IntImm": _Printer.number, "FloatImm": _Printer.number, "Not": _Printer.negate,
    "Let": _Printer.let, "Select": _Printer.either, "Call": _Printer.call,
}  # fmt: skip
