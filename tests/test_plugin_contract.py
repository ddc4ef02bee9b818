"""What the loader demands of a plugin, on modules made up in memory; whatever is wrong, the distribution is named."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from graphopt import plugins
from graphopt.backend_base import Backend, Build
from graphopt.calibration import Dataset
from graphopt.criterion_base import Criterion
from graphopt.errors import DataError, ExitCode, OptionError, PluginError
from graphopt.instruments import Instrument, instruments_for
from graphopt.markers import hookimpl
from graphopt.options import opt
from graphopt.pass_base import Context, Pass, PassResult
from graphopt.pipeline_text import Step
from graphopt.plugins import Registry, load_plugins
from graphopt.targets import Target

Load = Callable[..., Registry]


@dataclass(frozen=True, kw_only=True)
class Trim(Pass):
    """Trim nothing."""

    name: ClassVar[str] = "trim"
    lossy: ClassVar[bool] = False
    amount: int = opt(1, help="how much", ge=0)

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        return PassResult(modified=False)


class Oven(Backend):
    name = "oven"

    def unsupported(self, model: Any, target: Any, options: Any) -> Any:
        return ()

    def build(self, model: Any, target: Any, folder: Any, options: Any) -> Build:
        return Build()

    def how(self, target: Any) -> Any:
        return "estimated"

    def load(self, folder: Any, target: Any, threads: int) -> Any:
        return lambda feed: feed


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Load made-up plugins: distribution -> its hooks by name, a module, or an exception that importing it raises."""

    def run(**distributions: Any) -> Registry:
        entries: list[EntryPoint] = []
        for name, content in distributions.items():
            module = content if isinstance(content, ModuleType) else ModuleType(f"made_up_{name}")
            if isinstance(content, dict):
                for hook, function in content.items():
                    setattr(module, hook, hookimpl(function))
            monkeypatch.setitem(sys.modules, module.__name__, module)
            entry = EntryPoint(name, module.__name__, "graphopt")
            vars(entry).update(dist=SimpleNamespace(name=f"{name}-dist", version="1.0"))
            entries.append(entry)
        monkeypatch.setattr(plugins, "entry_points", lambda group: entries)
        monkeypatch.delenv("GRAPHOPT_PLUGINS", raising=False)
        return load_plugins()

    return run


def refusal(load: Load, **distributions: Any) -> str:
    with pytest.raises(PluginError) as caught:
        load(**distributions)
    assert caught.value.exit_code == ExitCode.PLUGIN
    assert "\n" not in str(caught.value)
    return str(caught.value)


def passes(*classes: Any) -> dict[str, Any]:
    return {"graphopt_passes": lambda: list(classes)}


# ---------------------------------------------------------------- passes


def test_a_pass_is_found_by_name_and_built_from_text(load: Load) -> None:
    registry = load(acme=passes(Trim))
    assert registry.passes == {"trim": Trim}
    assert registry.passes_from_text("trim{amount=3},trim") == (Trim(amount=3), Trim())
    assert registry.plugins[0].hooks == ("graphopt_passes",)
    assert not registry.plugins[0].builtin


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trimm", "--passes: no pass called 'trimm'; did you mean 'trim'?"),
        ("trim{amuont=1}", "trim.amuont: no such option; did you mean 'amount'?"),
        ("trim{amount=-1}", "trim.amount: -1 is not at least 0"),
    ],
)
def test_a_pipeline_that_does_not_fit_names_the_nearest(load: Load, text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        load(acme=passes(Trim)).passes_from_text(text)
    assert str(caught.value) == message


def _variant(**members: Any) -> type[Pass]:
    """A frozen pass like Trim with other members."""
    body = {"name": "other", "lossy": True, "run": Trim.run, "__annotations__": {}, **members}
    return dataclass(frozen=True, kw_only=True)(type("Other", (Pass,), body))


class _Plain(Pass):
    name = "plain"
    lossy = False

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        return PassResult(modified=False)


@dataclass(kw_only=True)
class _Thawed(Pass):
    name: ClassVar[str] = "thawed"
    lossy: ClassVar[bool] = False

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        return PassResult(modified=False)


@dataclass(frozen=True, kw_only=True)
class _Idle(Pass):
    name: ClassVar[str] = "idle"
    lossy: ClassVar[bool] = False


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (Trim(), "is not a subclass of Pass"),
        (int, "is not a subclass of Pass"),
        (_variant(name=None), "pass class Other needs a name of lower-case letters, digits and dashes, not None"),
        (_variant(name="Two Words"), "needs a name of lower-case letters, digits and dashes, not 'Two Words'"),
        (_variant(lossy=None), "pass class Other needs lossy = True or lossy = False"),
        (_variant(__annotations__={"n": "int"}, n=1), "pass class Other: field 'n' is not declared with opt(...)"),
        (
            _variant(__annotations__={"n": "Missing"}, n=opt(1, help="")),
            "options whose types cannot be read: NameError",
        ),
        (_Plain, "pass class _Plain needs the decorator @dataclass(frozen=True, kw_only=True)"),
        (_Thawed, "pass class _Thawed needs the decorator @dataclass(frozen=True, kw_only=True)"),
        (_Idle, "pass class _Idle does not define run"),
    ],
)
def test_a_class_that_is_no_pass_is_refused(load: Load, item: Any, message: str) -> None:
    text = refusal(load, acme=passes(item))
    assert text.startswith("plugin acme-dist: ")
    assert message in text
    assert text.endswith("; disable it with --no-plugin acme-dist")


def test_two_plugins_with_one_pass_name_are_both_named(load: Load) -> None:
    text = refusal(load, acme=passes(Trim), zeta=passes(_variant(name="trim")))
    assert text == "pass trim: claimed by both acme-dist and zeta-dist; disable it with --no-plugin zeta-dist"
    assert "claimed twice by plugin acme-dist" in refusal(load, acme=passes(Trim, Trim))


# ---------------------------------------------------------------- criteria


class Size(Criterion):
    """How many there are."""

    name: ClassVar[str] = "size"

    def scores(self, model: ir.Model, groups: Any, ctx: Context) -> list[np.ndarray]:
        return [np.ones(group.units) for group in groups]


def criteria(*classes: Any) -> dict[str, Any]:
    return {"graphopt_criteria": lambda: list(classes)}


def _criterion(**members: Any) -> type[Criterion]:
    return type("Other", (Criterion,), {"name": "other", "scores": Size.scores, **members})


def _demanding(self: Any, size: int) -> None:
    raise AssertionError(size)


def test_a_criterion_is_found_by_name(load: Load) -> None:
    registry = load(acme=criteria(Size), zeta=criteria(_criterion(needs_data=True)))
    assert list(registry.criteria) == ["other", "size"]
    assert isinstance(registry.criteria["size"], Size)
    assert registry.criteria["other"].needs_data
    assert registry.plugins[0].hooks == ("graphopt_criteria",)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (Size(), "is not a subclass of Criterion"),
        (int, "is not a subclass of Criterion"),
        (type("Nameless", (Criterion,), {"scores": Size.scores}), "criterion class Nameless needs a name of"),
        (_criterion(name="Two Words"), "needs a name of lower-case letters, digits and dashes, not 'Two Words'"),
        (_criterion(name="taylor"), "criterion class Other: the name 'taylor' is reserved"),
        (_criterion(needs_data="yes"), "criterion class Other needs needs_data = True or needs_data = False"),
        (_criterion(comparable=1), "criterion class Other needs comparable = True or comparable = False"),
        (type("Idle", (Criterion,), {"name": "idle"}), "criterion class Idle does not define scores"),
        (_criterion(__init__=_demanding), "criterion class Other cannot be made without arguments: TypeError"),
    ],
)
def test_a_class_that_is_no_criterion_is_refused(load: Load, item: Any, message: str) -> None:
    text = refusal(load, acme=criteria(item))
    assert text.startswith("plugin acme-dist: ")
    assert message in text
    assert text.endswith("; disable it with --no-plugin acme-dist")


def test_two_plugins_with_one_criterion_are_both_named(load: Load) -> None:
    text = refusal(load, acme=criteria(Size), zeta=criteria(_criterion(name="size")))
    assert text == "criterion size: claimed by both acme-dist and zeta-dist; disable it with --no-plugin zeta-dist"


# ---------------------------------------------------------------- backends and targets


def test_a_target_leads_to_its_backend(load: Load) -> None:
    cake = Target(name="cake", backend="oven")
    oven = Oven()
    registry = load(acme={"graphopt_targets": lambda: [cake]}, zeta={"graphopt_backends": lambda: (oven,)})
    assert registry.targets.resolve("cake") is cake
    assert registry.backend_of(cake) is oven
    assert registry.backend_of(Target(name="plain")) is None


def test_a_target_without_its_backend_is_refused_when_it_is_used(load: Load) -> None:
    registry = load(acme={"graphopt_targets": lambda: [Target(name="cake", backend="ovn")]},
                    zeta={"graphopt_backends": lambda: [Oven()]})  # fmt: skip
    with pytest.raises(PluginError) as caught:
        registry.backend_of(registry.targets.resolve("cake"))
    fact = "target cake: needs the backend 'ovn', which no loaded plugin brings; did you mean 'oven'?"
    assert str(caught.value) == fact


@pytest.mark.parametrize(
    ("hook", "item", "message"),
    [
        ("graphopt_backends", Oven, "is not an instance of Backend with a name"),
        ("graphopt_targets", "cake", "graphopt_targets: 'cake' is not a Target"),
    ],
)
def test_an_object_of_another_kind_is_refused(load: Load, hook: str, item: Any, message: str) -> None:
    assert message in refusal(load, acme={hook: lambda: [item]})


def test_clashing_targets_and_backends_are_refused(load: Load) -> None:
    target = {"graphopt_targets": lambda: [Target(name="cake", device="one")]}
    assert refusal(load, acme=target, zeta=dict(target)).startswith("target cake:one: claimed by both acme-dist and")
    backend = {"graphopt_backends": lambda: [Oven()]}
    assert refusal(load, acme=backend, zeta=dict(backend)).startswith("backend oven: claimed by both acme-dist and")


# ---------------------------------------------------------------- hooks


def _raise(error: BaseException) -> Callable[[], Any]:
    def hook() -> Any:
        raise error

    return hook


def test_a_hook_that_raises_is_named(load: Load) -> None:
    text = refusal(load, acme={"graphopt_passes": _raise(KeyError("missing\nkey"))})
    assert text.startswith("plugin acme-dist: fails in graphopt_passes: KeyError: 'missing")


def test_a_hook_that_returns_no_list_is_named(load: Load) -> None:
    text = refusal(load, acme={"graphopt_passes": lambda: {"trim": Trim}})
    assert text.startswith("plugin acme-dist: graphopt_passes returns dict, not a list or tuple")


def test_a_hook_without_its_marker_is_refused(load: Load) -> None:
    module = ModuleType("made_up_unmarked")
    vars(module)["graphopt_passes"] = lambda: [Trim]
    text = refusal(load, acme=module)
    assert "graphopt_passes is not marked with @hookimpl, so it would never be called" in text


def test_a_hook_may_take_fewer_arguments_and_more_with_defaults(load: Load) -> None:
    registry = load(acme={"graphopt_calibration": lambda extra=1: None, "graphopt_default_pipeline": lambda: "trim"})
    assert list(registry.calibration("x.npz")) == []
    assert registry.default_pipeline(Target(name="ort")) == "trim"


def test_an_exit_at_import_is_a_broken_plugin(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EntryPoint, "load", _raise_exit)
    assert refusal(load, acme={}).startswith("plugin acme-dist: fails on import: SystemExit: 4")


def _raise_exit(entry: EntryPoint) -> Any:
    raise SystemExit(4)


def test_one_object_behind_two_entry_points_is_refused(load: Load) -> None:
    module = ModuleType("made_up_shared")
    assert "names an object that is already loaded" in refusal(load, acme=module, zeta=module)


def test_readers_are_asked_and_must_not_compete(load: Load) -> None:
    data = Dataset("acme:x", None, lambda: iter([{"x": np.zeros(1)}]))
    reader = {"graphopt_calibration": lambda uri: data if uri.startswith("acme:") else None}
    registry = load(acme=reader)
    assert list(registry.calibration("acme:x")) == [data]
    assert list(registry.calibration("x.npz")) == []
    with pytest.raises(PluginError, match="data 'acme:x': claimed by both acme-dist and zeta-dist"):
        load(acme=reader, zeta=dict(reader)).calibration("acme:x")
    with pytest.raises(PluginError, match="graphopt_calibration returns int, not Dataset or None"):
        load(acme={"graphopt_calibration": lambda uri: 3}).calibration("x")


def test_what_a_reader_says_of_the_data_reaches_the_user(load: Load) -> None:
    registry = load(acme={"graphopt_calibration": _raise(DataError("acme:x", "cut short"))})
    with pytest.raises(DataError, match="acme:x: cut short"):
        registry.calibration("acme:x")


def test_instruments_of_plugins_come_after_the_built_in_ones(load: Load) -> None:
    watch = Instrument()
    seen: list[Any] = []
    registry = load(acme={"graphopt_instruments": lambda config: seen.append(dict(config)) or [watch]})
    found = instruments_for(registry, {"target": "ort"})
    assert found[-1] is watch
    assert len(found) > 1
    assert seen == [{"target": "ort"}]
    with pytest.raises(PluginError, match="graphopt_instruments: 3 has no method before_pass"):
        instruments_for(load(acme={"graphopt_instruments": lambda: [3]}), {})


def test_a_step_without_options_builds_the_defaults(load: Load) -> None:
    assert load(acme=passes(Trim)).pass_from_step(Step("trim")) == Trim()
