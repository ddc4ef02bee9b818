"""Plugins: found through the entry-point group `graphopt`, loaded in a fixed order, and named when they break.

The built-in passes and backends enter the same way. A plugin that is broken, or that clashes with another, is an error
with its way out; nothing is renamed and nothing wins over anything else. `$GRAPHOPT_PLUGINS` makes builds hermetic:

    GRAPHOPT_PLUGINS=none     only what graphopt itself brings
    GRAPHOPT_PLUGINS=a,b      that, and the distributions a and b
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.resources
import inspect
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from importlib.resources.abc import Traversable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import pluggy

from graphopt import hookspecs
from graphopt.backend_base import Backend
from graphopt.calibration import Dataset
from graphopt.criterion_base import Criterion
from graphopt.errors import GraphoptError, OptionError, PluginError, UsageError, nearest
from graphopt.options import build, specs
from graphopt.pass_base import Pass
from graphopt.pipeline_text import Step, parse_pipeline, parse_target
from graphopt.plugin_checks import PluginInfo, checked_backend, checked_criterion, checked_pass, reason, way_out
from graphopt.targets import Target, TargetTable

if TYPE_CHECKING:
    from graphopt.instruments import Instrument

__all__ = ["PluginInfo", "Registry", "load_plugins"]

_GROUP = "graphopt"
_BUILTIN = "graphopt"
_ENVIRONMENT = "GRAPHOPT_PLUGINS"
_T = TypeVar("_T")


@dataclass(frozen=True)
class Registry:
    """Everything that plugins bring, by name; nothing clashes and everything keeps its contract.

    Attributes:
        passes: Pass classes by their spelling.
        backends: Backends by name.
        targets: All targets.
        criteria: Pruning criteria by name.
        plugins: The loaded entry points, in the order in which hooks are called.
    """

    passes: Mapping[str, type[Pass]]
    backends: Mapping[str, Backend]
    targets: TargetTable
    criteria: Mapping[str, Criterion]
    plugins: tuple[PluginInfo, ...]
    _hooks: _Hooks = field(repr=False)

    def pass_from_step(self, step: Step) -> Pass:
        """Build the pass that a pipeline step names.

        Raises:
            OptionError: There is no such pass, or an option does not fit it.
        """
        return self.build_pass(step.name, step.values)

    def build_pass(self, name: str, values: Mapping[str, Any], subject: str = "--passes") -> Pass:
        """Build a pass from its name and option values; `subject` is where the name was written.

        Raises:
            OptionError: There is no such pass, or an option does not fit it.
        """
        if name not in self.passes:
            raise OptionError(subject, f"no pass called {name!r}", nearest(name, self.passes))
        return build(self.passes[name], values, name)

    def passes_from_text(self, text: str) -> tuple[Pass, ...]:
        """Build the passes of a pipeline.

        Raises:
            OptionError: The text does not parse, names an unknown pass, or an option does not fit.
        """
        return tuple(self.pass_from_step(step) for step in parse_pipeline(text))

    def target_from_text(self, text: str, more: Mapping[str, Any] | None = None) -> tuple[Target, Any]:
        """Find a target and build its options.

        Args:
            text: The target as written: `NAME[:DEVICE][{option=value ...}]`.
            more: Options given beside the text; they win.

        Returns:
            The target, and an instance of the options of its backend; None if that has none.

        Raises:
            UsageError: There is no such target.
            OptionError: The text does not parse, or an option does not fit.
        """
        step = parse_target(text)
        target = self.targets.resolve(step.name)
        options, given = self.options_of(target), {**step.values, **(more or {})}
        if options is not None:
            return target, build(options, given, str(target))
        if given:
            raise OptionError(f"{target}.{next(iter(given))}", "no such option", "this target has none")
        return target, None

    def options_of(self, target: Target) -> type[Any] | None:
        """What can be asked of a build for a target: a dataclass of options; None: nothing."""
        backend = self.backends.get(target.backend or "")
        return None if backend is None else backend.options

    def targets_with(self, option: str) -> tuple[Target, ...]:
        """Targets that have an option of this name."""
        having = ((target, self.options_of(target)) for target in self.targets)
        return tuple(target for target, cls in having if cls and option in {spec.name for spec in specs(cls)})

    def backend_of(self, target: Target) -> Backend | None:
        """The backend that compiles for a target; None where the ONNX model itself ships.

        Raises:
            PluginError: No loaded plugin brings the backend.
        """
        if target.backend is None:
            return None
        if target.backend not in self.backends:
            fact = f"needs the backend {target.backend!r}, which no loaded plugin brings"
            raise PluginError(f"target {target}", fact, nearest(target.backend, self.backends))
        return self.backends[target.backend]

    def calibration(self, uri: str) -> Iterable[Dataset]:
        """Ask plugins for the data behind a uri; empty if it is none of theirs.

        Raises:
            PluginError: A reader fails, or two plugins claim the uri.
        """
        answers = self._hooks.call("graphopt_calibration", uri=uri)
        return _at_most_one(answers, Dataset, f"data {uri!r}", "graphopt_calibration")

    def default_pipeline(self, target: Target) -> str | None:
        """Pipeline text for a target when the user names no passes; None if nobody has one.

        Raises:
            PluginError: The hook fails, or two plugins answer.
        """
        answers = self._hooks.call("graphopt_default_pipeline", target=target)
        return next(iter(_at_most_one(answers, str, f"target {target}", "graphopt_default_pipeline")), None)

    def instruments(self, config: Mapping[str, Any]) -> tuple[Instrument, ...]:
        """Instruments that plugins bring for a run with this configuration, in plugin order."""
        found: list[Instrument] = []
        for plugin, items in self._hooks.lists("graphopt_instruments", config=config):
            for item in items:
                lacking = [n for n in ("before_pass", "after_pass", "failed") if not callable(getattr(item, n, None))]
                if lacking:
                    raise plugin.broken(f"graphopt_instruments: {item!r} has no method {lacking[0]}")
                found.append(item)
        return tuple(found)

    def recipes(self) -> Mapping[str, Traversable]:
        """Recipes by name: files `recipes/NAME.toml` in the packages in which plugins lie.

        Raises:
            PluginError: Two plugins bring recipes of one name.
        """
        found: dict[str, tuple[PluginInfo, Traversable]] = {}
        packages = {importlib.import_module(p.module).__package__ or "": p for p in reversed(self.plugins)}
        for package, plugin in sorted(packages.items()):
            for file in _recipe_files(package):
                _claim(found, file.name.removesuffix(".toml"), plugin, file, "recipe")
        return {name: file for name, (_, file) in sorted(found.items())}


def load_plugins(*, disable: Collection[str] = (), only: Collection[str] | None = None) -> Registry:
    """Load the installed plugins and collect what they bring.

    Args:
        disable: Distributions to leave out (`--no-plugin`).
        only: The distributions to load besides graphopt itself; None: what `$GRAPHOPT_PLUGINS` says, else all.

    Raises:
        PluginError: A plugin cannot be imported, breaks its contract, or clashes with another.
        UsageError: A named distribution is not an installed plugin.
    """
    hooks = _Hooks(_chosen(disable, only))
    passes: dict[str, tuple[PluginInfo, type[Pass]]] = {}
    backends: dict[str, tuple[PluginInfo, Backend]] = {}
    targets: dict[str, tuple[PluginInfo, Target]] = {}
    criteria: dict[str, tuple[PluginInfo, Criterion]] = {}
    for plugin, items in hooks.lists("graphopt_passes"):
        for item in items:
            _claim(passes, *checked_pass(plugin, item), "pass")
    for plugin, items in hooks.lists("graphopt_backends"):
        for item in items:
            _claim(backends, *checked_backend(plugin, item), "backend")
    for plugin, items in hooks.lists("graphopt_targets"):
        for item in items:
            if not isinstance(item, Target):
                raise plugin.broken(f"graphopt_targets: {item!r} is not a Target")
            _claim(targets, str(item), plugin, item, "target")
    for plugin, items in hooks.lists("graphopt_criteria"):
        for item in items:
            _claim(criteria, *checked_criterion(plugin, item), "criterion")
    return Registry(
        passes={name: found for name, (_, found) in sorted(passes.items())},
        backends={name: found for name, (_, found) in sorted(backends.items())},
        targets=TargetTable(target for _, target in targets.values()),
        criteria={name: found for name, (_, found) in sorted(criteria.items())},
        plugins=hooks.plugins,
        _hooks=hooks,
    )


# ---------------------------------------------------------------- hooks


class _Hooks:
    """Loaded plugins; calls each hook plugin by plugin, so that a failure has a name."""

    def __init__(self, chosen: Iterable[EntryPoint]) -> None:
        self._manager = pluggy.PluginManager(_GROUP)
        self._manager.add_hookspecs(hookspecs)
        self._loaded: list[tuple[PluginInfo, Any]] = [self._load(entry) for entry in chosen]

    @property
    def plugins(self) -> tuple[PluginInfo, ...]:
        return tuple(info for info, _ in self._loaded)

    def call(self, hook: str, **arguments: Any) -> list[tuple[PluginInfo, Any]]:
        """What each plugin that implements the hook answers; None is no answer."""
        answers: list[tuple[PluginInfo, Any]] = []
        for info, plugin in self._loaded:
            if hook not in info.hooks:
                continue
            others = [other for _, other in self._loaded if other is not plugin]
            try:
                results = self._manager.subset_hook_caller(hook, others)(**arguments)
            except GraphoptError:
                raise
            except Exception as e:
                raise info.broken(f"fails in {hook}: {reason(e)}") from e
            answers += [(info, result) for result in results]
        return answers

    def lists(self, hook: str, **arguments: Any) -> list[tuple[PluginInfo, Sequence[Any]]]:
        """As `call`, for hooks that return sequences."""
        answers = self.call(hook, **arguments)
        for info, answer in answers:
            if not isinstance(answer, (list, tuple)):
                raise info.broken(f"{hook} returns {type(answer).__name__}, not a list or tuple")
        return answers

    def _load(self, entry: EntryPoint) -> tuple[PluginInfo, Any]:
        info = _info(entry)
        try:
            plugin = entry.load()
        except (Exception, SystemExit) as e:
            raise info.broken(f"fails on import: {reason(e)}") from e
        hooks = self._hooks_of(info, plugin)
        try:
            self._manager.register(plugin, f"{info.name}:{info.entry_point}")
        except ValueError as e:
            raise info.broken(f"entry point {info.entry_point!r} names an object that is already loaded") from e
        except pluggy.PluginValidationError as e:
            raise info.broken(f"entry point {info.entry_point!r} is not accepted: {reason(e)}") from e
        return dataclasses.replace(info, hooks=hooks), plugin

    def _hooks_of(self, info: PluginInfo, plugin: Any) -> tuple[str, ...]:
        """Names of the hooks that a plugin implements; refuses misspelled, unmarked and wrongly declared ones."""
        found: set[str] = set()
        known = {name: member for name, member in vars(hookspecs).items() if name.startswith(f"{_GROUP}_")}
        for attribute in dir(plugin):
            options = self._manager.parse_hookimpl_opts(plugin, attribute)
            member = getattr(plugin, attribute, None)
            if options is None:
                if attribute in known and inspect.isroutine(member):
                    raise info.broken(f"{attribute} is not marked with @hookimpl, so it would never be called")
                continue
            name = options.get("specname") or attribute
            if name not in known:
                raise info.broken(f"implements the unknown hook {name!r} ({nearest(name, known)})")
            offered = inspect.signature(known[name]).parameters
            wanted = inspect.signature(cast("Any", member)).parameters.values()
            for parameter in wanted:
                if parameter.default is parameter.empty and parameter.name not in offered:
                    fact = f"{name} takes the argument {parameter.name!r}, which the hook does not have"
                    raise info.broken(f"{fact} ({nearest(parameter.name, offered)})")
            found.add(name)
        return tuple(sorted(found))


# ---------------------------------------------------------------- which plugins


def _chosen(disable: Collection[str], only: Collection[str] | None) -> list[EntryPoint]:
    """Entry points to load, sorted by distribution and name."""
    found = sorted(entry_points(group=_GROUP), key=lambda entry: (_canonical(_distribution(entry)), entry.name))
    names = {_canonical(_distribution(entry)): _distribution(entry) for entry in found}
    subject = "plugins"
    if only is None:
        subject, only = _ENVIRONMENT, _from_environment()
    kept = set(names) if only is None else {_known(name, names, subject) for name in only} | {_BUILTIN}
    for name in disable:
        canonical = _known(name, names, "--no-plugin")
        if canonical == _BUILTIN:
            raise UsageError(f"--no-plugin {name}", "what graphopt itself brings is always loaded")
        kept.discard(canonical)
    return [entry for entry in found if _canonical(_distribution(entry)) in kept]


def _from_environment() -> tuple[str, ...] | None:
    text = os.environ.get(_ENVIRONMENT, "").strip()
    if not text:
        return None
    return () if text == "none" else tuple(name.strip() for name in text.split(",") if name.strip())


def _known(name: str, names: Mapping[str, str], subject: str) -> str:
    if _canonical(name) not in names:
        third_party = [shown for canonical, shown in names.items() if canonical != _BUILTIN]
        raise UsageError(subject, f"no installed plugin is called {name!r}", nearest(name, third_party))
    return _canonical(name)


def _info(entry: EntryPoint) -> PluginInfo:
    version = entry.dist.version if entry.dist else ""
    name = _distribution(entry)
    return PluginInfo(name, version, entry.name, entry.module, builtin=_canonical(name) == _BUILTIN)


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else entry.module


def _canonical(name: str) -> str:
    """Normal form of a distribution's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


# ---------------------------------------------------------------- contracts


def _claim(table: dict[str, tuple[PluginInfo, _T]], name: str, plugin: PluginInfo, item: _T, what: str) -> None:
    if name in table:
        raise _clash(f"{what} {name}", table[name][0], plugin)
    table[name] = (plugin, item)


def _at_most_one(answers: Sequence[tuple[PluginInfo, Any]], kind: type[_T], what: str, hook: str) -> tuple[_T, ...]:
    if len(answers) > 1:
        raise _clash(what, answers[0][0], answers[1][0])
    for plugin, answer in answers:
        if not isinstance(answer, kind):
            raise plugin.broken(f"{hook} returns {type(answer).__name__}, not {kind.__name__} or None")
    return tuple(answer for _, answer in answers)


def _clash(subject: str, first: PluginInfo, second: PluginInfo) -> PluginError:
    if first.name == second.name:
        return PluginError(subject, f"claimed twice by plugin {first.name}", way_out(first))
    fact = f"claimed by both {first.name} and {second.name}"
    return PluginError(subject, fact, way_out(first if second.builtin else second))


def _recipe_files(package: str) -> list[Traversable]:
    if not package:  # the plugin is a module on its own
        return []
    folder = importlib.resources.files(package) / "recipes"
    return [file for file in folder.iterdir() if file.name.endswith(".toml")] if folder.is_dir() else []
