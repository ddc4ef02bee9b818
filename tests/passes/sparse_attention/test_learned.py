from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.analyses.streaming import expose
from graphopt.calibration import Dataset
from graphopt.errors import OptionError
from graphopt.pass_base import Context, PassResult
from graphopt.reference import Feed, Reference
from graphopt.targets import Target
from graphopt.testing import check_pass
from graphopt_passes.sparse_attention import SparseAttention
from graphopt_passes.sparse_attention._patterns import Kind, band_of, computed_scores, seen_scores, visible
from graphopt_passes.sparse_attention._runs import in_runs

LENGTH = 96
# logarithms of what heads attend to: neighbours, a wide surrounding, the first two tokens, everything
RELATIVE = np.stack(
    [
        -np.abs(np.subtract.outer(np.arange(LENGTH), np.arange(LENGTH))) / 0.4,
        -np.abs(np.subtract.outer(np.arange(LENGTH), np.arange(LENGTH))) / 3.5,
        np.where(np.arange(LENGTH) < 2, 8.0, 0.0) * np.ones((LENGTH, 1)),
        np.zeros((LENGTH, LENGTH)),
    ]
)


def model(*, masked: bool = True) -> ir.Model:
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    main (float[B,{LENGTH},32] x) => (float[B,{LENGTH},32] y)
    <int64[4] split = {{0, 0, 4, 8}}, int64[3] join = {{0, 0, 32}}, float scale = {{0.01}},
     float[1,4,{LENGTH},{LENGTH}] m>
    {{ q4 = Reshape(x, split) q = Transpose<perm=[0,2,1,3]>(q4) k = Transpose<perm=[0,2,3,1]>(q4)
       s = MatMul(q, k) t = Mul(s, scale) u = Add(t, m) p = Softmax<axis=-1>(u) o = MatMul(p, q)
       o4 = Transpose<perm=[0,2,1,3]>(o) y = Reshape(o4, join) }}"""
    text = text if masked else text.replace("u = Add(t, m)", "u = Identity(t)")
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(RELATIVE[None].astype(np.float32), "m"))
    return ir.from_proto(proto)


def projected(scale: float) -> ir.Model:
    """The same with a projection behind it that takes the last head times `scale`."""
    proto = ir.to_proto(model())
    weight = np.random.default_rng(3).standard_normal((32, 32)).astype(np.float32)
    weight[24:] *= scale
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    proto.graph.node[-1].output[0] = "joined"
    proto.graph.node.append(onnx.helper.make_node("MatMul", ["joined", "w"], ["y"]))
    return ir.from_proto(proto)


def samples() -> Dataset:
    def read() -> Iterator[Feed]:
        rng = np.random.default_rng(1)
        for _ in range(6):
            yield {"x": rng.standard_normal((1, LENGTH, 32)).astype(np.float32)}

    return Dataset("random", "random", read, stacked=True)


def learn(made: ir.Model, **options: object) -> PassResult:
    ctx = Context(made, Target(name="ort"), calibration=samples())
    step = SparseAttention(pattern="learned", **options)  # type: ignore[arg-type]
    step.requires(made, ctx)
    return step.run(made, ctx)


def test_heads_of_equal_weight_get_the_cheapest_pattern_that_keeps_enough() -> None:
    sparse = model()
    result = learn(sparse, width=16, keep=0.95)
    action = result.changes[0].action
    assert "0: window 2" in action
    assert "1: window 16" in action
    assert "2: window 2 and 4 global" in action
    assert "3: everything" in action
    details = result.changes[0].details
    assert all(0.95 <= details[f"head {head}"] <= 1 for head in range(4))  # type: ignore[operator]
    assert result.metrics["attention_kept_least"] == min(details[f"head {head}"] for head in range(4))


def test_heads_on_different_patterns_compute_what_dense_heads_with_their_masks_do() -> None:
    sparse = model()
    learn(sparse, width=16, keep=0.95)
    seen = np.stack(
        [
            visible(band_of("window", 2, causal=False), LENGTH),
            visible(band_of("window", 16, causal=False), LENGTH),
            visible(band_of("window", 2, causal=False, leading=4), LENGTH),
            np.ones((LENGTH, LENGTH), bool),
        ]
    )
    session = Reference(sparse)
    for feed in samples().feeds(4):
        x = feed["x"].reshape(LENGTH, 4, 8).swapaxes(0, 1).astype(np.float64)
        weights = np.where(seen, np.exp(x @ x.swapaxes(1, 2) * 0.01 + RELATIVE), 0)
        expected = (weights / weights.sum(axis=2, keepdims=True)) @ x
        np.testing.assert_allclose(session.run(feed)["y"][0], expected.swapaxes(0, 1).reshape(LENGTH, 32), atol=1e-5)


def test_a_lower_share_costs_less_and_a_share_of_all_keeps_everything() -> None:
    costs = [float(learn(model(), width=16, keep=keep).metrics["scores_computed"]) for keep in (0.5, 0.9, 0.999)]
    assert costs[0] < costs[1] < costs[2]
    whole = learn(model(), width=2, keep=1.0)
    assert not whole.modified
    assert "no pattern keeps 1 of what its heads attend to" in whole.changes[0].action


def test_scores_of_a_head_that_adds_nothing_go_to_the_others() -> None:
    equal, deaf = (learn(projected(scale), width=16, keep=0.8) for scale in (1.0, 1e-3))
    assert "3: everything" in equal.changes[0].action
    assert "everything" not in deaf.changes[0].action
    assert deaf.metrics["scores_computed"] <= equal.metrics["scores_computed"]  # type: ignore[operator]
    first, second = (
        [float(result.changes[0].details[f"head {head}"]) for head in range(3)] for result in (equal, deaf)
    )
    assert all(np.greater_equal(second, first))
    assert sum(second) > sum(first)


def test_learning_gives_the_same_twice() -> None:
    first, second = (learn(model(), width=16, keep=0.8) for _ in range(2))
    assert first.changes == second.changes
    assert first.metrics == second.metrics


def test_fixed_patterns_report_what_they_keep() -> None:
    made = model()
    ctx = Context(made, Target(name="ort"), calibration=samples())
    result = SparseAttention(width=3).run(made, ctx)
    weights = np.exp(RELATIVE) / np.exp(RELATIVE).sum(axis=2, keepdims=True)
    expected = (weights * visible(band_of("window", 3, causal=False), LENGTH)).sum(axis=2).mean(axis=1)
    got = [result.changes[0].details[f"head {head}"] for head in range(4)]
    np.testing.assert_allclose(np.array(got, float), expected, atol=0.01)


@pytest.mark.parametrize(
    ("kind", "width", "leading"),
    [("window", 16, 0), ("window", 32, 0), ("window", 5, 3), ("strided", 8, 0), ("block", 16, 0)],
)
def test_scores_are_counted_as_the_model_computes_them(kind: Kind, width: int, leading: int) -> None:
    made = model(masked=False)
    ctx = Context(made, Target(name="ort"), calibration=samples())
    result = SparseAttention(pattern=kind, width=width, global_tokens=leading).run(made, ctx)
    weights = [node.outputs[0].name or "" for node in made.graph if node.op_type == "Softmax"]
    feed = next(iter(samples().feeds(1)))
    found = Reference(expose(made, weights)).run(feed, weights)
    band, _ = in_runs(band_of(kind, width, causal=False, leading=leading))
    assert sum(array.size for array in found.values()) == 4 * computed_scores(band, LENGTH)
    if not leading:  # queries that are global are computed in their block as well
        assert sum(np.count_nonzero(array) for array in found.values()) == 4 * seen_scores(band, LENGTH)
    assert result.metrics["scores_computed"] == round(computed_scores(band, LENGTH) / LENGTH**2, 4)
    assert result.metrics["scores_seen"] == round(seen_scores(band, LENGTH) / LENGTH**2, 4)


def test_scores_of_causal_heads_are_a_share_of_their_half() -> None:
    band = band_of("window", LENGTH, causal=True)
    assert seen_scores(band, LENGTH) == LENGTH * (LENGTH + 1) // 2
    narrow = band_of("window", 1, causal=True)
    assert seen_scores(narrow, LENGTH) == LENGTH


def test_learning_needs_samples() -> None:
    with pytest.raises(OptionError, match="learned needs samples"):
        SparseAttention(pattern="learned").requires(model(), Context(model(), Target(name="ort")))


def test_learning_keeps_the_contract() -> None:
    assert check_pass(SparseAttention(pattern="learned", width=16), model(), calibration=samples()).modified
