"""The text form of a pipeline and of a target with its options, parsed and printed back identically.

    pipeline ::= step ("," step)*
    step     ::= NAME [ "{" [option (SPACE option)*] "}" ]
    target   ::= NAME [ ":" NAME ] [ "{" [option (SPACE option)*] "}" ]
    option   ::= NAME [ "=" value ("," value)* ]          no value means true
    value    ::= bare | '"' text '"'                      bare has no , { } = " or space

Inside quotes a backslash stands before a quote or a backslash that is meant literally.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from graphopt.errors import OptionError

__all__ = ["Step", "format_pipeline", "parse_pipeline", "parse_target"]

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]*")
_TARGET = re.compile(r"[^{}\s]+")  # any text: what is no target is refused where all are known
_BARE = re.compile(r'[^,{}="\s]+')
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class Step:
    """One step: a pass name and its options as written, each a tuple of words (empty: true)."""

    name: str
    options: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def values(self) -> Mapping[str, tuple[str, ...]]:
        """The options by name."""
        return dict(self.options)

    def __str__(self) -> str:
        if not self.options:
            return self.name
        parts = (f"{name}={','.join(map(_quote, words))}" if words else name for name, words in self.options)
        return f"{self.name}{{{' '.join(parts)}}}"


def format_pipeline(steps: Iterable[Step]) -> str:
    """Print steps as text that `parse_pipeline` reads back."""
    return ",".join(map(str, steps))


def parse_pipeline(text: str) -> tuple[Step, ...]:
    """Parse pipeline text.

    Raises:
        OptionError: The text does not follow the grammar; the message names the column.
    """
    return _Parser(text, "--passes").pipeline()


def parse_target(text: str) -> Step:
    """Parse a target with its options, such as `npu:ethos-u55-128{memory_mode=Sram_Only}`.

    Raises:
        OptionError: What stands in braces does not follow the grammar; the message names the column.
    """
    return _Parser(text, "--target").target() if "{" in text else Step(text)


def _quote(word: str) -> str:
    if _BARE.fullmatch(word):
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


class _Parser:
    def __init__(self, text: str, given_by: str) -> None:
        self.text = text
        self.given_by = given_by
        self.at = 0

    def pipeline(self) -> tuple[Step, ...]:
        self.skip()
        steps = [self.step()]
        while self.take(","):
            steps.append(self.step())
        self.skip()
        if self.at < len(self.text):
            raise self.error("expected ',' or the end")
        return tuple(steps)

    def target(self) -> Step:
        step = self.step("a target", _TARGET)
        self.skip()
        if self.at < len(self.text):
            raise self.error("expected the end")
        return step

    def step(self, what: str = "a pass name", pattern: re.Pattern[str] = _NAME) -> Step:
        name = self.name(what, pattern)
        options: list[tuple[str, tuple[str, ...]]] = []
        if self.take("{"):
            while not self.take("}"):
                if self.at >= len(self.text):
                    raise self.error("'{' is never closed", "add '}'")
                begin = self.at
                option = self.option()
                if option[0] in (known for known, _ in options):
                    self.at = begin
                    raise self.error(f"option {option[0]!r} is given twice", "keep one")
                options.append(option)
        return Step(name, tuple(options))

    def option(self) -> tuple[str, tuple[str, ...]]:
        name = self.name("an option name or '}'")
        if not self.take("="):
            return name, ()
        words = [self.value()]
        while self.take(","):
            words.append(self.value())
        return name, tuple(words)

    def name(self, what: str, pattern: re.Pattern[str] = _NAME) -> str:
        self.skip()
        match = pattern.match(self.text, self.at)
        if match is None:
            raise self.error(f"expected {what}")
        self.at = match.end()
        return match.group()

    def value(self) -> str:
        self.skip()
        if self.text[self.at : self.at + 1] == '"':
            return self.quoted()
        match = _BARE.match(self.text, self.at)
        if match is None:
            raise self.error("expected a value")
        self.at = match.end()
        return match.group()

    def quoted(self) -> str:
        begin, word = self.at, ""
        self.at += 1
        while self.at < len(self.text):
            char = self.text[self.at]
            self.at += 1
            if char == '"':
                return word
            if char == "\\" and self.at < len(self.text):
                char = self.text[self.at]
                self.at += 1
            word += char
        self.at = begin
        raise self.error("the quote is never closed", "add '\"'")

    def take(self, char: str) -> bool:
        self.skip()
        if self.text[self.at : self.at + 1] != char:
            return False
        self.at += 1
        return True

    def skip(self) -> None:
        match = _SPACE.match(self.text, self.at)
        self.at = match.end() if match else self.at

    def error(self, fact: str, hint: str | None = None) -> OptionError:
        found = repr(self.text[self.at]) if self.at < len(self.text) else "the end"
        fact = fact if hint else f"{fact}, found {found}"
        return OptionError(f"{self.given_by} {self.text!r}", f"column {self.at + 1}: {fact}", hint)
