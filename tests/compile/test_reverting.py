"""The accuracy loop: a step that costs too much leaves its worst sites alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import build

import graphopt
from graphopt.bundle import file_digests
from graphopt.compile.decisions import Decisions, LeftOut, Reverted, read_decisions, write_decisions
from graphopt.compile.reverting import Search
from graphopt.compile.running import Run
from graphopt.errors import ExitCode, PassError, UsageError
from graphopt.options import opt
from graphopt.pass_base import Change, Context, Pass, PassResult
from graphopt.recipe import Limits
from graphopt.reference import Feed
from graphopt_passes.quant import Quant

LAYERS = ("a", "b", "c", "d", "e", "f")
NOISE = {"a": 1e-3, "b": 1e-3, "c": 0.4, "d": 1e-3, "e": 0.2, "f": 1e-3}
BODY = "\n".join(f"[{name}] t_{name} = MatMul({source}, w_{name})" for source, name in zip(
    ("x", *(f"t_{name}" for name in LAYERS)), LAYERS, strict=False
)) + "\n[last] y = Identity(t_f)"  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Disturb(Pass):
    """Add noise to weights; how much is known for every layer."""

    name: ClassVar[str] = "disturb"
    lossy: ClassVar[bool] = True
    skip: tuple[str, ...] = opt((), help="layers left alone")
    misled: bool = opt(False, help="the first ranking is upside down, and what comes first makes things worse")

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        changes: list[Change] = []
        for node in model.graph:
            if node.name not in NOISE:
                continue
            if node.name in self.skip:
                changes.append(Change.skipped(node.name, "named by skip"))
                continue
            value = node.inputs[1]
            assert value is not None
            assert value.const_value is not None
            weight = value.const_value.numpy()
            noise = ctx.rng.standard_normal(weight.shape)
            amount = NOISE[node.name] * (10 if self.misled and "a" in self.skip and "c" not in self.skip else 1)
            value.const_value = ir.tensor((weight * (1 + amount * noise)).astype(np.float32), name=value.name)
            changes.append(Change(node.name, "disturbed"))
        return PassResult(any(change.done for change in changes), tuple(changes), notes=("disturbed",))

    def revertible(self, model: ir.Model, sites: Sequence[str]) -> tuple[str, ...]:
        return tuple(site for site in sites if site in NOISE)

    def worst_first(
        self, model: ir.Model, ctx: Context, sites: Sequence[str], reverted: Sequence[str], feeds: Sequence[Feed]
    ) -> tuple[str, ...]:
        assert feeds
        wrong = self.misled and not reverted
        return tuple(sites) if wrong else tuple(sorted(sites, key=lambda site: -NOISE[site]))

    def without(self, sites: Sequence[str]) -> Self:
        return replace(self, skip=(*self.skip, *sites))


Compile = Callable[..., graphopt.Result]


@pytest.fixture
def chain(tmp_path: Path) -> Compile:
    """Compile a chain of six layers, some of which stand noise badly."""
    scale = {f"w_{name}": (16, 16) for name in LAYERS}
    model = build("(float[N,16] x) => (float[N,16] y)", BODY, scale)
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy() / 4, name=value.name)
    ir.save(model, tmp_path / "chain.onnx")
    samples = {"x": np.random.default_rng(2).standard_normal((16, 16)).astype(np.float32)}

    def run(*passes: Pass, out: str = "out", **options: object) -> graphopt.Result:
        given = {"out": tmp_path / out, "calibration": samples, "force": True, **options}
        return graphopt.optimize(tmp_path / "chain.onnx", passes or (Disturb(),), **given)

    return run


def reverted(result: graphopt.Result) -> set[str]:
    return {c.site for step in result.report.steps for c in step.changes if c.action.startswith("skipped: reverted")}


def test_the_worst_layers_are_reverted_and_no_others(chain: Compile) -> None:
    result = chain(limits=Limits(min_sqnr=30.0))
    assert result.exit_code == ExitCode.OK
    assert result.report.verdict == "ok"
    assert result.report.fidelity.outputs[0].sqnr_db >= 30
    assert reverted(result) == {"c", "e"}
    assert "disturb: 2 layers left alone, reverted to keep --min-sqnr: c, e" in result.report.notes


def test_without_a_limit_nothing_is_reverted(chain: Compile) -> None:
    assert reverted(chain()) == set()


def test_a_limit_that_holds_reverts_nothing(chain: Compile) -> None:
    assert reverted(chain(limits=Limits(min_sqnr=1.0))) == set()


def test_the_loop_gives_the_same_bytes_twice_and_no_decisions(chain: Compile) -> None:
    first, second = (chain(limits=Limits(min_sqnr=30.0), out=out) for out in ("a", "b"))
    assert file_digests(first.path) == file_digests(second.path)
    assert not (first.path / "decisions.json").exists()


def test_a_limit_that_no_reverting_reaches_ships_the_model_before_the_step(chain: Compile) -> None:
    result = chain(limits=Limits(min_sqnr=300.0))
    assert result.exit_code == ExitCode.LIMIT_MISSED
    assert "--min-sqnr 300 dB missed" in result.report.verdict
    assert "written: the input, unchanged" in result.report.verdict
    assert any("left out: --min-sqnr missed" in note for note in result.report.notes)


def test_a_step_back_makes_a_misled_ranking_start_anew(chain: Compile) -> None:
    result = chain(Disturb(misled=True), limits=Limits(min_sqnr=30.0))
    assert result.exit_code == ExitCode.OK
    assert {"c", "e"} <= reverted(result)
    assert len(reverted(result)) < len(LAYERS)


def test_steps_after_the_one_that_was_mended_run_as_well(chain: Compile) -> None:
    result = chain(Disturb(), Disturb(skip=("c", "e")), limits=Limits(min_sqnr=30.0))
    assert result.exit_code == ExitCode.OK
    assert len(result.report.steps) == 2
    assert reverted(result) == {"c", "e"}


@pytest.mark.parametrize("attempts", [0, 1])
def test_time_that_ran_out_in_the_search_is_recorded_and_replays(
    chain: Compile, monkeypatch: pytest.MonkeyPatch, attempts: int
) -> None:
    asked = 0

    def late(run: Run) -> bool:
        nonlocal asked
        asked += 1
        run.clocked |= asked > 2 + attempts  # once before the step, once before the ranking
        return asked > 2 + attempts

    monkeypatch.setattr(Run, "out_of_time", late)
    result = chain(limits=Limits(min_sqnr=30.0, time_limit="10m"), out="a")
    record = result.path / "decisions.json"
    assert record.exists()
    again = chain(decisions=record, limits=Limits(min_sqnr=30.0, time_limit="10m"), out="b")
    assert file_digests(again.path) == file_digests(result.path)
    assert again.exit_code == result.exit_code
    assert result.report.fidelity.outputs[0].sqnr_db >= 30, "the best seen keeps the limit"


def test_steps_that_there_was_no_time_for_stay_left_out_in_a_replay(chain: Compile) -> None:
    limits = Limits(time_limit="0.0001s")
    first = chain(limits=limits, out="a")
    again = chain(limits=limits, out="b", decisions=first.path / "decisions.json")
    assert first.exit_code == again.exit_code == ExitCode.LIMIT_MISSED
    assert file_digests(again.path) == file_digests(first.path)


def test_layers_of_a_quantization_are_reverted(chain: Compile) -> None:
    result = chain(Quant(mode="weight"), limits=Limits(min_sqnr=40.0))
    assert result.exit_code == ExitCode.OK
    assert 0 < len(reverted(result)) < len(LAYERS)
    assert result.report.fidelity.outputs[0].sqnr_db >= 40


@pytest.mark.parametrize(("dtype", "limit"), [("fp16", 66.0), ("bf16", 48.0), ("fp8", 28.0)])
def test_nodes_are_reverted_from_narrow_floats(chain: Compile, dtype: Any, limit: float) -> None:
    whole = chain(Quant(dtype=dtype))
    assert whole.report.fidelity.outputs[0].sqnr_db < limit, "the limit is missed with all of it"
    result = chain(Quant(dtype=dtype), limits=Limits(min_sqnr=limit))
    assert result.exit_code == ExitCode.OK
    assert 0 < len(reverted(result)) < len(LAYERS)
    assert result.report.fidelity.outputs[0].sqnr_db >= limit


def test_decisions_that_name_sites_are_replayed_without_a_search(chain: Compile, tmp_path: Path) -> None:
    entry = Reverted(1, ("a", "c"), "slower than before otherwise")
    (tmp_path / "made").mkdir()
    write_decisions(tmp_path / "made", Decisions("disturb", reverted=(entry,)))
    result = chain(decisions=tmp_path / "made" / "decisions.json", limits=Limits(min_sqnr=30.0))
    skipped = {c.site: c.action for c in result.report.steps[0].changes if not c.done}
    assert skipped == dict.fromkeys(("a", "c"), "skipped: slower than before otherwise")
    assert result.exit_code == ExitCode.LIMIT_MISSED, "what was decided is done, limit or not"


def test_decisions_leave_steps_out_for_the_reason_they_were_left_out(chain: Compile, tmp_path: Path) -> None:
    write_decisions(tmp_path, Decisions("disturb", (LeftOut(1, "it made the model slower"),)))
    report = chain(decisions=tmp_path / "decisions.json").report
    assert "disturb left out: it made the model slower" in report.notes
    assert report.steps == ()


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("{", "not a decisions.json"),
        ('{"pipeline": "fold"}', "made for the pipeline 'fold'"),
        ("[]", "not a decisions"),
    ],
)
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, text: str, fact: str) -> None:
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(UsageError, match=fact):
        read_decisions(tmp_path / "d.json", "quant")


def test_a_pass_that_offers_nothing_cannot_be_told_to_leave_sites_alone(chain: Compile, tmp_path: Path) -> None:
    write_decisions(tmp_path, Decisions("fold", reverted=(Reverted(1, ("a",), "so"),)))
    with pytest.raises(PassError, match="cannot leave single sites alone"):
        graphopt.optimize(tmp_path / "chain.onnx", "fold", out=tmp_path / "o", decisions=tmp_path / "decisions.json")


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 60), st.data())
def test_the_search_finds_the_fewest_with_few_attempts(count: int, draw: st.DataObject) -> None:
    needed = draw.draw(st.integers(1, count))
    search = Search(lambda sites: float(needed - len(sites)), lambda left, reverted: left, lambda: False)
    found = search.run([f"s{i}" for i in range(count)], float(needed))
    assert (None if found is None else len(found)) == (needed if needed < count else None)
    assert search.attempts <= 2 * int(np.ceil(np.log2(count))) + 1


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=12), st.integers(0, 8))
def test_the_search_ends_whatever_candidates_do_and_returns_only_what_it_saw_suffice(
    levels: list[float], patience: int
) -> None:
    seen: dict[tuple[str, ...], float] = {}

    def attempt(sites: tuple[str, ...]) -> float:
        seen[sites] = levels[(7 * len(seen) + len(sites)) % len(levels)]
        return seen[sites]

    search = Search(attempt, lambda left, reverted: tuple(reversed(left)), lambda: len(seen) > patience)
    found = search.run([f"s{i}" for i in range(len(levels))], 0.5)
    assert found is None or seen[found] <= 0
    assert search.attempts < 40
