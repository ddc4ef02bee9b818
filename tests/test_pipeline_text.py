"""Pipeline text: what is read, what is printed, and where an error points."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.errors import OptionError
from graphopt.pipeline_text import Step, format_pipeline, parse_pipeline, parse_target

names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.\-]{0,8}", fullmatch=True)
values = st.lists(st.text(max_size=8), max_size=3).map(tuple)
options = st.lists(st.tuples(names, values), max_size=4, unique_by=lambda option: option[0]).map(tuple)
pipelines = st.lists(st.builds(Step, names, options), min_size=1, max_size=4).map(tuple)


@given(pipelines)
def test_printed_pipelines_parse_back(steps: tuple[Step, ...]) -> None:
    text = format_pipeline(steps)
    assert parse_pipeline(text) == steps
    assert format_pipeline(parse_pipeline(text)) == text


@given(st.lists(names, min_size=1, max_size=2).map(":".join), options)
def test_printed_targets_parse_back(name: str, given: tuple[tuple[str, tuple[str, ...]], ...]) -> None:
    target = Step(name, given)
    assert parse_target(str(target)) == target
    assert str(parse_target(str(target))) == str(target)


@given(st.text())
def test_any_text_is_parsed_or_refused_with_a_column(text: str) -> None:
    try:
        steps = parse_pipeline(text)
    except OptionError as e:
        assert e.fact.startswith("column ")
    else:
        assert parse_pipeline(format_pipeline(steps)) == steps


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("fold", (Step("fold"),)),
        (" fold , quant ", (Step("fold"), Step("quant"))),
        ("fold{}", (Step("fold"),)),
        ("prune{ratio=0.5}", (Step("prune", (("ratio", ("0.5",)),)),)),
        ("p{a=1 b c=x,y}", (Step("p", (("a", ("1",)), ("b", ()), ("c", ("x", "y")))),)),
        ("p{ a = 1 , 2\n b }", (Step("p", (("a", ("1", "2")), ("b", ()))),)),
        (r'p{a="say \"hi\" \\"}', (Step("p", (("a", (r'say "hi" \ '.strip(),)),)),)),
        ('p{a="",b}', (Step("p", (("a", ("", "b")),)),)),
        ("acme-clip-weights{sigmas=3}", (Step("acme-clip-weights", (("sigmas", ("3",)),)),)),
    ],
)
def test_text_reads_as_steps(text: str, steps: tuple[Step, ...]) -> None:
    assert parse_pipeline(text) == steps


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "column 1: expected a pass name, found the end"),
        ("fold,", "column 6: expected a pass name, found the end"),
        (",fold", "column 1: expected a pass name, found ','"),
        ("fold quant", "column 6: expected ',' or the end, found 'q'"),
        ("prune{ratio=0.5", "column 16: '{' is never closed; add '}'"),
        ("prune{", "column 7: '{' is never closed; add '}'"),
        ("prune}", "column 6: expected ',' or the end, found '}'"),
        ("prune{ratio=}", "column 13: expected a value, found '}'"),
        ("prune{ratio=0.5,}", "column 17: expected a value, found '}'"),
        ("prune{=1}", "column 7: expected an option name or '}', found '='"),
        ("prune{a=1 a=2}", "column 11: option 'a' is given twice; keep one"),
        ('p{a="x}', "column 5: the quote is never closed; add '\"'"),
        ("1fold", "column 1: expected a pass name, found '1'"),
    ],
)
def test_an_error_points_at_the_column(text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_pipeline(text)
    assert str(caught.value) == f"--passes {text!r}: {message}"


def test_only_what_needs_quotes_is_quoted() -> None:
    step = Step("p", (("a", ("plain", "two words", "", 'q"', "back\\slash")),))
    assert str(step) == r'p{a=plain,"two words","","q\"",back\slash}'
