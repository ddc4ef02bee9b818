"""What a plugin is called, and what the classes that it brings must be."""

from __future__ import annotations

import dataclasses
import inspect
import re
from dataclasses import dataclass
from typing import Any, cast

from graphopt.backend_base import Backend
from graphopt.criterion_base import RESERVED, Criterion
from graphopt.errors import PluginError
from graphopt.options import specs
from graphopt.pass_base import Pass

__all__ = ["PluginInfo", "checked_backend", "checked_criterion", "checked_pass", "reason", "way_out"]

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@dataclass(frozen=True)
class PluginInfo:
    """One loaded entry point.

    Attributes:
        name: Name of the distribution, which is what `--no-plugin` takes.
        version: Version of the distribution.
        entry_point: Name of the entry point.
        module: Module that the entry point names.
        hooks: Hooks that it implements, sorted.
        builtin: True for what graphopt itself brings.
    """

    name: str
    version: str
    entry_point: str
    module: str
    hooks: tuple[str, ...] = ()
    builtin: bool = False

    def broken(self, fact: str) -> PluginError:
        """Build the error to raise about this plugin."""
        return PluginError(f"plugin {self.name}", fact, way_out(self))


def checked_pass(plugin: PluginInfo, cls: Any) -> tuple[str, PluginInfo, type[Pass]]:
    """Name, plugin and class of a pass that a plugin brings.

    Raises:
        PluginError: It is no pass, or breaks the contract of passes.
    """
    if not (isinstance(cls, type) and issubclass(cls, Pass)):
        raise plugin.broken(f"graphopt_passes: {cls!r} is not a subclass of Pass")
    where = f"pass class {cls.__name__}"
    name, lossy = getattr(cls, "name", None), getattr(cls, "lossy", None)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise plugin.broken(f"{where} needs a name of lower-case letters, digits and dashes, not {name!r}")
    if not isinstance(lossy, bool):
        raise plugin.broken(f"{where} needs lossy = True or lossy = False")
    _check_options(plugin, cls, where)
    return name, plugin, cls


def checked_backend(plugin: PluginInfo, item: Any) -> tuple[str, PluginInfo, Backend]:
    """Name, plugin and instance of a backend that a plugin brings.

    Raises:
        PluginError: It is no backend, or its options break the contract of options.
    """
    if not isinstance(item, Backend) or not isinstance(getattr(item, "name", None), str):
        raise plugin.broken(f"graphopt_backends: {item!r} is not an instance of Backend with a name")
    if item.options is not None:
        _check_options(plugin, item.options, f"the class of options of backend {item.name!r}")
    return item.name, plugin, item


def _check_options(plugin: PluginInfo, cls: type[Any], where: str) -> None:
    """Refuse a class whose fields are not options."""
    parameters = vars(cls).get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        raise plugin.broken(f"{where} needs the decorator @dataclass(frozen=True, kw_only=True)")
    if inspect.isabstract(cls):
        raise plugin.broken(f"{where} does not define {', '.join(sorted(cls.__abstractmethods__))}")
    try:
        options = {spec.name for spec in specs(cls)}
    except (NameError, TypeError) as e:
        raise plugin.broken(f"{where} has options whose types cannot be read: {reason(e)}") from e
    for item in dataclasses.fields(cast("Any", cls)):
        if item.init and item.name not in options:
            raise plugin.broken(f"{where}: field {item.name!r} is not declared with opt(...)")


def checked_criterion(plugin: PluginInfo, cls: Any) -> tuple[str, PluginInfo, Criterion]:
    """Name, plugin and instance of a criterion that a plugin brings.

    Raises:
        PluginError: It is no criterion, or breaks the contract of criteria.
    """
    if not (isinstance(cls, type) and issubclass(cls, Criterion)):
        raise plugin.broken(f"graphopt_criteria: {cls!r} is not a subclass of Criterion")
    where = f"criterion class {cls.__name__}"
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise plugin.broken(f"{where} needs a name of lower-case letters, digits and dashes, not {name!r}")
    if name in RESERVED:
        raise plugin.broken(f"{where}: the name {name!r} is reserved")
    for flag in ("needs_data", "comparable"):
        if not isinstance(getattr(cls, flag), bool):
            raise plugin.broken(f"{where} needs {flag} = True or {flag} = False")
    if inspect.isabstract(cls):
        raise plugin.broken(f"{where} does not define {', '.join(sorted(cls.__abstractmethods__))}")
    try:
        return name, plugin, cls()
    except Exception as e:
        raise plugin.broken(f"{where} cannot be made without arguments: {reason(e)}") from e


def way_out(plugin: PluginInfo) -> str:
    """What to do about a broken plugin."""
    return "reinstall graphopt" if plugin.builtin else f"disable it with --no-plugin {plugin.name}"


def reason(e: BaseException) -> str:
    """Type and first line of an error that a plugin raised."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return f"{type(e).__name__}: {lines[0][:200]}" if lines else type(e).__name__
