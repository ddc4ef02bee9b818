from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from small_models import build

from graphopt.calibration import Dataset
from graphopt.errors import OptionError
from graphopt.pass_base import Change, Context, PassResult
from graphopt.reference import Feed, Reference
from graphopt.targets import Target
from graphopt.testing import check_pass
from graphopt_passes.lowrank import LowRank

ROWS = "(float[N,24] x) => (float[N,12] y)"
TOKENS = "(float[N,T,24] x) => (float[N,T,12] y)"
IMAGE = "(float[N,8,12,12] x) => (float[N,O,H,W] y)"

# signature, body, weights: layers whose factors must compute what they did
LAYERS: dict[str, tuple[str, str, dict[str, tuple[int, ...]]]] = {
    "gemm": (ROWS, "[a] y = Gemm(x, w, b)", {"w": (24, 12), "b": (12,)}),
    "transposed gemm": (ROWS, "[a] y = Gemm<transB=1, alpha=0.5, beta=2.0>(x, w, b)", {"w": (12, 24), "b": (12,)}),
    "gemm without bias": (ROWS, "[a] y = Gemm<transB=1>(x, w)", {"w": (12, 24)}),
    "gemm with a bias a row": (ROWS, "[a] y = Gemm(x, w, b)", {"w": (24, 12), "b": (1, 12)}),
    "matmul": (TOKENS, "[a] y = MatMul(x, w)", {"w": (24, 12)}),
    "matmul with bias": (TOKENS, "[a] m = MatMul(x, w) y = Add(b, m)", {"w": (24, 12), "b": (12,)}),
    "turned weight": (TOKENS, "t = Transpose<perm=[1,0]>(w) [a] y = MatMul(x, t)", {"w": (12, 24)}),
    "conv": (IMAGE, "[a] y = Conv<pads=[1,1,1,1]>(x, w, b)", {"w": (16, 8, 3, 3), "b": (16,)}),
    "strided conv": (
        IMAGE,
        "[a] y = Conv<strides=[2,1], pads=[0,1,2,1], dilations=[1,2]>(x, w)",
        {"w": (16, 8, 3, 5)},
    ),
    "same conv": (
        IMAGE,
        '[a] y = Conv<auto_pad="SAME_LOWER", strides=[2,3]>(x, w, b)',
        {"w": (16, 8, 4, 3), "b": (16,)},
    ),
    "pointwise conv": (IMAGE, "[a] y = Conv<strides=[2,2]>(x, w, b)", {"w": (16, 8, 1, 1), "b": (16,)}),
    "conv in one dimension": (
        "(float[N,8,20] x) => (float[N,16,L] y)",
        "[a] y = Conv<pads=[2,1], strides=[2]>(x, w)",
        {"w": (16, 8, 5)},
    ),
}


def model_of(name: str, opset: int = 17) -> ir.Model:
    return build(*LAYERS[name][:2], LAYERS[name][2], opset=opset)


def make_low_rank(model: ir.Model, name: str, rank: int, axes: int = 1) -> None:
    """Give a weight a rank between its first axes and the others."""
    value = model.graph.initializers[name]
    array = value.const_value.numpy()
    left, _, right = np.linalg.svd(array.reshape(int(np.prod(array.shape[:axes])), -1), full_matrices=False)
    value.const_value = ir.tensor((left[:, :rank] @ right[:rank]).reshape(array.shape).astype(np.float32), name=name)


def samples(model: ir.Model, count: int = 24, seed: int = 2) -> Dataset:
    def read() -> Iterator[Feed]:
        rng = np.random.default_rng(seed)
        for _ in range(count):
            yield {
                value.name: rng.standard_normal([d if isinstance(d, int) else 1 for d in value.shape]).astype(
                    np.float32
                )
                for value in model.graph.inputs
            }

    return Dataset("random", None, read, stacked=True)


def run(model: ir.Model, data: Dataset | None = None, round_to: int = 1, **options: Any) -> PassResult:
    ctx = Context(model, Target(name="ort", round_to=round_to), calibration=data)
    step = LowRank(**options)
    step.requires(model, ctx)
    return step.run(model, ctx)


def outputs(model: ir.Model) -> list[np.ndarray]:
    session = Reference(model)
    return [session.run(feed)["y"] for feed in samples(model, 4, seed=3).feeds()]


def relative(before: list[np.ndarray], after: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(before, after, strict=True))


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def reasons(result: PassResult) -> dict[str, str]:
    return {change.site: change.action for change in result.changes if not change.done}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("data", [False, True], ids=["no data", "data"])
def test_a_weight_of_low_rank_is_factored_without_a_trace(name: str, data: bool) -> None:
    model = model_of(name)
    make_low_rank(model, "w", 3, axes=1)
    before, size = outputs(model), model.graph.initializers["w"].const_value.size
    result = run(model, samples(model) if data else None, of="params", energy=0.9999)
    assert result.modified
    assert [change.site for change in result.changes if change.done] == ["a"]
    assert relative(before, outputs(model)) < 1e-4
    assert sum(v.const_value.size for k, v in model.graph.initializers.items() if "factor" in k) < size
    assert "w" not in model.graph.initializers
    assert next(node for node in model.graph if node.name == "a").outputs[0].name in ("y", "m")


@pytest.mark.parametrize("form", ["output", "input", "spatial", "tucker"])
@pytest.mark.parametrize("name", ["conv", "strided conv", "same conv"])
def test_every_chain_of_convolutions_computes_what_the_layer_did(form: Any, name: str) -> None:
    model = model_of(name)
    shape = model.graph.initializers["w"].const_value.shape.numpy()
    rng = np.random.default_rng(1)  # every part of the kernel is of rank 2
    parts = [rng.standard_normal((2, size)) for size in shape]
    low = np.einsum("ro,ri,ra,rb->oiab", *parts).astype(np.float32)
    model.graph.initializers["w"].const_value = ir.tensor(low, name="w")
    before = outputs(model)
    result = run(model, samples(model), of="params", energy=0.9999, form=form)
    assert result.changes[0].done
    assert result.changes[0].details["form"] == form
    assert relative(before, outputs(model)) < 1e-4


@pytest.mark.parametrize("name", ["gemm", "matmul with bias", "conv", "strided conv"])
def test_the_output_loses_what_the_report_says(name: str) -> None:
    model, data = model_of(name), samples(model_of(name), 64)
    whole = model.clone()
    ratio = 0.2
    result = run(model, data, of="params", ratio=ratio, update=False, max_error=0)
    change = result.changes[0]
    assert change.done
    value = "m" if name == "matmul with bias" else "y"
    bias = whole.graph.initializers["b"].const_value.numpy() if "b" in whole.graph.initializers else np.zeros(1)
    bias = bias.reshape(-1, *[1] * 2) if name == "conv" else bias
    pairs = [(r.run(f)["y"] - bias) for f in data.feeds() for r in (Reference(whole), Reference(model))]
    lost = sum(float(np.square(a - b).sum()) for a, b in zip(pairs[::2], pairs[1::2], strict=True))
    kept = sum(float(np.square(a).sum()) for a in pairs[::2])
    assert value
    assert change.details["energy_lost"] == pytest.approx(lost / kept, rel=0.02)


def test_old_operator_sets_get_what_they_have() -> None:
    model = model_of("transposed gemm", opset=7)
    make_low_rank(model, "w", 3)
    before = outputs(model)
    assert run(model, of="params", energy=0.9999).modified
    assert operators(model) == ["MatMul", "Gemm"]
    assert relative(before, outputs(model)) < 1e-4


def test_a_table_is_factored_on_request_alone() -> None:
    body = "[look] y = Gather(w, ids)"
    model = build("(int64[N,T] ids) => (float[N,T,16] y)", body, {"w": (60, 16)})
    make_low_rank(model, "w", 4)
    assert "use of=params" in reasons(run(model, tables=True))["look"]
    assert reasons(run(model)) == {"look": "skipped: a table costs no arithmetic; lowrank.tables includes it"}
    feed = {"ids": np.array([[0, 59, 7], [-1, 3, 3]])}
    before = Reference(model).run(feed)["y"]
    assert run(model, of="params", energy=0.9999, tables=True).modified
    assert operators(model) == ["Gather", "MatMul"]
    np.testing.assert_allclose(Reference(model).run(feed)["y"], before, atol=1e-5)


TWO = "[a] h = Gemm(x, v, b) r = Relu(h) [c] y = Gemm(r, w, d)"
TWO_WEIGHTS = {"v": (24, 24), "b": (24,), "w": (24, 12), "d": (12,)}


def test_layers_answer_for_what_those_before_them_lost() -> None:
    errors = {}
    for update in (False, True):
        model = build(ROWS, TWO, TWO_WEIGHTS)
        before, data = outputs(model), samples(model, 400)
        assert run(model, data, of="params", ratio=0.2, scope="uniform", update=update, max_error=0).modified
        errors[update] = float(np.mean([np.square(a - b).sum() for a, b in zip(before, outputs(model), strict=True)]))
    assert errors[True] < 0.9 * errors[False]


def test_ranks_go_where_they_are_needed() -> None:
    def error(scope: Any) -> float:
        model = build(ROWS, TWO, TWO_WEIGHTS)
        make_low_rank(model, "v", 4)
        before = outputs(model)
        run(model, samples(model, 200), of="params", ratio=0.3, scope=scope, max_error=0)
        return relative(before, outputs(model))

    assert error("global") < 0.5 * error("uniform")


def test_the_ratio_is_met() -> None:
    model = build(ROWS, TWO, TWO_WEIGHTS)
    size = 24 * 24 + 24 * 12
    result = run(model, samples(model, 100), of="params", ratio=0.3, max_error=0)
    left = sum(v.const_value.size for v in model.graph.initializers.values() if len(v.shape) == 2)
    assert 0.3 <= 1 - left / size < 0.36
    assert result.metrics["achieved"] == pytest.approx(1 - left / size, abs=1e-4)
    assert result.notes == ()


def test_layers_of_full_rank_are_left_alone_and_say_so() -> None:
    model = build(ROWS, "[a] y = Gemm(x, w)", {"w": (24, 12)})
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((24, 24)))
    model.graph.initializers["w"].const_value = ir.tensor(q[:, :12].astype(np.float32), name="w")
    result = run(model, samples(model, 200), of="params", ratio=0.4)
    assert not result.modified
    why = "with all 1 layers factored the model's outputs lose 49% of their energy, more than max_error=0.3"
    assert reasons(result) == {"a": f"skipped: does not pay: {why}"}
    assert result.notes == (f"factoring does not pay: {why}",)
    assert (
        "nats off, more than max_nats=0.01"
        in run(model, samples(model, 200), of="params", ratio=0.1, max_error=0.9, max_nats=0.01).notes[0]
    )
    result = run(model, of="params", ratio=0.1, max_layer_error=0.3)
    assert not result.modified
    assert "nearly full rank" in reasons(result)["a"]
    assert result.notes == ("0.00 of the params instead of 0.1 could go",)


def test_ranks_are_what_the_target_likes() -> None:
    model = build("(float[N,64] x) => (float[N,64] y)", "[a] y = Gemm(x, w)", {"w": (64, 64)})
    result = run(model, of="params", ratio=0.3, round_to=8, max_error=0)
    assert result.changes[0].details["rank"] == 16
    model = build("(float[N,64] x) => (float[N,64] y)", "[a] y = Gemm(x, w)", {"w": (64, 64)})
    ctx = Context(model, Target(name="ort"))
    assert LowRank(of="params", ratio=0.3, max_error=0, round_to=5).run(model, ctx).changes[0].details["rank"] == 20


REFUSED: dict[str, tuple[str, str, dict[str, tuple[int, ...]], str]] = {
    "shared": (ROWS, "[a] p = MatMul(x, w) q = Identity(w) r = ReduceSum<keepdims=0>(q) y = Add(p, r)", {"w": (24, 12)},
               "others read its weight"),
    "small": ("(float[N,24] x) => (float[N,1] y)", "[a] y = Gemm(x, w)", {"w": (24, 1)}, "no lower rank"),
    "returned": ("(float[N,24] x) => (float[N,12] y, float[24,12] w2)", "[a] y = MatMul(x, w) w2 = Identity(w)",
                 {"w": (24, 12)}, "others read its weight"),
    "recurrent": ("(float[4,N,24] x) => (float[4,1,N,12] y)", "[a] y, h = RNN<hidden_size=12>(x, w, r)",
                  {"w": (1, 12, 24), "r": (1, 12, 12)}, "recurrent layers"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_factored_stays_and_says_why(name: str) -> None:
    signature, body, weights, reason = REFUSED[name]
    model = build(signature, body, weights)
    result = run(model, of="params")
    assert not result.modified
    assert reason in reasons(result)["a"]


def test_a_weight_behind_dequantize_linear_stays() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["" : 17]> main (float[N,4] x) => (float[N,4] y) '
        "<int8[4,4] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}, float s = {0.5}>"
        "{ d = DequantizeLinear(w, s) [a] y = MatMul(x, d) }"
    )
    assert reasons(run(model, of="params")) == {"a": "skipped: its weight is quantized; factor before quant"}


def test_products_of_computed_values_are_no_sites() -> None:
    model = build("(float[N,4] x) => (float[N,N] y)", "t = Transpose<perm=[1,0]>(x) y = MatMul(x, t)", {})
    assert run(model).changes == ()


def test_named_layers_alone_are_factored() -> None:
    model = build(ROWS, TWO, TWO_WEIGHTS)
    result = run(model, of="params", only=("c",), max_error=0)
    assert {change.site: change.done for change in result.changes} == {"a": False, "c": True}
    assert reasons(result) == {"a": "skipped: not in lowrank.only"}
    model = build(ROWS, TWO, TWO_WEIGHTS)
    assert reasons(run(model, of="params", skip=("Gemm",)))["a"] == "skipped: lowrank.skip names it"
    with pytest.raises(OptionError, match=r"lowrank.only: 'd' fits no layer with a weight"):
        run(model, only=("d",))
    with pytest.raises(OptionError, match=r"lowrank.scale: moments needs samples"):
        run(model, scale="moments")


def test_a_layer_that_cannot_save_its_share_stays() -> None:
    model = build(ROWS, "[a] y = Gemm(x, w)", {"w": (24, 12)})
    assert reasons(run(model, of="params", ratio=0.8))["a"] == "skipped: no rank that loses little saves so much"
    assert reasons(run(model, of="params", ratio=0.0))["a"] == "skipped: the ratio is met without it"
    narrow = build("(float[N,2] x) => (float[N,2] y)", "[a] y = Gemm(x, w)", {"w": (2, 2)})
    assert reasons(run(narrow, of="params"))["a"] == "skipped: a chain of any rank costs as much as the layer"


def test_single_layers_can_be_left_alone_whatever_their_names() -> None:
    model = build(ROWS, TWO, TWO_WEIGHTS)
    model.graph[0].name = "layer[0]*"
    step = LowRank(of="params", max_error=0)
    names = step.revertible(model, ["layer[0]*", "c"])
    result = step.without(names[:1]).run(model, Context(model, Target(name="ort")))
    assert {change.site: change.done for change in result.changes} == {"layer[0]*": False, "c": True}


def test_the_contract_of_a_pass_is_kept() -> None:
    model = build(ROWS, TWO, TWO_WEIGHTS)
    result = check_pass(LowRank(of="params", max_error=0), model, calibration=samples(model, 40))
    assert any(change.done for change in result.changes)
    assert check_pass(LowRank(ratio=0.0), model).modified is False


def test_half_precision_and_descriptions_stay() -> None:
    model = build("(float16[N,24] x) => (float16[N,12] y)", "[a] y = MatMul(x, w)", {"w": (24, 12)})
    value = model.graph.initializers["w"]
    value.const_value = ir.tensor(value.const_value.numpy().astype(np.float16), name="w")
    value.type = ir.TensorType(ir.DataType.FLOAT16)
    node = model.graph[0]
    node.doc_string, node.metadata_props["origin"] = "the layer", "a test"
    assert run(model, of="params", max_error=0).modified
    last = next(node for node in model.graph if node.name == "a")
    assert (last.doc_string, last.metadata_props["origin"]) == ("the layer", "a test")
    assert {v.dtype for v in model.graph.initializers.values()} == {ir.DataType.FLOAT16}
    Reference(model).run({"x": np.zeros((2, 24), np.float16)})


def test_a_change_says_what_was_done() -> None:
    model = model_of("gemm")
    change: Change = run(model, of="params", max_error=0).changes[0]
    assert change.action.startswith("factored (product, rank ")
    assert change.details["form"] == "product"
