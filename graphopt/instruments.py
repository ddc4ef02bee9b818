"""Instruments: callbacks around passes, for logging, dumping and measuring; they look and do not touch.

Built-in instruments come first, then those of plugins (hook `graphopt_instruments`), in plugin order.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt.model_io import save_model
from graphopt.pass_base import Context, PassResult
from graphopt.pipeline_text import Step
from graphopt.plugins import Registry

__all__ = ["Dump", "Instrument", "LogLines", "instruments_for"]

_log = logging.getLogger(__name__)


class Instrument:
    """Base of all instruments; override what you need. None of the methods may change the model."""

    def before_pass(self, step: Step, model: ir.Model, ctx: Context) -> None:
        """Called before a pass looks at the model."""

    def after_pass(self, step: Step, model: ir.Model, ctx: Context, result: PassResult) -> None:
        """Called after a pass, once its result has been verified."""

    def failed(self, step: Step, error: BaseException) -> None:
        """Called when a pass, or the verification after it, raises; the error goes on its way afterwards."""


class LogLines(Instrument):
    """Log one line per pass, and one per skipped site at the level of details."""

    def before_pass(self, step: Step, model: ir.Model, ctx: Context) -> None:
        """Log that a pass begins."""
        _log.debug("%s: %d nodes before", step, _nodes(model))

    def after_pass(self, step: Step, model: ir.Model, ctx: Context, result: PassResult) -> None:
        """Log what a pass did."""
        done = sum(change.done for change in result.changes)
        skipped = len(result.changes) - done
        if not result.modified:
            _log.info("%s: nothing to do, %d sites left alone", step, skipped)
        else:
            _log.info("%s: %d sites changed, %d left alone, %d nodes", step, done, skipped, _nodes(model))
        for change in result.changes:
            _log.debug("%s: %s: %s", step.name, change.site, change.action)

    def failed(self, step: Step, error: BaseException) -> None:
        """Log that a pass failed."""
        _log.debug("%s: failed: %s", step, error)


@dataclass
class Dump(Instrument):
    """Write the model after each pass into `folder`, as `01-fold.onnx`, `02-prune.onnx` and so on.

    Weights lie inside the files or, above `model_io.EMBED_LIMIT`, beside them.
    """

    folder: Path
    _count: int = 0

    def after_pass(self, step: Step, model: ir.Model, ctx: Context, result: PassResult) -> None:
        """Write the model.

        Raises:
            WriteError: The folder cannot be written.
        """
        self._count += 1
        save_model(model, self.folder / f"{self._count:02d}-{step.name}.onnx")


def instruments_for(registry: Registry, config: Mapping[str, Any]) -> tuple[Instrument, ...]:
    """All instruments of a run.

    Args:
        registry: The loaded plugins.
        config: What plugins may go by: target and pipeline. `dump`, a folder, adds a model after each pass.

    Raises:
        PluginError: A plugin's hook fails, or returns something else.
    """
    dump = config.get("dump")
    dumps = (Dump(Path(dump)),) if dump else ()
    return (LogLines(), *dumps, *registry.instruments(config))


def _nodes(model: ir.Model) -> int:
    return sum(1 for graph in model.graphs() for _ in graph)
