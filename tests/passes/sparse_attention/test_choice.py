from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.analyses import CONSTANTS, SHAPES
from graphopt.analyses.attention import ATTENTION, AttentionBlock
from graphopt.pass_base import Context
from graphopt.targets import Target
from graphopt_passes.sparse_attention._losses import root_of, seen_part, squares
from graphopt_passes.sparse_attention._patterns import band_of, visible, visible_rows
from graphopt_passes.sparse_attention.learned import Choice, Setting, Tried, choose
from graphopt_passes.sparse_attention.mass import Masses
from graphopt_passes.sparse_attention.plans import _learned_plan
from graphopt_passes.sparse_attention.projection import projection_of

Array = np.ndarray[Any, np.dtype[Any]]
RNG = np.random.default_rng(0)
LENGTH = 64
TRIED = [
    Setting("window", 4, 0, 4),
    Setting("window", 8, 0, 4),
    Setting("window", 4, 4, 4),
    Setting("strided", 4, 0, 4),
]


def core(tail: str, initializers: dict[str, Array], last: str = "C") -> tuple[AttentionBlock, Context]:
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    main (float[2,{LENGTH},8] x) => (float[2,{LENGTH},{last}] y)
    <int64[4] split = {{0, 0, 2, 4}}, int64[3] join = {{0, 0, 8}}, int64[2] flat = {{-1, 8}}, float scale = {{0.5}}>
    {{ q4 = Reshape(x, split) q = Transpose<perm=[0,2,1,3]>(q4) k = Transpose<perm=[0,2,3,1]>(q4)
       s = MatMul(q, k) t = Mul(s, scale) p = Softmax<axis=-1>(t) o = MatMul(p, q) {tail} }}"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in initializers.items())
    made = ir.from_proto(proto)
    ctx = Context(made, Target(name="ort"))
    return ctx.fact(ATTENTION)[0], ctx


WEIGHT = RNG.standard_normal((8, 5)).astype(np.float32)
PLAIN = "o4 = Transpose<perm=[0,2,1,3]>(o) j = Reshape(o4, join)"


@pytest.mark.parametrize(
    ("tail", "weight", "last"),
    [
        (f"{PLAIN} y = MatMul(j, w)", WEIGHT, "5"),
        (f"{PLAIN} f = Reshape(j, flat) g = Gemm<transB=1>(f, w) y = Identity(g)", WEIGHT.T.copy(), "5"),
        (f"{PLAIN} i = Identity(j) c = Cast<to=1>(i) y = MatMul(c, w)", WEIGHT, "5"),
    ],
)
def test_the_projection_is_found_behind_what_moves_elements(tail: str, weight: Array, last: str) -> None:
    block, ctx = core(tail, {"w": weight}, last)
    found = projection_of(block, ctx.fact(CONSTANTS), ctx.fact(SHAPES))
    assert found is not None
    np.testing.assert_array_equal(found, WEIGHT.reshape(2, 4, 5))


@pytest.mark.parametrize(
    ("tail", "why"),
    [
        ("o4 = Transpose<perm=[0,2,3,1]>(o) j = Reshape(o4, join) y = MatMul(j, w)", "width comes before heads"),
        (f"{PLAIN} r = Relu(j) y = MatMul(r, w)", "it is not linear"),
        (f"{PLAIN} v = Identity(w) y = MatMul(j, v)", "its weight is computed"),
        (f"{PLAIN} z = MatMul(j, w) u = ReduceMax<keepdims=1>(j) y = Add(z, u)", "outputs are read by others"),
    ],
)
def test_no_projection_is_made_up(tail: str, why: str) -> None:
    block, ctx = core(tail, {"w": WEIGHT}, "5")
    assert projection_of(block, ctx.fact(CONSTANTS), ctx.fact(SHAPES)) is None, why


def test_roots_keep_lengths_and_distances_of_what_heads_add() -> None:
    for channels in (3, 16):
        matrix = RNG.standard_normal((2, 6, channels)).astype(np.float32)
        rows = RNG.standard_normal((2, 10, 6)).astype(np.float32)
        np.testing.assert_allclose(squares(rows @ root_of(matrix)), squares(rows @ matrix), rtol=1e-5)


@pytest.mark.parametrize("known", [True, False])
def test_errors_are_those_of_a_softmax_over_keys_that_are_seen(known: bool) -> None:
    scores = RNG.standard_normal((3, 7, 9))
    seen = RNG.random((7, 9)) < 0.5
    seen[:, 2] = True
    full = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    part = np.where(seen, np.exp(scores), 0)
    part /= part.sum(-1, keepdims=True)
    values = RNG.standard_normal((3, 9, 4)) if known else np.eye(9)[None].repeat(3, axis=0)
    kept, errors = seen_part(full, values if known else None, full @ values, seen)
    np.testing.assert_allclose(kept, (full * seen).sum((1, 2)), rtol=1e-9)
    np.testing.assert_allclose(errors, np.square((part - full) @ values).sum((1, 2)), rtol=1e-9)


def test_a_query_that_sees_nothing_of_what_it_attends_to_loses_its_whole_output() -> None:
    weights, values = np.array([[[0.0, 1.0]]]), np.array([[[5.0], [2.0]]])
    kept, errors = seen_part(weights, values, weights @ values, np.array([[True, False]]))
    assert (kept[0], errors[0]) == (0, 4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("kind", "leading"), [("window", 0), ("strided", 3), ("block", 1)])
def test_rows_of_the_map_are_those_of_the_whole(causal: bool, kind: Any, leading: int) -> None:
    band = band_of(kind, 6, causal=causal, leading=leading)
    whole = visible(band, 50)
    for queries in (np.array([0]), np.array([3, 17, 49]), np.sort(RNG.choice(50, 20, replace=False))):
        np.testing.assert_array_equal(visible_rows(band, queries, 50), whole[queries])
    distance = np.abs(np.subtract.outer(np.arange(50), np.arange(50)))
    assert whole[distance < 6 if kind != "block" else distance == 0].all() or causal


def tried(shares: Array, losses: Array) -> Tried:
    """A core of two heads: `[patterns, heads]` each."""
    block, _ = core(f"{PLAIN} y = MatMul(j, w)", {"w": WEIGHT}, "5")
    bands = [setting.band(causal=False) for setting in TRIED]
    return Tried(block, Masses(shares * 10, losses, np.array([0.5, 0.5]), 10, LENGTH), bands)


def lost(losses: Array, choices: list[Choice]) -> float:
    return sum(
        float(losses[choice.setting, list(choice.heads)].sum()) for choice in choices if choice.setting is not None
    )


def test_the_budget_is_spent_where_errors_fall_most() -> None:
    shares = np.array([[0.9, 0.9], [0.95, 0.95], [0.9, 0.9], [0.9, 0.9]])
    losses = np.array([[0.5, 0.01], [0.1, 0.009], [0.4, 0.01], [0.4, 0.01]])
    made = tried(shares, losses)
    assert choose([made], 0.5) == [[Choice((0, 1), 0)]]
    both = choose([made], 0.93)  # pays a window of 8 for both: everything is too dear for either
    assert both == [[Choice((0, 1), 1)]]


def test_a_layer_that_matters_gets_what_another_can_do_without() -> None:
    shares = np.array([[0.9, 0.2], [0.95, 0.95], [0.92, 0.9], [0.9, 0.9]])
    calm, hurt = np.full((4, 2), 1e-4), np.array([[0.9, 0.9], [0.5, 0.5], [0.05, 0.05], [0.6, 0.6]])
    first, second = tried(shares, calm), tried(shares, hurt)
    alone = choose([second], 0.9)[0]
    together = choose([first, second], 0.9)
    assert together[0] == [Choice((0, 1), 0)]
    loss = [
        sum(hurt[c.setting, h] for c in chosen if c.setting is not None for h in c.heads)
        for chosen in (alone, together[1])
    ]
    assert loss[1] < loss[0]


def test_of_two_that_keep_and_cost_as_much_the_one_of_less_error_is_taken() -> None:
    shares = np.array([[0.1, 0.1], [0.8, 0.8], [0.8, 0.8], [0.1, 0.1]])
    for better, worse in ((1, 2), (2, 1)):
        losses = np.full((4, 2), 0.9)
        losses[better], losses[worse] = 0.2, 0.7
        made = tried(shares, losses)
        assert made.costs[1] == made.costs[2]
        assert choose([made], 0.8)[0] == [Choice((0, 1), better)]


def test_a_pattern_no_cheaper_than_a_window_that_loses_as_little_is_never_chosen() -> None:
    made = tried(np.ones((4, 2)), np.zeros((4, 2)))
    window, strided = made.costs[0], made.costs[3]
    assert window < strided
    for keep in (0.1, 0.9, 1.0):
        for noise in range(4):
            shares = np.sort(np.random.default_rng(noise).random((4, 2)), axis=0)
            losses = 1 - shares
            losses[3] = losses[0]  # dearer than the window of 4, and no better
            chosen = choose([tried(shares, losses)], keep)[0]
            assert all(choice.setting != 3 for choice in chosen)


def test_patterns_that_cost_as_much_as_everything_are_not_chosen() -> None:
    block, _ = core(f"{PLAIN} y = MatMul(j, w)", {"w": WEIGHT}, "5")
    wide = Setting("window", LENGTH, 0, 4).band(causal=False)
    masses = Masses(np.full((1, 2), 10.0), np.zeros((1, 2)), np.ones(2), 10, LENGTH)
    assert choose([Tried(block, masses, [wide])], 0.5) == [[Choice((0, 1), None)]]


def test_a_layer_may_get_everything_from_what_another_leaves() -> None:
    shares = np.array([[0.9, 0.9], [0.9, 0.9], [0.95, 0.95], [0.9, 0.9]])
    calm, hurt = np.zeros((4, 2)), np.full((4, 2), 0.9)
    cores = [tried(np.full((4, 2), 0.1), calm), tried(shares, hurt)]
    choices = choose(cores, 0.9)
    assert choices == [[Choice((0, 1), 0)], [Choice((0, 1), None)]]
    plan = _learned_plan(cores[1], TRIED, choices[1], 0.9)
    assert plan.reason == "of the scores that keep=0.9 leaves to all heads together, those of its heads matter most"
    assert set(plan.kept.values()) == {1.0}
