"""Every criterion on every kind of group: none crashes, and all but the control find a unit that is useless."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from small_models import IMAGE, Shape, build, context, zero

from graphopt.analyses import CHANNEL_GROUPS
from graphopt.calibration import Dataset
from graphopt.model_io import ShapeBinding, input_specs, load_model
from graphopt.reference import Feed, Reference, random_feed
from graphopt.testing import check_criterion
from graphopt_passes.prune import Prune
from graphopt_passes.prune.criteria import BUILT_IN, find_criterion, worth

NAMES = [criterion.name for criterion in BUILT_IN]


def put(model: ir.Model, **arrays: Any) -> ir.Model:
    for name, array in arrays.items():
        model.graph.initializers[name].const_value = ir.tensor(np.asarray(array, np.float32), name=name)
    return model


def noise(model: ir.Model, count: int = 24) -> Dataset:
    def read() -> Iterator[Feed]:
        rng = np.random.default_rng(3)
        return (random_feed(input_specs(model), ShapeBinding(dims={"N": 1}), rng) for _ in range(count))

    shape = model.graph.inputs[0].shape
    return Dataset("noise", None, read, stacked=shape is not None and not isinstance(shape[0], int))


def judged(name: str, model: ir.Model, data: Dataset | None = None) -> list[np.ndarray]:
    ctx = context(model, calibration=data, rng=np.random.default_rng(5))
    return worth(find_criterion(name, ctx), model, ctx.fact(CHANNEL_GROUPS).free, ctx)


BRANCH = """
    y = If (c) <
        then_branch = left () => (float[N,5] l) { a = MatMul(x, w1) r = Relu(a) l = MatMul(r, w2) },
        else_branch = right () => (float[N,5] m) { m = MatMul(x, w3) }
    >
"""
KINDS: dict[str, tuple[str, str, Mapping[str, Shape]]] = {
    "channels": (
        IMAGE,
        """
        [a] a = Conv<pads=[1,1,1,1]>(x, w1, b1) n = BatchNormalization(a, s, o, m, var) r = Relu(n)
        [b] b = Conv(r, w2) z = Add(b, r) p = GlobalAveragePool(z) f = Flatten(p) y = Gemm<transB=1>(f, w3)
        """,
        {
            "w1": (6, 3, 3, 3),
            "b1": (6,),
            "s": (6,),
            "o": (6,),
            "m": (6,),
            "var": (6,),
            "w2": (6, 6, 1, 1),
            "w3": (5, 6),
        },
    ),
    "depthwise": (
        IMAGE,
        """
        [a] a = Conv(x, w1) r = Relu(a) [d] d = Conv<group=6, pads=[1,1,1,1]>(r, w2) q = Relu(d)
        p = GlobalAveragePool(q) f = Flatten(p) y = MatMul(f, w3)
        """,
        {"w1": (6, 3, 3, 3), "w2": (6, 1, 3, 3), "w3": (6, 5)},
    ),
    "grouped": (
        IMAGE,
        """
        [a] a = Conv(x, w1) r = Relu(a) [g] g = Conv<group=2>(r, w2) q = Relu(g)
        p = GlobalAveragePool(q) f = Flatten(p) y = MatMul(f, w3)
        """,
        {"w1": (8, 3, 3, 3), "w2": (6, 4, 3, 3), "w3": (6, 5)},
    ),
    "flattened": (
        IMAGE,
        "[a] a = Conv(x, w1) r = Relu(a) f = Flatten(r) y = Gemm(f, w2)",
        {"w1": (6, 3, 7, 7), "w2": (24, 5)},
    ),
    "concatenated": (
        IMAGE,
        """
        [a] a = Conv(x, w1) [b] b = Conv(x, w2) c = Concat<axis=1>(a, b) r = Relu(c)
        p = GlobalAveragePool(r) f = Flatten(p) y = MatMul(f, w3)
        """,
        {"w1": (4, 3, 3, 3), "w2": (6, 3, 3, 3), "w3": (10, 5)},
    ),
    "transposed": (
        IMAGE,
        """
        [a] a = ConvTranspose(x, w1) r = Relu(a) p = GlobalAveragePool(r) f = Flatten(p)
        t = Transpose<perm=[1,0]>(w2) [m] m = MatMul(f, t) s = Relu(m) u = Transpose<perm=[1,0]>(w3) y = MatMul(s, u)
        """,
        {"w1": (3, 6, 2, 2), "w2": (8, 6), "w3": (5, 8)},
    ),
    "heads": (
        "(float[1,6,8] x) => (float[1,6,5] y)",
        """
        q0 = MatMul(x, wq) q1 = Reshape(q0, shape) q = Transpose<perm=[0,2,1,3]>(q1)
        k0 = MatMul(x, wk) k1 = Reshape(k0, shape) k = Transpose<perm=[0,2,3,1]>(k1)
        v0 = MatMul(x, wv) v1 = Reshape(v0, shape) v = Transpose<perm=[0,2,1,3]>(v1)
        qk = MatMul(q, k) pr = Softmax<axis=-1>(qk) pv = MatMul(pr, v)
        h = Transpose<perm=[0,2,1,3]>(pv) h1 = Reshape(h, back) y = MatMul(h1, wo)
        """,
        {"wq": (8, 12), "wk": (8, 12), "wv": (8, 12), "wo": (12, 5)},
    ),
    "recurrent": (
        "(float[4,1,3] x) => (float[4,1,5] y)",
        """
        a, ah, ac = LSTM<hidden_size=6>(x, w, r, b) s = Squeeze(a, one) y = MatMul(s, w2)
        """,
        {"w": (1, 24, 3), "r": (1, 24, 6), "b": (1, 48), "w2": (6, 5)},
    ),
}


def constant(model: ir.Model, name: str, array: np.ndarray) -> None:
    """Give a value that the text uses but does not declare."""
    for node in model.graph:
        for i, value in enumerate(node.inputs):
            if value is not None and value.name == name:
                if name not in model.graph.initializers:
                    tensor = ir.tensor(array, name=name)
                    made = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype))
                    made.shape = ir.Shape(array.shape)
                    model.graph.register_initializer(made)
                node.replace_input_with(i, model.graph.initializers[name])


def model_of(kind: str) -> ir.Model:
    if kind == "subgraph":
        return build("(float[N,4] x, bool c) => (float[N,5] y)", BRANCH, {"w1": (4, 6), "w2": (6, 5), "w3": (4, 5)})
    if kind == "quantized":
        model = build(
            "(float[N,4] x) => (float[N,5] y)",
            """
            d1 = DequantizeLinear<axis=1>(q1, s1) a = MatMul(x, d1) r = Relu(a)
            d2 = DequantizeLinear(q2, s2, z2) y = MatMul(r, d2)
            """,
            {"s1": (6,), "s2": ()},
        )
        rng = np.random.default_rng(0)
        put(model, s1=rng.random(6) + 0.1, s2=np.float32(0.3))
        constant(model, "q1", rng.integers(-100, 100, (4, 6)).astype(np.int8))
        constant(model, "q2", rng.integers(0, 200, (6, 5)).astype(np.uint8))
        constant(model, "z2", np.array(0, np.uint8))
        return model
    model = build(*KINDS[kind])
    constant(model, "shape", np.array([0, 0, 3, 4]))
    constant(model, "back", np.array([0, 0, 12]))
    constant(model, "one", np.array([1]))
    return model


def is_found(criterion: str, scores: np.ndarray) -> bool:
    """Whether unit 1, all zeros, is the first to go; with few filters others may lie nearer to their median."""
    if criterion == "fpgm":
        return bool(scores[1] < np.median(scores))
    return criterion == "random" or int(scores.argmin()) == 1


@pytest.mark.parametrize("kind", [*KINDS, "quantized"])
def test_every_criterion_finds_a_useless_unit_in_every_kind_of_group(kind: str) -> None:
    model = model_of(kind)
    groups = context(model).fact(CHANNEL_GROUPS).free
    assert groups
    for group in groups:
        zero(model, group, [1])
    data = noise(model)
    for name in NAMES:
        for group, scores in zip(groups, judged(name, model, data), strict=True):
            assert scores.shape == (group.units,)
            assert np.isfinite(scores).all()
            assert (scores >= 0).all()
            assert is_found(name, scores), (kind, name, group.name, scores)


@pytest.mark.parametrize("name", NAMES)
def test_groups_inside_subgraphs_are_judged(name: str) -> None:
    model = model_of("subgraph")
    groups = context(model).fact(CHANNEL_GROUPS).free
    assert [group.units for group in groups] == [6]

    def read() -> Iterator[Feed]:
        rng = np.random.default_rng(0)
        for i in range(8):
            yield {"x": rng.standard_normal((1, 4)).astype(np.float32), "c": np.array(i % 2 == 0)}

    zero(model, groups[0], [1])
    (scores,) = judged(name, model, Dataset("branches", None, read))
    assert scores.shape == (6,)
    assert is_found(name, scores)


@pytest.mark.parametrize("name", NAMES)
def test_scores_repeat_and_change_nothing(name: str) -> None:
    model = model_of("channels")
    found = check_criterion(
        find_criterion(name, context(model, calibration=noise(model))), model, calibration=noise(model)
    )
    assert len(found) == 1


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("reconstruction", "output-change")])
def test_scores_of_a_group_have_a_mean_of_one(name: str) -> None:
    model = model_of("grouped")
    for scores in judged(name, model, noise(model)):
        assert scores.mean() == pytest.approx(1)


def test_infinite_samples_are_survived() -> None:
    model = model_of("channels")
    data = Dataset("inf", None, lambda: iter([{"x": np.full((1, 3, 8, 8), np.inf, np.float32)}]), stacked=True)
    for name in NAMES:
        for scores in judged(name, model, data):
            assert np.isfinite(scores).all()


def test_criteria_with_data_beat_the_control_on_a_real_network(zoo: Callable[..., Path]) -> None:
    folder = zoo("cifar10_resnet20", limit=500)
    with np.load(folder / "calib.npz") as calibration, np.load(folder / "eval.npz") as evaluation:
        ((name, images),) = calibration.items()
        shown, labels = evaluation[name], evaluation["labels"]
    data = Dataset("images", None, lambda: ({name: image[None]} for image in images), stacked=True)
    right = {}
    for criterion in ("random", "wanda", "reconstruction"):
        model = load_model(folder / "model.onnx")
        ctx = context(model, calibration=data, rng=np.random.default_rng(0))
        Prune(criterion=criterion, scope="uniform", refit=False).run(model, ctx)
        (logits,) = Reference(model).run({name: shown}).values()
        right[criterion] = float((logits.argmax(axis=1) == labels).mean())
    assert min(right["wanda"], right["reconstruction"]) > right["random"] + 0.1, right
