from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.errors import ModelError
from graphopt.pass_base import Context
from graphopt.reference import Feed, Reference
from graphopt.targets import Target
from graphopt_passes.prune.refit import stepwise as _stepwise
from graphopt_passes.prune.refit.stepwise import Stepwise

BODY = """
    a = MatMul(x, w)
    t = Transpose(w)
    r = Relu(a)
    n = Shape(r)
    b = MatMul(r, t)
    z = Cast<to=1>(n)
    s = Add(b, x)
    c = If (flag) <
        then_branch = yes () => (float[N,4] kept) { kept = Add(s, x) },
        else_branch = no () => (float[N,4] other) { other = Mul(s, b) }
    >
    y = Sub(c, s)
    q = ReduceSum(z)
"""


def build() -> ir.Model:
    weight = ir.tensor(np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32), name="w")
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    main (float[N,4] x, bool flag) => (float[N,4] y, float q) <float[4,4] w> {{ {BODY} }}"""
    return ir.from_onnx_text(text, initializers=[weight])


def feeds() -> list[Feed]:
    rng = np.random.default_rng(1)
    sizes = (3, 3, 2)
    return [
        {"x": rng.standard_normal((n, 4)).astype(np.float32), "flag": np.array(i % 2 == 0)} for i, n in enumerate(sizes)
    ]


def whole(model: ir.Model, name: str) -> list[np.ndarray]:
    copy = model.clone()
    value = next(v for node in copy.graph for v in node.outputs if v.name == name)
    if name not in [output.name for output in copy.graph.outputs]:
        copy.graph.outputs.append(value)
    session = Reference(copy)
    return [session.run(feed, [name])[name] for feed in feeds()]


@pytest.mark.parametrize("limit", [256 << 20, 0])
def test_pieces_compute_what_the_whole_model_does(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_stepwise, "_KEPT_BYTES", limit)
    model = build()
    stepwise = Stepwise(model, feeds(), Context(model, Target(name="ort")))
    for name in ("a", "r", "b", "s", "c", "y"):
        found = [values[0] for values in stepwise.run(stepwise.born[name] + 1, [name])]
        for got, expected in zip(found, whole(model, name), strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-5)
        assert (stepwise.kept is not None) == bool(limit)


def test_values_of_several_kinds_come_together() -> None:
    model = build()
    stepwise = Stepwise(model, feeds(), Context(model, Target(name="ort")))
    x, r, b = next(stepwise.run(stepwise.born["b"] + 1, ["x", "r", "b"]))
    np.testing.assert_array_equal(x, feeds()[0]["x"])
    np.testing.assert_allclose(b, r @ model.graph.initializers["w"].const_value.numpy().T, atol=1e-5)


def test_what_is_computed_already_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    stepwise = Stepwise(model, feeds(), Context(model, Target(name="ort")))
    list(stepwise.run(stepwise.born["s"], ["b"]))
    assert set(stepwise.kept[0]) == {"x", "flag", "b", "z"}
    monkeypatch.setattr(_stepwise, "Reference", None)
    assert len(list(stepwise.run(stepwise.born["s"], ["b"]))) == 3


def test_a_weight_that_changes_behind_the_position_is_seen() -> None:
    model = build()
    stepwise = Stepwise(model, feeds(), Context(model, Target(name="ort")))
    before = [r for (r,) in stepwise.run(stepwise.born["b"], ["r"])]
    model.graph.initializers["w"].const_value = ir.tensor(np.eye(4, dtype=np.float32), name="w")
    for (b,), r in zip(stepwise.run(stepwise.born["b"] + 1, ["b"]), before, strict=True):
        np.testing.assert_array_equal(b, r)


def test_constants_are_made_anew_and_not_kept() -> None:
    model = build()
    stepwise = Stepwise(model, feeds(), Context(model, Target(name="ort")))
    assert "t" not in stepwise.born
    assert "w" not in stepwise.born


def test_what_was_asked_for_can_be_asked_for_again() -> None:
    """An output of the model is read by no node; still it is there the second time."""
    model = build()
    stepwise = Stepwise(model, feeds(), Context(model, Target(name="ort")))
    first, second = (list(stepwise.run(stepwise.born["y"] + 1, ["y", "a"])) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        for before, after in zip(one, other, strict=True):
            np.testing.assert_array_equal(before, after)


def test_a_failure_in_a_batch_is_raised() -> None:
    model = build()
    broken = [*feeds()[:2], {"x": np.zeros((2, 5), dtype=np.float32), "flag": np.array(True)}]
    stepwise = Stepwise(model, broken, Context(model, Target(name="ort")))
    with pytest.raises(ModelError):
        list(stepwise.run(stepwise.born["r"] + 1, ["r"]))
