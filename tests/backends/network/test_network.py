"""Whole small networks as one function equal ONNX Runtime; views and memory are right on their own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_runner import runnable
from network_runner import run_network
from text_models import build as model_of

from graphopt.reference import Reference
from graphopt.targets import Isa
from graphopt_backends.network.memory import Lifetime, lay_out
from graphopt_backends.network.views import Buffer, View, contiguous_strides

ISAS = runnable()


def _check(text: str, isa: Isa, kernels: list[str] | None = None, **weights: np.ndarray) -> None:
    model = model_of(text, 20, **weights)
    reference = Reference(model.clone(), threads=1)
    for seed in range(4):
        random = np.random.default_rng(seed)
        feed = {
            str(v.name): random.standard_normal([int(size) for size in v.shape or ()]).astype(np.float32)
            for v in model.graph.inputs
        }
        got, ran = run_network(model, isa, feed, tasks=1 + seed % 2)
        for name, expected in reference.run(feed).items():
            np.testing.assert_allclose(got[name], expected, rtol=1e-4, atol=1e-4)
        assert kernels is None or ran == kernels


def _drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_a_residual_network_is_three_kernels_and_a_pool(isa: Isa) -> None:
    _check(
        """
        g (float[1,3,12,12] x) => (float[1,10] y) {
            a = Conv<pads=[1,1,1,1]>(x, w1, b1)
            b = Relu(a)
            c = Conv<pads=[1,1,1,1]>(b, w2)
            d = Add(c, b)
            e = Relu(d)
            p = GlobalAveragePool(e)
            f = Flatten(p)
            y = Gemm<transB=1>(f, w3, b3)
        }""",
        isa, ["Transpose", "Conv", "Conv", "Reduce", "Gemm"],
        w1=_drawn(20, 3, 3, 3), b1=_drawn(20), w2=_drawn(20, 20, 3, 3), w3=_drawn(10, 20), b3=_drawn(10),
    )  # fmt: skip


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_a_gate_that_reads_its_own_region_from_outside_is_not_fused(isa: Isa) -> None:
    _check(
        """
        g (float[1,8,6,6] x) => (float[1,8,6,6] y) {
            a = Conv(x, w1)
            b = Sigmoid(a)
            c = Mul(a, b)
            p = GlobalAveragePool(c)
            s = Conv(p, w2)
            t = HardSigmoid(s)
            y = Mul(c, t)
        }""",
        isa, None, w1=_drawn(8, 8, 1, 1), w2=_drawn(8, 8, 1, 1),
    )  # fmt: skip


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_moves_are_views_and_outputs_lie_as_the_caller_wants_them(isa: Isa) -> None:
    _check(
        """
        g (float[2,6,4,5] x) => (float[2,5,4,12] y, float[2,3,4,5] z) {
            a, z = Split<axis=1, num_outputs=2>(x)
            b = Relu(a)
            c = Concat<axis=1>(b, x, z)
            y = Transpose<perm=[0,3,2,1]>(c)
        }""",
        isa,
    )  # fmt: skip


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_a_feed_forward_block_keeps_its_activation_in_registers(isa: Isa) -> None:
    _check(
        """
        g (float[2,7,32] x) => (float[2,7,32] y) {
            n = LayerNormalization(x, s, b)
            a = MatMul(n, w1)
            c = Add(a, b1)
            d = Gelu(c)
            e = MatMul(d, w2)
            y = Add(e, x)
        }""",
        isa, ["Normalize", "Gemm", "Gemm"],
        s=_drawn(32), b=_drawn(32), w1=_drawn(32, 65), b1=_drawn(65), w2=_drawn(65, 32),
    )  # fmt: skip


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_attention_needs_no_transposition(isa: Isa) -> None:
    _check(
        """
        g (float[2,9,32] x, float[2,1,1,9] mask) => (float[2,9,32] y) {
            q0 = MatMul(x, wq)
            k0 = MatMul(x, wk)
            v0 = MatMul(x, wv)
            q1 = Reshape(q0, split)
            k1 = Reshape(k0, split)
            v1 = Reshape(v0, split)
            q = Transpose<perm=[0,2,1,3]>(q1)
            k = Transpose<perm=[0,2,3,1]>(k1)
            v = Transpose<perm=[0,2,1,3]>(v1)
            s0 = MatMul(q, k)
            s1 = Mul(s0, scale)
            s2 = Add(s1, mask)
            p = Softmax<axis=-1>(s2)
            c0 = MatMul(p, v)
            c1 = Transpose<perm=[0,2,1,3]>(c0)
            c = Reshape(c1, joined)
            y = MatMul(c, wo)
        }""",
        isa, ["Gemm", "Gemm", "Gemm", "Attention", "Gemm"],
        wq=_drawn(32, 32), wk=_drawn(32, 32), wv=_drawn(32, 32), wo=_drawn(32, 32), scale=np.float32([0.1]),
        split=np.array([2, 9, 4, 8]), joined=np.array([2, 9, 32]),
    )  # fmt: skip


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize(
    "attributes",
    [
        'mode="nearest"', 'mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"',
        'mode="linear"', 'mode="linear", coordinate_transformation_mode="align_corners"',
        'mode="linear", coordinate_transformation_mode="pytorch_half_pixel"', 'mode="cubic", exclude_outside=1',
        'mode="cubic", coordinate_transformation_mode="half_pixel_symmetric"',
    ],
)  # fmt: skip
def test_images_are_resized_as_onnx_runtime_does(isa: Isa, attributes: str) -> None:
    text = f"g (float[1,5,7,6] x) => (float[1,5,16,9] y) {{ y = Resize<{attributes}>(x, , , sizes) }}"
    _check(text, isa, sizes=np.array([1, 5, 16, 9]))


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_elements_are_looked_up_repeated_and_mirrored(isa: Isa) -> None:
    _check(
        """
        g (float[2,3,7] x) => (float[2,8,9] y, float[4,3,7] z, float[2,2,7] w, float[2,3,4] v) {
            a = Gather<axis=1>(x, twice)
            b = Pad<mode="reflect">(a, pads)
            y = Tanh(b)
            z = Tile(x, repeats)
            w = Gather<axis=1>(x, backwards)
            v = Slice(x, starts, ends, axes, steps)
        }""",
        isa, None, twice=np.array([0, 2, 1, -1]), pads=np.array([0, 2, 1, 0, 2, 1]), repeats=np.array([2, 1, 1]),
        backwards=np.array([2, 0]), starts=np.array([-1]), ends=np.array([-100]), axes=np.array([2]),
        steps=np.array([-2]),
    )  # fmt: skip


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_reductions_and_pools_of_every_kind(isa: Isa) -> None:
    _check(
        """
        g (float[2,5,8,6] x) => (float[2,1,8,1] a, float[5,6] b, float[2,5,8] c, float[2,5,3,6] d, float[2,5,1,1] e) {
            a = ReduceL2<keepdims=1>(x, odd)
            b = ReduceMax<keepdims=0>(x, even)
            c = ReduceMean<keepdims=0>(x, last)
            d = AveragePool<kernel_shape=[3,1], strides=[3,1], pads=[1,0,0,0]>(x)
            e = GlobalMaxPool(x)
        }""",
        isa, None, odd=np.array([1, 3]), even=np.array([0, 2]), last=np.array([-1]),
    )  # fmt: skip


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_windows_that_are_cut_at_the_end_count_what_they_see(isa: Isa) -> None:
    _check(
        """
        g (float[2,5,8,7] x) => (float[2,5,4,4] a, float[2,5,3,3] b, float[2,5,4,4] c) {
            a = AveragePool<kernel_shape=[3,2], strides=[2,2], ceil_mode=1>(x)
            b = AveragePool<kernel_shape=[3,3], strides=[3,3], pads=[1,1,0,0], ceil_mode=1>(x)
            c = MaxPool<kernel_shape=[3,2], strides=[2,2], ceil_mode=1>(x)
        }""",
        isa,
    )  # fmt: skip


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 20), st.integers(0, 6)), max_size=30))
def test_tensors_that_live_at_the_same_time_do_not_overlap(drawn: list[tuple[int, int, int]]) -> None:
    lives = {Buffer("uint8", size): Lifetime(first, first + length) for size, first, length in drawn}
    offsets, total = lay_out(lives)
    for a, life in lives.items():
        assert offsets[a] % 64 == 0
        assert offsets[a] + a.nbytes <= total
        for b, other in lives.items():
            if a is not b and life.first <= other.last and other.first <= life.last:
                assert offsets[a] + a.nbytes <= offsets[b] or offsets[b] + b.nbytes <= offsets[a]


_shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)


@settings(deadline=None)
@given(_shapes, st.data())
def test_a_view_reads_what_numpy_reads(shape: tuple[int, ...], data: st.DataObject) -> None:
    array = np.arange(np.prod(shape)).reshape(shape)
    view = View(Buffer("int64", array.size), shape, contiguous_strides(shape))
    axes = data.draw(st.permutations(range(len(shape))))
    array, view = array.transpose(axes), view.permuted(axes)
    axis = data.draw(st.integers(0, len(shape) - 1))
    start = data.draw(st.integers(0, array.shape[axis] - 1))
    size = data.draw(st.integers(1, array.shape[axis] - start))
    array = array.take(range(start, start + size), axis)
    view = view.sliced(axis, start, size)
    wanted = tuple(data.draw(st.permutations(array.shape)))
    reshaped = view.reshaped(wanted)
    if reshaped is not None:
        array, view = array.reshape(wanted), reshaped
    at = sum(
        np.arange(n).reshape([-1 if i == j else 1 for j in range(view.rank)]) * view.strides[i]
        for i, n in enumerate(view.shape)
    )
    np.testing.assert_array_equal(array, at + view.offset)


def test_a_reshape_that_needs_a_copy_is_no_view() -> None:
    view = View(Buffer("float32", 6), (2, 3), (3, 1)).permuted((1, 0))
    assert view.reshaped((6,)) is None
    assert view.reshaped((3, 1, 2)) is not None


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_tensors_without_elements_are_known(isa: Isa) -> None:
    _check(
        """
        g (float[3,4] x, float[0,4] none) => (float[0,4] y, float[3,4] z, float[4] s, float[0,2] w, float[3,2] v) {
            y = Slice(x, one, one, first)
            a = Relu(y)
            z = Concat<axis=0>(a, x, none)
            s = ReduceSum<keepdims=0>(none, first)
            w = MatMul(none, matrix)
            b = Slice(x, one, one, second)
            v = MatMul(b, nothing)
        }""",
        isa, None, one=np.array([1]), first=np.array([0]), second=np.array([1]), matrix=_drawn(4, 2),
        nothing=_drawn(0, 2),
    )  # fmt: skip


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_products_of_vectors_and_of_computed_matrices(isa: Isa) -> None:
    _check(
        """
        g (float[2,3,5] x, float[5] r, float[4,5] m, float[4,7] n) => (float[2,3] a, float[4] b, float[] c,
            float[7,5] d, float[4,6] e) {
            a = MatMul(x, r)
            b = MatMul(m, r)
            c = MatMul(r, r)
            d = Gemm<transA=1, alpha=0.5, beta=2.0>(n, m, r)
            e = Gemm(m, w, column)
        }""",
        isa, None, w=_drawn(5, 6), column=_drawn(4, 1),
    )  # fmt: skip


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_pixels_become_channels_and_roots_of_powers_are_pooled(isa: Isa) -> None:
    _check(
        """
        g (float[2,12,4,6] x) => (float[2,3,8,12] a, float[2,3,8,12] b, float[2,48,2,3] c, float[2,12,3,4] d) {
            a = DepthToSpace<blocksize=2, mode="DCR">(x)
            b = DepthToSpace<blocksize=2, mode="CRD">(x)
            c = SpaceToDepth<blocksize=2>(x)
            d = LpPool<kernel_shape=[3,2], strides=[2,2], pads=[1,1,1,1], p=3>(x)
        }""",
        isa,
    )  # fmt: skip
