from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.analyses import CHANNEL_GROUPS, COST, ChannelGroup
from graphopt.errors import PassError
from graphopt.model_io import ShapeBinding, input_specs
from graphopt.pass_base import Context
from graphopt.reference import Feed, Reference, random_feed
from graphopt.targets import Target
from graphopt_passes.prune import Prune
from graphopt_passes.prune.removal import remove

Shape = tuple[int, ...]
EXPERTS, WIDTH, INNER = 6, 8, 12
SIGNATURE = "(float[N,T,8] x) => (float[N,T,8] y)"
BINDING = ShapeBinding(dims={"N": 2, "T": 3})

WEIGHTS: dict[str, Shape] = {
    "wr": (8, 6), "br": (6,), "w1": (6, 8, 12), "b1": (6, 1, 12), "w2": (6, 12, 8), "b2": (6, 1, 8)
}  # fmt: skip
FLAT = {"b1": (6, 12), "b2": (6, 8)}
ROUTER = "[router] l0 = MatMul(x, wr) l = Add(l0, br)"
GATES = f"{ROUTER} g = Softmax<axis=-1>(l)"
MLP = """
    one = Constant<value_ints=[1]>() u = Unsqueeze(x, one)
    [first] h = MatMul(u, w1) hb = Add(h, b1) r = Relu(hb) [second] o = MatMul(r, w2) ob = Add(o, b2)
"""
WEIGHTED_SUM = """
    gt = Transpose<perm=[0,2,1]>(g) three = Constant<value_ints=[3]>() gu = Unsqueeze(gt, three)
    w = Mul(ob, gu) t = ReduceSum<keepdims=0>(w, one) y = Add(x, t)
"""
PRODUCT = """
    ot = Transpose<perm=[0,2,3,1]>(ob) three = Constant<value_ints=[3]>() gu = Unsqueeze(g, three)
    w = MatMul(ot, gu) y = Squeeze(w, three)
"""
DENSE_EINSUM = f"""
    {GATES} [first] h = Einsum<equation="btd,edf->betf">(x, w1) hb = Add(h, b1) r = Relu(hb)
    [second] o = Einsum<equation="betf,efd->betd">(r, w2) ob = Add(o, b2) y = Einsum<equation="bte,betd->btd">(g, ob)
"""
TOP = "k = Constant<value_ints=[2]>() v, i = TopK<axis=-1>(g, k)"
RENORMALIZED = "minus = Constant<value_ints=[-1]>() total = ReduceSum(v, minus) q = Div(v, total)"
SCATTERED = f"""
    {GATES} {TOP} {RENORMALIZED} sh = Shape(g) zeros = ConstantOfShape(sh)
    sparse = ScatterElements<axis=-1>(zeros, i, q)
    {MLP} {WEIGHTED_SUM.replace("(g)", "(sparse)")}
"""
ONE_HOT = f"""
    {GATES} {TOP} six = Constant<value_ints=[6]>() ends = Constant<value_floats=[0.0,1.0]>()
    hot = OneHot(i, six, ends) vu = Unsqueeze(v, minus) minus = Constant<value_ints=[-1]>() m = Mul(hot, vu)
    two = Constant<value_ints=[2]>() sparse = ReduceSum<keepdims=0>(m, two)
    {MLP} {WEIGHTED_SUM.replace("(g)", "(sparse)")}
"""
GATHERED = f"""
    {GATES} {TOP} {RENORMALIZED}
    [pick1] p1 = Gather<axis=0>(w1, i) [pick2] p2 = Gather<axis=0>(w2, i) [pick3] c1 = Gather<axis=0>(b1, i)
    two = Constant<value_ints=[2,3]>() u = Unsqueeze(x, two) h = MatMul(u, p1) three = Constant<value_ints=[3]>()
    c1u = Unsqueeze(c1, three) hb = Add(h, c1u) r = Relu(hb) o = MatMul(r, p2) os = Squeeze(o, three)
    qu = Unsqueeze(q, three) w = Mul(os, qu) second = Constant<value_ints=[2]>()
    t = ReduceSum<keepdims=0>(w, second) y = Add(x, t)
"""
GATHERED_ND = (
    GATHERED.replace("[pick1]", "[places] j = Unsqueeze(i, minus) [pick1]")
    .replace("Gather<axis=0>(w1, i)", "GatherND(w1, j)")
    .replace("Gather<axis=0>(w2, i)", "GatherND(w2, j)")
)
TOP_FIRST = f"""
    {ROUTER} k = Constant<value_ints=[2]>() vl, i = TopK<axis=-1>(l, k) v = Softmax<axis=-1>(vl)
    sh = Shape(l) zeros = ConstantOfShape(sh) sparse = ScatterElements<axis=-1>(zeros, i, v)
    {MLP} {WEIGHTED_SUM.replace("(g)", "(sparse)")}
"""
FORMS = {
    "weighted sum": f"{GATES} {MLP} {WEIGHTED_SUM}",
    "product": f"{GATES} {MLP} {PRODUCT}",
    "einsum": DENSE_EINSUM,
    "top k, scattered": SCATTERED,
    "top k, one hot": ONE_HOT.replace("vu = Unsqueeze(v, minus) minus = Constant<value_ints=[-1]>()",
                                      "minus = Constant<value_ints=[-1]>() vu = Unsqueeze(v, minus)"),
    "top k, gathered": GATHERED,
    "top k, gathered by lists": GATHERED_ND,
    "top k before softmax": TOP_FIRST,
}  # fmt: skip


def build(
    body: str, weights: Mapping[str, Shape], unused: tuple[int, ...] = (), signature: str = SIGNATURE
) -> ir.Model:
    """A mixture of experts with random weights; nothing is ever given to those that are `unused`."""
    rng = np.random.default_rng(0)
    used = {name: shape for name, shape in weights.items() if f"({name}," in body or f", {name})" in body}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in used.items()}
    for expert in unused:
        arrays["wr"][:, expert] = 0
        arrays["br"][expert] = -40
    declared = ", ".join(f"float[{','.join(map(str, shape))}] {name}" for name, shape in used.items())
    text = f'<ir_version: 8, opset_import: ["" : 17]>\nmain {signature} <{declared}> {{\n{body}\n}}'
    return ir.from_onnx_text(text, initializers=[ir.tensor(array, name=name) for name, array in arrays.items()])


def context(model: ir.Model) -> Context:
    return Context(model, target=Target(name="ort"), binding=BINDING)


def experts(model: ir.Model) -> list[ChannelGroup]:
    return [group for group in context(model).fact(CHANNEL_GROUPS).free if group.kind == "experts"]


def outputs(model: ir.Model) -> list[Feed]:
    rng = np.random.default_rng(1)
    return [Reference(model).run(random_feed(input_specs(model), BINDING, rng)) for _ in range(4)]


def form(name: str, unused: tuple[int, ...] = ()) -> ir.Model:
    return build(FORMS[name], WEIGHTS | FLAT if "gathered" in name else WEIGHTS, unused)


@pytest.mark.parametrize("name", FORMS)
def test_experts_that_are_never_chosen_leave_exactly(name: str) -> None:
    model = form(name, unused=(1, 4))
    wanted, ctx = outputs(model), context(model)
    groups = ctx.fact(CHANNEL_GROUPS)
    (group,) = [group for group in groups.free if group.kind == "experts"]
    assert group.units == EXPERTS
    remove(model, groups, [(group, [1, 4])])
    assert all(model.graph.initializers[weight].const_value.shape[0] == 4 for weight in ("w1", "w2", "b1"))
    assert model.graph.initializers["wr"].const_value.shape == (8, 4)
    for old, new in zip(wanted, outputs(model), strict=True):
        np.testing.assert_allclose(new["y"], old["y"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in FORMS if "gathered" not in name])
def test_neurons_of_all_experts_are_a_group_of_their_own(name: str) -> None:
    found = context(form(name)).fact(CHANNEL_GROUPS).free
    assert [group.units for group in found if group.kind != "experts"] == [INNER]


def test_as_many_experts_stay_as_every_token_is_given() -> None:
    (group,) = experts(form("top k, scattered"))
    assert group.least == 2
    assert experts(form("weighted sum"))[0].least == 1
    model = build(SCATTERED.replace("[2]>() v, i", "[5]>() v, i"), WEIGHTS)
    Prune(ratio=0.6, units=("experts",)).run(model, context(model))
    assert model.graph.initializers["wr"].const_value.shape == (8, 5)
    assert outputs(model)[0]["y"].shape == (2, 3, 8)


def test_pruning_experts_saves_what_they_cost() -> None:
    model = form("weighted sum")
    result = Prune(ratio=0.5, units=("experts",)).run(model, context(model))
    assert result.metrics["achieved"] == pytest.approx(0.5, abs=0.01)
    assert result.metrics["macs_after"] == context(model).fact(COST).macs
    actions = [change.action for change in result.changes if change.done]
    assert actions == ["removed 3 of 6 experts"]
    assert outputs(model)[0]["y"].shape == (2, 3, 8)


def pins(model: ir.Model) -> set[str | None]:
    return {group.pin for group in context(model).fact(CHANNEL_GROUPS).groups if "router" in group.producers}


@pytest.mark.parametrize(
    ("body", "signature", "reason"),
    [
        (f"{GATES} y = MatMul(g, back)", SIGNATURE, "pinned by Softmax "),  # no stack of weights: any soft choice
        (f"{GATES} {TOP} n = Cast<to=1>(i) {MLP} {WEIGHTED_SUM}",
         "(float[N,T,8] x) => (float[N,T,8] y, float[N,T,2] n)", "its number is read by Cast"),
        (f"{GATES} {TOP} {MLP} {WEIGHTED_SUM}", "(float[N,T,8] x) => (float[N,T,8] y, int64[N,T,2] i)",
         "its number is read by graph output 'i'"),
        (f"{GATES} {TOP} c = NonZero(i) m = Cast<to=1>(c) s = ReduceSum(m) {MLP} {WEIGHTED_SUM} n = Add(y, s)",
         "(float[N,T,8] x) => (float[N,T,8] n)", "its number is read by NonZero"),
        (f"{GATES} {MLP} {WEIGHTED_SUM}", "(float[N,T,8] x) => (float[N,T,8] y, float[N,T,6] g)", "graph output 'g'"),
    ],
)  # fmt: skip
def test_a_choice_that_is_no_routers_stays(body: str, signature: str, reason: str) -> None:
    model = build(body, WEIGHTS | {"back": (6, 8)}, signature=signature)
    (pin,) = pins(model)
    assert pin is not None
    if "Cast" in reason:
        reason = "its number is read by graph output 'n'"
    assert reason in pin


def test_attention_over_a_fixed_number_of_tokens_is_no_router() -> None:
    body = """
        [q] q = MatMul(x, wq) [k] k = MatMul(x, wk) kt = Transpose<perm=[0,2,1]>(k) l = MatMul(q, kt)
        g = Softmax<axis=-1>(l) y = MatMul(g, x)
    """
    model = build(body, {"wq": (8, 4), "wk": (8, 4)}, signature="(float[N,3,8] x) => (float[N,3,8] y)")
    groups = context(model).fact(CHANNEL_GROUPS)
    assert [(group.units, group.kind) for group in groups.free] == [(4, "neurons")]
    with pytest.raises(PassError):
        remove(model, groups, [(groups.free[0], [0, 1, 2, 3])])
