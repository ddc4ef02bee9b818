"""Which layers are reverted first."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from passes.quant.mixed.models import bound, branches, quantize, samples
from small_models import build

from graphopt_passes.quant import Quant

NAMES = ("loud", "loud2", "quiet", "quiet2")


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("reverted", [(), ("loud",)])
def test_layers_that_reach_the_output_come_before_those_that_hardly_do(
    reverted: tuple[str, ...], *, data: bool
) -> None:
    model = branches()
    left = tuple(name for name in NAMES if name not in reverted)
    feeds = list(samples(count=3).feeds())
    ranked = Quant(equalize=False, smooth=False).worst_first(model, bound(model, data=data), left, reverted, feeds)
    assert sorted(ranked) == sorted(left)
    assert all(name.startswith("loud") for name in ranked[: 2 - len(reverted)])


def test_ranking_leaves_the_model_alone() -> None:
    from graphopt.structure import fingerprint

    model = branches()
    before = fingerprint(model)
    Quant().worst_first(model, bound(model), NAMES, (), list(samples(count=2).feeds()))
    assert fingerprint(model) == before


@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": "auto"}, {"mode": "weight"}, {"mode": "static"}])
def test_every_integer_form_is_ranked(options: dict[str, object]) -> None:
    model = branches()
    step = Quant(**options)  # type: ignore[arg-type]
    ranked = step.worst_first(model, bound(model), NAMES, (), list(samples(count=2).feeds()))
    assert sorted(ranked) == sorted(NAMES)
    assert ranked[0].startswith("loud")


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_weights_in_narrow_floats_are_ranked_by_what_reaches_the_output(dtype: str) -> None:
    model = branches()
    feeds = list(samples(count=2).feeds())
    ranked = Quant(dtype=dtype).worst_first(model, bound(model), NAMES, (), feeds)  # type: ignore[arg-type]
    assert set(ranked[:2]) == {"loud", "loud2"}
    assert set(ranked[2:]) == {"quiet", "quiet2"}


@pytest.mark.parametrize("reverted", [(), ("down",)])
def test_nodes_in_fp16_are_ranked_by_the_noise_they_add(reverted: tuple[str, ...]) -> None:
    body = """
    [first] a = MatMul(x, w1)
    [up] b = Add(a, far)
    [down] c = Sub(b, far)
    [last] y = MatMul(c, w2)
    """
    model = build("(float[N,32] x) => (float[N,32] y)", body, {"w1": (32, 32), "w2": (32, 32), "far": (1,)})
    model.graph.initializers["far"].const_value = ir.tensor(np.full(1, 5000, np.float32), name="far")
    feeds = list(samples((4, 32), 2).feeds())
    left = tuple(name for name in ("first", "up", "down", "last") if name not in reverted)
    ranked = Quant(dtype="fp16").worst_first(model, bound(model, data=False), left, reverted, feeds)
    assert sorted(ranked) == sorted(left)
    assert set(ranked[: 2 - len(reverted)]) == {"up", "down"} - set(reverted)


def test_layers_that_are_quantized_anew_are_ranked_by_what_the_float_model_makes_of_them() -> None:
    model = branches()
    quantize(model)
    step, feeds = Quant(requantize=True), list(samples(count=2).feeds())
    assert step.revertible(model, (*NAMES, "y")) == NAMES
    ranked = step.worst_first(model, bound(model), NAMES, (), feeds)
    assert sorted(ranked) == sorted(NAMES)
    assert ranked[0].startswith("loud")


def test_only_layers_with_weights_can_be_reverted() -> None:
    assert Quant().revertible(branches(), ("loud", "s", "y", "quiet")) == ("loud", "quiet")


def test_every_node_can_be_reverted_from_narrow_floats() -> None:
    model = branches()
    names = [node.name or "" for node in model.graph]
    assert Quant(dtype="fp16").revertible(model, ("loud", names[1], "nowhere")) == ("loud", names[1])


def test_names_are_taken_literally_whatever_characters_they_hold() -> None:
    body = "[a] t = MatMul(x, w1)\n[b] y = MatMul(t, w2)"
    model = build("(float[N,32] x) => (float[N,32] y)", body, {"w1": (32, 32), "w2": (32, 32)})
    model.graph[0].name, model.graph[1].name = "layers[0]*", "layers[0]x"
    step = Quant(bits=8, skip=("layers*x",)).without(["layers[0]*"])
    assert step.skip == ("layers*x", "layers[[]0][*]")
    from fnmatch import fnmatchcase

    assert fnmatchcase("layers[0]*", step.skip[1])
    assert not fnmatchcase("layers[0]x", step.skip[1])
    assert np.isfinite(model.graph.initializers["w1"].const_value.numpy()).all()  # type: ignore[union-attr]
