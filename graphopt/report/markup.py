"""HTML that cannot forget to escape: text is text until it is made markup, and only `tag` makes it.

Attribute names: `cls` is `class`, `_` is `-`; an attribute that is None is left out.
"""

from __future__ import annotations

import html
import importlib.resources
from collections.abc import Iterable

from graphopt.report.figures import clean

__all__ = ["EMPTY", "Markup", "join", "page", "tag"]

_VOID = frozenset({"meta", "rect", "line"})

_STYLE = "style.css"

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


class Markup(str):
    """Text that is already HTML."""

    __slots__ = ()


EMPTY = Markup("")


def join(parts: Iterable[str]) -> Markup:
    """Put pieces side by side; plain text among them is escaped."""
    return Markup("".join(part if isinstance(part, Markup) else _escape(part) for part in parts))


def tag(name: str, *children: str, **attributes: str | None) -> Markup:
    """Make an element; children that are plain text are escaped."""
    names = {key: key.removesuffix("_").replace("_", "-") if key != "cls" else "class" for key in attributes}
    text = "".join(f' {names[key]}="{_escape(value)}"' for key, value in attributes.items() if value is not None)
    return Markup(f"<{name}{text}/>" if name in _VOID else f"<{name}{text}>{join(children)}</{name}>")


def page(title: str, *body: str) -> str:
    """Make a whole page that needs nothing but itself."""
    head = (
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("title", title),
        Markup(f"<style>{_style()}</style>"),
    )
    document = tag("html", tag("head", *head), tag("body", tag("main", *body)), lang="en")
    return f"<!doctype html>\n{document}\n"


def _style() -> str:
    return importlib.resources.files("graphopt.report").joinpath(_STYLE).read_text("utf-8").strip()


def _escape(text: str) -> str:
    return html.escape(clean(text), quote=True)
