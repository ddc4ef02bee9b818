"""Graphs of 16-bit floats compute in float32, and their weights stay 16 bits wide."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import tvm
from kernel_program import ISAS as CPUS
from kernel_runner import AVX512, run, runnable
from network_runner import run_network

from graphopt.model_io import ShapeBinding
from graphopt.reference import Reference
from graphopt.targets import Isa
from graphopt_backends._compile import llvm_target
from graphopt_backends._lower import lower
from graphopt_backends.kernels.batched import Batched
from graphopt_backends.kernels.build import build
from graphopt_backends.kernels.conv import Conv, Window
from graphopt_backends.kernels.expression import as_type, operand
from graphopt_backends.kernels.gemm import Gemm
from graphopt_backends.kernels.loops import Loops
from graphopt_backends.kernels.multiply import stored_as
from graphopt_backends.network.convert import convert, unsupported
from graphopt_backends.network.half import Widened, narrowed, widen
from graphopt_backends.network.weights import Weights

ISAS = runnable()
HALVES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
needs_kernels = pytest.mark.skipif(not ISAS, reason="this CPU runs none of the kernels")
on_every_cpu = pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
in_both_types = pytest.mark.parametrize("dtype", HALVES, ids=str)


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def _model(text: str, **constants: np.ndarray) -> ir.Model:
    """A graph in operator set 21 with constants."""
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21, "some.domain" : 1]> {text}')
    for name, array in constants.items():
        tensor = ir.Tensor(array, name=name)
        value = next(v for node in model.graph for v in node.inputs if v is not None and v.name == name)
        value.const_value, value.type, value.shape = tensor, ir.TensorType(tensor.dtype), tensor.shape
        model.graph.register_initializer(value)
    return model


def _halves(**arrays: np.ndarray) -> dict[str, np.ndarray]:
    return {name: array.astype(np.float16) for name, array in arrays.items()}


_CONV_NET = """
g (float16[1,3,19,17] x) => (float16[1,10] y) {
    a = Conv<pads=[1,1,1,1], strides=[2,2]>(x, stem, stem_bias)
    b = Relu(a)
    c = Conv(b, point)
    d = Conv<pads=[1,1,1,1], group=24>(c, depth)
    e = Add(d, c)
    f = MaxPool<kernel_shape=[2,2], strides=[2,2]>(e)
    g = GlobalAveragePool(f)
    h = Flatten(g)
    y = Gemm<transB=1, alpha=0.5>(h, head, head_bias)
}"""

_MLP = """
g (float16[5,77] x) => (float16[5,40] y, float16[5,130] z) {
    a = MatMul(x, up)
    z = Gelu(a)
    y = MatMul(z, down)
}"""

_ATTENTION = """
g (float16[2,9,48] x, int64[2,9] kept) => (float16[2,9,48] y) {
    heads = Constant<value_ints=[0,0,4,12]>()
    flat = Constant<value_ints=[0,0,48]>()
    axes = Constant<value_ints=[1,2]>()
    n = LayerNormalization(x, gain, shift)
    q0 = MatMul(n, wq)
    k0 = MatMul(n, wk)
    v0 = MatMul(n, wv)
    q1 = Reshape(q0, heads)
    k1 = Reshape(k0, heads)
    v1 = Reshape(v0, heads)
    q = Transpose<perm=[0,2,1,3]>(q1)
    k = Transpose<perm=[0,2,3,1]>(k1)
    v = Transpose<perm=[0,2,1,3]>(v1)
    s = MatMul(q, k)
    scaled = Mul(s, scale)
    there = Cast<to=10>(kept)
    missing = Sub(one, there)
    mask = Mul(missing, least)
    wide = Unsqueeze(mask, axes)
    masked = Add(scaled, wide)
    p = Softmax<axis=-1>(masked)
    o = MatMul(p, v)
    o1 = Transpose<perm=[0,2,1,3]>(o)
    o2 = Reshape(o1, flat)
    o3 = MatMul(o2, wo)
    y = Add(o3, x)
}"""

_MIXED = """
g (float[3,33] x) => (float[3,65] y, float16[3,65] z, int32[3,65] i) {
    a = Cast<to=10>(x)
    b = MatMul(a, w)
    c = Cast<to=1>(b)
    d = LayerNormalization(c, gain)
    e = Cast<to=10>(d)
    z = Mul(e, two)
    y = Cast<to=1>(z)
    f = Mul(z, ten)
    i = Cast<to=6>(f)
}"""

NETWORKS: dict[str, tuple[str, dict[str, np.ndarray]]] = {
    "convolutions": (
        _CONV_NET,
        _halves(
            stem=_normal(24, 3, 3, 3), stem_bias=_normal(24), point=_normal(24, 24, 1, 1, seed=1),
            depth=_normal(24, 1, 3, 3, seed=2), head=_normal(10, 24, seed=3), head_bias=_normal(10),
        ),
    ),
    "perceptron": (_MLP, _halves(up=_normal(77, 130), down=_normal(130, 40))),
    "attention": (
        _ATTENTION,
        _halves(
            gain=1 + _normal(48), shift=_normal(48), wq=_normal(48, 48, seed=1), wk=_normal(48, 48, seed=2),
            wv=_normal(48, 48, seed=3), wo=_normal(48, 48, seed=4), scale=np.array(12**-0.5), one=np.array(1),
            least=np.array(-60000),
        ),
    ),
    "mixed": (
        _MIXED,
        {**_halves(w=_normal(33, 65), two=np.array(2), ten=np.array(10)), "gain": 1 + _normal(65)},
    ),
}  # fmt: skip


def _feed(model: ir.Model, seed: int) -> dict[str, np.ndarray]:
    rng, feed = np.random.default_rng(seed), dict[str, np.ndarray]()
    for value in model.graph.inputs:
        shape = tuple(int(size) for size in value.shape or () if isinstance(size, int))
        assert value.dtype is not None
        floats = value.dtype.is_floating_point()
        array = rng.standard_normal(shape) if floats else (rng.random(shape) < 0.7) | (np.indices(shape)[-1] == 0)
        feed[str(value.name)] = array.astype(value.dtype.numpy())
    return feed


@needs_kernels
@on_every_cpu
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_float16_compute_what_onnx_runtime_does(name: str, isa: Isa) -> None:
    model = _model(NETWORKS[name][0], **NETWORKS[name][1])
    reference = Reference(model.clone(), threads=1)
    feed = _feed(model, len(name))
    got, _ = run_network(model, isa, feed)
    for output, expected in reference.run(feed).items():
        assert got[output].dtype == expected.dtype
        if expected.dtype == np.int32:
            assert np.abs(got[output] - expected).max() <= 1
        else:
            np.testing.assert_allclose(got[output].astype("f"), expected.astype("f"), rtol=4e-3, atol=4e-3)


@needs_kernels
@on_every_cpu
@in_both_types
def test_results_are_those_of_float32_arithmetic_on_the_same_weights(isa: Isa, dtype: np.dtype) -> None:
    up, down = _normal(77, 130).astype(dtype), _normal(130, 41).astype(dtype)
    to = int(ir.Tensor(up).dtype)
    text = f"""
    g (float[5,77] x) => (float[5,41] y) {{
        a = Cast<to=1>(up)
        b = MatMul(x, a)
        c = Relu(b)
        d = Cast<to={to}>(c)
        e = Cast<to=1>(d)
        f = Cast<to=1>(down)
        y = MatMul(e, f)
    }}"""
    x = _normal(5, 77, seed=1)
    expected = np.maximum(x.astype("d") @ up.astype("d"), 0) @ down.astype("d")
    got, ran = run_network(_model(text, up=up, down=down), isa, {"x": x})
    np.testing.assert_allclose(got["y"], expected, rtol=1e-5, atol=1e-6)
    assert ran == ["Gemm", "Gemm"]  # the rounding in between is left out


@needs_kernels
@on_every_cpu
@in_both_types
@pytest.mark.parametrize(("rows", "columns", "depth"), [(1, 500, 333), (5, 77, 33), (37, 16, 64), (30, 48, 1024)])
def test_products_widen_their_weights_exactly(isa: Isa, dtype: np.dtype, rows: int, columns: int, depth: int) -> None:
    kernel = Gemm(isa, "f32", rows, columns, depth, stored=stored_as(np.empty(0, dtype)))
    x, weight = _normal(rows, depth, seed=rows), _normal(depth, columns, seed=columns).astype(dtype)
    packed = kernel.pack(weight)
    assert packed.itemsize == 2
    got = run(kernel, [x, packed], np.zeros((rows, columns), np.float32))
    np.testing.assert_allclose(got, x.astype("d") @ weight.astype("d"), rtol=1e-5, atol=1e-6)


@needs_kernels
@on_every_cpu
@in_both_types
@pytest.mark.parametrize("groups", [1, 3])
def test_convolutions_widen_their_weights_exactly(isa: Isa, dtype: np.dtype, groups: int) -> None:
    window = Window((3, 2), pads=(1, 0, 1, 1))
    stored = stored_as(np.empty(0, dtype))
    kernel = Conv(isa, "f32", 2, 7, 9, 12, 21, window, groups, stored=stored)
    same = Conv(isa, "f32", 2, 7, 9, 12, 21, window, groups)
    x, weight = _normal(2, 7, 9, 12, seed=groups), _normal(21, 12 // groups, 3, 2).astype(dtype)
    result = np.zeros((2, *kernel.result_size, 21), np.float32)
    expected = run(same, [x, same.pack(weight.astype(np.float32))], result)
    np.testing.assert_allclose(run(kernel, [x, kernel.pack(weight)], result), expected, rtol=1e-5, atol=1e-6)


@needs_kernels
@on_every_cpu
@in_both_types
def test_many_constant_matrices_stay_narrow(isa: Isa, dtype: np.dtype) -> None:
    text = "g (float[3,7,29] x) => (float[3,7,37] y) { a = Cast<to=1>(w) \n y = MatMul(x, a) }"
    weight = _normal(3, 29, 37).astype(dtype)
    lowered = lower(_model(text, w=weight), ShapeBinding(), "x86").model
    calls = convert(lowered, isa, Weights(io.BytesIO())).calls
    assert [call.kernel.stored for call in calls if isinstance(call.kernel, Batched)] == [str(dtype)]
    x = _normal(3, 7, 29, seed=1)
    got, _ = run_network(_model(text, w=weight), isa, {"x": x})
    np.testing.assert_allclose(got["y"], x.astype("d") @ weight.astype("d"), rtol=1e-5, atol=1e-6)


@needs_kernels
@on_every_cpu
@in_both_types
def test_rows_of_a_table_are_widened_when_they_are_looked_up(isa: Isa, dtype: np.dtype) -> None:
    table = _normal(999, 67).astype(dtype)
    text = f"""
    g (int64[5] i) => ({"float16" if dtype == np.float16 else "bfloat16"}[5,67] y, float[5,67] z) {{
        y = Gather(table, i)
        wide = Cast<to=1>(table)
        rows = Gather(wide, i)
        z = Neg(rows)
    }}"""
    numbers = np.array([0, 998, -999, 7, -1])
    got, ran = run_network(_model(text, table=table), isa, {"i": numbers})
    np.testing.assert_array_equal(got["y"], table[numbers])
    np.testing.assert_array_equal(got["z"], -table[numbers].astype(np.float32))
    assert ran.count("Lookup") == 2
    lowered = lower(_model(text, table=table), ShapeBinding(), "x86").model
    weights = Weights(io.BytesIO())
    convert(lowered, isa, weights)
    assert weights.nbytes < 1.1 * table.nbytes


@in_both_types
def test_weights_take_half_the_bytes(dtype: np.dtype) -> None:
    up, down = _normal(256, 512), _normal(512, 256)
    sizes: list[int] = []
    for kind in (np.dtype(np.float32), dtype):
        to = int(ir.Tensor(np.zeros(1, kind)).dtype)
        text = f"""
        g (float[4,256] x) => (float[4,256] y) {{
            a = Cast<to={to}>(x)
            b = MatMul(a, up)
            c = MatMul(b, down)
            y = Cast<to=1>(c)
        }}"""
        lowered = lower(_model(text, up=up.astype(kind), down=down.astype(kind)), ShapeBinding(), "x86").model
        assert not unsupported(lowered)
        weights = Weights(io.BytesIO())
        convert(lowered, AVX512, weights)
        sizes.append(weights.nbytes)
    assert sizes[1] < 0.51 * sizes[0]


def test_numbers_are_narrowed_only_where_nothing_is_lost() -> None:
    rng = np.random.default_rng(0)
    plain = rng.standard_normal((64, 65)).astype(np.float32)
    for dtype in HALVES:
        exact = plain.astype(dtype).astype(np.float32)
        found = narrowed(exact)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found.astype(np.float32), exact)
        exact[-1, -2] += np.float32(1e-6)
        assert narrowed(exact).dtype == np.float32
    assert narrowed(plain).dtype == np.float32
    assert narrowed(np.ones(9, np.float32)).dtype == np.float32, "too few to count"
    assert narrowed(np.full(4096, 1e5, np.float32)).dtype == np.float32, "too large for float16"
    assert narrowed(np.ones(4096, np.int8)).dtype == np.int8


def _types(model: ir.Model) -> set[ir.DataType | None]:
    return {value.dtype for graph in model.graphs() for node in graph for value in node.outputs}


_LOOP = """
g (float16[4] x, int64 turns, bool[1] asked) => (float16[4] y, float16[K,4] all, float16[4] z) {
    go = Constant<value = bool {1}>()
    y, all = Loop(turns, go, x) <body = b (int64 i, bool on, float16[4] s) => (bool more, float16[4] t, float16[4] u) {
        n = Cast<to=10>(i)
        a = Add(s, n)
        t = Mul(a, x)
        u = Cast<to=10>(t)
        more = Identity(on)
    }>
    z = If(asked) <
        then_branch = p () => (float16[4] zp) { zp = Neg(x) },
        else_branch = q () => (float16[4] zq) {
            w = Cast<to=1>(x)
            v = Exp(w)
            zq = Cast<to=10>(v)
        }>
}"""


@pytest.mark.parametrize("asked", [True, False])
def test_bodies_of_loops_and_branches_compute_in_float32_as_well(asked: bool) -> None:
    model = _model(_LOOP)
    reference = Reference(model.clone(), threads=1)
    infer = lower(model, ShapeBinding(), "x86").model
    inner = [value for graph in list(infer.graphs())[1:] for node in graph for value in node.outputs]
    assert inner
    assert not {value.dtype for value in inner} & {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
    widened = Reference(infer, threads=1)
    for seed in range(4):
        feed = {"x": _normal(4, seed=seed).astype("e"), "turns": np.array(3), "asked": np.array([asked])}
        got = widened.run(feed)
        for name, expected in reference.run(feed).items():
            assert got[name].dtype == np.float16
            np.testing.assert_allclose(got[name].astype("f"), expected.astype("f"), rtol=4e-3, atol=1e-3)


@needs_kernels
@on_every_cpu
def test_integers_are_made_of_numbers_of_16_bits(isa: Isa) -> None:
    text = """
    g (float[7] x) => (int64[7] i, bool[7] b, float[7] f) {
        h = Cast<to=10>(x)
        i = Cast<to=7>(h)
        b = Cast<to=9>(h)
        whole = Cast<to=10>(i)
        f = Cast<to=1>(whole)
    }"""
    x = np.array([2.9999, -2.9999, 1e-9, 0, 41.99, 2047.9, -0.5], np.float32)
    expected = x.astype(np.float16)
    got, _ = run_network(_model(text), isa, {"x": x})
    np.testing.assert_array_equal(got["i"], expected.astype(np.int64))
    np.testing.assert_array_equal(got["b"], expected.astype(bool))
    np.testing.assert_array_equal(got["f"], expected.astype(np.int64))


def test_operators_of_other_domains_keep_their_types() -> None:
    text = "g (float16[4] x) => (float16[4] y) { a = Neg(x) \n b = some.domain.Thing(a) \n y = Neg(b) }"
    model = _model(text)
    for node in model.graph:
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT16), ir.Shape([4])
    assert widen(model)
    thing = next(node for node in model.graph if node.op_type == "Thing")
    ends = [value.dtype for value in (*thing.inputs, *thing.outputs) if value is not None]
    assert ends == [ir.DataType.FLOAT16] * 2
    assert [node.outputs[0].dtype for node in model.graph if node.op_type == "Neg"] == [ir.DataType.FLOAT] * 2
    assert [(value.name, value.dtype) for value in model.graph.outputs] == [("y", ir.DataType.FLOAT16)]


def test_types_named_by_attributes_change_with_the_values() -> None:
    text = """
    g (float16[2,3] x, int64[2] s) => (float16[2,3] y) {
        a = ConstantOfShape<value = float16[1] {15360}>(s)
        b = EyeLike<dtype=10>(x)
        c = Add(a, b)
        y = Add(c, x)
    }"""
    model = _model(text)
    reference = Reference(model.clone(), threads=1)
    model = lower(model, ShapeBinding(), "x86").model
    assert _types(model) == {ir.DataType.FLOAT, ir.DataType.FLOAT16}
    feed = {"x": _normal(2, 3).astype("e"), "s": np.array([2, 3])}
    np.testing.assert_allclose(Reference(model).run(feed)["y"], reference.run(feed)["y"], rtol=2e-3)


def test_a_model_without_16_bit_floats_stays_as_it_is() -> None:
    model = _model("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    before = ir.to_proto(model).SerializeToString()
    assert not widen(model)
    assert ir.to_proto(model).SerializeToString() == before


def test_constants_are_made_of_16_bits_whenever_they_are_read() -> None:
    array = _normal(40, 50).astype(np.float16)
    wide = Widened(ir.Tensor(array, name="w"))
    assert (wide.dtype, tuple(wide.shape), wide.nbytes) == (ir.DataType.FLOAT, (40, 50), 8000)
    np.testing.assert_array_equal(wide.numpy(), array.astype(np.float32))
    assert wide.tobytes() == array.astype(np.float32).tobytes()


def _listing(kernel: Any) -> str:
    function = kernel.primitive("kernel").with_attr("global_symbol", "kernel")
    module = tvm.IRModule({tvm.ir.GlobalVar("kernel"): function})
    return build(module, tvm.target.Target(llvm_target(kernel.isa, 1))).inspect_source("s")


@pytest.mark.parametrize("device", [name for name, isa in CPUS.items() if isa.lane_operands])
@pytest.mark.parametrize("make", [
    lambda isa: Gemm(isa, "f32", 5, 96, 64, stored="float16"),
    lambda isa: Loops(isa, as_type(operand(0, "float16"), "float32"), (103,), (1,), ((1,),)),
], ids=["product", "cast"])  # fmt: skip
def test_arm_widens_vectors_by_instructions(device: str, make: Callable[[Isa], Any]) -> None:
    assert "fcvtl" in _listing(make(CPUS[device]))


@needs_kernels
@on_every_cpu
def test_bfloat16_is_rounded_half_to_even_and_keeps_what_is_no_number(isa: Isa) -> None:
    halves = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0xBF80FFFF], np.uint32).view(np.float32)
    special = np.array([np.nan, np.inf, -np.inf, 3.4e38, 1e-40, -0.0, 1, -2], np.float32)
    kernel = Loops(isa, as_type(operand(0), "bfloat16"), (77,), (1,), ((1,),))
    x = np.concatenate([halves, special, _normal(65)])
    got = run(kernel, [x], np.zeros(77, ml_dtypes.bfloat16))
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(got.astype(np.float32), x.astype(ml_dtypes.bfloat16).astype(np.float32))
