"""Recipes: TOML in, passes out, and every key that does not fit is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import pytest

from graphopt.errors import ExitCode, OptionError, UsageError
from graphopt.model_io import ShapeBinding
from graphopt.options import opt
from graphopt.pass_base import Context, Pass, PassResult
from graphopt.pipeline_text import parse_pipeline
from graphopt.plugins import Registry, load_plugins
from graphopt.recipe import Limits, load_recipe, parse_recipe, recipe_summaries, seconds
from graphopt.targets import TargetTable


@dataclass(frozen=True, kw_only=True)
class Trim(Pass):
    """Trim nothing."""

    name: ClassVar[str] = "trim"
    lossy: ClassVar[bool] = False
    ratio: float = opt(0.3, help="how much", ge=0, lt=1)
    mode: Literal["a", "b"] = opt("a", help="how")
    skip_layers: tuple[str, ...] = opt((), help="which not")

    def run(self, model: Any, ctx: Context) -> PassResult:
        return PassResult(modified=False)


REGISTRY = Registry({"trim": Trim}, {}, TargetTable([]), {}, (), SimpleNamespace())  # type: ignore[arg-type]

FULL = """
summary = "everything at once"
target = "arm:cortex-a76"
seed = 7
pack = true

[[pass]]
name = "trim"
ratio = 0.5
skip-layers = ["first conv", "last"]

[[pass]]
name = "trim"
mode = "b"

[limits]
max-drop = 1
max_size = 0.5
min-sqnr = 20.5
time-limit = "10m"

[shapes]
image = [1, 3, 224, 224]

[dims]
batch = 4
"""


def test_everything_in_a_recipe_is_read() -> None:
    recipe = parse_recipe(FULL, REGISTRY, "full")
    assert recipe.passes == (Trim(ratio=0.5, skip_layers=("first conv", "last")), Trim(mode="b"))
    assert (recipe.summary, recipe.target, recipe.seed) == ("everything at once", "arm:cortex-a76", 7)
    assert recipe.pack
    assert recipe.limits == Limits(max_drop=1.0, max_size=0.5, min_sqnr=20.5, time_limit="10m")
    assert recipe.binding == ShapeBinding({"image": (1, 3, 224, 224)}, {"batch": 4})


def test_a_recipe_prints_as_pipeline_text_that_builds_it_again() -> None:
    recipe = parse_recipe(FULL, REGISTRY, "full")
    assert recipe.pipeline == 'trim{ratio=0.5 skip_layers="first conv",last},trim{mode=b}'
    assert tuple(REGISTRY.pass_from_step(step) for step in parse_pipeline(recipe.pipeline)) == recipe.passes


def test_only_passes_are_needed() -> None:
    recipe = parse_recipe('[[pass]]\nname = "trim"\n', REGISTRY, "small")
    assert (recipe.target, recipe.seed, recipe.limits, bool(recipe.binding)) == (None, None, Limits(), False)
    assert not recipe.pack


@pytest.mark.parametrize("section", ["without-calibration", "without_calibration"])
def test_options_may_differ_where_there_is_no_calibration_data(section: str) -> None:
    other = f"[pass.{section}]\nratio = 0.2\nskip_layers = ['b']\n"
    text = STEP + "ratio = 0.5\nskip-layers = ['a']\n" + other + STEP
    recipe = parse_recipe(text, REGISTRY, "r")
    assert recipe.passes == (Trim(ratio=0.5, skip_layers=("a",)), Trim())
    assert recipe.without_calibration == (Trim(ratio=0.2, skip_layers=("b",)), Trim())


STEP = '[[pass]]\nname = "trim"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "recipe r: has no passes; add a table [[pass]] with a name for each step"),
        ("target = 'arm'", "recipe r: has no passes; add a table [[pass]] with a name for each step"),
        ("[pass]\nname = 'trim'", "recipe r: has no passes; add a table [[pass]] with a name for each step"),
        ("[[pass]]\nratio = 0.5", 'recipe r: [[pass]] number 1 has no name; write name = "quant"'),
        ("pass = ['trim']", 'recipe r: [[pass]] number 1 has no name; write name = "quant"'),
        ("[[pass]]\nname = 'trimm'", "recipe r: no pass called 'trimm'; did you mean 'trim'?"),
        (STEP + "ratoi = 0.5", "trim.ratoi: no such option; did you mean 'ratio'?"),
        (STEP + "ratio = 1.5", "trim.ratio: 1.5 is not less than 1"),
        (STEP + "ratio = '1.5x'", "trim.ratio: '1.5x' is not a number"),
        (STEP + "mode = 'c'", "trim.mode: 'c' is not one of a, b"),
        ("traget = 'arm'\n" + STEP, "recipe r: unknown key 'traget'; did you mean 'target'?"),
        ("[limit]\n" + STEP, "recipe r: unknown key 'limit'; did you mean 'limits'?"),
        ("seed = -1\n" + STEP, "recipe r.seed: -1 is not at least 0"),
        ("target = 3\n" + STEP, "recipe r.target: 3 is not a text"),
        ("pack = 3\n" + STEP, "recipe r.pack: 3 is not true or false"),
        (STEP + "[limits]\nmax-dorp = 1", "recipe r: limits.max-dorp: no such option; did you mean 'max_drop'?"),
        (STEP + "[limits]\nmax-drop = -1", "recipe r: limits.max-drop: -1.0 is not at least 0"),
        (STEP + "[limits]\ntime-limit = 'soon'",
         "recipe r: limits.time-limit: 'soon' is not a duration; write 90s, 10m or 2h"),
        (STEP + "without-calibration = 3",
         "recipe r: [[pass]] number 1: 'without-calibration' is not a table; write [without-calibration]"),
        (STEP + "[pass.without-calibration]\nratoi = 1", "trim.ratoi: no such option; did you mean 'ratio'?"),
        ("limits = 3\n" + STEP, "recipe r: 'limits' is not a table; write [limits]"),
        (STEP + "[shapes]\nimage = 3", "recipe r: shapes.image: 3 is not a list of sizes; write [1, 3, 224, 224]"),
        (STEP + "[shapes]\nimage = [1, 0]", "recipe r: shapes.image: 0 is not a size; sizes are whole numbers from 1"),
        (STEP + "[dims]\nbatch = true", "recipe r: dims.batch: True is not a size; sizes are whole numbers from 1"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_recipe(text, REGISTRY, "r")
    assert str(caught.value) == message
    assert caught.value.exit_code == ExitCode.USAGE


def test_text_that_is_no_toml_is_refused_with_its_line() -> None:
    with pytest.raises(OptionError, match=r"recipe r: not TOML: .*line 2"):
        parse_recipe("seed = 1\nseed = = 2", REGISTRY, "r")


@pytest.mark.parametrize(("text", "value"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200)])
def test_durations_are_seconds_minutes_or_hours(text: str, value: float) -> None:
    assert seconds(text, "--time-limit") == value


@pytest.mark.parametrize("text", ["", "m", "10 m", "-1s", "0", "0.0h", "1d", "nan"])
def test_other_durations_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="is not a duration; write 90s, 10m or 2h"):
        seconds(text, "--time-limit")


# ---------------------------------------------------------------- files and names


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_plugins(only=())


def test_a_recipe_is_read_from_a_file(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('[[pass]]\nname = "fold"\n')
    assert load_recipe(tmp_path / "mine.toml", registry).pipeline == "fold"
    assert load_recipe(str(tmp_path / "mine.toml"), registry).origin == str(tmp_path / "mine.toml")


def test_a_file_without_an_ending_is_read_too(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").write_text('[[pass]]\nname = "fold"\n')
    assert load_recipe("mine", registry).pipeline == "fold"


def _not_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("itn8", None, "--recipe itn8: neither a recipe nor a file; did you mean 'int8'?"),
        ("gone.toml", None, "--recipe gone.toml: no such file; known: deep-compression, int8, small"),
        ("dir/x", None, "--recipe dir/x: no such file; known: deep-compression, int8, small"),
        ("binary.toml", _not_text, "--recipe binary.toml: not a text file"),
    ],
)
def test_a_recipe_that_is_not_there_is_refused(
    registry: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    write: Callable[[Path], None] | None,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if write:
        write(Path(name))
    with pytest.raises(UsageError) as caught:
        load_recipe(name, registry)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("deep-compression", ["fold", "prune", "share"]),
        ("int8", ["fold", "quant"]),
        ("small", ["fold", "prune", "quant"]),
    ],
)
def test_the_built_in_recipes_build(registry: Registry, name: str, steps: list[str]) -> None:
    recipe = load_recipe(name, registry)
    assert [step.name for step in recipe.passes] == steps
    assert recipe.summary
    assert registry.passes_from_text(recipe.pipeline) == recipe.passes


def test_every_built_in_recipe_is_tested(registry: Registry) -> None:
    assert set(registry.recipes()) == {"deep-compression", "int8", "small"}
    assert all(recipe_summaries(registry).values())
