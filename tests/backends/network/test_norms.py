"""Normalizations written as arithmetic become one kernel, and equal ONNX Runtime; so do those of images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from kernel_runner import runnable
from network_runner import run_network
from text_models import build as model_of

from graphopt.reference import Reference
from graphopt.targets import Isa

Check = Callable[..., None]
ISAS = runnable()
isas = pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)


def _drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


@pytest.fixture
def check() -> Check:
    """Compile a model once and compare four runs."""

    def run(text: str, isa: Isa, kernels: list[str] | None = None, opset: int = 21, **weights: np.ndarray) -> None:
        model = model_of(text, opset, **weights)
        model.opset_imports["com.microsoft"] = 1
        reference = Reference(model.clone(), threads=1)
        for seed in range(4):
            random = np.random.default_rng(seed)
            feed = {
                str(value.name): random.standard_normal(tuple(value.shape or ())).astype(np.float32) * 2 + 1  # type: ignore[arg-type]
                for value in model.graph.inputs
            }
            got, ran = run_network(model, isa, feed, tasks=1)
            for name, expected in reference.run(feed).items():
                np.testing.assert_allclose(got[name], expected, rtol=1e-4, atol=1e-4)
            assert kernels is None or ran == kernels

    return run


@isas
@pytest.mark.parametrize("square", ["Pow(x, two)", "Mul(x, x)"])
@pytest.mark.parametrize(
    "divide", ["r = Reciprocal(s)\n n = Mul(r, x)", "r = Div(one, s)\n n = Mul(x, r)", "n = Div(x, s)"]
)
def test_a_root_mean_square_is_one_kernel(check: Check, isa: Isa, square: str, divide: str) -> None:
    check(
        f"""
        g (float[3,5,40] x) => (float[3,5,40] y) {{
            q = {square}
            m = ReduceMean<keepdims=1>(q, axes)
            e = Add(m, least)
            s = Sqrt(e)
            {divide}
            y = Mul(n, w)
        }}""",
        isa, ["Normalize"], two=np.float32(2), one=np.float32(1), least=np.float32(1e-5), axes=np.array([-1]),
        w=_drawn(40),
    )  # fmt: skip


@isas
@pytest.mark.parametrize("behind", ["g0 = Mul(n, w)\n y = Add(g0, b)", "y = Mul(w, n)", "y = Relu(n)"])
def test_a_layer_normalization_is_one_kernel(check: Check, isa: Isa, behind: str) -> None:
    check(
        f"""
        g (float[3,5,37] x) => (float[3,5,37] y) {{
            m = ReduceMean<keepdims=1>(x, axes)
            d = Sub(x, m)
            q = Mul(d, d)
            v = ReduceMean<keepdims=1>(q, axes)
            e = Add(v, least)
            s = Sqrt(e)
            n = Div(d, s)
            {behind}
        }}""",
        isa, ["Normalize", "Loops"] if "Relu" in behind else ["Normalize"], least=np.float32(1e-5),
        axes=np.array([2]), w=_drawn(37), b=_drawn(37),
    )  # fmt: skip


@isas
def test_a_mean_that_is_read_elsewhere_stays(check: Check, isa: Isa) -> None:
    check(
        """
        g (float[3,37] x) => (float[3,37] y, float[3,1] s) {
            q = Mul(x, x)
            m = ReduceMean<keepdims=1>(q, axes)
            e = Add(m, least)
            s = Sqrt(e)
            y = Div(x, s)
        }""",
        isa, None, least=np.float32(1e-5), axes=np.array([1]),
    )  # fmt: skip


@isas
def test_a_sum_and_its_normalization(check: Check, isa: Isa) -> None:
    check(
        """
        g (float[2,5,48] x, float[2,5,48] s) => (float[2,5,48] y, float[2,5,48] t) {
            y, m, v, t = com.microsoft.SkipLayerNormalization<epsilon=0.001>(x, s, w, b, c)
        }""",
        isa, ["Loops", "Normalize"], w=_drawn(48), b=_drawn(48), c=_drawn(48) + 1,
    )  # fmt: skip


@isas
@pytest.mark.parametrize("norm", ["InstanceNormalization(a, w, b)", "GroupNormalization<num_groups=3>(a, w, b)"])
def test_normalizations_of_images_behind_a_convolution(check: Check, isa: Isa, norm: str) -> None:
    check(
        f"""
        g (float[2,4,9,8] x) => (float[2,12,9,8] y) {{
            a = Conv(x, k)
            n = {norm}
            y = Relu(n)
        }}""",
        isa, None, k=_drawn(12, 4, 1, 1), w=_drawn(12), b=_drawn(12),
    )  # fmt: skip
