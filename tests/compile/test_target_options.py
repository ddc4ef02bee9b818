"""Options of targets: declared by a backend, written after the target, and kept wherever the target is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import onnx_ir as ir
import pytest

import graphopt
from graphopt.backend_base import Backend, Build, BuildOptions, Estimate, EstimatedStep, Obtained, Runnable
from graphopt.bundle import Bundle, read_manifest
from graphopt.cli import compile as compile_module
from graphopt.cli import main
from graphopt.errors import ExitCode, OptionError, PluginError, UsageError
from graphopt.options import opt
from graphopt.plugin_checks import PluginInfo, checked_backend
from graphopt.plugins import Registry, load_plugins
from graphopt.reference import Reference
from graphopt.targets import Target, TargetTable

KERNEL = "model.acme"
ESTIMATE = Estimate(
    KERNEL, "Acme 1.0", "at 5 MHz", 5000, 0.001, {"NPU": 4000}, 640_000, 0.5, {"SRAM": 1 << 15}, {"SRAM": 7000}, 10, 9,
    (EstimatedStep("conv", "Conv2D", ("/stem/Conv",), 5000, {"NPU": 4000, "SRAM": 5000}, 640_000, 0.5, 1 << 15),),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AcmeOptions:
    """What can be asked of the made-up backend."""

    mode: Literal["small", "fast"] = opt("fast", help="what it is made for")
    table: str | None = opt(None, help="file that it reads")
    clock: float = opt(100.0, help="MHz", gt=0)
    require: bool = opt(False, help="fail where it cannot")


class AcmeBackend(Backend):
    """Writes its options down; what it makes runs in ONNX Runtime."""

    name: ClassVar[str] = "acme"
    options: ClassVar[type[Any] | None] = AcmeOptions
    libraries: ClassVar[tuple[str, ...]] = ("pluggy", "no-such-distribution")

    def reads(self, options: Any) -> Sequence[Path]:
        return (Path(options.table),) if options.table else ()

    def explain(self, target: Target) -> Sequence[str]:
        return (f"operators of {target}:", "  Conv  always")

    def build(self, model: ir.Model, target: Target, folder: Path, options: BuildOptions) -> Build:
        table = Path(options.target.table).read_text() if options.target.table else ""
        text = json.dumps({**dataclasses.asdict(options.target), "table": table})
        (folder / KERNEL).write_text(text, "utf8")
        return Build(KERNEL, (KERNEL,), estimates=(ESTIMATE,))

    def how(self, target: Target) -> Obtained:
        return "executed"

    def load(self, folder: Path, target: Target, threads: int) -> Runnable:
        return Reference(folder / "model.onnx").run


@pytest.fixture
def registry() -> Registry:
    targets = [Target(name="acme", device="cam1", backend="acme", default=True), Target(name="bare", default=True)]
    known = load_plugins(only=())
    table = TargetTable([*targets, *known.targets])
    return dataclasses.replace(known, backends={**known.backends, "acme": AcmeBackend()}, targets=table)


@pytest.fixture
def digits(fixtures: Path, tmp_path: Path, registry: Registry) -> Callable[..., graphopt.Result]:
    """Optimize the digits CNN for a target into tmp_path/out."""

    def run(target: str, **options: Any) -> graphopt.Result:
        given = {"out": tmp_path / "out", "registry": registry, "check": "sample", **options}
        return graphopt.optimize(fixtures / "digits_cnn" / "model.onnx", "fold", target, **given)

    return run


def _built(result: graphopt.Result) -> dict[str, Any]:
    return json.loads((result.path / KERNEL).read_text("utf8"))


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("acme", AcmeOptions()),
        ("acme:cam1{}", AcmeOptions()),
        ("acme{mode=small require}", AcmeOptions(mode="small", require=True)),
        ('acme:cam1{ table="a b.ini" clock=50 }', AcmeOptions(table="a b.ini", clock=50.0)),
    ],
)
def test_a_target_is_read_with_its_options(text: str, options: AcmeOptions, registry: Registry) -> None:
    target, found = registry.target_from_text(text)
    assert str(target) == "acme:cam1"
    assert found == options
    assert registry.targets.resolve(text) is target


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("acme{moed=small}", "acme:cam1.moed: no such option; did you mean 'mode'?"),
        ("acme{mode=slow}", "acme:cam1.mode: 'slow' is not one of small, fast"),
        ("acme{clock=0}", "acme:cam1.clock: 0.0 is not greater than 0"),
        ("acme{clock}", "acme:cam1.clock: needs a value; write clock=FLOAT"),
        ("bare{mode=small}", "bare.mode: no such option; this target has none"),
        ("ort{mode=small}", "ort.mode: no such option; this target has none"),
        ("acme{mode=small", "--target 'acme{mode=small': column 16: '{' is never closed; add '}'"),
        ("acme{mode=small},x", "--target 'acme{mode=small},x': column 17: expected the end, found ','"),
        ("{mode=small}", "--target '{mode=small}': column 1: expected a target, found '{'"),
    ],
)
def test_options_that_do_not_fit_are_refused_as_those_of_passes(text: str, message: str, registry: Registry) -> None:
    with pytest.raises(OptionError) as caught:
        registry.target_from_text(text)
    assert str(caught.value) == message
    assert caught.value.exit_code == ExitCode.USAGE


def test_an_unknown_target_is_named_without_its_options(registry: Registry) -> None:
    with pytest.raises(UsageError) as caught:
        registry.target_from_text("acne{mode=small}")
    assert str(caught.value) == "--target acne: no such target; did you mean 'acme'?"


def test_a_backend_whose_options_break_the_contract_is_named() -> None:
    @dataclass
    class Loose:
        size: int = opt(1, help="not frozen")

    class Broken(AcmeBackend):
        options: ClassVar[type[Any] | None] = Loose

    with pytest.raises(PluginError, match="the class of options of backend 'acme' needs the decorator @dataclass"):
        checked_backend(PluginInfo("acme-dist", "1", "x", "m"), Broken())
    with pytest.raises(PluginError, match="is not an instance of Backend with a name"):
        checked_backend(PluginInfo("acme-dist", "1", "x", "m"), Broken)


# ---------------------------------------------------------------- what becomes of them


def test_options_reach_the_build_and_stay_in_the_bundle(digits: Callable[..., graphopt.Result]) -> None:
    result = digits("acme{mode=small clock=50}")
    assert _built(result) == {"mode": "small", "table": "", "clock": 50.0, "require": False}
    text = "acme:cam1{mode=small clock=50.0}"
    manifest = read_manifest(result.path)
    assert manifest is not None
    assert (result.report.target, manifest.target) == (text, text)
    assert f"--target '{text}'" in result.report.command
    assert manifest.versions["no-such-distribution"] == "missing"


def test_a_target_without_options_looks_as_before(digits: Callable[..., graphopt.Result]) -> None:
    result = digits("acme")
    assert result.report.target == "acme:cam1"
    assert "--target acme:cam1" in result.report.command


def test_options_may_come_beside_the_text(digits: Callable[..., graphopt.Result]) -> None:
    result = digits("acme{clock=50}", target_options={"mode": "small"})
    assert result.report.target == "acme:cam1{mode=small clock=50.0}"


def test_a_bundle_is_made_anew_where_an_option_or_a_file_it_names_differs(
    digits: Callable[..., graphopt.Result], tmp_path: Path
) -> None:
    table = tmp_path / "some.ini"
    table.write_text("first", "utf8")
    text = f"acme{{table={table}}}"
    first = digits(text)
    assert digits(text).up_to_date
    assert first.report.target == "acme:cam1{table=some.ini}", "a path would differ between machines"
    table.write_text("second", "utf8")
    second = digits(text)
    assert not second.up_to_date
    assert _built(second)["table"] == "second"
    assert not digits(f"{text[:-1]} mode=small}}").up_to_date


def test_a_file_that_an_option_names_is_not_overwritten(digits: Callable[..., graphopt.Result], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "some.ini").write_text("mine", "utf8")
    with pytest.raises(UsageError, match=r"holds the input 'some\.ini' and would be replaced"):
        digits(f"acme{{table={tmp_path / 'out' / 'some.ini'}}}")


def test_the_folder_by_default_is_called_after_the_target_alone(
    digits: Callable[..., graphopt.Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert digits("acme:cam1{mode=small}", out=None).path == Path("model.acme-cam1")


def test_a_recipe_may_name_options(fixtures: Path, tmp_path: Path, registry: Registry) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('target = "acme{mode=small}"\n[[pass]]\nname = "fold"\n', "utf8")
    model = fixtures / "digits_cnn" / "model.onnx"
    result = graphopt.optimize(model, recipe=recipe, out=tmp_path / "out", registry=registry, check="none")
    assert _built(result)["mode"] == "small"


def test_a_bundle_with_options_opens(digits: Callable[..., graphopt.Result], registry: Registry) -> None:
    bundle = Bundle.open(digits("acme{mode=small}").path, registry=registry)
    assert (str(bundle.target), bundle.how) == ("acme:cam1", "executed")


def test_what_a_backend_estimates_is_in_the_report(digits: Callable[..., graphopt.Result]) -> None:
    result = digits("acme")
    assert result.report.backend is not None
    assert result.report.backend.estimates == (ESTIMATE,)
    assert "estimated by Acme 1.0" in (result.path / "report.html").read_text("utf8")
    assert digits("acme").report == result.report, "read from report.json"


# ---------------------------------------------------------------- the command


@pytest.fixture
def command(fixtures: Path, tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the command with the made-up backend among the others."""
    monkeypatch.chdir(tmp_path)
    for module in ("graphopt.plugins", "graphopt.compile.resolve"):
        monkeypatch.setattr(f"{module}.load_plugins", lambda **_: registry)

    def run(*words: str) -> int:
        argv = [str(fixtures / "digits_cnn" / "model.onnx"), "--passes", "fold", "--check", "none", *words]
        with pytest.raises(SystemExit) as caught:
            main(list(words) if words[0] == "explain" else argv)
        return int(caught.value.code or 0)

    return run


def test_require_npu_is_the_option_of_targets_that_have_it(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--target", "acme{mode=small}", "--require-npu", "-o", "out", "-q") == 0
    assert json.loads((tmp_path / "out" / KERNEL).read_text("utf8"))["require"] is True
    assert command("--target", "arm", "--require-npu", "-o", "other") == ExitCode.USAGE
    said = capsys.readouterr().err
    assert said.startswith("graphopt: --require-npu: the target arm:cortex-a76 has no NPU; give one that has: ")
    assert "--target acme" in said
    assert not (tmp_path / "other").exists()


def test_explain_shows_the_options_of_a_target(command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert command("explain", "--target", "acme") == 0
    said = capsys.readouterr().out
    assert "options, written 'acme:cam1{option=value ...}':" in said
    assert "mode=small|fast" in said
    assert "(> 0)  [default: 100.0]" in said
    assert said.endswith("operators of acme:cam1:\n  Conv  always\n")
    assert command("explain", "ort") == 0
    assert "no options" in capsys.readouterr().out


def test_explain_wants_one_name(command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert command("explain", "quant", "--target", "arm") == ExitCode.USAGE
    assert command("explain", "--target", "amr") == ExitCode.USAGE
    assert "--target amr: no such target; did you mean 'arm'?" in capsys.readouterr().err


def test_files_that_options_name_are_dependencies(tmp_path: Path) -> None:
    table = tmp_path / "some.ini"
    request = SimpleNamespace(reads=(table,), calibration=None, evaluation=None)
    assert compile_module._files(request) == [table]
