"""Samples of a batch that stay apart are run one after the other: what is proven, and what runs."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from batch_cases import APART, MIXED, model_of
from drawn_networks import networks
from drawn_transformers import transformers
from hypothesis import HealthCheck, given, settings

from graphopt.backend_base import BuildOptions
from graphopt.errors import BackendError, DataError
from graphopt.model_io import InputSpec, ShapeBinding, input_specs, load_model
from graphopt.reference import Feed, Reference
from graphopt.targets import host_machine
from graphopt_backends._engine import Engine
from graphopt_backends._lower import lower
from graphopt_backends._plan import read_plan
from graphopt_backends._session import run_plan, through_program
from graphopt_backends.batch.follow import Batch, batch_axes

_OPEN = {"T": 6, "sequence": 576, "batch": 1}
_SAMPLES = 3


def _binding(model: ir.Model) -> ShapeBinding:
    names = {dim for spec in input_specs(model) for dim in spec.shape or ()}
    return ShapeBinding(dims={name: size for name, size in _OPEN.items() if name in names})


def _verdict(model: ir.Model, **dims: int) -> Batch:
    binding = _binding(model)
    return lower(model, ShapeBinding(dims={**binding.dims, **dims}), "x86").batch


def _draw(spec: InputSpec, axes: tuple[int, ...], rng: np.random.Generator, samples: int) -> np.ndarray:
    sizes = [size if isinstance(size, int) else _OPEN.get(str(size), 1) for size in spec.shape or ()]
    shape = [samples if axis in axes else size for axis, size in enumerate(sizes)]
    dtype = spec.dtype.numpy()
    if spec.name == "sr":
        return np.array(16000, dtype)
    most = 2 if "mask" in spec.name or dtype.kind == "b" else 30
    return rng.standard_normal(shape).astype(dtype) if dtype.kind == "f" else rng.integers(0, most, shape).astype(dtype)


def _feed(model: ir.Model, samples: int = _SAMPLES, seed: int = 0) -> Feed:
    specs, rng = input_specs(model), np.random.default_rng(seed)
    axes = batch_axes(specs)
    return {spec.name: _draw(spec, axes.get(spec.name, ()), rng, samples) for spec in specs}


def _check_against_onnx_runtime(model: ir.Model, batch: Batch) -> None:
    """All samples at once give what they give one by one, where the batch says."""
    names = [spec.name for spec in input_specs(model)]
    axes = dict(zip(names, batch.inputs, strict=True))
    feed, reference = _feed(model), Reference(model, optimize=False)
    together = reference.run(feed)
    alone = [
        reference.run({n: a if axes[n] is None else np.take(a, [i], axes[n]) for n, a in feed.items()})
        for i in range(_SAMPLES)
    ]
    for (name, array), axis in zip(together.items(), batch.outputs, strict=True):
        joined = np.concatenate([one[name] for one in alone], axis)
        assert joined.shape == array.shape
        np.testing.assert_allclose(joined, array, rtol=0, atol=1e-4 * max(1.0, np.abs(array).max(initial=0)))


@pytest.mark.parametrize("name", APART)
def test_samples_are_proven_to_stay_apart_where_onnx_runtime_says_so_too(name) -> None:
    model = model_of(APART[name])
    batch = _verdict(model)
    assert batch.size == 1, batch.reason
    _check_against_onnx_runtime(model, batch)


@pytest.mark.parametrize("name", MIXED)
def test_samples_that_mix_are_never_taken_for_apart_and_the_reason_names_the_node(name) -> None:
    case, reason = MIXED[name]
    batch = _verdict(model_of(case))
    assert batch.size == 0
    assert any(word in batch.reason for word in reason.split("|")), batch.reason


def test_a_model_without_an_open_batch_serves_no_other() -> None:
    case = APART["norms"]
    model = model_of((case[0].replace("N", "1"), *case[1:]))
    assert _verdict(model).reason == "no input has an open batch axis"


def test_inputs_with_batches_of_several_sizes_serve_no_other() -> None:
    model = model_of(("(float[N,6] x, float[M,6] z) => (y)", "y = Concat<axis=0>(x, z)", {}, 17))
    assert _verdict(model, N=2, M=3).reason == "open batches of inputs have sizes 2, 3"
    model = model_of(("(float[N,N] x) => (y)", "y = Relu(x)", {}, 17))
    assert _verdict(model, N=4).reason == "input 'x' has the open batch on several axes"


def test_a_batch_that_was_fixed_by_the_user_is_the_unit() -> None:
    for case in APART.values():
        model = model_of(case)
        names = {dim for spec in input_specs(model) for dim in spec.shape or ()} & {"N", "batch"}
        batch = _verdict(model, **dict.fromkeys(names, 4))
        assert batch.size == 4, batch.reason
        assert batch.outputs == _verdict(model).outputs


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(networks())
def test_drawn_networks_agree(model) -> None:
    batch = _verdict(model)
    assert batch.size == 1, batch.reason
    _check_against_onnx_runtime(model, batch)


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(transformers())
def test_drawn_transformers_agree_but_for_branches_that_a_mean_over_everything_decides(model) -> None:
    batch = _verdict(model)
    if any(node.op_type == "If" for node in model.graph):
        assert "(ReduceMean) reduces along the batch" in batch.reason
    else:
        assert batch.size == 1, batch.reason
        _check_against_onnx_runtime(model, batch)


_TRAINED = (
    "basic_pitch", "cifar10_resnet20", "magika_v3_3", "minilm", "mobilenet_v1_025", "silero_vad_op15",
    "silero_vad_op18", "stories260k", "tiny_kws", "tiny_resnet8",
)  # fmt: skip


@pytest.mark.skipif("GRAPHOPT_ZOO" not in os.environ, reason="GRAPHOPT_ZOO is not set")
@pytest.mark.parametrize("case", _TRAINED)
def test_trained_models_take_any_batch(case, zoo) -> None:
    model = load_model(zoo(case) / "model.onnx")
    batch = _verdict(model)
    assert batch.size == 1, batch.reason
    _check_against_onnx_runtime(model, batch)


here = pytest.mark.skipif(host_machine() != "x86_64", reason="this machine is not x86-64")


@here
@pytest.mark.parametrize("name", ["layers over images", "samples along the second axis", "norms"])
def test_a_compiled_model_takes_any_batch(name, backend, cache, tmp_path: Path) -> None:
    model = model_of(APART[name])
    x86, target = backend("x86")
    build = x86.build(model, target, tmp_path, BuildOptions(cache=cache, binding=_binding(model)))
    assert str(build.facts["batch"]).startswith("any: axis ")
    run = x86.load(tmp_path, target, 2)
    for samples in (1, 2, 5):
        feed = _feed(model, samples, seed=samples)
        for output, expected in Reference(model).run(feed).items():
            np.testing.assert_allclose(run(feed)[output], expected, atol=1e-5 * max(1.0, np.abs(expected).max()))


@here
def test_batches_of_several_samples_are_run_one_after_the_other(backend, cache, tmp_path: Path) -> None:
    model = model_of(APART["norms"])
    x86, target = backend("x86")
    build = x86.build(model, target, tmp_path, BuildOptions(cache=cache, binding=ShapeBinding(dims={"N": 2})))
    assert build.facts["batch"] == "any multiple of 2: axis 0 of x, axis 0 of y"
    run, feed = x86.load(tmp_path, target, 1), _feed(model, 6)
    expected = Reference(model).run(feed)["y"]
    np.testing.assert_allclose(run(feed)["y"], expected, atol=1e-5)
    plan = read_plan(tmp_path)
    program = through_program(plan.parts[0], tmp_path, 1, ())
    np.testing.assert_allclose(run_plan(plan, [program], [feed, feed])[1]["y"], expected, atol=1e-5)
    with pytest.raises(
        DataError, match="has a batch of 3, the model was compiled for 2 at a time; give a multiple of 2"
    ):
        run(_feed(model, 3))
    with pytest.raises(DataError, match="has a batch of 0"):
        run(_feed(model, 0))


@here
def test_inputs_must_agree_on_the_batch(backend, cache, tmp_path: Path) -> None:
    model = model_of(APART["samples along the second axis"])
    x86, target = backend("x86")
    x86.build(model, target, tmp_path, BuildOptions(cache=cache, binding=_binding(model)))
    feed = {**_feed(model, 4), "h": _feed(model, 3)["h"]}
    with pytest.raises(DataError, match="'h': has a batch of 3 where another input has 4"):
        x86.load(tmp_path, target, 1)(feed)


@here
def test_a_model_that_mixes_samples_says_why_it_takes_no_other_batch(backend, cache, tmp_path: Path) -> None:
    model = model_of(MIXED["a mean over samples"][0])
    x86, target = backend("x86")
    build = x86.build(model, target, tmp_path, BuildOptions(cache=cache))
    assert build.facts["batch"] == "fixed: 'node' (ReduceMean) reduces along the batch"
    with pytest.raises(DataError, match=r"compiled for \(1, 6\), and its batch is fixed: 'node' \(ReduceMean\)"):
        x86.load(tmp_path, target, 1)(_feed(model, 2))
    engine = Engine(tmp_path / "model.so")
    with pytest.raises(BackendError, match="do not stay apart"):
        engine.run_batch([np.ones((2, 6), np.float32)], 2)


@here
def test_parts_of_several_engines_take_any_batch(backend, cache, tmp_path: Path) -> None:
    model = model_of(
        ("(float[5,batch,4,4] x) => (float[5,batch] y)", "h = Mul(x, w)\n d = Det(h)\n y = Relu(d)", {"w": (4,)}, 17)
    )
    x86, target = backend("x86")
    build = x86.build(model, target, tmp_path, BuildOptions(cache=cache, binding=_binding(model), fallback="ort"))
    assert (build.facts["parts"], build.facts["batch"]) == (3, "any: axis 1 of x, axis 1 of y")
    feed = _feed(model, 3)
    np.testing.assert_allclose(x86.load(tmp_path, target, 1)(feed)["y"], Reference(model).run(feed)["y"], atol=1e-5)
