"""Removing channels that are zero changes nothing, operator by operator."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest
from drawn_networks import Drawing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operator_cases import Case, assert_budget_is_exact, assert_exact, build, units_of
from small_models import Shape, channel_groups

IMAGE = "(float[N,3,8,8] x) => (float[N,5] y)"
TOKENS = "(float[N,7,8] x) => (float[N,7,5] y)"
SEQUENCE = "(float[7,N,8] x) => (float[7,N,5] y)"
STEM = "[conv] a = Conv<pads=[1,1,1,1]>(x, w1, b1) "
HEAD = " g = GlobalAveragePool(%s) f = Flatten(g) [last] y = Gemm<transB=1>(f, w9)"
FIRST: dict[str, Shape | np.ndarray] = {"w1": (8, 3, 3, 3), "b1": (8,)}


def image(body: str, head: int, free: Mapping[str, int], opset: int = 17, source: str = "c", **more: object) -> Case:
    weights = {**FIRST, "w9": (5, head), **more}
    return Case(IMAGE, STEM + body + HEAD % source, weights, free, opset)  # type: ignore[arg-type]


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def recurrent(op: str, gates: int, extra: str = "", tail: str = "", layout: int = 0, directions: int = 1) -> Case:
    direction = "bidirectional" if directions == 2 else "forward"
    weights: dict[str, Shape | np.ndarray] = {
        "w1": (directions, gates * 6, 8), "w2": (directions, gates * 6, 6), "b1": (directions, 2 * gates * 6),
        "w9": (6 * directions, 5),
    }  # fmt: skip
    if "w3" in tail:
        weights["w3"] = (directions, 3 * 6)
    signature = TOKENS if layout else SEQUENCE
    call = f'[rnn] r = {op}<hidden_size=6,direction="{direction}",layout={layout}{extra}>(x, w1, w2, b1{tail})'
    if layout:
        body = f"{call} to = Constant<value_ints=[0,0,{6 * directions}]>() t = Reshape(r, to)"
    else:
        to = f"to = Constant<value_ints=[0,0,{6 * directions}]>()"
        body = f"{call} p = Transpose<perm=[0,2,1,3]>(r) {to} t = Reshape(p, to)"
    return Case(signature, f"{body} [last] y = MatMul(t, w9)", weights, {"rnn": 6})


CASES: dict[str, Case] = {
    "tile": image("n = Constant<value_ints=[1,3,1,1]>() c = Tile(a, n)", 24, {"conv": 8}),
    "tile of one": Case(
        "(float[N,1,8,8] x) => (float[N,5] y)",
        "[conv] a = Conv(x, w1) m = GlobalAveragePool(a) q = ReduceMean<axes=[1]>(x) p = GlobalAveragePool(q)"
        " n = Constant<value_ints=[1,8,1,1]>() r = Tile(p, n) c = Mul(m, r)" + HEAD % "c",
        {"w1": (8, 1, 3, 3), "w9": (5, 8)},
        {"conv": 8},
    ),
    "expand to a stated size": Case(
        "(float[N,1,8,8] x) => (float[N,5] y)",
        "[conv] a = Conv(x, w1) m = GlobalAveragePool(a) p = GlobalAveragePool(x)"
        " n = Constant<value_ints=[1,8,1,1]>() r = Expand(p, n) c = Mul(m, r)" + HEAD % "c",
        {"w1": (8, 1, 3, 3), "w9": (5, 8)},
        {"conv": 8},
    ),
    "expand to the size of another": image(
        "s = Shape(a) p = ReduceMean<axes=[1]>(x) r = Expand(p, s) d = Mul(a, r) c = Relu(d)", 8, {"conv": 8}
    ),
    "depth to space": image("c = DepthToSpace<blocksize=2>(a)", 2, {"conv": 2}),
    "depth to space, columns first": image('c = DepthToSpace<blocksize=2,mode="CRD">(a)', 2, {"conv": 2}),
    "space to depth": image("c = SpaceToDepth<blocksize=2>(a)", 32, {"conv": 8}),
    "group norm of groups": image(
        "c = GroupNormalization<num_groups=4>(a, w2, b2)", 8, {"conv": 4}, opset=18, w2=(4,), b2=(4,)
    ),
    "group norm of channels": image(
        "c = GroupNormalization<num_groups=4>(a, w2, b2)", 8, {"conv": 4}, opset=21, w2=(8,), b2=(8,)
    ),
    "lp norm": image("c = LpNormalization<axis=1>(a)", 8, {"conv": 8}),
    "cumulated sum": image("n = Constant<value_int=2>() c = CumSum(a, n)", 8, {"conv": 8}),
    "top k": image("n = Constant<value_ints=[3]>() c, i = TopK<axis=3>(a, n)", 8, {"conv": 8}),
    "triangle": image("c = Trilu(a)", 8, {"conv": 8}),
    "compress": image(
        "n = Constant<value_ints=[1,0,1]>() k = Cast<to=9>(n) c = Compress<axis=2>(a, k)", 8, {"conv": 8}
    ),
    "gather of channels": image("n = Constant<value_ints=[3,1,1,7,-1]>() c = Gather<axis=1>(a, n)", 5, {"conv": 8}),
    "gather of one channel": image(
        "n = Constant<value_int=3>() d = Gather<axis=1>(a, n) k = Constant<value_ints=[1]>() e = Unsqueeze(d, k)"
        " c = Mul(e, a)", 8, {"conv": 7}
    ),
    "gather of a row": image(
        "n = Constant<value_int=3>() d = Gather<axis=2>(a, n) k = Constant<value_ints=[2]>() c = Unsqueeze(d, k)",
        8, {"conv": 8},
    ),
    "slice with a step": image(
        "o = Constant<value_ints=[1]>() n = Constant<value_ints=[1000]>() t = Constant<value_ints=[2]>()"
        " c = Slice(a, o, n, o, t)", 4, {"conv": 4}
    ),
    "slice with a step elsewhere": image(
        "z = Constant<value_ints=[0,0]>() n = Constant<value_ints=[6,8]>() k = Constant<value_ints=[1,2]>()"
        " t = Constant<value_ints=[1,2]>() c = Slice(a, z, n, k, t)", 6, {"conv": 8}
    ),
    "gather elements": image("c = GatherElements<axis=2>(a, n)", 8, {"conv": 8}, n=np.zeros((1, 8, 3, 8), np.int64)),
    "scatter nd": image("c = ScatterND(a, n, u)", 8, {"conv": 8}, n=np.zeros((2, 1), np.int64), u=(2, 8, 8, 8)),
    "grid sample": image(
        "b = Shape(x) z = Constant<value_ints=[0]>() o = Constant<value_ints=[1]>() k = Slice(b, z, o)"
        " t = Constant<value_ints=[4,4,2]>() s = Concat<axis=0>(k, t) n = Expand(grid, s) c = GridSample(a, n)",
        8, {"conv": 8}, grid=(1, 4, 4, 2),
    ),
    "col2im": Case(
        "(float[N,3,16] x) => (float[N,5] y)",
        "[conv] a = Conv(x, w1) n = Constant<value_ints=[8,8]>() k = Constant<value_ints=[2,2]>()"
        " c = Col2Im<strides=[2,2]>(a, n, k)" + HEAD % "c",
        {"w1": (12, 3, 1), "w9": (5, 3)}, {"conv": 3}, opset=18,
    ),
    "constant of shape": image(
        "s = Shape(a) z = ConstantOfShape<value=float[1] {1.0}>(s) d = Add(a, z) c = Relu(d)", 8, {"conv": 8}
    ),
    "einsum": Case(
        TOKENS,
        '[one] h = Einsum<equation="bsd,hd->bsh">(x, w1) r = Relu(h) [two] y = Einsum<equation="...h,ho">(r, w2)',
        {"w1": (6, 8), "w2": (6, 5)}, {"one": 6},
    ),
    "einsum with heads": Case(
        TOKENS,
        '[one] h = Einsum<equation="bsd,dnk->bnsk">(x, w1) r = Relu(h) '
        '[two] y = Einsum<equation="bnsk,nko->bso">(r, w2)',
        {"w1": (8, 3, 4), "w2": (3, 4, 5)}, {"one": 7},
    ),
    "lstm": recurrent("LSTM", 4),
    "lstm, both directions": recurrent("LSTM", 4, directions=2),
    "lstm with peepholes": recurrent("LSTM", 4, tail=",,,,w3"),
    "gru": recurrent("GRU", 3),
    "gru, both directions, reset after": recurrent("GRU", 3, directions=2, extra=",linear_before_reset=1"),
    "rnn": recurrent("RNN", 1, directions=2, extra=',activations=["Relu","Tanh"]'),
    "gelu of ONNX Runtime": Case(
        TOKENS, "[one] h = MatMul(x, w1) g = com.microsoft.Gelu(h) [two] y = MatMul(g, w2)",
        {"w1": (8, 6), "w2": (6, 5)}, {"one": 6},
    ),
    "gelu with a bias": Case(
        TOKENS,
        "[one] h = MatMul(x, w1) g = com.microsoft.BiasGelu(h, b1) [mid] k = MatMul(g, w2)"
        " f = com.microsoft.FastGelu(k, b2) q = com.microsoft.QuickGelu(f) [two] y = MatMul(q, w3)",
        {"w1": (8, 6), "b1": (6,), "w2": (6, 4), "b2": (4,), "w3": (4, 5)}, {"one": 6, "mid": 4},
    ),
    "fused convolution": image(
        '[two] c = com.microsoft.FusedConv<activation="Relu",pads=[1,1,1,1]>(a, w2, b2, a)', 8, {"conv": 8},
        w2=(8, 8, 3, 3), b2=(8,),
    ),
    "fused products": Case(
        TOKENS,
        "[one] h = com.microsoft.FusedMatMul<transB=1,alpha=0.5>(x, w1) r = Relu(h)"
        " [two] y = com.microsoft.FusedMatMul(r, w2)",
        {"w1": (6, 8), "w2": (6, 5)}, {"one": 6},
    ),
    "skip layer norm": Case(
        TOKENS,
        "[one] h = MatMul(x, w1) r = Relu(h) [two] m = MatMul(r, w2)"
        " n = com.microsoft.SkipLayerNormalization(m, x, gamma, beta) [three] y = MatMul(n, w3)",
        {"w1": (8, 6), "w2": (6, 8), "gamma": (8,), "beta": (8,), "w3": (8, 5)}, {"one": 6},
    ),
    "4-bit weights": Case(
        "(float[N,7,32] x) => (float[N,7,5] y)",
        "[one] h = com.microsoft.MatMulNBits<K=32,N=6,bits=4,block_size=16>(x, w1, scale, zero) r = Relu(h)"
        " [two] y = MatMul(r, w2)",
        {
            "w1": np.arange(96, dtype=np.uint8).reshape(6, 2, 8), "scale": (12,), "zero": np.full(6, 0x88, np.uint8),
            "w2": (6, 5),
        }, {"one": 6},
    ),
    "quantized lstm": Case(
        SEQUENCE,
        "[rnn] r = com.microsoft.DynamicQuantizeLSTM<hidden_size=6>(x, w1, w2, b1, , , , , s1, z1, s2, z2)"
        " p = Transpose<perm=[0,2,1,3]>(r) to = Constant<value_ints=[0,0,6]>() t = Reshape(p, to)"
        " [last] y = MatMul(t, w9)",
        {
            "w1": np.ones((1, 8, 24), np.int8), "w2": np.ones((1, 6, 24), np.int8), "b1": (1, 48), "w9": (6, 5),
            "s1": np.full((1, 24), 0.01, np.float32), "s2": np.full((1, 24), 0.02, np.float32),
            "z1": np.zeros((1, 24), np.int8), "z2": np.zeros((1, 24), np.int8),
        }, {"rnn": 6},
    ),
    "mean over channels of an einsum": Case(
        TOKENS,
        '[one] h = Einsum<equation="bsd,hd->bsh">(x, w1) m = ReduceMean<axes=[2]>(h) k = Mul(h, m)'
        ' [two] y = Einsum<equation="bsh,ho->bso">(k, w2)',
        {"w1": (6, 8), "w2": (6, 5)}, {"one": 6},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_units_that_can_leave_are_found(name: str) -> None:
    assert units_of(CASES[name].model()) == CASES[name].free


@pytest.mark.parametrize("name", CASES)
def test_the_budget_foresees_the_cost(name: str) -> None:
    assert_budget_is_exact(CASES[name].model())


@pytest.mark.parametrize("name", CASES)
def test_units_that_are_zero_can_leave(name: str) -> None:
    model = CASES[name].model()
    groups = [group for group in channel_groups(model).free if group.units > 1]
    assert_exact(model, [(group, [0, group.units - 1][: max(1, group.units // 2)]) for group in groups])


class OperatorDrawing(Drawing):
    """Random networks of the operators above; every block takes and gives `[N, channels, 8, 8]`."""

    def numbers(self, *given: int) -> str:
        return self.value(f"Constant<value_ints=[{','.join(map(str, given))}]>()")

    def tiled(self) -> None:
        self.current = self.value(f"Tile({self.current}, {self.numbers(1, 2, 1, 1)})")
        self.channels *= 2

    def gathered(self) -> None:
        picked = self.pick([[0, 0, -1], [self.channels - 1, 0], list(range(self.channels))])
        self.current = self.value(f"Gather<axis=1>({self.current}, {self.numbers(*picked)})")
        self.channels = len(picked)

    def strided(self) -> None:
        if self.channels % 2 == 0 and self.channels > 2:
            one = self.numbers(1)
            end, step = self.numbers(1000), self.numbers(2)
            self.current = self.value(f"Slice({self.current}, {one}, {end}, {one}, {step})")
            self.channels //= 2

    def folded(self) -> None:
        deep = self.value(f"SpaceToDepth<blocksize=2>({self.current})")
        self.current = self.value(f'DepthToSpace<blocksize=2,mode="{self.pick(["DCR", "CRD"])}">({deep})')

    def summed(self) -> None:
        made = self.pick([3, 5])
        equation = self.pick(["nchw,dc->ndhw", "nc...,dc->nd..."])
        self.current = self.value(f'Einsum<equation="{equation}">({self.current}, {self.weight(made, self.channels)})')
        self.channels = made

    def grouped_norm(self) -> None:
        if self.channels % 2 == 0:
            parameters = f"{self.weight(self.channels)}, {self.weight(self.channels)}"
            self.current = self.value(f"GroupNormalization<num_groups=2>({self.current}, {parameters})")

    def cumulated(self) -> None:
        axis = self.value("Constant<value_int=3>()")
        self.current = self.value(f"CumSum({self.current}, {axis})")

    def tokens(self) -> str:
        flat = self.value(f"Reshape({self.current}, {self.numbers(0, self.channels, 64)})")
        return self.value(f"Transpose<perm=[0,2,1]>({flat})")

    def image(self, tokens: str, channels: int) -> None:
        turned = self.value(f"Transpose<perm=[0,2,1]>({tokens})")
        self.current = self.value(f"Reshape({turned}, {self.numbers(0, channels, 8, 8)})")
        self.channels = channels

    def attended(self) -> None:
        source = self.tokens()
        parts = [self.value(f"MatMul({source}, {self.weight(self.channels, 12)})") for _ in range(3)]
        mixed = self.value(f"com.microsoft.MultiHeadAttention<num_heads=3>({', '.join(parts)})")
        self.image(self.value(f"MatMul({mixed}, {self.weight(12, 4)})"), 4)

    def remembered(self) -> None:
        gates = {"GRU": 3, "LSTM": 4, "RNN": 1}
        kind = self.pick(sorted(gates))
        steps = self.value(f"Transpose<perm=[1,0,2]>({self.tokens()})")
        weights = f"{self.weight(2, 4 * gates[kind], self.channels)}, {self.weight(2, 4 * gates[kind], 4)}"
        made = self.value(f'{kind}<hidden_size=4,direction="bidirectional">({steps}, {weights})')
        merged = self.value(f"Reshape({self.value(f'Transpose<perm=[2,0,1,3]>({made})')}, {self.numbers(0, 64, 8)})")
        self.image(merged, 8)

    def finish(self) -> ir.Model:
        self.lines.append(f"p = GlobalAveragePool({self.current}) f = Flatten(p)")
        self.lines.append(f"y = Gemm(f, {self.weight(self.channels, 5)}, {self.weight(5)})")
        return build(IMAGE, "\n".join(self.lines), self.weights, opset=21)


BLOCKS = (
    "plain", "residual", "concat", "tiled", "gathered", "strided", "folded", "summed", "grouped_norm", "cumulated",
    "attended", "remembered",
)  # fmt: skip


@st.composite
def networks(draw: st.DrawFn) -> ir.Model:
    drawing = OperatorDrawing(lambda options: draw(st.sampled_from(options)))
    for name in draw(st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=5)):
        getattr(drawing, name)()
    return drawing.finish()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(networks(), st.data())
def test_zero_units_can_leave_random_networks(model: ir.Model, data: st.DataObject) -> None:
    free = [group for group in channel_groups(model).free if group.units > 1]
    assert_exact(
        model, [(g, sorted(data.draw(st.sets(st.integers(0, g.units - 1), max_size=g.units - 1)))) for g in free]
    )
