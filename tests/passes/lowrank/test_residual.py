"""Weights in few bits with a thin branch beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from small_models import build

from graphopt.calibration import Dataset
from graphopt.pass_base import Context, PassResult
from graphopt.reference import Feed, Reference
from graphopt.targets import Target
from graphopt.testing import check_pass
from graphopt_passes.lowrank import LowRank
from graphopt_passes.lowrank._factors import Problem
from graphopt_passes.lowrank._residual import affordable_rank, bits_of, compensated
from graphopt_passes.quant.blockwise.fit import Method

ROWS = "(float[N,96] x) => (float[N,80] y)"
BODIES = {
    "matmul": ("[a] y = MatMul(x, w)", (96, 80)),
    "gemm": ("[a] y = Gemm<alpha=0.5, beta=2.0, transB=1>(x, w, b)", (80, 96)),
    "turned weight": ("t = Transpose<perm=[1,0]>(w) [a] y = MatMul(x, t)", (80, 96)),
}
RNG = np.random.default_rng(5)
MIX = 0.005 * RNG.standard_normal((96, 96)) @ np.diag(np.geomspace(3, 0.05, 96)) @ RNG.standard_normal((96, 96))


def model_of(name: str, opset: int = 21) -> ir.Model:
    body, shape = BODIES[name]
    return build(ROWS, body, {"w": shape, "b": (80,)}, opset=opset)


def samples(count: int, seed: int = 2) -> Dataset:
    """Correlated rows."""

    def read() -> Iterator[Feed]:
        rng = np.random.default_rng(seed)
        for _ in range(count):
            yield {"x": (rng.standard_normal((4, 96)) @ MIX).astype(np.float32)}

    return Dataset("random", None, read, stacked=False)


def run(model: ir.Model, data: Dataset | None = None, **options: Any) -> PassResult:
    ctx = Context(model, Target(name="ort"), calibration=data)
    step = LowRank(residual=True, **options)
    step.requires(model, ctx)
    return step.run(model, ctx)


def error(before: ir.Model, after: ir.Model, name: str = "y") -> float:
    """Energy of the output's error on other samples, in parts of that of the output."""
    feeds = list(samples(4, seed=3).feeds())
    pairs = [[Reference(model).run(feed)[name] for model in (before, after)] for feed in feeds]
    return float(sum(np.square(a - b).sum() for a, b in pairs) / sum(np.square(a).sum() for a, _ in pairs))


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("data", [False, True], ids=["no data", "data"])
def test_a_product_becomes_integers_with_a_branch_beside_them(name: str, data: bool) -> None:
    model = model_of(name)
    whole = model.clone()
    result = run(model, samples(60) if data else None)
    (change,) = result.changes
    assert change.done
    assert error(whole, model) < (0.003 if data else 0.03)
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("DequantizeLinear") == 3
    assert kinds[-1] == "Add"
    assert model.graph[-1].name == "a"
    assert model.graph[-1].outputs[0].name == "y"
    assert {v.dtype for v in model.graph.initializers.values() if len(v.shape or ()) == 2 and v.name != "b"} >= {
        ir.DataType.UINT4, ir.DataType.INT4
    }  # fmt: skip
    assert "w" not in model.graph.initializers


def test_the_output_loses_what_the_report_says_and_less_than_without_a_branch() -> None:
    model = model_of("matmul")
    whole, data = model.clone(), samples(60)
    (change,) = run(model, data).changes
    feeds = list(data.feeds())
    pairs = [[Reference(each).run(feed)["y"] for each in (whole, model)] for feed in feeds]
    lost = sum(np.square(a - b).sum() for a, b in pairs) / sum(np.square(a).sum() for a, _ in pairs)
    assert change.details["energy_lost"] == pytest.approx(float(lost), rel=0.1)  # the runtime rounds what goes in
    assert change.details["energy_lost"] < 0.8 * change.details["plain"]


@pytest.mark.parametrize("algorithm", ["rtn", "auto"])
def test_a_branch_beats_smaller_blocks_of_as_many_bits(algorithm: Any) -> None:
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.standard_normal((192, 192)))[0]
    x = rng.standard_normal((1000, 192)) * np.geomspace(4, 0.02, 192) @ turn
    problem = Problem(rng.standard_normal((192, 192)), x.T @ x / len(x))
    small, large = (Method(bits=4, group_size=size, algorithm=algorithm) for size in (32, 64))
    rank = affordable_rank(192, 192, 0.5)
    assert bits_of(192, 192, large, rank) < bits_of(192, 192, small, 0) + 0.02
    assert compensated(problem, rank, large).error < 0.95 * compensated(problem, 1, small).plain


def test_terms_of_full_rank_leave_what_four_bits_lose_of_the_error_alone() -> None:
    rng = np.random.default_rng(0)
    found = compensated(Problem(rng.standard_normal((48, 32))), 32, Method(bits=4, group_size=16))
    assert found.error < 0.1 * found.plain


def test_an_old_operator_set_is_raised() -> None:
    model = model_of("gemm", opset=13)
    whole = model.clone()
    assert run(model).modified
    assert model.opset_imports[""] == 21
    assert error(whole, model) < 0.03


def test_a_rank_can_be_given() -> None:
    model = model_of("matmul")
    details = run(model, rank=7, bits=2, group_size=32, max_error=0).changes[0].details
    assert details["rank"] == 7
    assert details["bits"] == 2


REFUSED = {
    "conv": ("(float[N,8,9,9] x) => (float[N,64,7,7] y)", "[a] y = Conv(x, w)", (64, 8, 3, 3),
             "a convolution has no form in blocks"),
    "batch": ("(float[3,N,96] x) => (float[3,N,80] y)", "[a] y = MatMul(x, w)", (3, 96, 80),
              "only a matrix on the right"),
    "left": ("(float[96,N] x) => (float[80,N] y)", "[a] y = MatMul(w, x)", (80, 96), "only a matrix on the right"),
    "shared": ("(float[N,96] x) => (float[N,96] y)", "[a] m = MatMul(x, w) r = Relu(m) y = MatMul(r, w)", (96, 96),
               "layers share its weight"),
    "small": ("(float[N,8] x) => (float[N,8] y)", "[a] y = MatMul(x, w)", (8, 8), "take as many bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_gets_no_branch_stays_and_says_why(name: str) -> None:
    signature, body, shape, reason = REFUSED[name]
    model = build(signature, body, {"w": shape}, opset=21)
    result = run(model)
    assert not result.modified
    assert reason in result.changes[0].action


def test_outputs_that_lose_too_much_leave_the_model_as_it_was() -> None:
    model = model_of("matmul")
    before = ir.to_proto(model).SerializeToString()
    result = run(model, samples(40), max_error=1e-6)
    assert not result.modified
    assert "more than max_error=1e-06" in result.notes[0]
    assert ir.to_proto(model).SerializeToString() == before


def test_named_layers_alone_get_a_branch() -> None:
    model = build("(float[N,96] x) => (float[N,96] y)", "[a] m = MatMul(x, w) [c] y = MatMul(m, v)",
                  {"w": (96, 96), "v": (96, 96)}, opset=21)  # fmt: skip
    done = {change.site: change.done for change in run(model, skip=("a",)).changes}
    assert done == {"a": False, "c": True}


def test_the_contract_of_a_pass_is_kept() -> None:
    result = check_pass(LowRank(residual=True), model_of("gemm"), calibration=samples(30))
    assert result.modified
