"""Options of passes: declared once as dataclass fields, built alike from text, TOML and Python.

    field type            accepts as text                 from TOML or Python
    bool                  true, false (no value: true)    bool
    int, float, str       one value                       the same (an int for a float)
    Literal[...]          one of the choices              the same
    tuple[T, ...]         values separated by commas      list or tuple of T
    T | None              none, or T                      None, or T

A dash in an option's name is read as an underscore.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from graphopt.errors import OptionError, nearest

__all__ = ["Bounds", "OptionSpec", "build", "non_defaults", "opt", "specs"]

_KEY = "graphopt.option"
_T = TypeVar("_T")


@dataclass(frozen=True)
class Bounds:
    """Limits of a number; None means open."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def violated_by(self, value: float) -> str | None:
        """Return the broken limit as text, or None."""
        checks = (
            (self.ge, value < self.ge if self.ge is not None else False, "at least"),
            (self.gt, value <= self.gt if self.gt is not None else False, "greater than"),
            (self.le, value > self.le if self.le is not None else False, "at most"),
            (self.lt, value >= self.lt if self.lt is not None else False, "less than"),
        )
        return next((f"{word} {limit:g}" for limit, broken, word in checks if limit is not None and broken), None)

    def __str__(self) -> str:
        parts = ((">=", self.ge), (">", self.gt), ("<=", self.le), ("<", self.lt))
        return ", ".join(f"{sign} {limit:g}" for sign, limit in parts if limit is not None)


@dataclass(frozen=True)
class OptionSpec:
    """One option as help texts and completion show it."""

    name: str
    type: str
    default: Any
    help: str
    bounds: Bounds
    choices: tuple[Any, ...] = ()


def opt(
    default: _T,
    *,
    help: str,  # noqa: A002  the word that argparse, click and every reader use
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> _T:
    """Declare an option as a dataclass field with its help text and bounds."""
    metadata = {_KEY: (help, Bounds(ge, gt, le, lt))}
    return dataclasses.field(default=default, metadata=metadata)


def specs(cls: type) -> tuple[OptionSpec, ...]:
    """Return the options that a class declares with `opt`, in order."""
    hints = get_type_hints(cls)
    found: list[OptionSpec] = []
    for field in dataclasses.fields(cls):
        if _KEY in field.metadata:
            text, bounds = field.metadata[_KEY]
            hint = hints[field.name]
            found.append(OptionSpec(field.name, _type_text(hint), field.default, text, bounds, _choices(hint)))
    return tuple(found)


def build(cls: type[_T], values: Mapping[str, Any], subject: str) -> _T:
    """Build an instance of `cls` from option values.

    Args:
        cls: A dataclass whose options are declared with `opt`.
        values: Option name -> a tuple of words (from pipeline text) or a typed value (TOML, Python). Dashes in
            names are read as underscores.
        subject: What errors call the thing: the name of the pass.

    Raises:
        OptionError: An option is unknown, of the wrong type or out of bounds.
    """
    hints, known = get_type_hints(cls), {spec.name: spec for spec in specs(cls)}
    arguments: dict[str, Any] = {}
    for raw, value in values.items():
        name = raw.replace("-", "_")
        if name not in known:
            raise OptionError(f"{subject}.{raw}", "no such option", nearest(name, known))
        if name in arguments:
            raise OptionError(f"{subject}.{raw}", "given twice", "keep one")
        arguments[name] = _convert(hints[name], value, f"{subject}.{raw}")
        _check_bounds(arguments[name], known[name].bounds, f"{subject}.{raw}")
    return cls(**arguments)


def non_defaults(instance: Any) -> dict[str, tuple[str, ...]]:
    """Return the options that differ from their defaults, as words that `build` reads back."""
    found: dict[str, tuple[str, ...]] = {}
    for spec in specs(instance.__class__):
        value = getattr(instance, spec.name)
        if value != spec.default or type(value) is not type(spec.default):
            found[spec.name] = () if value is True else _words(value)
    return found


def _words(value: Any) -> tuple[str, ...]:
    if isinstance(value, tuple):
        return tuple(word for item in cast("tuple[Any, ...]", value) for word in _words(item))
    if value is None:
        return ("none",)
    return (str(value).lower() if isinstance(value, bool) else str(value),)


def _type_text(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "|".join(str(choice) for choice in args)
    if origin is tuple:
        return f"{_type_text(args[0])},..."
    if origin in (Union, types.UnionType):
        return "|".join("none" if arg is type(None) else _type_text(arg) for arg in args)
    return str(getattr(hint, "__name__", hint))


def _choices(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) is Literal else ()


def _convert(hint: Any, value: Any, subject: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin is tuple:
        items: Iterable[Any] = cast("Iterable[Any]", value) if isinstance(value, (tuple, list)) else (value,)
        return tuple(_convert(args[0], item, subject) for item in items)
    if origin in (Union, types.UnionType):
        if value in (None, ("none",), "none") and type(None) in args:
            return None
        return _convert(next(arg for arg in args if arg is not type(None)), value, subject)
    if isinstance(value, tuple):  # words of pipeline text
        words = cast("tuple[Any, ...]", value)
        if not words and hint is bool:
            return True
        if len(words) != 1:
            fact = "needs a value" if not words else f"takes one value, got {len(words)}"
            raise OptionError(subject, fact, f"write {subject.rpartition('.')[2]}={_type_text(hint).upper()}")
        value = words[0]
    return _scalar(hint, value, subject)


def _scalar(hint: Any, value: Any, subject: str) -> Any:
    if get_origin(hint) is Literal:
        for choice in get_args(hint):
            same_type = isinstance(value, str) or type(value) is type(choice)
            if same_type and str(choice) == str(value):
                return choice
        raise OptionError(subject, f"{value!r} is not one of {', '.join(map(str, get_args(hint)))}")
    if hint is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if hint is str and isinstance(value, str):
        return value
    if hint in (int, float) and not isinstance(value, bool):
        try:
            number = hint(value)
        except (TypeError, ValueError, OverflowError):  # int(inf), float(10**400)
            number = None
        is_nan = isinstance(number, float) and math.isnan(number)
        if number is not None and not is_nan and (isinstance(value, str) or number == value):
            return number
    raise OptionError(subject, f"{value!r} is not {_article(hint)}")


def _article(hint: Any) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(hint, _type_text(hint))


def _check_bounds(value: Any, bounds: Bounds, subject: str) -> None:
    for item in cast("tuple[Any, ...]", value) if isinstance(value, tuple) else (value,):
        if isinstance(item, (int, float)) and (broken := bounds.violated_by(item)):
            raise OptionError(subject, f"{item!r} is not {broken}")
