"""What heads of attention keep of what they attend to: layers against heads, as a picture and in a line.

A pass says it by its changes: `head 3` in their details is a share, `head 3 sees` what the head is left with.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from graphopt.pass_base import Change
from graphopt.report.data import Report, StepReport
from graphopt.report.figures import clean, plural
from graphopt.report.markup import EMPTY, Markup, tag

__all__ = ["Head", "heads_of", "heads_text", "is_of_head", "maps"]

_OF_HEAD = re.compile(r"head (\d+)( sees)?")
_CELL, _HIGH, _NAME, _TOP = 44, 26, 260, 22  # pixels
_LONGEST = 34  # characters of a layer's name
_FAINTEST, _PALEST = 0.5, 0.08  # a share up to the first is as pale as the second
_DARK = 0.55  # from here on text is written in the colour of the paper


@dataclass(frozen=True)
class Head:
    """One head of a layer.

    Attributes:
        layer: The layer.
        number: Which of its heads.
        kept: Share of its attention that it keeps, from 0 to 1.
        sees: What it is left with; empty where all heads of the step are.
    """

    layer: str
    number: int
    kept: float
    sees: str = ""


def is_of_head(key: str) -> bool:
    """Whether a figure of a change is about one head."""
    return _OF_HEAD.fullmatch(key) is not None


def heads_of(changes: Iterable[Change]) -> list[Head]:
    """All heads that changes tell of, layer by layer."""
    found: list[Head] = []
    for change in changes:
        matches = ((_OF_HEAD.fullmatch(key), value) for key, value in change.details.items())
        shares = {int(m[1]): value for m, value in matches if m is not None and m[2] is None}
        for number, kept in sorted(shares.items()):
            if isinstance(kept, (int, float)):
                found.append(Head(change.site, number, float(kept), str(change.details.get(f"head {number} sees", ""))))
    return found


def heads_text(step: StepReport) -> str:
    """Write what heads keep in a line; empty where the step tells of none."""
    heads = heads_of(step.done)
    if not heads:
        return ""
    least, mean = min(heads, key=lambda head: head.kept), sum(head.kept for head in heads) / len(heads)
    text = f"{plural(len(heads), 'head')} keep {_percent(mean)} of what they attend to, at least {_percent(least.kept)}"
    text += f" ({clean(least.layer)}, head {least.number})"
    counts = Counter(head.sees for head in heads if head.sees).most_common()
    return text + "".join(f"{': ' if i == 0 else ', '}{n} {clean(sees)}" for i, (sees, n) in enumerate(counts))


def maps(report: Report) -> list[Markup]:
    """A picture for each step that tells of heads."""
    return [_picture(step, heads) for step in report.steps if (heads := heads_of(step.done))]


def _picture(step: StepReport, heads: Sequence[Head]) -> Markup:
    layers = list(dict.fromkeys(head.layer for head in heads))
    columns = 1 + max(head.number for head in heads)
    counts = Counter(head.sees for head in heads if head.sees).most_common()
    letters = {sees: _letter(i) for i, (sees, _) in enumerate(counts)}
    width, height = _NAME + _CELL * columns, _TOP + _HIGH * len(layers)
    marks = [_text(str(i), _NAME + _CELL * (i + 0.5), _TOP - 8, "soft", "middle") for i in range(columns)]
    marks += [_text(_short(layer), _NAME - 10, _TOP + _HIGH * (i + 0.65), "", "end") for i, layer in enumerate(layers)]
    marks += [_cell(head, letters.get(head.sees, ""), layers.index(head.layer)) for head in heads]
    label = f"Share of its attention that each head keeps, {len(layers)} layers by {columns} heads"
    svg = tag(
        "svg", tag("title", label), *marks, cls="heads", role="img", viewBox=f"0 0 {width} {height}",
        width=str(width), height=str(height),
    )  # fmt: skip
    legend = [tag("span", tag("b", letters[sees]), f" {sees}, {plural(n, 'head')}") for sees, n in counts]
    text = tag("p", tag("code", step.step), " ", heads_text(step).partition(": ")[0], cls="small")
    return tag("div", text, tag("div", svg, cls="scroll"), tag("div", *legend, cls="legend") if legend else EMPTY)


def _cell(head: Head, letter: str, row: int) -> Markup:
    x, y = _NAME + _CELL * head.number, _TOP + _HIGH * row
    shade = _PALEST + (1 - _PALEST) * max(0.0, (head.kept - _FAINTEST) / (1 - _FAINTEST))
    box = tag("rect", x=str(x + 1), y=str(y + 1), width=str(_CELL - 2), height=str(_HIGH - 2), rx="3",
              cls="f-accent", fill_opacity=f"{min(shade, 1.0):.2f}")  # fmt: skip
    sees = f", {head.sees}" if head.sees else ""
    told = tag("title", f"{head.layer}, head {head.number}: {_percent(head.kept)}{sees}")
    text = f"{100 * head.kept:.0f}{f' {letter}' if letter else ''}"
    return tag("g", told, box, _text(text, x + _CELL / 2, y + 0.65 * _HIGH, "onto" if shade > _DARK else "", "middle"))


def _text(text: str, x: float, y: float, cls: str, anchor: str) -> Markup:
    return tag("text", text, x=f"{x:.0f}", y=f"{y:.0f}", text_anchor=anchor, cls=cls or None)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"...{name[3 - _LONGEST :]}"


def _letter(number: int) -> str:
    return chr(ord("a") + number) if number < 26 else f"{_letter(number // 26 - 1)}{_letter(number % 26)}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
