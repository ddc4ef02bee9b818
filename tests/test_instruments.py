"""Instruments: told of every step, in order, and they leave the model alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir
import pytest

from graphopt.errors import PassError
from graphopt.instruments import Dump, Instrument, LogLines
from graphopt.model_io import load_model, model_bytes
from graphopt.pass_base import Change, Context, Pass, PassResult
from graphopt.pipeline_text import Step
from graphopt.runner import run_step
from graphopt.targets import Target


@dataclass(frozen=True, kw_only=True)
class Rename(Pass):
    """Rename the graph."""

    name: ClassVar[str] = "rename"
    lossy: ClassVar[bool] = False

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        model.graph.name = f"{model.graph.name}_"
        return PassResult(modified=True, changes=(Change("graph", "renamed"), Change.skipped("node", "has a name")))


@dataclass(frozen=True, kw_only=True)
class Refuse(Pass):
    """Refuse to run."""

    name: ClassVar[str] = "refuse"
    lossy: ClassVar[bool] = True

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        raise self.fail("does not want to")


@dataclass
class Watch(Instrument):
    events: list[str] = field(default_factory=list)

    def before_pass(self, step: Step, model: ir.Model, ctx: Context) -> None:
        self.events.append(f"before {step}")

    def after_pass(self, step: Step, model: ir.Model, ctx: Context, result: PassResult) -> None:
        self.events.append(f"after {step} {result.modified}")

    def failed(self, step: Step, error: BaseException) -> None:
        self.events.append(f"failed {step}")


def run(passes: Sequence[Pass], ctx: Context, instruments: Sequence[Instrument]) -> None:
    for number, step in enumerate(passes, 1):
        run_step(step, number, ctx, instruments)


@pytest.fixture
def ctx(fixtures: Path) -> Context:
    return Context(load_model(fixtures / "digits_cnn" / "model.onnx"), Target(name="ort"))


def test_an_instrument_hears_of_every_step(ctx: Context) -> None:
    watch = Watch()
    with pytest.raises(PassError):
        run([Rename(), Refuse()], ctx, [watch])
    assert watch.events == ["before rename", "after rename True", "before refuse", "failed refuse"]


def test_the_base_does_nothing(ctx: Context) -> None:
    before = model_bytes(ctx.model)
    watch = Instrument()
    step = Step("x")
    watch.before_pass(step, ctx.model, ctx)
    watch.after_pass(step, ctx.model, ctx, PassResult(modified=False))
    watch.failed(step, ValueError())
    assert model_bytes(ctx.model) == before


def test_log_lines_count_what_was_done_and_left_alone(ctx: Context, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "graphopt")
    before = len(list(ctx.model.graph.all_nodes()))
    run([Rename()], ctx, [LogLines()])
    assert f"rename: 1 sites changed, 1 left alone, {before} nodes" in caplog.messages
    assert "rename: node: skipped: has a name" in caplog.messages


def test_a_dump_holds_the_model_after_each_step(ctx: Context, tmp_path: Path) -> None:
    run([Rename(), Rename()], ctx, [Dump(tmp_path)])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["01-rename.onnx", "02-rename.onnx"]
    first, second = (load_model(tmp_path / name).graph.name or "" for name in names)
    assert second == f"{first}_"
