from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from graphopt.errors import UsageError
from graphopt.report.data import OutputFidelity, Report
from graphopt.report.encoding import from_json, to_json


@pytest.mark.parametrize("name", ["report", "hostile", "nothing_run"])
def test_a_report_comes_back_from_json(name: str, request: pytest.FixtureRequest) -> None:
    report = request.getfixturevalue(name)
    assert from_json(to_json(report)) == report


def test_the_same_report_gives_the_same_bytes(report: Report) -> None:
    shuffled = replace(report, versions=dict(reversed(list(report.versions.items()))))
    assert to_json(report) == to_json(shuffled)


def test_nan_and_infinity_survive_in_strict_json(report: Report) -> None:
    output = OutputFidelity("y", math.nan, 0.0, -math.inf, math.inf, math.inf, 1.0, nan=True)
    text = to_json(replace(report, fidelity=replace(report.fidelity, outputs=(output,))))
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    back = from_json(text).fidelity.outputs[0]
    assert math.isnan(back.max_abs)
    assert (back.reference_min, back.sqnr_db) == (-math.inf, math.inf)


def test_text_that_is_no_report_is_one_clear_line() -> None:
    with pytest.raises(UsageError, match=r"report\.json: not a report: .*; build again with --force"):
        from_json('{"model": 3}')


def test_a_report_says_how_its_figures_were_obtained(report: Report) -> None:
    found = json.loads(to_json(report))
    assert found["fidelity"]["how"] == found["accuracy"]["how"] == "executed"
    assert found["backend"]["how"] == "emulated"
