"""Random towers and real models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.model_io import input_specs, load_model, model_bytes
from graphopt.reference import Reference

ZOO = (
    "basic_pitch", "cifar10_resnet20", "cifar10_resnet56", "gtcrn_simple", "magika_v3_3", "minilm", "mnist_cntk",
    "mobilenet_v1_025", "mobilenet_v2", "silero_vad_op15", "silero_vad_op18", "stories260k", "tiny_kws",
    "tiny_resnet8", "ultraface_rfb320", "yunet_n320",
)  # fmt: skip


CHANNELS = st.sampled_from([1, 2, 3])


@st.composite
def towers(draw: st.DrawFn) -> tuple[str, dict[str, np.ndarray]]:
    """A chain of convolutions, grouped and transposed, with norms, activations and per-channel arithmetic between."""
    seed = draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    channels, lines, held, current = 4, [], {}, "x"

    def constant(*shape: int, positive: bool = False) -> str:
        name = f"k{len(held)}"
        array = rng.standard_normal(shape) * 0.5
        held[name] = (np.abs(array) + 0.2 if positive else array).astype(np.float32)
        return name

    for i in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["conv", "transposed", "norm", "relu", "scale", "shift", "residual"]))
        out = f"t{i}"
        if kind in ("conv", "transposed"):
            groups = draw(st.sampled_from([g for g in (1, 2, 4) if channels % g == 0]))
            wide = groups * draw(CHANNELS)
            bias = f", {constant(wide)}" if draw(st.booleans()) else ""
            if kind == "conv":
                pad = draw(st.sampled_from([0, 1]))
                kernel = constant(wide, channels // groups, 2 * pad + 1, 1)
                lines.append(
                    f"{out} = Conv <group = {groups}, pads = [{pad}, 0, {pad}, 0]> ({current}, {kernel}{bias})"
                )
            else:
                kernel = constant(channels, wide // groups, 1, 1)
                lines.append(f"{out} = ConvTranspose <group = {groups}> ({current}, {kernel}{bias})")
            channels = wide
        elif kind == "norm":
            parts = [constant(channels) for _ in range(3)] + [constant(channels, positive=True)]
            lines.append(f"{out} = BatchNormalization({current}, {', '.join(parts)})")
        elif kind == "relu":
            lines.append(f"{out} = Relu({current})")
        elif kind == "residual":
            lines.append(f"{out} = Add({current}, {current})")
        else:
            number = constant(channels, 1, 1, positive=True)
            lines.append(f"{out} = {'Mul' if kind == 'scale' else 'Sub'}({current}, {number})")
        current = out
    lines[-1] = lines[-1].replace(current, "y", 1)
    inputs = ", ".join(f"float[{','.join(map(str, a.shape))}] {n}" for n, a in held.items())
    body = (
        f"g (float[N,4,3,3] x{', ' + inputs if inputs else ''}) => (float[N,{channels},3,3] y) {{ "
        + "\n".join(lines)
        + " }"
    )
    return body, held


@settings(max_examples=40, deadline=None)
@given(tower=towers())
def test_fold_agrees_on_random_towers(bench: Any, tower: tuple[str, dict[str, np.ndarray]]) -> None:
    body, held = tower
    bench.check(bench.with_weights(bench.model(body), **held), tolerance=1e-4)


@st.composite
def shape_programs(draw: st.DrawFn) -> str:
    """Integer arithmetic on the shape of `float[N,3,4]`: vectors and scalars, combined at random."""
    lines, vectors, scalars, held = ["v0 = Shape(x)"], {"v0": 3}, ["two"], ["int64 two = {2}"]

    def constant(values: list[int], *, scalar: bool = False) -> str:
        name = f"k{len(held)}"
        shape = "" if scalar else f"[{len(values)}]"
        held.append(f"int64{shape} {name} = {{{', '.join(map(str, values))}}}")
        return name

    for i in range(draw(st.integers(2, 9))):
        vector = draw(st.sampled_from(sorted(vectors)))
        size = vectors[vector]
        kind = draw(st.sampled_from(["pick", "cut", "join", "calculate", "calculate_scalar", "wrap", "choose"]))
        if kind == "pick":
            index = draw(st.integers(-size, size - 1))
            scalars.append(f"s{i}")
            lines.append(f"s{i} = Gather({vector}, {constant([index], scalar=True)})")
            continue
        if kind == "calculate_scalar":
            operator, left = draw(st.sampled_from(["Add", "Sub", "Mul"])), draw(st.sampled_from(scalars))
            lines.append(f"s{i} = {operator}({left}, {draw(st.sampled_from(scalars))})")
            scalars.append(f"s{i}")
            continue
        if kind == "cut":
            start = draw(st.integers(0, size - 1))
            stop = draw(st.integers(start + 1, size + 2))
            lines.append(f"v{i + 1} = Slice({vector}, {constant([start])}, {constant([stop])})")
            vectors[f"v{i + 1}"] = min(stop, size) - start
        elif kind == "join":
            other = draw(st.sampled_from(sorted(vectors)))
            lines.append(f"v{i + 1} = Concat <axis = 0> ({vector}, {other})")
            vectors[f"v{i + 1}"] = size + vectors[other]
        elif kind == "wrap":
            lines.append(f"v{i + 1} = Unsqueeze({draw(st.sampled_from(scalars))}, {constant([0])})")
            vectors[f"v{i + 1}"] = 1
        elif kind == "choose":
            number, other = constant([draw(st.integers(-1, 4))]), constant([9])
            lines.append(f"q{i} = Equal({vector}, {number})")
            lines.append(f"v{i + 1} = Where(q{i}, {other}, {vector})")
            vectors[f"v{i + 1}"] = size
        else:
            operator = draw(st.sampled_from(["Add", "Sub", "Mul", "Div"]))
            lines.append(f"v{i + 1} = {operator}({vector}, {constant([draw(st.integers(1, 3))] * size)})")
            vectors[f"v{i + 1}"] = size
    last = max(vectors, key=lambda name: int(name[1:]))
    lines.append(f"y = Neg({last})")
    body = "\n".join(lines)
    return f"g (float[N,3,4] x) => (int64[{vectors[last]}] y) <{', '.join(held)}> {{ {body} }}"


@settings(max_examples=60, deadline=None)
@given(program=shape_programs())
def test_fold_agrees_on_random_shape_arithmetic(bench: Any, program: str) -> None:
    bench.check(bench.model(program))


@pytest.mark.parametrize("case", ZOO)
def test_fold_keeps_what_a_real_model_computes(bench: Any, zoo: Callable[[str], Path], case: str) -> None:
    folder = zoo(case)
    original, model = load_model(folder / "model.onnx"), load_model(folder / "model.onnx")
    before = bench.interface(original)
    result = bench.fold(model)
    assert result.modified == (model_bytes(model) != model_bytes(original))
    assert bench.interface(model) == before
    wanted, folded = Reference(original), Reference(model)
    with np.load(folder / "calib.npz") as data:
        ranks = {spec.name: spec.rank for spec in input_specs(original)}
        for i in range(4):
            feed = {
                n: data[n][i : i + 1] if data[n].ndim == rank else np.asarray(data[n][i]) for n, rank in ranks.items()
            }
            expected, found = wanted.run(feed), folded.run(feed)
            for name, array in expected.items():
                size = np.abs(array).max() + 1e-6
                np.testing.assert_allclose(found[name] / size, array / size, atol=2e-5, err_msg=name)
    assert not bench.fold(model).modified


@pytest.mark.parametrize(
    ("case", "gone"),
    [
        (
            "cifar10_resnet20",
            {"BatchNormalization", "Shape", "Gather", "Concat", "ConstantOfShape", "Cast", "Unsqueeze"},
        ),
        ("ultraface_rfb320", {"BatchNormalization", "Shape", "Gather", "Unsqueeze"}),
        ("gtcrn_simple", {"BatchNormalization"}),
        ("minilm", {"Concat"}),
    ],
)
def test_fold_leaves_no_shape_arithmetic_where_shapes_are_known(
    bench: Any, zoo: Callable[[str], Path], case: str, gone: set[str]
) -> None:
    model = load_model(zoo(case) / "model.onnx")
    bench.fold(model)
    assert not gone & set(bench.operators(model))
    pads = [node.inputs[1] for node in model.graph if node.op_type == "Pad" and len(node.inputs) > 1]
    assert all(value is not None and value.is_initializer() for value in pads)
