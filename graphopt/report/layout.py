"""Lines of text with styles: columns and wrapped paragraphs that look the same on a terminal and in a pipe."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["LABEL", "Line", "columns", "cut", "print_lines", "width_of", "wrapped"]

LABEL = 12
"""Width of the labels before paragraphs."""

Line = Sequence[tuple[str, str]]
"""Pieces of one line, each with its style."""

_NARROWEST, _WIDEST = 40, 110


def width_of(console: Console) -> int:
    """Columns to fill: as many as there are, within reason."""
    return max(_NARROWEST, min(console.width, _WIDEST))


def print_lines(lines: Iterable[Line], console: Console) -> None:
    """Print lines as they are: no markup is read, nothing is wrapped or padded."""
    from rich.text import Text

    for line in lines:
        text = Text.assemble(*line)
        text.rstrip()
        console.print(text, soft_wrap=True)


def columns(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,)) -> Iterator[Line]:
    """A table without lines; the first column is bold, the last is dim, those not in `left` are flush right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        cells = [
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        styles = ("dim",) * 3 if row is head else ("bold", "", "dim")
        middle = "".join(f"  {cell}" for cell in cells[1:-1])
        yield (cells[0], styles[0]), (middle, styles[1]), (f"  {cells[-1]}", styles[2])


def cut(text: str, width: int) -> str:
    """Shorten a name that would break a table."""
    return text if len(text) <= width else f"{text[: width - 3]}..."


def wrapped(label: str, text: str, how: str, width: int, *, style: str = "", indent: int = LABEL) -> Iterator[Line]:
    """A label and beside it the text, with how it was obtained in brackets after it."""
    whole = f"{text} ({how})" if how else text
    plain = len(text)
    for i, part in enumerate(textwrap.wrap(whole, width - indent, break_on_hyphens=False) or [""]):
        split = max(0, min(len(part), plain))
        yield ((label if i == 0 else "").ljust(indent), "bold"), (part[:split], style), (part[split:], "dim")
        plain -= len(part) + 1
