"""Frozen dataclasses as JSON text and back, the same bytes for the same values.

Python                         JSON
dataclass                      object, keys in the order of the fields
mapping                        object, keys sorted
tuple, list                    array
NaN, infinities                "nan", "inf", "-inf", and floats again where the field says float
str, int, float, bool, None    as they are
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

__all__ = ["from_text", "to_text"]

_T = TypeVar("_T")


def to_text(record: object) -> str:
    """Write a dataclass as indented JSON with a newline at the end."""
    return json.dumps(_plain(record), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def from_text(cls: type[_T], text: str) -> _T:
    """Read what `to_text` wrote; unknown keys are left out, so that older programs read newer files.

    Raises:
        ValueError: The text is no JSON, or does not have the fields of `cls`.
    """
    return cast("_T", _build(cls, json.loads(text), cls.__name__))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value)
        return {str(key): _plain(items[key]) for key in sorted(items, key=str)}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in cast("Sequence[Any]", value)]
    if value is None or type(value) in (str, int, bool):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, (str, int)):  # enumerations and other refinements
        return str(value) if isinstance(value, str) else int(value)
    if callable(item := getattr(value, "item", None)):  # a number from numpy
        return _plain(item())
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _build(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _build_record(hint, value, where)
    if origin in (Union, types.UnionType):
        return _build_union(arguments, value, where)
    if origin is Literal:
        return _checked(value, value in arguments, where)
    if origin is tuple:
        return _build_tuple(arguments, value, where)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        items = cast("Mapping[str, Any]", _checked(value, isinstance(value, dict), where))
        return {key: _build(arguments[1], item, f"{where}.{key}") for key, item in items.items()}
    if hint is float:
        known = isinstance(value, (int, float)) and not isinstance(value, bool)
        return float(_checked(value, known or value in ("nan", "inf", "-inf"), where))
    return _checked(value, type(value) is hint, where)


def _build_record(cls: type, value: Any, where: str) -> Any:
    items = cast("Mapping[str, Any]", _checked(value, isinstance(value, dict), where))
    hints = get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls) if f.name in items]
    try:
        return cls(**{name: _build(hints[name], items[name], f"{where}.{name}") for name in known})
    except TypeError as e:
        raise ValueError(f"{where}: {e}") from e


def _build_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    items = cast("list[Any]", _checked(value, isinstance(value, list), where))
    if arguments[1:] == (...,):
        return tuple(_build(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    _checked(items, len(items) == len(arguments), where)
    return tuple(_build(a, item, f"{where}[{i}]") for i, (a, item) in enumerate(zip(arguments, items, strict=True)))


def _build_union(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None:
        return _checked(value, type(None) in arguments, where)
    exact = [a for a in arguments if type(value) is a]
    if exact:
        return value
    for argument in arguments:
        if argument is not type(None):
            try:
                return _build(argument, value, where)
            except ValueError:
                continue  # the next alternative may fit; the error below names the place if none does
    return _checked(value, False, where)


def _checked(value: _T, fits: bool, where: str) -> _T:
    if not fits:
        raise ValueError(f"{where}: {value!r} does not fit")
    return value
