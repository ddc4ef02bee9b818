"""Options: every conversion and every error text, from pipeline text and from Python or TOML alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.errors import ExitCode, OptionError
from graphopt.options import Bounds, build, non_defaults, opt, specs
from graphopt.pipeline_text import Step, parse_pipeline


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One option of every type."""

    ratio: float = opt(0.3, help="a fraction", ge=0, lt=1)
    bits: Literal[4, 8] = opt(8, help="a choice of numbers")
    mode: Literal["auto", "static"] = opt("auto", help="a choice of words")
    count: int = opt(3, help="a count", gt=0, le=100)
    fast: bool = opt(False, help="a flag")
    careful: bool = opt(True, help="a flag that is on")
    prefix: str = opt("", help="a text")
    skip_layers: tuple[str, ...] = opt((), help="names")
    sizes: tuple[int, ...] = opt((1, 2), help="sizes", ge=1)
    limit: float | None = opt(None, help="a limit", gt=0)
    seed: int | None = opt(7, help="a seed")


def words(text: str) -> dict[str, tuple[str, ...]]:
    return dict(parse_pipeline(f"sample{{{text}}}")[0].values)


@pytest.mark.parametrize(
    ("text", "option", "value"),
    [
        ("ratio=0.5", "ratio", 0.5),
        ("ratio=0", "ratio", 0.0),
        ("ratio=1e-3", "ratio", 0.001),
        ("bits=4", "bits", 4),
        ("mode=static", "mode", "static"),
        ("count=100", "count", 100),
        ("fast", "fast", True),
        ("fast=true", "fast", True),
        ("fast=True", "fast", True),
        ("careful=false", "careful", False),
        ("prefix=encoder.", "prefix", "encoder."),
        ('prefix="two words, {and} more"', "prefix", "two words, {and} more"),
        ('prefix=""', "prefix", ""),
        ("skip-layers=a,b", "skip_layers", ("a", "b")),
        ("skip_layers=a", "skip_layers", ("a",)),
        ("skip-layers", "skip_layers", ()),
        ("sizes=3,1,2", "sizes", (3, 1, 2)),
        ("limit=2.5", "limit", 2.5),
        ("limit=none", "limit", None),
        ("seed=none", "seed", None),
        ("seed=12", "seed", 12),
    ],
)
def test_text_converts_to_the_declared_type(text: str, option: str, value: Any) -> None:
    got = getattr(build(Sample, words(text), "sample"), option)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("option", "given_value", "value"),
    [
        ("ratio", 0.5, 0.5),
        ("ratio", 0, 0.0),
        ("count", 5, 5),
        ("count", 5.0, 5),
        ("bits", 4, 4),
        ("bits", "4", 4),
        ("mode", "static", "static"),
        ("fast", True, True),
        ("prefix", "x", "x"),
        ("skip_layers", ["a", "b"], ("a", "b")),
        ("skip-layers", ("a",), ("a",)),
        ("skip_layers", "a", ("a",)),
        ("sizes", [4], (4,)),
        ("sizes", 4, (4,)),
        ("limit", None, None),
        ("limit", 3, 3.0),
    ],
)
def test_toml_and_python_values_convert_alike(option: str, given_value: Any, value: Any) -> None:
    got = getattr(build(Sample, {option: given_value}, "sample"), option.replace("-", "_"))
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ratoi=0.5", "sample.ratoi: no such option; did you mean 'ratio'?"),
        ("ratio=lots", "sample.ratio: 'lots' is not a number"),
        ("ratio=nan", "sample.ratio: 'nan' is not a number"),
        ("ratio=1", "sample.ratio: 1.0 is not less than 1"),
        ("ratio=inf", "sample.ratio: inf is not less than 1"),
        ("ratio=-0.1", "sample.ratio: -0.1 is not at least 0"),
        ("ratio", "sample.ratio: needs a value; write ratio=FLOAT"),
        ("ratio=0.1,0.2", "sample.ratio: takes one value, got 2; write ratio=FLOAT"),
        ("bits=5", "sample.bits: '5' is not one of 4, 8"),
        ("bits", "sample.bits: needs a value; write bits=4|8"),
        ("mode=statc", "sample.mode: 'statc' is not one of auto, static"),
        ("count=0", "sample.count: 0 is not greater than 0"),
        ("count=101", "sample.count: 101 is not at most 100"),
        ("count=1.5", "sample.count: '1.5' is not a whole number"),
        ("count=1e400", "sample.count: '1e400' is not a whole number"),
        ("fast=maybe", "sample.fast: 'maybe' is not true or false"),
        ("fast=true,false", "sample.fast: takes one value, got 2; write fast=BOOL"),
        ("sizes=2,0", "sample.sizes: 0 is not at least 1"),
        ("sizes=2,x", "sample.sizes: 'x' is not a whole number"),
        ("limit=0", "sample.limit: 0.0 is not greater than 0"),
        ("limit=some", "sample.limit: 'some' is not a number"),
        ("skip-layers=a skip_layers=b", "sample.skip_layers: given twice; keep one"),
    ],
)
def test_an_option_that_does_not_fit_is_named_with_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        build(Sample, words(text), "sample")
    assert str(caught.value) == message
    assert caught.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("ratio", True, "sample.ratio: True is not a number"),
        ("ratio", [0.1], "sample.ratio: [0.1] is not a number"),
        ("ratio", None, "sample.ratio: None is not a number"),
        ("ratio", math.nan, "sample.ratio: nan is not a number"),
        ("count", 2.5, "sample.count: 2.5 is not a whole number"),
        ("count", math.inf, "sample.count: inf is not a whole number"),
        ("count", 10**400, f"sample.count: {10**400} is not at most 100"),
        ("limit", 10**400, f"sample.limit: {10**400} is not a number"),
        ("fast", 1, "sample.fast: 1 is not true or false"),
        ("bits", 4.0, "sample.bits: 4.0 is not one of 4, 8"),
        ("prefix", 3, "sample.prefix: 3 is not a text"),
        ("skip_layers", [1], "sample.skip_layers: 1 is not a text"),
        ("sizes", {"a": 1}, "sample.sizes: {'a': 1} is not a whole number"),
    ],
)
def test_a_typed_value_that_does_not_fit_is_refused(option: str, value: Any, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        build(Sample, {option: value}, "sample")
    assert str(caught.value) == message


def test_an_unknown_option_with_no_near_name_lists_all() -> None:
    with pytest.raises(OptionError, match="known: bits, careful, count"):
        build(Sample, {"zzzzzz": ("1",)}, "sample")


def test_specs_tell_what_help_texts_need() -> None:
    by_name = {spec.name: spec for spec in specs(Sample)}
    assert list(by_name) == [
        "ratio", "bits", "mode", "count", "fast", "careful", "prefix", "skip_layers", "sizes", "limit", "seed",
    ]  # fmt: skip
    assert by_name["bits"].choices == (4, 8)
    assert (by_name["ratio"].type, by_name["ratio"].default, str(by_name["ratio"].bounds)) == (
        "float",
        0.3,
        ">= 0, < 1",
    )
    assert by_name["skip_layers"].type == "str,..."
    assert by_name["limit"].type == "float|none"
    assert by_name["mode"].help == "a choice of words"


def test_bounds_without_limits_print_as_nothing() -> None:
    assert str(Bounds()) == ""
    assert Bounds().violated_by(1e300) is None


def test_defaults_are_left_out() -> None:
    assert non_defaults(Sample()) == {}
    assert non_defaults(Sample(ratio=0.3, sizes=(1, 2))) == {}


finite = st.floats(allow_nan=False)
samples = st.builds(
    Sample,
    ratio=st.floats(0, 1, exclude_max=True),
    bits=st.sampled_from([4, 8]),
    mode=st.sampled_from(["auto", "static"]),
    count=st.integers(1, 100),
    fast=st.booleans(),
    careful=st.booleans(),
    prefix=st.text(),
    skip_layers=st.lists(st.text()).map(tuple),
    sizes=st.lists(st.integers(min_value=1)).map(tuple),
    limit=st.none() | st.floats(0, exclude_min=True, allow_nan=False),
    seed=st.none() | st.integers(),
)


@given(samples)
def test_any_instance_survives_printing_and_parsing(sample: Sample) -> None:
    step = Step("sample", tuple(non_defaults(sample).items()))
    parsed = parse_pipeline(str(step))[0]
    assert build(Sample, parsed.values, "sample") == sample
