from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.analyses import CONSTANTS
from graphopt.analyses.ranges import expose
from graphopt.pass_base import Context
from graphopt.reference import Reference
from graphopt.targets import Target
from graphopt_passes.prune.refit.outlook import Outlook, outlook

NORM = "BatchNormalization"
KNOWN = {"x", "s"}


def look(body: str) -> tuple[Outlook, ir.Model]:
    """The outlook of `o`, a convolution's output with four channels; `s` is known before."""
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 4, 1, 1), "c": (4, 1, 1), "row": (4,), "scale": (4,), "shift": (4,), "mean": (4,), "var": (4,)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    arrays |= {"var": np.abs(arrays["var"]), "six": np.float32(6), "zero": np.float32(0)}
    words = re.findall(r"\w+", f"o = Conv(x, w) {body}")
    used = {name: array for name, array in arrays.items() if name in words}
    declared = ", ".join(f"float[{','.join(map(str, array.shape))}] {name}" for name, array in used.items())
    declared = declared.replace("float[] ", "float ")
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    main (float[N,4,4,4] x, float[N,4,4,4] s) => (float[N,4,4,4] y) <{declared}> {{ o = Conv(x, w) {body} }}"""
    model = ir.from_onnx_text(text, initializers=[ir.tensor(array, name=name) for name, array in used.items()])
    constants = Context(model, Target(name="ort")).fact(CONSTANTS)
    return outlook(model.graph[0].outputs[0], 4, -3, constants, KNOWN), model


@pytest.mark.parametrize(
    ("body", "low", "high"),
    [
        ("y = Relu(o)", 0.0, np.inf),
        ("a = Add(s, o) y = Relu(a)", 0.0, np.inf),
        ("a = Add(o, c) b = Mul(a, c) y = Relu(b)", 0.0, np.inf),
        (f"a = {NORM}(o, scale, shift, mean, var) b = Add(a, s) y = Relu(b)", 0.0, np.inf),
        (f"a = Add(o, s) b = {NORM}(a, scale, shift, mean, var) y = Clip(b, zero, six)", 0.0, 6.0),
    ],
)
def test_totals_and_edges_say_what_the_activation_shows(body: str, low: float, high: float) -> None:
    found, model = look(body)
    assert found.bounded
    assert (found.shortcut == "s") == ("s)" in body or "(s," in body)
    rng = np.random.default_rng(1)
    feed = {name: 3 * rng.standard_normal((2, 4, 4, 4)).astype(np.float32) for name in ("x", "s")}
    out = Reference(expose(model, ["o"])).run(feed)
    total = out["o"] + found.bypass(feed["s"] if found.shortcut else None, out["o"], -3)
    gain, lowest, highest = (array.reshape(4, 1, 1) for array in (found.gain, found.low, found.high))
    seen = gain * np.clip(total, lowest, highest)
    assert seen.min() >= low - 1e-4
    assert seen.max() <= high + 1e-4
    np.testing.assert_allclose(seen, out["y"], atol=1e-4)


@pytest.mark.parametrize(
    "body",
    [
        "y = Sigmoid(o)",
        "a = Relu(o) y = Add(a, o)",
        "a = Add(o, row) y = Relu(a)",
        "a = Mul(o, s) y = Relu(a)",
        "a = Add(o, x) b = Add(a, s) c2 = Sigmoid(b) y = Relu(c2)",
    ],
)
def test_what_cannot_be_followed_is_looked_at_as_it_is(body: str) -> None:
    assert not look(body)[0].bounded


def test_a_shortcut_that_is_not_known_yet_does_not_count() -> None:
    found, _ = look("t = Relu(x) a = Add(o, t) y = Relu(a)")
    assert found.shortcut is None
    assert not found.bounded


def test_a_channel_that_a_norm_silences_has_no_edge() -> None:
    found, model = look(f"a = {NORM}(o, scale, shift, mean, var) y = Relu(a)")
    array = model.graph.initializers["scale"].const_value.numpy().copy()
    array[2] = 0
    model.graph.initializers["scale"].const_value = ir.tensor(array, name="scale")
    constants = Context(model, Target(name="ort")).fact(CONSTANTS)
    found = outlook(model.graph[0].outputs[0], 4, -3, constants, KNOWN)
    assert found.low[2] == -np.inf
    assert found.gain[2] == 0
    assert np.isfinite(found.offset).all()
