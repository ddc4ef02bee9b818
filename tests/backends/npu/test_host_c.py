"""Host parts as C source: compilers take it without a word, and it computes what ONNX Runtime does."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from host_cases import CASES, draw
from host_check import CC, STRICT, Find, needs_compiler, no_npu, strict_compiler, written
from text_models import build

from graphopt.errors import BackendError
from graphopt.model_io import ShapeBinding
from graphopt.reference import Reference
from graphopt_backends._lower import lower
from graphopt_backends.npu.host import c_lower
from graphopt_backends.npu.host.c_lower import lower_part, refused_nodes
from graphopt_backends.npu.host.c_names import helper, literal
from graphopt_backends.npu.host.c_run import HEADER, SOURCE, Compiled


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A compiler that takes every warning for an error."""
    return strict_compiler(tmp_path_factory.mktemp("strict"))


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_c_computes_what_onnx_runtime_does(name: str, backend: Find, strict: str, tmp_path: Path) -> None:
    make, tolerance = CASES[name]
    model, rng = make(), np.random.default_rng(5)
    plan = written(model, backend("npu")[1], tmp_path)
    compiled, reference = Compiled(tmp_path, strict, no_npu), Reference(model)
    part, specs = plan.parts[0], {spec.name: spec for spec in plan.outputs}
    for _ in range(4):
        feed = {str(value.name): draw(value, rng) for value in model.graph.inputs}
        wanted = reference.run(feed)
        for function, inputs, outputs in (
            ("model_run", [spec.name for spec in plan.inputs], plan.outputs),
            ("model_host0", part.inputs, [specs[output] for output in part.outputs]),
        ):
            made = compiled.run(function, [feed[input_] for input_ in inputs], outputs)
            for spec, array in zip(outputs, made, strict=True):
                assert (str(array.dtype), array.shape) == (str(wanted[spec.name].dtype), wanted[spec.name].shape)
                np.testing.assert_allclose(array, wanted[spec.name], rtol=tolerance, atol=tolerance)


@needs_compiler
def test_every_byte_is_dequantized_exactly_with_a_scale_of_nine_digits(
    backend: Find, strict: str, tmp_path: Path
) -> None:
    scale = np.array(0.0039215227589, np.float32)
    model = build("g (int8[256] x) => (float[256] y) { y = DequantizeLinear(x, s) }", s=scale)
    plan = written(model, backend("npu")[1], tmp_path)
    everything = np.arange(-128, 128).astype(np.int8)
    (made,) = Compiled(tmp_path, strict, no_npu).run("model_run", [everything], plan.outputs)
    assert np.array_equal(made, everything.astype(np.float32) * scale)


@needs_compiler
def test_the_first_of_equals_comes_first(backend: Find, strict: str, tmp_path: Path) -> None:
    model = build("g (float[1,8] x) => (float[1,5] y, int64[1,5] i) { y, i = TopK(x, k) }", k=np.array([5], np.int64))
    plan = written(model, backend("npu")[1], tmp_path)
    given = np.array([[1, 3, 2, 3, 1, 3, 2, 0]], np.float32)
    values, places = Compiled(tmp_path, strict, no_npu).run("model_run", [given], plan.outputs)
    assert values.tolist() == [[3, 3, 3, 2, 2]]
    assert places.tolist() == [[1, 3, 5, 2, 6]]


@needs_compiler
def test_any_name_of_a_tensor_becomes_a_name_in_c(backend: Find, strict: str, tmp_path: Path) -> None:
    model = build("g (float[3] p, float[3] q, float[3] r) => (float[3] y) { a = Exp(p)  b = Min(a, q)  y = Mul(b, r) }")
    names = {"p": "double", "q": "expf", "r": "*/ 3 x\n", "a": "min_float32", "b": "inputs", "y": "expf "}
    for value in (*model.graph.inputs, *(o for node in model.graph for o in node.outputs)):
        value.name = names[str(value.name)]
    plan = written(model, backend("npu")[1], tmp_path)
    feed = [np.array([0, 1, 2], np.float32), np.array([5, 1, 9], np.float32), np.array([1, 2, 3], np.float32)]
    (made,) = Compiled(tmp_path, strict, no_npu).run("model_run", feed, plan.outputs)
    np.testing.assert_allclose(made, np.minimum(np.exp(feed[0]), feed[1]) * feed[2], rtol=1e-6)


@pytest.mark.parametrize("compiler", ["arm-none-eabi-gcc", "aarch64-linux-gnu-gcc"])
def test_cross_compilers_take_the_source(compiler: str, backend: Find, tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    written(CASES["heads"][0](), backend("npu")[1], tmp_path)
    words = [compiler, "-std=c99", *STRICT.split(), "-O2", "-c", SOURCE, "-o", "model.o"]
    assert subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True).stderr == ""


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_the_header_is_one_for_cpp_as_well(backend: Find, tmp_path: Path) -> None:
    written(CASES["heads"][0](), backend("npu")[1], tmp_path)
    words = ["g++", "-std=c++11", *STRICT.split(), "-x", "c++", "-fsyntax-only", HEADER]
    assert subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False).stderr.count("error") == 0


@needs_compiler
def test_memory_can_be_placed_and_nothing_is_allocated(backend: Find, tmp_path: Path) -> None:
    written(CASES["heads"][0](), backend("npu")[1], tmp_path)
    text = (tmp_path / SOURCE).read_text()
    assert not re.search(r"\b(malloc|calloc|free|pthread|tvm)", text, re.IGNORECASE)
    placed = '-DGRAPHOPT_HOST_WORKSPACE=__attribute__((section("fast")))'
    subprocess.run([str(CC), "-std=c99", placed, "-c", SOURCE, "-o", "model.o"], cwd=tmp_path, check=True)
    assert b"fast" in (tmp_path / "model.o").read_bytes()


def test_the_same_model_gives_the_same_source(backend: Find, tmp_path: Path) -> None:
    found: list[bytes] = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        folder.mkdir()
        written(CASES["heads"][0](), backend("npu")[1], folder)
        found.append((folder / SOURCE).read_bytes() + (folder / HEADER).read_bytes())
    assert found[0] == found[1]


def test_tensors_that_are_not_needed_at_the_same_time_share_memory(backend: Find, tmp_path: Path) -> None:
    body = "  ".join(f"v{i + 1} = CumSum(v{i}, a)" for i in range(8))
    model = build(f"g (float[1000] v0) => (float[1000] v8) {{ {body} }}", a=np.array(0, np.int64))
    written(model, backend("npu")[1], tmp_path)
    size = re.search(r"bytes\[(\d+)\]", (tmp_path / SOURCE).read_text())
    assert size is not None
    assert int(size[1]) < 2.1 * 4000, "two tensors are alive at a time, of seven"


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-45, 3.4028235e38, 16777217.0, -0.0, 1e10])
def test_floats_are_read_back_as_they_were(value: float) -> None:
    text = literal(np.float32(value), "float32")
    assert text.endswith("f")
    assert np.float32(float(text[:-1])).tobytes() == np.float32(value).tobytes()
    assert float(literal(value, "float64")) == value


def test_numbers_that_have_no_digits_have_names() -> None:
    assert [literal(v, "float32") for v in (np.inf, -np.inf, np.nan)] == ["INFINITY", "-INFINITY", "NAN"]
    assert literal(-(2**63), "int64") == "INT64_MIN"
    assert literal(-(2**31), "int32") == "INT32_MIN"
    assert "a < b ? a : b" in helper("min_int8")


def test_constants_that_are_too_large_for_source_name_the_largest(
    backend: Find, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(c_lower, "MOST_BYTES", 1 << 20)
    small, large = np.ones((8, 8), np.float32), np.ones((8, 1 << 16), np.float32)
    model = build(
        "g (float[1,8] x) => (float[1,65536] y) { a = MatMul(x, small)  y = MatMul(a, large) }",
        small=small,
        large=large,
    )
    found = refused_nodes(lower(model, ShapeBinding(), "npu").model)
    assert [(refused.operator, "1 MiB" in refused.reason) for refused in found.values()] == [("MatMul", True)]
    with pytest.raises(BackendError, match="1 MiB of constants"):
        lower_part(lower(model, ShapeBinding(), "npu").model, "host0")


@needs_compiler
def test_an_input_can_be_an_output(backend: Find, strict: str, tmp_path: Path) -> None:
    model = build("g (float[3] x) => (float[3] y) { y = Relu(x) }")
    model.graph.outputs.append(model.graph.inputs[0])
    plan = written(model, backend("npu")[1], tmp_path)
    given = np.array([-1, 0, 2], np.float32)
    values = Compiled(tmp_path, strict, no_npu).run("model_run", [given], plan.outputs)
    assert [value.tolist() for value in values] == [[0, 0, 2], [-1, 0, 2]]


def test_a_resize_by_a_scale_that_tvm_does_not_keep_is_named() -> None:
    body = 'g (float[1,2,7,4] x) => (float[1,2,3,8] y) { y = Resize<mode = "linear">(x, , scales) }'
    model = build(body, scales=np.array([1, 1, 0.5, 2], np.float32))
    (found,) = refused_nodes(lower(model, ShapeBinding(), "npu").model).values()
    assert (found.operator, found.reason) == ("Resize", "its scale makes no whole number of elements")
    exact = build(body.replace("7,4", "6,4"), scales=np.array([1, 1, 0.5, 2], np.float32))
    assert refused_nodes(lower(exact, ShapeBinding(), "npu").model) == {}
    some = build(body.replace('"linear"', '"linear", axes = [-2, -1]'), 18, scales=np.array([0.5, 2], np.float32))
    assert len(refused_nodes(lower(some, ShapeBinding(), "npu").model)) == 1
