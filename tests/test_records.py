from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.records import from_text, to_text


@dataclass(frozen=True)
class Inner:
    text: str
    number: float


@dataclass(frozen=True)
class Outer:
    kind: Literal["a", "b"]
    whole: int
    maybe: int | None
    flag: bool
    inner: Inner
    items: tuple[Inner, ...] = ()
    pair: tuple[int, str] = (0, "")
    mapping: Mapping[str, int | float | str | bool] = field(default_factory=dict)


inners = st.builds(Inner, st.text(), st.floats(allow_nan=False))
outers = st.builds(
    Outer,
    st.sampled_from(["a", "b"]),
    st.integers(),
    st.none() | st.integers(),
    st.booleans(),
    inners,
    st.lists(inners).map(tuple),
    st.tuples(st.integers(), st.text()),
    st.dictionaries(
        st.text(), st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text() | st.booleans()
    ),
)


@given(outers)
def test_records_come_back_as_they_went(record: Outer) -> None:
    assert from_text(Outer, to_text(record)) == record


@given(outers)
def test_the_text_is_strict_json_with_a_newline_at_the_end(record: Outer) -> None:
    text = to_text(record)
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert text.endswith("}\n")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks_come_back_as_floats(value: float) -> None:
    text = to_text(Inner("x", value))
    assert repr(from_text(Inner, text).number) == repr(value)
    assert to_text(from_text(Inner, text)) == text


def test_the_order_of_a_mapping_does_not_change_the_bytes() -> None:
    one = Outer("a", 1, None, True, Inner("", 0.0), mapping={"x": 1, "y": 2})
    two = Outer("a", 1, None, True, Inner("", 0.0), mapping={"y": 2, "x": 1})
    assert to_text(one) == to_text(two)


def test_numpy_scalars_are_written_as_plain_numbers() -> None:
    mapping = {"a": np.int64(3), "b": np.float32(0.5), "c": np.bool_(True)}
    text = to_text(Outer("a", 1, None, True, Inner("", 0.0), mapping=mapping))
    assert json.loads(text)["mapping"] == {"a": 3, "b": 0.5, "c": True}


def test_unknown_keys_are_left_out_so_that_newer_files_can_be_read() -> None:
    assert from_text(Inner, '{"text": "x", "number": 1, "later": []}') == Inner("x", 1.0)


def test_what_has_no_json_form_is_refused() -> None:
    with pytest.raises(TypeError, match="no JSON form"):
        to_text(Outer("a", 1, None, True, Inner("", 0.0), mapping={"a": object()}))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"text": 1, "number": 1}',
        '{"text": "x", "number": true}',
        '{"text": "x", "number": "much"}',
        '{"text": "x"}',
    ],
)
def test_text_that_does_not_fit_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        from_text(Inner, text)


def test_a_value_that_no_alternative_takes_is_named_with_its_place() -> None:
    with pytest.raises(ValueError, match=r"Outer\.maybe: 'x' does not fit"):
        from_text(Outer, '{"kind": "a", "whole": 1, "maybe": "x", "flag": true, "inner": {"text": "", "number": 0}}')
