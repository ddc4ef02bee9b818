from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.analyses import CHANNEL_GROUPS, CONSTANTS
from graphopt.calibration import Dataset, open_calibration
from graphopt.model_io import ShapeBinding, input_specs, load_model, model_bytes
from graphopt.pass_base import Context
from graphopt.reference import Feed, Reference
from graphopt.targets import Target
from graphopt.testing import check_pass
from graphopt_passes._prune_refit import readers, refit
from graphopt_passes._prune_removal import remove
from graphopt_passes.prune import Prune

BODY = """
    [first] a = Conv<pads=[1,1,1,1]>(x, w1, b1) r = Relu(a)
    [second] c = Conv(r, w2) s = Relu(c)
    p = GlobalAveragePool(s) f = Flatten(p)
    [last] y = Gemm<transB=1, alpha=0.5>(f, head, bias)
"""
SHAPES = {"w1": (6, 3, 3, 3), "b1": (6,), "w2": (8, 6, 1, 1), "head": (5, 8), "bias": (5,)}


def build(body: str = BODY, shapes: dict[str, tuple[int, ...]] | None = None) -> ir.Model:
    rng = np.random.default_rng(0)
    shapes = shapes or SHAPES
    tensors = [ir.tensor(rng.standard_normal(s).astype(np.float32), name=name) for name, s in shapes.items()]
    declared = ", ".join(f"float[{','.join(map(str, s))}] {name}" for name, s in shapes.items())
    text = f'<ir_version: 8, opset_import: ["" : 17]> main (float[N,3,8,8] x) => (float[N,5] y) <{declared}> {{{body}}}'
    return ir.from_onnx_text(text, initializers=tensors)


def samples(count: int = 32) -> Dataset:
    def read() -> Iterator[Feed]:
        rng = np.random.default_rng(2)
        for _ in range(count):
            yield {"x": rng.standard_normal((1, 3, 8, 8)).astype(np.float32)}

    return Dataset("random", None, read, stacked=True)


def context(model: ir.Model, data: Dataset | None = None) -> Context:
    return Context(model, Target(name="ort"), calibration=data)


def outputs(model: ir.Model) -> np.ndarray:
    session = Reference(model)
    return np.concatenate([session.run(feed)["y"] for feed in samples(8).feeds()])


def duplicate_channel(model: ir.Model) -> None:
    """Make channel 5 of the first layer three times channel 2."""
    for name in ("w1", "b1"):
        value = model.graph.initializers[name]
        array = value.const_value.numpy().copy()
        array[5] = 3 * array[2]
        value.const_value = ir.tensor(array, name=name)


def test_a_channel_that_others_can_express_leaves_without_a_trace() -> None:
    model = build()
    duplicate_channel(model)
    expected = outputs(model)
    group = context(model).fact(CHANNEL_GROUPS).groups[0]
    assert refit(model, context(model), samples(), [(group, [5])]) == 1
    groups = context(model).fact(CHANNEL_GROUPS)
    remove(model, groups, [(groups.groups[0], [5])])
    error = np.abs(outputs(model) - expected).max() / np.abs(expected).max()
    assert error < 1e-2, "all but the ridge"


def test_refitting_comes_closer_than_leaving_the_readers_alone() -> None:
    expected = outputs(build())
    errors: list[float] = []
    for on in (True, False):
        model = build()
        result = Prune(refit=on).run(model, context(model, samples()))
        assert (result.metrics["refitted"] == 2) == on
        errors.append(float(np.square(outputs(model) - expected).mean()))
    assert errors[0] < 0.5 * errors[1]


def test_without_data_nothing_is_refitted() -> None:
    model = build()
    assert Prune().run(model, context(model)).metrics["refitted"] == 0


def test_a_reader_that_gains_a_bias_may_lose_outputs_too() -> None:
    model = build()
    assert len(next(node for node in model.graph if node.name == "second").inputs) == 2
    result = Prune(ratio=0.5).run(model, context(model, samples()))
    second = next(node for node in model.graph if node.name == "second")
    assert second.inputs[2] is not None
    kept = next(change for change in result.changes if change.site == "second").details["channels_after"]
    assert second.inputs[2].shape == ir.Shape([kept])
    outputs(model)


def test_the_same_data_gives_the_same_bytes() -> None:
    digests = []
    for _ in range(2):
        model = build()
        Prune().run(model, context(model, samples()))
        digests.append(model_bytes(model))
    assert digests[0] == digests[1]


def test_refitting_keeps_the_contract_of_passes() -> None:
    assert check_pass(Prune(), build(), calibration=samples()).modified


@pytest.mark.parametrize(
    ("body", "shapes"),
    [
        # one weight, two readers
        (
            "[first] a = Conv(x, w1) b = Conv(a, w2) c = Conv(b, w2) %s",
            {"w1": (6, 3, 1, 1), "w2": (6, 6, 1, 1), "head": (5, 6)},
        ),
        # a transposed convolution
        (
            "[first] a = Conv(x, w1) c = ConvTranspose(a, w2) %s",
            {"w1": (6, 3, 1, 1), "w2": (6, 4, 1, 1), "head": (5, 4)},
        ),
    ],
)
def test_readers_that_cannot_be_refitted_are_left_alone(body: str, shapes: dict[str, tuple[int, ...]]) -> None:
    model = build(body % "p = GlobalAveragePool(c) f = Flatten(p) y = Gemm<transB=1>(f, head)", shapes)
    ctx = context(model)
    group = ctx.fact(CHANNEL_GROUPS).groups[0]
    assert all(reader.node.op_type == "Gemm" for reader in readers(model, ctx.fact(CONSTANTS), [(group, [0])]))


def test_digits_are_read_as_well_as_before(fixtures: Path) -> None:
    path = fixtures / "digits_cnn" / "model.onnx"
    data = np.load(path.with_name("eval.npz"))
    model = load_model(path)
    calibration = open_calibration(str(path.with_name("calib.npz")), input_specs(model), ShapeBinding())
    result = Prune(ratio=0.3).run(model, context(model, calibration))
    assert result.metrics["achieved"] == pytest.approx(0.3, abs=0.02)
    session = Reference(model)
    hits = session.run({"image": data["image"]})[session.outputs[0]].argmax(axis=1) == data["labels"]
    assert hits.mean() > 0.97
