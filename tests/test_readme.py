"""README shows what is tested."""

from __future__ import annotations

import re
from pathlib import Path

from graphopt.cli.compile import compile_command
from graphopt.cli.verbs import VERBS
from graphopt.errors import ExitCode

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf8")


def test_the_plugin_is_the_tested_file() -> None:
    plugin = ROOT / "tests" / "plugins" / "acme_graphopt" / "acme_graphopt" / "clip_weights.py"
    assert f"```python\n{plugin.read_text('utf8').rstrip()}\n```" in README


def test_the_criterion_is_the_tested_one() -> None:
    plugin = (ROOT / "tests" / "plugins" / "acme_graphopt" / "acme_graphopt" / "peak.py").read_text("utf8")
    assert f"```python\n{plugin[plugin.index('class Peak') :].rstrip()}\n```" in README


def test_the_entry_point_is_that_of_the_tested_package() -> None:
    line = 'clip-weights = "acme_graphopt.clip_weights"'
    assert line in README
    assert line in (ROOT / "tests" / "plugins" / "acme_graphopt" / "pyproject.toml").read_text("utf8")


def test_every_option_and_verb_it_names_exists() -> None:
    options = {name for parameter in compile_command.params for name in parameter.opts}
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", prose)) - {"--fetch"}
    assert named <= options, named - options
    verbs = set(re.findall(r"graphopt (inspect|list|explain|extract|doctor|bench|completion)\b", prose))
    assert verbs <= set(VERBS)


def test_every_exit_code_is_listed() -> None:
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", README, flags=re.MULTILINE)}
    assert listed == {int(code) for code in ExitCode}


def test_it_shows_what_the_demo_printed() -> None:
    for word in ("top1 (600 samples)", "model.so", "emulated", "verdict"):
        assert word in README
