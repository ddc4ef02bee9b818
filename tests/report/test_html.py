from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from graphopt.measured import Measured, Times
from graphopt.report.data import LayerCost, LayerRow, Report
from graphopt.report.html import render_html, render_measured_html
from graphopt.report.markup import Markup, join, tag

VOID = {"meta", "rect", "line"}


class Page(HTMLParser):
    """Reads a page: its elements, their attributes, its visible text; fails where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID
        self.tags.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def pages(report: Report, measured: Measured) -> list[str]:
    return [render_html(report), render_measured_html(report, measured), render_measured_html(None, measured)]


@pytest.mark.parametrize("name", ["report", "hostile", "nothing_run"])
def test_pages_are_well_formed_and_hold_no_script(
    name: str, request: pytest.FixtureRequest, measured: Measured
) -> None:
    for text in pages(request.getfixturevalue(name), measured):
        page = Page(text)
        assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
        assert not [key for key, _ in page.attributes if key.startswith("on")]


def test_pages_name_nothing_outside_themselves(report: Report, measured: Measured) -> None:
    for text in pages(report, measured):
        assert not re.search(r"https?://|//[a-z]|url\(|@import|\bsrc=|\bhref=", text)


def test_hostile_names_are_shown_and_not_obeyed(hostile: Report, measured: Measured) -> None:
    evil = replace(measured, rows=tuple(replace(row, subject=hostile.model) for row in measured.rows))
    for text in pages(hostile, evil):
        assert "<script" not in text
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert "<script>alert('x')</script>&\"" in Page(text).text


def test_the_same_report_gives_the_same_page(report: Report) -> None:
    assert render_html(report) == render_html(replace(report))


def test_every_change_and_every_reason_stands_in_the_page(report: Report) -> None:
    text = Page(render_html(report)).text
    for step in report.steps:
        assert step.step in text
        for change in step.changes:
            assert change.site in text
            assert change.action in text


def test_figures_say_how_they_were_obtained(report: Report) -> None:
    text = Page(render_html(report)).text
    assert "counted" in text
    assert "executed" in text
    assert "How its results were obtained: emulated" in text
    backend = replace(
        report.backend, how="compiled only", agreement=None, not_run="compiled only: qemu-aarch64 not found"
    )
    text = Page(render_html(replace(report, backend=backend))).text
    assert "How its results were obtained: compiled only" in text
    assert "compiled only: qemu-aarch64 not found" in text


def test_a_missed_limit_shows_in_the_verdict_and_in_the_list(report: Report) -> None:
    limit = replace(report.limits[0], got=2.5, met=False)
    text = Page(render_html(replace(report, limits=(limit,), verdict="--max-drop missed"))).text
    assert "attention --max-drop missed" in text
    assert "missed --max-drop at most 1.00 points, got 2.50 points" in text
    assert "every limit is met" not in text


def test_without_a_limit_the_page_does_not_claim_one_was_met(report: Report) -> None:
    assert "ok every limit is met" in Page(render_html(report)).text
    assert "ok finished; no limit was set" in Page(render_html(replace(report, limits=()))).text


def test_a_result_that_is_slower_is_said_to_be(measured: Measured) -> None:
    slow = replace(measured.rows[1], times=Times(8.0, 7.0, 7.5, 9.0, 10.0))
    note = "the result is 2.00x slower than the original in ONNX Runtime (onnxruntime, 1 thread)"
    assert note in Page(render_measured_html(None, replace(measured, rows=(measured.rows[0], slow)))).text
    assert "slower" not in Page(render_measured_html(None, measured)).text


def test_without_labels_the_distance_takes_the_place_of_accuracy(report: Report, nothing_run: Report) -> None:
    assert "24.3 dB SQNR" in Page(render_html(replace(report, accuracy=None))).text
    assert "not checked: needs 12 GB" in Page(render_html(nothing_run)).text


def test_layers_that_are_gone_and_layers_nobody_looked_at_say_so(report: Report) -> None:
    text = Page(render_html(report)).text
    assert "gone: merged into another layer, or removed" in text
    cost = LayerCost(None, 1, 4)
    text = Page(render_html(replace(report, layers=(LayerRow("a", "Conv", cost, cost),)))).text
    assert "no step looked at it" in text


def test_many_layers_are_folded_away_and_none_is_lost(report: Report) -> None:
    cost = LayerCost(10, 1, 4)
    rows = tuple(LayerRow(f"layer{i:03}", "Conv", cost, cost) for i in range(200))
    page = Page(render_html(replace(report, layers=rows)))
    assert all(f"layer{i:03}" in page.text for i in range(200))
    assert "140 more layers" in page.text


def test_bars_are_as_long_as_their_figures(report: Report) -> None:
    text = render_html(report)
    bars = re.findall(r'<title>(before|after): (?:1\.09 MB|262 kB)</title>.*?width="1000".*?width="([\d.]+)"', text)
    assert bars == [("before", "1000"), ("after", f"{1000 * 262_144 / 1_093_412:.1f}")]


def test_the_measured_page_times_only_what_was_executed(report: Report, measured: Measured) -> None:
    text = Page(render_measured_html(report, measured)).text
    assert "2.00x faster" in text
    assert "Without a time" in text
    assert "ran 8 samples, max diff 0.0117 from model.onnx in ONNX Runtime" in text
    assert "Example CPU" in text
    assert text.count("4.00 ms") >= 1
    only = replace(measured, rows=measured.rows[2:])
    assert " ms" not in Page(render_measured_html(report, only)).text


def test_plain_text_is_escaped_and_markup_is_not() -> None:
    inner = tag("b", "<&>")
    assert inner == "<b>&lt;&amp;&gt;</b>"
    assert tag("td", inner, "<", cls='a"b') == '<td class="a&quot;b"><b>&lt;&amp;&gt;</b>&lt;</td>'
    assert join(("<", Markup("<br/>"))) == "&lt;<br/>"
