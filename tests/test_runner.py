"""The runner trusts no pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.analyses import CONSTANTS, COST, SHAPES
from graphopt.errors import ModelError, OptionError, PassError
from graphopt.instruments import Instrument
from graphopt.pass_base import Change, Context, Pass, PassResult
from graphopt.runner import run_pass, run_step
from graphopt.targets import Target
from graphopt.testing import ContractError, check_pass

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
small (float[N,4] x) => (float[N,2] y)
<float[4,2] w = {1,2,3,4,5,6,7,8}>
{
  h = Relu(x)
  y = MatMul(h, w)
}
"""


def model() -> ir.Model:
    return ir.from_onnx_text(TEXT)


def context(m: ir.Model | None = None) -> Context:
    return Context(model=m or model(), target=Target(name="ort"))


def scale_weight(m: ir.Model, factor: float) -> None:
    value = m.graph.initializers["w"]
    value.const_value = ir.tensor((value.const_value.numpy() * factor).astype(np.float32), name="w")


@dataclass(frozen=True, kw_only=True)
class Nothing(Pass):
    """Do nothing."""

    name: ClassVar[str] = "nothing"
    lossy: ClassVar[bool] = False

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        return PassResult(modified=False)


@dataclass(frozen=True, kw_only=True)
class Scale(Pass):
    """Scale the weight."""

    name: ClassVar[str] = "scale"
    lossy: ClassVar[bool] = True

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        scale_weight(model, 2.0)
        return PassResult(modified=True, changes=(Change("w", "doubled"),))


def test_a_pass_that_does_nothing_keeps_all_facts() -> None:
    ctx = context()
    fact = ctx.fact(SHAPES)
    run_pass(Nothing(), ctx)
    assert ctx.fact(SHAPES) is fact


def test_facts_are_dropped_unless_declared_preserved() -> None:
    class Keeps(Scale):
        def run(self, model: ir.Model, ctx: Context) -> PassResult:
            scale_weight(model, 2.0)
            return PassResult(modified=True, preserved=frozenset({SHAPES}))

    ctx = context()
    shapes, constants = ctx.fact(SHAPES), ctx.fact(CONSTANTS)
    run_pass(Keeps(), ctx)
    assert ctx.fact(SHAPES) is shapes
    assert ctx.fact(CONSTANTS) is not constants


def test_a_lie_about_modified_is_found_in_both_directions() -> None:
    class Denies(Scale):
        def run(self, model: ir.Model, ctx: Context) -> PassResult:
            scale_weight(model, 2.0)
            return PassResult(modified=False)

    class Boasts(Scale):
        def run(self, model: ir.Model, ctx: Context) -> PassResult:
            return PassResult(modified=True)

    with pytest.raises(PassError, match="says that it changed nothing, but did"):
        run_pass(Denies(), context())
    with pytest.raises(PassError, match="says that it changed the model, but did not"):
        run_pass(Boasts(), context())


def test_a_changed_interface_is_found() -> None:
    class Renames(Scale):
        def run(self, model: ir.Model, ctx: Context) -> PassResult:
            model.graph.outputs[0].name = "z"
            return PassResult(modified=True)

    with pytest.raises(PassError, match=r"left a broken model: the interface changed: output 'y'"):
        run_pass(Renames(), context())


def test_an_invalid_graph_is_found() -> None:
    class Breaks(Scale):
        def run(self, model: ir.Model, ctx: Context) -> PassResult:
            model.graph.node(0).op_type = "NoSuchOperator"
            return PassResult(modified=True)

    with pytest.raises(PassError, match="no longer valid ONNX"):
        run_pass(Breaks(), context())


def test_a_broken_promise_of_equal_outputs_is_found() -> None:
    class Lossless(Scale):
        lossy: ClassVar[bool] = False

    with pytest.raises(PassError, match="promises equal outputs, but output 'y' differs by"):
        run_pass(Lossless(), context())
    run_pass(Scale(), context())


def test_an_exception_is_wrapped_with_the_step_and_its_number() -> None:
    class Crashes(Scale):
        def run(self, model: ir.Model, ctx: Context) -> PassResult:
            raise ZeroDivisionError("by zero")

    with pytest.raises(PassError, match=r"scale \(step 2\): failed: ZeroDivisionError: by zero"):
        run_step(Crashes(), 2, context())


def test_a_refusal_passes_through_unchanged() -> None:
    class Refuses(Scale):
        def requires(self, model: ir.Model, ctx: Context) -> None:
            raise OptionError("scale.factor", "not today")

    with pytest.raises(OptionError, match="not today"):
        run_pass(Refuses(), context())


def test_random_streams_differ_by_step_and_repeat_by_seed() -> None:
    drawn: list[float] = []

    class Draws(Nothing):
        def run(self, model: ir.Model, ctx: Context) -> PassResult:
            drawn.append(float(ctx.rng.random()))
            return PassResult(modified=False)

    for seed in (0, 0, 1):
        run_step(Draws(), 1, context(), seed=seed)
        run_step(Draws(), 2, context(), seed=seed)
    first, second, third = drawn[:2], drawn[2:4], drawn[4:]
    assert first == second
    assert len({*first, *third}) == 4


def test_instruments_see_every_step_and_failures() -> None:
    seen: list[str] = []

    class Watch(Instrument):
        def before_pass(self, step: object, model: ir.Model, ctx: Context) -> None:
            seen.append(f"before {step}")

        def after_pass(self, step: object, model: ir.Model, ctx: Context, result: PassResult) -> None:
            seen.append(f"after {step} {result.modified}")

        def failed(self, step: object, error: BaseException) -> None:
            seen.append(f"failed {step}")

    class Crashes(Scale):
        name: ClassVar[str] = "crash"

        def run(self, model: ir.Model, ctx: Context) -> PassResult:
            raise ValueError

    run_step(Scale(), 1, context(), [Watch()])
    with pytest.raises(PassError):
        run_step(Crashes(), 2, context(), [Watch()])
    assert seen == ["before scale", "after scale True", "before crash", "failed crash"]


def test_cost_counts_multiply_accumulates_and_parameters() -> None:
    cost = context().fact(COST)
    assert cost.macs == 8
    assert cost.params == 8
    assert cost.weight_bytes == 32


def test_the_conformance_kit_passes_good_and_names_what_bad_passes_break() -> None:
    class Unsteady(Scale):
        def run(self, model: ir.Model, ctx: Context) -> PassResult:
            scale_weight(model, float(np.random.default_rng().random()))
            return PassResult(modified=True)

    class Silent(Scale):
        def run(self, model: ir.Model, ctx: Context) -> PassResult:
            return PassResult(modified=False, changes=(Change("w", "left alone", done=False),))

    assert check_pass(Scale(), model()).modified
    with pytest.raises(ContractError, match="same bytes"):
        check_pass(Unsteady(), model())
    with pytest.raises(ContractError, match="'skipped: ' and why"):
        check_pass(Silent(), model())


def test_an_operator_unknown_to_onnx_runtime_leaves_the_promise_unchecked() -> None:
    custom = ir.from_onnx_text(TEXT.replace('"" : 17', '"" : 17, "acme" : 1').replace("Relu", "acme.Relu"))

    class Renames(Scale):
        lossy: ClassVar[bool] = False

    run = run_pass(Renames(), context(custom))
    assert "does not run in ONNX Runtime" in run.unchecked


def test_model_error_is_usage() -> None:
    assert ModelError("a", "b").exit_code == 2
