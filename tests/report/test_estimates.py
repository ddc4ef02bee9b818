"""Estimates of compilers on the page and in the terminal."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from graphopt.backend_base import Estimate, EstimatedStep
from graphopt.report.data import Report
from graphopt.report.encoding import from_json, to_json
from graphopt.report.estimates import estimate_line, estimated_ms
from graphopt.report.html import render_html
from graphopt.report.terminal import render

HOSTILE = "<script>alert('x')</script>[bold red]\x1b[31m"


def _step(index: int, name: str = "t") -> EstimatedStep:
    cycles = 1000 * (index + 1)
    busy = {"NPU": 900 * (index + 1), "SRAM": 200, "off-chip flash": 950 * (index + 1)}
    return EstimatedStep(f"{name}{index}", "Conv2D", (f"/{name}/{index}",), cycles, busy, 64 * cycles, 0.5, 4096)


def _estimate(part: str = "model_vela.npz", steps: int = 3, **fields: object) -> Estimate:
    made = tuple(_step(i) for i in range(steps))
    cycles = sum(step.cycles for step in made)
    return Estimate(
        part, "Vela 5.2.0", "ethos-u55-128 at 500 MHz, Here, Shared_Sram", cycles, cycles / 500e6, {"NPU": cycles},
        64 * cycles, 0.5, {"SRAM": 18_000, "off-chip flash": 5_712}, {"SRAM": 51_344}, 4_608, 5_392, made,
        **fields,  # type: ignore[arg-type]
    )  # fmt: skip


def _with(report: Report, *estimates: Estimate) -> Report:
    assert report.backend is not None
    return replace(report, backend=replace(report.backend, estimates=estimates))


def _terminal(report: Report) -> str:
    stream = io.StringIO()
    render(report, None, Console(file=stream, width=100, force_terminal=False))
    return stream.getvalue()


def test_the_page_shows_figures_of_the_part_and_a_bar_for_each_operation(report: Report) -> None:
    text = render_html(_with(report, _estimate()))
    for wanted in ("estimated by Vela 5.2.0", "nothing was run", "ethos-u55-128 at 500 MHz, Here, Shared_Sram"):
        assert wanted in text
    for wanted in ("6.00 k cycles", "0.012 ms", "SRAM 18.0 kB", "off-chip flash 5.71 kB", "SRAM 51.3 kB"):
        assert wanted in text
    assert "4.61 kB \u2192 5.39 kB" in text
    assert "<title>/t/2: 3000 cycles</title>" in text, "a bar says its figure to a screen reader"
    assert text.count(">off-chip flash</span>") == 3, "each waits for what is busy longest"
    assert "Device time" in text


def test_the_terminal_says_it_in_one_entry(report: Report) -> None:
    words = " ".join(_terminal(_with(report, _estimate())).split())
    assert "estimate 0.012 ms, 6.00 k cycles, multipliers 50 % busy, SRAM 18.0 kB, off-chip flash 5.71 kB" in words
    assert "(estimated by Vela 5.2.0: ethos-u55-128 at 500 MHz, Here, Shared_Sram)" in words


def test_parts_are_added_up(report: Report) -> None:
    first, second = _estimate("a.npz"), replace(_estimate("b.npz", 1), memory={"SRAM": 30_000})
    assert estimated_ms([first, second]) == pytest.approx(0.014)
    line, by = estimate_line([first, second])
    assert line == "0.014 ms, 7.00 k cycles, multipliers 50 % busy, SRAM 30.0 kB, off-chip flash 5.71 kB"
    assert by == "estimated by Vela 5.2.0: ethos-u55-128 at 500 MHz, Here, Shared_Sram"
    text = render_html(_with(report, first, second))
    assert "<td>all</td>" in text
    assert "Layers of b.npz" in text


def test_many_operations_fold_away(report: Report) -> None:
    text = render_html(_with(report, _estimate(steps=75)))
    assert "15 more layers" in text
    assert "/t/74" in text


def test_steps_of_one_layer_are_shown_as_one(report: Report) -> None:
    first, *rest = (replace(_step(i), sites=("/softmax",), operator=name) for i, name in enumerate("ABCDA"))
    alone = replace(_step(9), sites=(), operator="Move")
    text = render_html(_with(report, replace(_estimate(), steps=(first, *rest, alone, alone))))
    assert "A, B, C, ..., 5 steps" in text
    assert "<title>/softmax: 15000 cycles</title>" in text
    assert text.count("<title>t9: 10000 cycles</title>") == 2, "what is nobody's stays apart"


def test_a_report_without_estimates_has_no_such_section(report: Report) -> None:
    assert "Estimates" not in render_html(report)
    assert "Device time" not in render_html(report)
    assert "estimate " not in _terminal(report)


def test_a_part_that_computes_nothing_is_shown_too(report: Report) -> None:
    empty = Estimate("model_vela.npz", "Vela 5.2.0", "somewhere", 0, 0.0, steps=(EstimatedStep("t", "Memcopy"),))
    text = render_html(_with(report, empty))
    assert "Memcopy" in text
    assert estimate_line([empty])[0] == "0.00000 ms, 0 cycles"


def test_names_cannot_steer_page_or_terminal(report: Report) -> None:
    step = replace(_step(0), name=HOSTILE, operator=HOSTILE, sites=(HOSTILE,), busy={HOSTILE: 1})
    hostile = replace(_estimate(HOSTILE), by=HOSTILE, settings=HOSTILE, memory={HOSTILE: 1}, steps=(step,))
    found = _with(report, hostile)
    text = render_html(found)
    assert "<script" not in text
    assert "\x1b" not in text
    assert "\x1b" not in _terminal(found)
    assert "[bold red]" in _terminal(found)


def test_estimates_are_read_back_from_json(report: Report) -> None:
    found = _with(report, _estimate(), _estimate("other.npz", 1))
    assert from_json(to_json(found)) == found
