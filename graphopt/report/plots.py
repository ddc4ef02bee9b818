"""Small plots as inline SVG: they stretch to the width they get and take their colours from the page."""

from __future__ import annotations

import math

from graphopt.measured import Times
from graphopt.report.markup import EMPTY, Markup, tag

__all__ = ["bar", "layer_bars", "pair", "time_bar"]

_WIDTH = 1000.0


def bar(value: float | None, largest: float, fill: str, label: str) -> Markup:
    """One bar; `fill` is a colour class, `label` what a screen reader says."""
    marks = (_rectangle(_WIDTH, 0, 9, "f-track"), _rectangle(_scaled(value, largest), 0, 9, fill))
    return _svg("bar", 9, label, *marks)


def pair(before: float | None, after: float | None, before_text: str, after_text: str) -> Markup:
    """Two labelled bars on one scale, before and after."""
    largest = max(before or 0.0, after or 0.0)
    rows = (("before", before, before_text, "f-before"), ("after", after, after_text, "f-accent"))
    cells: list[str] = []
    for name, value, text, fill in rows:
        cells += [tag("span", name), bar(value, largest, fill, f"{name}: {text}"), tag("b", text)]
    return tag("div", *cells, cls="pair")


def layer_bars(before: float | None, after: float | None, largest: float, fill: str, label: str) -> Markup:
    """Before above after; `largest` is the scale that all layers share."""
    if before is None and after is None:
        return EMPTY
    marks = (_rectangle(_scaled(before, largest), 0, 5, "f-before"), _rectangle(_scaled(after, largest), 6, 8, fill))
    return _svg("bar two", 15, label, *marks)


def time_bar(times: Times, largest: float, fill: str, label: str) -> Markup:
    """A bar up to the median, with a box from the first to the third quartile and a line from least to most."""
    at = {name: _scaled(value, largest) for name, value in vars(times).items()}
    whisker = tag("line", x1=_text(at["minimum"]), x2=_text(at["maximum"]), y1="11", y2="11", cls="s-ink")
    width = _text(max(at["high"] - at["low"], 1))
    box = tag("rect", x=_text(at["low"]), y="6", width=width, height="10", cls="s-ink", fill="none")
    return _svg("time", 22, label, _rectangle(at["median"], 3, 16, fill), whisker, box)


def _svg(cls: str, height: int, label: str, *marks: Markup) -> Markup:
    view = {"viewBox": f"0 0 {_WIDTH:.0f} {height}", "preserveAspectRatio": "none"}
    return tag("svg", tag("title", label), *marks, cls=cls, role="img", **view)


def _rectangle(width: float, y: float, height: float, fill: str) -> Markup:
    return tag("rect", width=_text(width), y=_text(y), height=_text(height), cls=fill)


def _scaled(value: float | None, largest: float) -> float:
    """Length on the common scale; what is there at all stays visible."""
    if value is None or not math.isfinite(value) or value <= 0 or largest <= 0:
        return 0.0
    return max(3.0, min(_WIDTH, _WIDTH * value / largest))


def _text(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
