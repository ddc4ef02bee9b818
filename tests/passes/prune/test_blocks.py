from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.analyses import CONSTANTS, COST, SHAPES
from graphopt.calibration import Dataset, open_calibration
from graphopt.errors import ExitCode, OptionError
from graphopt.model_io import ShapeBinding, input_specs, load_model, model_bytes
from graphopt.pass_base import Context, PassResult
from graphopt.reference import Feed, Reference, random_feed
from graphopt.targets import Target
from graphopt.testing import check_pass
from graphopt_passes.prune import Prune
from graphopt_passes.prune.blocks import OutputJudge, Savings, cheapest_blocks, without
from graphopt_passes.prune.residual_blocks import Block, find_blocks, join_shortcuts, remove_block

Shape = tuple[int, ...]
IMAGE = "(float[N,8,6,6] x) => (float[N,5] y)"
TOKENS = "(float[N,T,16] x) => (float[N,T,4] y)"
BINDING = ShapeBinding(dims={"N": 2, "T": 3})


def build(signature: str, body: str, weights: Mapping[str, Shape], zero: tuple[str, ...] = ()) -> ir.Model:
    """A model with random weights; those of `zero` are zero. Names that start with var are positive."""
    rng = np.random.default_rng(0)
    arrays = {name: 0.3 * rng.standard_normal(shape).astype(np.float32) for name, shape in weights.items()}
    arrays |= {name: np.abs(array) for name, array in arrays.items() if name.startswith("var")}
    arrays |= {name: np.zeros_like(arrays[name]) for name in zero}
    declared = ", ".join(f"float[{','.join(map(str, shape))}] {name}" for name, shape in weights.items())
    text = f'<ir_version: 8, opset_import: ["" : 17]>\nmain {signature} <{declared}> {{\n{body}\n}}'
    return ir.from_onnx_text(text, initializers=[ir.tensor(array, name=name) for name, array in arrays.items()])


def samples(model: ir.Model, count: int = 4) -> Dataset:
    rng = np.random.default_rng(3)
    sizes = ShapeBinding(dims={"N": count, "T": 3})
    return open_calibration(random_feed(input_specs(model), sizes, rng), input_specs(model), BINDING)


def context(model: ir.Model, **fields: object) -> Context:
    return Context(model, **{"target": Target(name="ort"), "binding": BINDING, **fields})  # type: ignore[arg-type]


def found(model: ir.Model) -> tuple[list[Block], dict[str, str]]:
    ctx = context(model)
    blocks, refused = find_blocks(model, ctx.fact(SHAPES), ctx.fact(CONSTANTS))
    return blocks, dict(refused)


def outputs(model: ir.Model, count: int = 4) -> list[Feed]:
    rng = np.random.default_rng(1)
    return [Reference(model).run(random_feed(input_specs(model), BINDING, rng)) for _ in range(count)]


def prune(model: ir.Model, **options: object) -> PassResult:
    step = Prune(**{"units": ("blocks",), **options})  # type: ignore[arg-type]
    ctx = context(model, calibration=samples(model))
    step.requires(model, ctx)
    return step.run(model, ctx)


CONV = """
    [stem] a = Conv<pads=[1,1,1,1]>(x, w0) r = Relu(a)
    [c1] b = Conv<pads=[1,1,1,1]>(r, w1) b2 = BatchNormalization(b, scale, bias, mean, var) b3 = Relu(b2)
    [c2] c = Conv(b3, w2) [sum] s = Add(c, r) q = Relu(s)
    [p1] d = Conv(q, w3) [sum2] t = Add(q, d)
    p = GlobalAveragePool(t) f = Flatten(p) [head] y = Gemm<transB=1>(f, h)
"""
CONV_WEIGHTS: dict[str, Shape] = {
    "w0": (8, 8, 3, 3), "w1": (8, 8, 3, 3), "scale": (8,), "bias": (8,), "mean": (8,), "var": (8,),
    "w2": (8, 8, 1, 1), "w3": (8, 8, 1, 1), "h": (5, 8),
}  # fmt: skip
ATTENTION = """
    n = LayerNormalization<axis=-1>(x, g, b) [q] q = MatMul(n, wq) [k] k = MatMul(n, wk) [v] v = MatMul(n, wv)
    kt = Transpose<perm=[0,2,1]>(k) l = MatMul(q, kt) lm = Add(l, mask) z = Softmax<axis=-1>(lm)
    u = MatMul(z, v) [o] o = MatMul(u, wo) [attended] s = Add(x, o)
"""
PRE_NORM = (
    ATTENTION
    + """
    n2 = LayerNormalization<axis=-1>(s, g, b) [f1] e = MatMul(n2, w1) e1 = Add(e, b1) e2 = Relu(e1)
    [f2] e3 = MatMul(e2, w2) e4 = Add(b2, e3) [fed] t = Add(s, e4)
    [head] y = MatMul(t, h)
"""
)
POST_NORM = """
    [f1] e = MatMul(x, w1) e1 = Add(e, b1) e2 = Relu(e1) [f2] e3 = MatMul(e2, w2) e4 = Add(b2, e3)
    [fed] t = Add(e4, x) t1 = LayerNormalization<axis=-1>(t, g, b) [head] y = MatMul(t1, h)
"""
TOKEN_WEIGHTS: dict[str, Shape] = {
    "g": (16,), "b": (16,), "wq": (16, 16), "wk": (16, 16), "wv": (16, 16), "mask": (3, 3), "wo": (16, 16),
    "w1": (16, 32), "b1": (32,), "w2": (32, 16), "b2": (16,), "h": (16, 4),
}  # fmt: skip
NESTED = """
    [c0] a = Conv(x, w0) [c1] b = Conv(a, w1) [c2] c = Conv(b, w2) [inner] d = Add(b, c) [c3] e = Conv(d, w3)
    [outer] s = Add(a, e) p = GlobalAveragePool(s) f = Flatten(p) [head] y = Gemm<transB=1>(f, h)
"""
NESTED_WEIGHTS: dict[str, Shape] = {**dict.fromkeys(("w0", "w1", "w2", "w3"), (8, 8, 1, 1)), "h": (5, 8)}
LAST = "[stem] a = Conv(x, w0) [c1] b = Conv(a, w1) [sum] y = Add(a, b)"
FIXED_TOKENS = "(float[N,3,16] x) => (float[N,3,4] y)"


def weights_of(body: str, weights: Mapping[str, Shape]) -> dict[str, Shape]:
    return {name: shape for name, shape in weights.items() if f" {name}" in body or f"({name}," in body}


@pytest.mark.parametrize(
    ("signature", "body", "weights", "zero", "gone", "layers"),
    [
        (IMAGE, CONV, CONV_WEIGHTS, ("w2",), "sum", ["c1", "c2"]),
        (IMAGE, CONV, CONV_WEIGHTS, ("w3",), "sum2", ["p1"]),
        (FIXED_TOKENS, PRE_NORM, TOKEN_WEIGHTS, ("wo",), "attended", ["q", "k", "v", "", "", "o"]),
        (FIXED_TOKENS, PRE_NORM, TOKEN_WEIGHTS, ("w2", "b2"), "fed", ["f1", "f2"]),
        (TOKENS, POST_NORM, weights_of(POST_NORM, TOKEN_WEIGHTS), ("w2", "b2"), "fed", ["f1", "f2"]),
        (IMAGE, NESTED, NESTED_WEIGHTS, ("w2",), "inner", ["c2"]),
        (IMAGE, NESTED, NESTED_WEIGHTS, ("w3",), "outer", ["c1", "c2", "c3"]),
        ("(float[N,8,6,6] x) => (float[N,8,6,6] y)", LAST, {"w0": (8, 8, 1, 1), "w1": (8, 8, 1, 1)}, ("w1",), "sum",
         ["c1"]),
    ],
)  # fmt: skip
def test_a_block_that_adds_zero_is_removed_exactly(
    signature: str, body: str, weights: dict[str, Shape], zero: tuple[str, ...], gone: str, layers: list[str]
) -> None:
    model = build(signature, body, weights, zero)
    wanted, before = outputs(model), context(model).fact(COST)
    block = next(block for block in found(model)[0] if block.name == gone)
    names = [name for name, _ in block.layers]
    assert [name if name in layers else "" for name in names] == layers
    constants = {value.name for value in model.graph.initializers.values()}
    remove_block(model, block)
    join_shortcuts(model, [block])
    assert all(not set(names) & {node.name} for node in model.graph)
    assert {value.name for value in model.graph.initializers.values()} == constants - {
        name for name in constants if not any(name in [v.name for v in node.inputs if v] for node in model.graph)
    }
    assert context(model).fact(COST).macs < before.macs
    for old, new in zip(wanted, outputs(model), strict=True):
        assert set(old) == set(new)
        np.testing.assert_allclose(new["y"], old["y"], rtol=1e-5, atol=1e-5)


def test_readers_of_a_removed_sum_read_its_shortcut() -> None:
    model = build(IMAGE, CONV, CONV_WEIGHTS)
    blocks, _ = found(model)
    for block in blocks:
        remove_block(model, block)
    join_shortcuts(model, blocks)
    assert [node.op_type for node in model.graph] == [
        "Conv", "Relu", "Relu", "GlobalAveragePool", "Flatten", "Gemm"
    ]  # fmt: skip
    assert set(model.graph.initializers) == {"w0", "h"}


def test_an_output_of_the_graph_keeps_its_name() -> None:
    model = build("(float[N,8,6,6] x) => (float[N,8,6,6] y)", LAST, {"w0": (8, 8, 1, 1), "w1": (8, 8, 1, 1)})
    (block,), _ = found(model)
    remove_block(model, block)
    join_shortcuts(model, [block])
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert [node.op_type for node in model.graph] == ["Conv", "Identity"]
    assert outputs(model)[0]["y"].shape == (2, 8, 6, 6)


def test_nodes_without_names_are_found() -> None:
    body = f"a = Conv(x, w0) b = Conv(a, w1) c = Relu(b) s = Add(a, c) {HEAD}"
    model = build(IMAGE, body, {"w0": (8, 8, 1, 1), "w1": (8, 8, 1, 1), "h": (5, 8)})
    for node in model.graph:
        node.name = None
    (block,), refused = found(model)
    assert (block.name, block.layers, refused) == ("Add_3", (("Conv_1", "Conv"),), {})


def test_a_constant_that_others_read_stays() -> None:
    body = CONV.replace("Conv(q, w3)", "Conv(q, w2)")
    model = build(IMAGE, body, {name: shape for name, shape in CONV_WEIGHTS.items() if name != "w3"})
    block = found(model)[0][0]
    remove_block(model, block)
    assert "w2" in model.graph.initializers
    assert "w1" not in model.graph.initializers
    assert outputs(model)[0]["y"].shape == (2, 5)


def test_the_shortcut_may_pass_through_what_keeps_the_shape() -> None:
    body = """
        [stem] a = Conv(x, w0) i = Identity(a) r = Relu(i) [c1] b = Conv(a, w1) [sum] s = Add(b, r)
        p = GlobalAveragePool(s) f = Flatten(p) [head] y = Gemm<transB=1>(f, h)
    """
    model = build(IMAGE, body, {"w0": (8, 8, 1, 1), "w1": (8, 8, 1, 1), "h": (5, 8)}, ("w1",))
    wanted = outputs(model)
    (block,), _ = found(model)
    remove_block(model, block)
    join_shortcuts(model, [block])
    for old, new in zip(wanted, outputs(model), strict=True):
        np.testing.assert_allclose(new["y"], old["y"], atol=1e-6)


HEAD = "p = GlobalAveragePool(s) f = Flatten(p) [head] y = Gemm<transB=1>(f, h)"
BRANCH = """
    then_branch = one() => (float[N,8,6,6] t) { t = Relu(b) },
    else_branch = two() => (float[N,8,6,6] e) { e = Abs(b) }
"""


READ_OUTSIDE = """
    [stem] a = Conv(x, w0) [c1] b = Conv(a, w1) r = Relu(b) [c2] c = Conv(r, w2)
    [sum] m = Add(a, c) [late] s = Mul(m, r)
"""
STRIDED = """
    [stem] a = Conv(x, w0) [c1] b = Conv<strides=[2,2]>(a, w1) [down] d = Conv<strides=[2,2]>(a, w2) [sum] s = Add(b, d)
"""
CAPTURED = f"""
    [stem] a = Conv(x, w0) [c1] b = Conv(a, w1) [sum] m = Add(a, b)
    k = ReduceMin<keepdims=0>(m) o = Cast<to=9>(k) [choice] v = If<{BRANCH}>(o) s = Add(m, v)
"""


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (READ_OUTSIDE, "'r' inside the block is read by Mul 'late' outside"),
        (STRIDED, "its shortcut passes through Conv 'c1', so the sum cannot become its input"),
        (CAPTURED, "'b' inside the block is captured by a subgraph"),
    ],
)
def test_what_is_no_block_is_refused_with_its_reason(body: str, reason: str) -> None:
    weights: dict[str, Shape] = {"w0": (8, 8, 1, 1), "w1": (8, 8, 1, 1), "w2": (8, 8, 1, 1), "h": (5, 8)}
    blocks, refused = found(build(IMAGE, body + HEAD, weights_of(body + HEAD, weights)))
    assert not [block for block in blocks if block.name == "sum"]
    assert refused["sum"] == reason


def test_a_block_may_hold_an_if_that_captures_its_shortcut() -> None:
    body = CAPTURED.replace("[c1] b = Conv(a, w1) [sum] m = Add(a, b)", "m = Neg(a)").replace("(b)", "(a)")
    body = body.replace("s = Add(m, v)", "[c1] b = Conv(v, w1) [sum] s = Add(a, b)") + HEAD
    model = build(IMAGE, body, {"w0": (8, 8, 1, 1), "w1": (8, 8, 1, 1), "h": (5, 8)}, ("w1",))
    wanted = outputs(model)
    (block,), _ = found(model)
    remove_block(model, block)
    join_shortcuts(model, [block])
    assert [node.op_type for node in model.graph] == ["Conv", "GlobalAveragePool", "Flatten", "Gemm"]
    stem = model.graph.node("stem").outputs[0]
    assert [use.node.op_type for use in stem.uses()] == ["GlobalAveragePool"]
    for old, new in zip(wanted, outputs(model), strict=True):
        np.testing.assert_allclose(new["y"], old["y"], atol=1e-6)


def test_an_inner_value_that_is_an_output_keeps_its_block() -> None:
    signature = "(float[N,8,6,6] x) => (float[N,8,6,6] y, float[N,8,6,6] b)"
    body = "[stem] a = Conv(x, w0) [c1] b = Conv(a, w1) r = Relu(b) [sum] y = Add(a, r)"
    blocks, refused = found(build(signature, body, {"w0": (8, 8, 1, 1), "w1": (8, 8, 1, 1)}))
    assert (blocks, refused) == ([], {"sum": "'b' inside the block is an output of the graph"})


def test_a_sum_whose_shape_is_not_known_to_be_the_shortcuts_is_refused() -> None:
    signature = "(float[N,T,16] x, float[N,U,16] z) => (float[N,V,16] y)"
    body = "[c1] a = MatMul(x, w1) m = Add(a, z) [sum] y = Add(x, m)"
    blocks, refused = found(build(signature, body, {"w1": (16, 16)}))
    assert not blocks
    assert refused["sum"].endswith("not known to be equal")


@pytest.mark.parametrize(
    "body",
    [
        "[stem] a = Conv(x, w0) m = Sigmoid(a) k = Mul(a, m) s = Add(a, k) " + HEAD,  # no layer inside
        "[stem] a = Conv(x, w0) [c1] b = Conv(x, w1) c = GlobalAveragePool(b) s = Add(a, c) " + HEAD,  # a bias
    ],
)
def test_sums_that_are_no_branches_of_layers_are_not_mentioned(body: str) -> None:
    weights: dict[str, Shape] = {"w0": (8, 8, 1, 1), "w1": (8, 8, 1, 1), "h": (5, 8)}
    assert found(build(IMAGE, body, weights_of(body, weights))) == ([], {})


def test_a_block_inside_a_removed_one_leaves_with_it() -> None:
    model = build(IMAGE, NESTED, NESTED_WEIGHTS, ("w3",))
    result = prune(model, ratio=0.7, refit=False)
    actions = {change.site: change.action for change in result.changes}
    assert actions["outer"] == "removed a residual block of 3 layers"
    assert actions["inner"] == "skipped: block: it left with the block of 'outer'"
    assert [node.name for node in model.graph if node.op_type == "Conv"] == ["c0"]


def chain(zero: tuple[str, ...] = ()) -> ir.Model:
    """Four residual blocks of one convolution each behind a stem, all of one size."""
    names = [f"w{i}" for i in range(5)]
    blocks = " ".join(
        f"[c{i}] b{i} = Conv(a{i - 1}, w{i}) r{i} = Relu(b{i}) [s{i}] a{i} = Add(a{i - 1}, r{i})" for i in range(1, 5)
    )
    body = f"[stem] a0 = Conv(x, w0) {blocks} p = GlobalAveragePool(a4) f = Flatten(p) [head] y = Gemm<transB=1>(f, h)"
    return build(IMAGE, body, {**dict.fromkeys(names, (8, 8, 1, 1)), "h": (5, 8)}, zero)


def test_the_cheapest_blocks_go_until_the_ratio_is_as_near_as_it_gets() -> None:
    model = chain(("w2", "w4"))
    wanted = outputs(model)
    result = prune(model, ratio=0.45)
    assert result.modified
    assert result.metrics["achieved"] == pytest.approx(0.4, abs=0.01)
    gone = {change.site for change in result.changes if change.action.startswith("removed")}
    assert gone == {"s2", "s4"}
    assert {change.site: change.action for change in result.changes}[
        "s1"
    ] == "skipped: block: the ratio is met more closely without it"
    for old, new in zip(wanted, outputs(model), strict=True):
        np.testing.assert_allclose(new["y"], old["y"], rtol=1e-4, atol=1e-5)


def test_a_block_that_saves_far_too_much_stays() -> None:
    model = chain(("w2",))
    before = model_bytes(model)
    result = prune(model, ratio=0.05)
    assert not result.modified
    assert model_bytes(model) == before
    reasons = {change.site: change.action for change in result.changes}
    assert reasons["s2"] == "skipped: block: the ratio is met more closely without it"


def test_a_sum_of_two_that_starts_at_the_input_is_a_block() -> None:
    body = f"[c1] b = Conv(x, w1) [sum] s = Sum(b, x) {HEAD}"
    model = build(IMAGE, body, {"w1": (8, 8, 1, 1), "h": (5, 8)}, ("w1",))
    wanted = outputs(model)
    (block,), _ = found(model)
    remove_block(model, block)
    join_shortcuts(model, [block])
    assert [node.op_type for node in model.graph] == ["GlobalAveragePool", "Flatten", "Gemm"]
    for old, new in zip(wanted, outputs(model), strict=True):
        np.testing.assert_allclose(new["y"], old["y"], atol=1e-6)


def test_choosing_one_by_one_is_about_as_good_as_trying_every_pair() -> None:
    model = chain()
    ctx = context(model)
    blocks, _ = found(model)
    judge = OutputJudge(model, samples(model, 16), ctx)
    savings = Savings(model, ctx.fact(COST), ctx.fact(CONSTANTS), "macs")
    steps = cheapest_blocks(model, blocks, savings, 2 * savings.of(blocks[0].nodes), judge, ctx)
    pairs = [(a, b) for i, a in enumerate(blocks) for b in blocks[i + 1 :]]
    best = min(judge.of(without(model, pair)) for pair in pairs)
    assert len(steps) == 2
    assert steps[-1].change <= 1.5 * best
    assert steps[0].change == min(judge.of(without(model, [block])) for block in blocks)


@pytest.mark.parametrize("of", ["macs", "params", "bytes"])
def test_savings_are_what_the_model_costs_less(of: str) -> None:
    model = build(IMAGE, CONV, CONV_WEIGHTS)
    ctx = context(model)
    block = found(model)[0][0]
    before, saving = ctx.fact(COST), Savings(model, ctx.fact(COST), ctx.fact(CONSTANTS), of).of(block.nodes)
    after = context(without(model, [block])).fact(COST)
    amounts = {
        "macs": before.macs - after.macs,
        "params": before.params - after.params,
        "bytes": before.weight_bytes - after.weight_bytes,
    }
    assert saving == amounts[of] > 0


def test_refitting_makes_up_for_removed_blocks() -> None:
    wanted = outputs(chain(), 16)

    def error(refit: bool) -> float:
        model = chain()
        result = prune_with(model, samples(model, 64), units=("blocks",), ratio=0.2, refit=refit)
        assert (result.metrics["refitted"] > 0) == refit  # type: ignore[operator]
        return sum(float(np.square(a["y"] - b["y"]).sum()) for a, b in zip(wanted, outputs(model, 16), strict=True))

    assert error(refit=True) < 0.5 * error(refit=False)


def prune_with(model: ir.Model, data: Dataset, **options: object) -> PassResult:
    step, ctx = Prune(**options), context(model, calibration=data)  # type: ignore[arg-type]
    step.requires(model, ctx)
    return step.run(model, ctx)


def test_blocks_and_channels_meet_the_ratio_together() -> None:
    model = chain(("w2",))
    result = prune_with(model, samples(model, 16), units=("blocks", "channels", "neurons"), ratio=0.5)
    assert "s2" in {change.site for change in result.changes if change.action.startswith("removed a residual")}
    assert any("channels" in change.action for change in result.changes if change.done)
    assert result.metrics["achieved"] == pytest.approx(0.5, abs=0.05)
    assert outputs(model)[0]["y"].shape == (2, 5)


def test_only_and_skip_name_blocks_by_their_sum_or_their_layers() -> None:
    def removed(**options: object) -> set[str]:
        result = prune(chain(("w1", "w2")), ratio=0.2, refit=False, **options)
        return {change.site for change in result.changes if change.done}

    assert removed() == {"s1"}
    assert removed(skip=("s1",)) == removed(skip=("c1",)) == removed(only=("s2",)) == removed(only=("c2",)) == {"s2"}
    reasons = {c.site: c.action for c in prune(chain(), ratio=0.2, only=("s2",), skip=("c2",)).changes}
    assert reasons["s1"] == "skipped: block: not in prune.only"
    assert reasons["s2"] == "skipped: block: prune.skip names 'c2'"


def test_blocks_without_samples_are_refused() -> None:
    model = chain()
    with pytest.raises(OptionError, match=r"prune.units: blocks are judged on samples; give --calibration") as error:
        Prune(units=("blocks",)).requires(model, context(model))
    assert error.value.exit_code == ExitCode.USAGE


def test_an_unknown_unit_is_refused_with_the_nearest() -> None:
    model = chain()
    with pytest.raises(OptionError, match=r"prune.units: 'block' is no kind of unit; did you mean 'blocks'\?"):
        Prune(units=("channels", "block")).requires(model, context(model))


def test_units_that_are_not_named_stay() -> None:
    model = chain()
    result = prune_with(model, samples(model), units=("heads",))
    assert not result.modified
    assert "skipped: prune.units does not name channels" in {change.action for change in result.changes}


def test_the_same_blocks_go_every_time() -> None:
    def pruned() -> bytes:
        model = chain()
        prune(model, ratio=0.4)
        return model_bytes(model)

    assert pruned() == pruned()


def test_the_contract_of_passes_holds_with_blocks() -> None:
    model = chain()
    assert check_pass(Prune(units=("blocks",), ratio=0.2), model, calibration=samples(model)).modified


@pytest.mark.parametrize(
    ("case", "blocks", "layers"), [("cifar10_resnet20", 7, 2), ("minilm", 12, 6), ("stories260k", 10, 6)]
)
def test_blocks_of_real_models_are_found(zoo: Callable[..., Path], case: str, blocks: int, layers: int) -> None:
    model = load_model(zoo(case) / "model.onnx")
    seen, _ = found(model)
    assert len(seen) == blocks
    assert len(seen[0].layers) == layers
    for block in seen:
        assert outputs_agree_in_shape(model, without(model, [block]))


def outputs_agree_in_shape(model: ir.Model, other: ir.Model) -> bool:
    feed = random_feed(input_specs(model), BINDING, np.random.default_rng(0))
    old, new = Reference(model).run(feed), Reference(other).run(feed)
    return [value.shape for value in old.values()] == [value.shape for value in new.values()]


def test_a_real_model_loses_a_fifth_of_its_macs_in_blocks(zoo: Callable[..., Path]) -> None:
    folder = zoo("cifar10_resnet20")
    model = load_model(folder / "model.onnx")
    data = open_calibration(folder / "calib.npz", input_specs(model), BINDING)
    result = prune_with(model, data, units=("blocks",), ratio=0.2, refit=False)
    assert result.metrics["achieved"] == pytest.approx(0.2, abs=0.06)
