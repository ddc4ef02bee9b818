from __future__ import annotations

import math
from dataclasses import replace

import pytest

from graphopt.measured import Measurement, Times
from graphopt.pass_base import Change
from graphopt.report.data import Accuracy, BackendReport, Fidelity, Limit, OutputFidelity, Report, StepReport
from graphopt.report.figures import (
    accuracy_change,
    agreement_text,
    clean,
    fidelity_text,
    limit_text,
    macs_text,
    milliseconds,
    number,
    quantity,
    ratio,
    reasons,
    scalar,
    score,
    size,
    speedup,
    spread,
    untimed,
    worst,
)


@pytest.mark.parametrize(
    ("got", "wanted"),
    [
        (size(0), "0 B"),
        (size(999), "999 B"),
        (size(1000), "1.00 kB"),
        (size(999_600), "1.00 MB"),
        (size(12_345_678), "12.3 MB"),
        (size(None), "unknown"),
        (quantity(950), "950"),
        (quantity(40_813_184), "40.8 M"),
        (number(0.0), "0"),
        (number(0.00001234), "1.23e-05"),
        (number(1234.5), "1,234"),
        (number(math.nan), "NaN"),
        (number(math.inf), "infinite"),
        (ratio(0, 5), ""),
        (ratio(10, 3), "0.30x"),
        (ratio(1_000_000, 1), "1e-06x"),
        (ratio(None, 3), ""),
        (speedup(4, 2), "2.00x faster"),
        (speedup(2, 4), "2.00x slower"),
        (speedup(2, 2.01), "same"),
        (milliseconds(0.0123), "0.012 ms"),
        (milliseconds(0.0012345), "0.00123 ms"),
        (milliseconds(0.9999), "1.00 ms"),
        (milliseconds(4), "4.00 ms"),
        (milliseconds(1234.5), "1,234 ms"),
        (score("top1", 91.7), "91.70 %"),
        (score("perplexity", 12.345), "12.35"),
        (scalar(True), "yes"),
        (scalar(12345), "12,345"),
        (scalar(0.29712), "0.2971"),
        (spread(Times(2.0, 1.0, 1.9, 2.1, 3.0)), "10 %"),
    ],
)
def test_figures_are_written_as_a_person_reads_them(got: str, wanted: str) -> None:
    assert got == wanted


@pytest.mark.parametrize(
    ("accuracy", "wanted"),
    [
        (Accuracy("top1", 92, 91.5, 0.5, 10), "-0.50 points"),
        (Accuracy("top1", 92, 92.5, -0.5, 10), "+0.50 points"),
        (Accuracy("top1", 92, 92, 0.0, 10), "+0.00 points"),
        (Accuracy("perplexity", 10, 11, 10.0, 10, higher_is_better=False), "10.00 % worse"),
        (Accuracy("perplexity", 10, 9, -10.0, 10, higher_is_better=False), "10.00 % better"),
        (Accuracy("top1", 92, math.nan, math.nan, 10), "NaN"),
    ],
)
def test_a_loss_and_a_gain_cannot_be_mixed_up(accuracy: Accuracy, wanted: str) -> None:
    assert accuracy_change(accuracy) == wanted


@pytest.mark.parametrize("text", ["\x1b[31m", "a\nb", "\u202e", "\x00", "\ud800", "\x9b31m"])
def test_control_characters_are_shown_and_not_obeyed(text: str) -> None:
    assert clean(text).isprintable()
    assert "\\u" in clean(text)


def test_clean_leaves_names_of_other_languages_alone() -> None:
    assert clean("größe/重み[0]") == "größe/重み[0]"


def test_macs_that_are_only_a_lower_bound_say_so(report: Report) -> None:
    assert macs_text(report.before) == "40.8 M"
    assert macs_text(replace(report.before, macs_unknown=("x",))) == "> 40.8 M"


def test_the_worst_output_stands_for_all() -> None:
    good, bad = OutputFidelity("a", 0.1, 0, 0, 1, 40.0, 1), OutputFidelity("b", 0.1, 0, 0, 1, 10.0, 1)
    broken = OutputFidelity("c", 0.0, 0, 0, 1, math.inf, 1, nan=True)
    assert worst(Fidelity("random inputs", 1, (good, bad))) is bad
    assert worst(Fidelity("random inputs", 1, (good, bad, broken))) is broken
    assert "NaN" in fidelity_text(Fidelity("random inputs", 1, (good, bad, broken)))


def test_equal_outputs_are_called_equal() -> None:
    same = OutputFidelity("a", 0.0, 0.0, 0, 1, math.inf, 1.0)
    assert fidelity_text(Fidelity("random inputs", 1, (same,))) == "equal, bit by bit"
    assert fidelity_text(Fidelity("random inputs", 1, (same, same))) == "all outputs equal, bit by bit"


def test_what_was_not_run_says_why() -> None:
    assert fidelity_text(Fidelity("random inputs", 0, not_run="not checked: needs 12 GB")) == "not checked: needs 12 GB"
    built = BackendReport("arm", "arm:x", "compiled only", not_run="compiled only: qemu-aarch64 not found")
    assert agreement_text(built) == "compiled only: qemu-aarch64 not found"


def test_limits_say_what_was_wanted_what_was_reached_and_whether_it_is_enough() -> None:
    assert (
        limit_text(Limit("--min-sqnr", 20, 24.5, True, "dB", "at least"))
        == "--min-sqnr at least 20 dB, got 24.5 dB: met"
    )
    assert limit_text(Limit("--max-size", 0.3, 0.5, False, "x")) == "--max-size at most 0.30x, got 0.50x: MISSED"
    assert limit_text(Limit("--time-limit", 600, None, False, "s")) == "--time-limit at most 600 s: MISSED"


def test_reasons_are_grouped_by_step_with_the_most_frequent_first() -> None:
    changed = (Change("d", "done"), Change.skipped("d", "not this as well"))
    changes = (Change.skipped("a", "x"), Change.skipped("b", "y"), Change.skipped("c", "y"), *changed)
    report_steps = (StepReport("p", "p", True, True, changes), StepReport("q", "q", True, True, changes[:1]))

    class Holder:
        steps = report_steps

    found = reasons(Holder())  # type: ignore[arg-type]
    assert [(r.step, r.reason, r.sites) for r in found] == [
        ("p", "y", ("b", "c")),
        ("p", "x", ("a",)),
        ("q", "x", ("a",)),
    ]


def test_a_row_without_a_time_says_what_was_done() -> None:
    row = Measurement("arm", "m", "result", "emulated", 1, 5, samples=8, agrees=0.25)
    assert untimed(row) == "ran 8 samples, max diff 0.25 from model.onnx in ONNX Runtime"
    assert untimed(replace(row, not_run="not run: no emulator")) == "not run: no emulator"
