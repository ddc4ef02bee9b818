"""What heads keep, as a picture and in a line."""

from __future__ import annotations

import re
from dataclasses import replace

from graphopt.pass_base import Change
from graphopt.report.data import Report, StepReport
from graphopt.report.heads import heads_of, heads_text
from graphopt.report.html import render_html


def step(layers: int, heads: int, *, sees: bool = True) -> StepReport:
    def details(layer: int) -> dict[str, float | str]:
        shares: dict[str, float | str] = {f"head {i}": 1 - (layer + i) / 100 for i in range(heads)}
        return shares | ({f"head {i} sees": f"window {8 << i % 3}" for i in range(heads)} if sees else {})

    changes = tuple(Change(f"layer{i}/Softmax", "learned", details=details(i)) for i in range(layers))
    return StepReport("attend{x=1}", "attend", modified=True, lossy=True, changes=changes)


def test_heads_are_read_from_changes_in_order() -> None:
    found = heads_of(step(2, 12).changes)
    assert [(head.layer, head.number) for head in found] == [
        (f"layer{i}/Softmax", n) for i in (0, 1) for n in range(12)
    ]
    assert (found[11].kept, found[11].sees) == (0.89, "window 32")


def test_a_line_says_the_mean_the_least_and_how_many_see_what() -> None:
    text = heads_text(step(2, 4))
    assert text.startswith("8 heads keep 98.0 % of what they attend to, at least 96.0 % (layer1/Softmax, head 3)")
    assert text.endswith(": 4 window 8, 2 window 16, 2 window 32")
    assert heads_text(step(0, 0)) == ""


def test_the_page_has_a_cell_for_each_head_and_a_legend(report: Report) -> None:
    page = render_html(replace(report, steps=(*report.steps, step(3, 5))))
    picture = page[page.index("Attention kept") :]
    assert len(re.findall(r"<g><title>layer\d/Softmax, head \d: ", picture)) == 15
    assert "<b>a</b> window 8, 6 heads" in picture
    assert "head 3 sees" not in page


def test_a_page_without_heads_has_no_such_section(report: Report) -> None:
    assert "Attention kept" not in render_html(report)
