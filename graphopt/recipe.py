"""Recipes: a pipeline with its target, limits and shapes in one TOML file, checked by the options builder.

    summary = "what it is for"
    target = "arm"
    seed = 0
    pack = true                 # as --pack

    [[pass]]                    # one table a step, in order; everything but `name` is an option of the pass
    name = "prune"
    ratio = 0.5

    [pass.without-calibration]  # options that differ where there is no --calibration
    ratio = 0.2

    [limits]
    max-drop = 1.0              # as --max-drop, --max-size, --min-sqnr, --time-limit
    time-limit = "10m"

    [shapes]                    # as --shape
    image = [1, 3, 224, 224]

    [dims]                      # as --dim
    batch = 1

Recipes that come with a plugin are files `recipes/NAME.toml` in its package.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, cast

from graphopt.errors import OptionError, UsageError, nearest
from graphopt.model_io import ShapeBinding
from graphopt.options import build, opt, specs
from graphopt.pass_base import Pass
from graphopt.pipeline_text import format_pipeline
from graphopt.plugins import Registry

__all__ = ["Limits", "Recipe", "load_recipe", "parse_recipe", "recipe_summaries", "seconds"]

_SECTIONS = ("pass", "limits", "shapes", "dims")
_WITHOUT = "without-calibration"
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|)")
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a result must hold to; None: no limit."""

    max_drop: float | None = opt(None, help="largest loss of the metric, in points", ge=0)
    max_size: float | None = opt(None, help="largest size, as a fraction of the original's", gt=0)
    min_sqnr: float | None = opt(None, help="smallest signal-to-noise ratio of any output, in dB")
    time_limit: str | None = opt(None, help="how long to search: 90s, 10m, 2h")


@dataclass(frozen=True)
class Recipe:
    """A pipeline with what belongs to it.

    Attributes:
        origin: Name or path of the recipe.
        passes: The steps, built.
        without_calibration: The steps where there is no calibration data.
        summary: One line for `graphopt list`.
        target: Target as the user would write it; None: not fixed.
        seed: Seed of all random streams; None: not fixed.
        pack: Also write the result as one small file, entropy-coded.
        limits: What the result must hold to.
        binding: Sizes for dynamic dimensions.
    """

    origin: str
    passes: tuple[Pass, ...]
    without_calibration: tuple[Pass, ...]
    summary: str = ""
    target: str | None = None
    seed: int | None = None
    pack: bool = False
    limits: Limits = field(default_factory=Limits)
    binding: ShapeBinding = field(default_factory=ShapeBinding)

    @property
    def pipeline(self) -> str:
        """The steps as pipeline text."""
        return format_pipeline(step.step() for step in self.passes)


@dataclass(frozen=True, kw_only=True)
class _Head:
    summary: str = opt("", help="what the recipe is for")
    target: str | None = opt(None, help="what to make the model for")
    seed: int | None = opt(None, help="seed of all random streams", ge=0)
    pack: bool = opt(False, help="also write model.gopt, the result as one small file")


def load_recipe(source: str | Path, registry: Registry) -> Recipe:
    """Load a recipe by file name, or by the name under which a plugin brings it.

    Args:
        source: NAME, or the path of a file; text that ends in `.toml` or holds a `/` is a path.
        registry: The loaded plugins.

    Raises:
        UsageError: There is no such recipe, or it cannot be read.
        OptionError: The recipe does not follow the format; the message names the key.
    """
    known, text = registry.recipes(), str(source)
    is_path = isinstance(source, Path) or text.endswith(".toml") or "/" in text
    if not is_path and text in known:
        return parse_recipe(_read(known[text], text), registry, text)
    path = Path(source)
    if path.is_file():
        return parse_recipe(_read(path, text), registry, text)
    fact = "no such file" if is_path else "neither a recipe nor a file"
    raise UsageError(f"--recipe {text}", fact, nearest(text, known))


def recipe_summaries(registry: Registry) -> Mapping[str, str]:
    """What each recipe of a plugin is for, by name; only the summary is looked at.

    Raises:
        OptionError: A recipe is not TOML.
    """
    found: dict[str, str] = {}
    for name, file in registry.recipes().items():
        found[name] = str(_table(_read(file, name), f"recipe {name}").get("summary", ""))
    return found


def parse_recipe(text: str, registry: Registry, origin: str) -> Recipe:
    """Build a recipe from TOML text; `origin` is what errors call it.

    Raises:
        OptionError: The text does not follow the format; the message names the key.
    """
    subject = f"recipe {origin}"
    table = _table(text, subject)
    known = [spec.name for spec in specs(_Head)]
    for key in table:
        if key not in (*known, *_SECTIONS):
            raise OptionError(subject, f"unknown key {key!r}", nearest(key, (*known, *_SECTIONS)))
    head = build(_Head, {key: table[key] for key in known if key in table}, subject)
    limits = build(Limits, _section(table, "limits", subject), f"{subject}: limits")
    if limits.time_limit is not None:
        seconds(limits.time_limit, f"{subject}: limits.time-limit")
    shapes = {k: _sizes(v, f"{subject}: shapes.{k}") for k, v in _section(table, "shapes", subject).items()}
    dims = {k: _size(v, f"{subject}: dims.{k}") for k, v in _section(table, "dims", subject).items()}
    passes = _passes(table.get("pass"), registry, subject, data=True)
    careful = _passes(table.get("pass"), registry, subject, data=False)
    sizes = ShapeBinding(shapes, dims)
    return Recipe(origin, passes, careful, head.summary, head.target, head.seed, head.pack, limits, sizes)


def seconds(text: str, subject: str) -> float:
    """Read a duration: a number with `s`, `m` or `h`; a bare number is seconds.

    Raises:
        OptionError: The text is not a duration, or it is zero.
    """
    match = _DURATION.fullmatch(text)
    if match is None or float(match[1]) == 0:
        raise OptionError(subject, f"{text!r} is not a duration", "write 90s, 10m or 2h")
    return float(match[1]) * _UNITS[match[2]]


def _table(text: str, subject: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise OptionError(subject, f"not TOML: {e}") from e


def _passes(tables: Any, registry: Registry, subject: str, *, data: bool) -> tuple[Pass, ...]:
    if not isinstance(tables, list) or not tables:
        raise OptionError(subject, "has no passes", "add a table [[pass]] with a name for each step")
    found: list[Pass] = []
    for number, item in enumerate(cast("list[Any]", tables), 1):
        table = cast("dict[str, Any]", item) if isinstance(item, dict) else {}
        name = table.get("name")
        if not isinstance(name, str):
            raise OptionError(subject, f"[[pass]] number {number} has no name", 'write name = "quant"')
        without = next((key for key in _spellings(_WITHOUT) if key in table), _WITHOUT)
        differing = _section(table, without, f"{subject}: [[pass]] number {number}")
        other = {} if data else differing
        gone = {"name", without, *(spelling for key in other for spelling in _spellings(key))}
        options = {key: value for key, value in table.items() if key not in gone} | other
        found.append(registry.build_pass(name, options, subject))
    return tuple(found)


def _spellings(key: str) -> tuple[str, str]:
    return key.replace("-", "_"), key.replace("_", "-")


def _section(table: Mapping[str, Any], name: str, subject: str) -> dict[str, Any]:
    section = table.get(name, {})
    if not isinstance(section, dict):
        raise OptionError(subject, f"{name!r} is not a table", f"write [{name}]")
    return cast("dict[str, Any]", section)


def _sizes(value: Any, subject: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise OptionError(subject, f"{value!r} is not a list of sizes", "write [1, 3, 224, 224]")
    return tuple(_size(item, subject) for item in cast("list[Any]", value))


def _size(value: Any, subject: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise OptionError(subject, f"{value!r} is not a size", "sizes are whole numbers from 1")
    return value


def _read(source: Path | Traversable, name: str) -> str:
    try:
        return source.read_text("utf8")
    except UnicodeDecodeError as e:
        raise UsageError(f"--recipe {name}", "not a text file") from e
    except OSError as e:
        raise UsageError(f"--recipe {name}", f"cannot be read: {e.strerror}") from e
