"""`--guard`: parts that a step makes slower stay as they were, and the decision replays."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import onnx_ir as ir
import pytest
from bench.test_regions import SIZE, burden, chain

import graphopt
from graphopt.bundle import file_digests
from graphopt.compile import running
from graphopt.measured import Measured, Region
from graphopt.options import opt
from graphopt.pass_base import Change, Context, Pass, PassResult

Compile = Callable[..., graphopt.Result]


@dataclass(frozen=True, kw_only=True)
class Burden(Pass):
    """Make layers slower, and say that they were changed."""

    name: ClassVar[str] = "burden"
    lossy: ClassVar[bool] = True
    layers: tuple[str, ...] = opt(("second",), help="layers made slower")
    harmless: tuple[str, ...] = opt(("first",), help="layers changed without harm")
    offers: bool = opt(True, help="can leave single layers alone")
    stubborn: bool = opt(False, help="leaves alone what it is told to, and makes others slower in its place")

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        changes: list[Change] = []
        for name in self.layers:
            slow = burden(model, name)
            model.graph = slow.graph
            changes.append(Change(name, "made slower"))
        for name in self.harmless:
            node = next(node for node in model.graph if node.name == name)
            value = node.inputs[1]
            assert value is not None
            assert value.const_value is not None
            value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.001), name=value.name)
            changes.append(Change(name, "changed"))
        return PassResult(bool(changes), tuple(changes))

    def revertible(self, model: ir.Model, sites: Sequence[str]) -> tuple[str, ...]:
        return tuple(site for site in sites if self.offers and site in ("first", "second", "third"))

    def without(self, sites: Sequence[str]) -> Self:
        others = ("third",) if self.stubborn else ()
        left = tuple(name for name in (*self.layers, *others) if name not in sites)
        return replace(self, layers=left, harmless=tuple(name for name in self.harmless if name not in sites))


def burdened(model: ir.Model) -> list[str]:
    """Layers that were made slower."""
    return [(node.name or "").removesuffix("_nothing") for node in model.graph if node.op_type == "Mul"]


@pytest.fixture
def steady_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a clock would say on a machine that nothing else runs on; `test_regions` asks a real one."""

    def slowed(request: object, before: ir.Model, after: ir.Model) -> tuple[Region, ...]:
        return tuple(Region((name,), 1.0, 3.0) for name in burdened(after) if name not in burdened(before))

    monkeypatch.setattr(running, "slowed", slowed)
    monkeypatch.setattr(running, "slowdown", lambda request, before, after: 1.0 + len(burdened(after)))


@pytest.fixture
def guarded(tmp_path: Path, steady_clock: None) -> Compile:
    ir.save(chain(), tmp_path / "chain.onnx")
    x = np.random.default_rng(2).standard_normal((1024, SIZE)).astype(np.float32)

    def run(step: Pass, out: str = "out", **options: object) -> graphopt.Result:
        given = {"out": tmp_path / out, "calibration": {"x": x.reshape(4, 256, SIZE)}, "force": True, **options}
        return graphopt.optimize(tmp_path / "chain.onnx", (step,), **given)

    return run


def changed(result: graphopt.Result) -> set[str]:
    return {change.site for step in result.report.steps for change in step.changes if change.done}


def test_only_the_slower_region_stays_as_it_was(guarded: Compile) -> None:
    result = guarded(Burden(), guard=True)
    assert changed(result) == {"first"}
    assert "burden: 1 layer left alone, slower than before otherwise: second" in result.report.notes


def test_a_target_with_kernels_of_its_own_is_told_which_clock_decided(guarded: Compile) -> None:
    pytest.importorskip("tvm")
    result = guarded(Burden(), guard=True, target="x86", verify=False)
    assert "burden: 1 layer left alone, slower than before otherwise in ONNX Runtime: second" in result.report.notes


def test_a_replay_gives_the_same_bytes_and_looks_at_no_clock(
    guarded: Compile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = guarded(Burden(), out="a", guard=True)
    monkeypatch.setattr(running, "slowed", None)
    monkeypatch.setattr(running, "slowdown", None)
    again = guarded(Burden(), out="b", decisions=first.path / "decisions.json")
    assert file_digests(again.path) == file_digests(first.path)


def test_a_step_that_offers_nothing_is_undone_as_a_whole(guarded: Compile) -> None:
    first = guarded(Burden(offers=False), out="a", guard=True)
    assert first.report.steps == ()
    assert "burden{offers=false} left out: it made the model slower" in first.report.notes
    again = guarded(Burden(offers=False), out="b", decisions=first.path / "decisions.json")
    assert file_digests(again.path) == file_digests(first.path)


def test_a_step_that_is_slower_even_so_is_undone_as_a_whole(guarded: Compile) -> None:
    report = guarded(Burden(stubborn=True), guard=True).report
    assert report.steps == ()
    assert any("it made the model slower" in note for note in report.notes)


def test_a_step_that_makes_nothing_slower_is_left_alone(guarded: Compile) -> None:
    result = guarded(Burden(layers=()), guard=True)
    assert changed(result) == {"first"}
    assert not any("left" in note for note in result.report.notes)


def test_without_guard_measuring_only_tells(guarded: Compile) -> None:
    result = guarded(Burden(), measure=True)
    assert changed(result) == {"first", "second"}
    assert result.measured is not None
    assert [region.layers for region in result.measured.slower_regions] == [("second",)]
    stored = Measured.from_json((result.path / "measured" / "bench.json").read_text("utf8"))
    assert stored.slower_regions == result.measured.slower_regions
    page = (result.path / "measured" / "report.html").read_text("utf8")
    assert "became slower" in page


def test_a_target_that_does_not_run_here_is_not_guarded_by_this_clock(
    guarded: Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizing = importlib.import_module("graphopt.compile.optimize")  # the package's `optimize` is the function
    for module in (optimizing, running):
        monkeypatch.setattr(module, "runs_here", lambda request: False)
    result = guarded(Burden(), guard=True)
    assert changed(result) == {"first", "second"}
    assert "--guard: no clock here speaks for ort, so no step was measured" in result.report.notes
