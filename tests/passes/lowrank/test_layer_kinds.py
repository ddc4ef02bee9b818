"""Every kind of layer, and every chain that it can become."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from small_models import build

from graphopt.analyses import CONSTANTS
from graphopt.calibration import Dataset
from graphopt.pass_base import Context, PassResult
from graphopt.reference import Feed, Reference
from graphopt.targets import Target
from graphopt_passes.lowrank import LowRank
from graphopt_passes.lowrank.places import Place
from graphopt_passes.lowrank.schemes import Geometry, bytes_saved

ROWS = "(float[N,24] x) => (float[N,20] y)"
IMAGE = "(float[N,12,10,11] x) => (float[N,O,H,W] y)"

TURNED = "(float[24,N] x) => (float[N,20] y)"
LINE = "(float[N,12,9] x) => (float[N,24,L] y)"

# signature, body, shape of the weight
KINDS: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "gemm of a turned input": (TURNED, "[a] y = Gemm<transA=1, alpha=0.5, beta=2.0>(x, w, b)", (24, 20)),
    "all turned": (TURNED, "[a] y = Gemm<transA=1, transB=1, alpha=-2.0>(x, w, b)", (20, 24)),
    "bias of one row each": ("(float[3,24] x) => (float[3,20] y)", "[a] y = Gemm(x, w, c)", (24, 20)),
    "weight on the left": ("(float[N,24,5] x) => (float[N,20,5] y)", "[a] y = MatMul(w, x)", (20, 24)),
    "batch": ("(float[3,N,24] x) => (float[3,N,20] y)", "[a] y = MatMul(x, w)", (3, 24, 20)),
    "batch that all read": ("(float[1,N,24] x) => (float[3,N,20] y)", "[a] y = MatMul(x, w)", (3, 24, 20)),
    "batches on the left": ("(float[2,3,24,N] x) => (float[2,3,20,N] y)", "[a] y = MatMul(w, x)", (2, 3, 20, 24)),
    "groups": (IMAGE, "[a] y = Conv<group=2, pads=[1,1,0,1], strides=[2,1]>(x, w, d)", (24, 6, 3, 3)),
    "depthwise": (IMAGE, "[a] y = Conv<group=12, pads=[3,3,3,3], dilations=[1,1]>(x, w)", (24, 1, 7, 7)),
    "transposed": (IMAGE, "[a] y = ConvTranspose<strides=[2,3], pads=[1,0,0,1], output_padding=[1,0]>(x, w, d)",
                   (12, 24, 4, 3)),
    "transposed and spread": (IMAGE, "[a] y = ConvTranspose<dilations=[2,1]>(x, w, d)", (12, 24, 3, 3)),
    "transposed in groups": (IMAGE, "[a] y = ConvTranspose<group=2, strides=[2,2]>(x, w)", (12, 8, 3, 4)),
    "transposed in one dimension": (LINE, "[a] y = ConvTranspose<strides=[4]>(x, w, d)", (12, 24, 8)),
}  # fmt: skip
FORMS: dict[str, tuple[str, ...]] = {
    "groups": ("output", "input", "spatial", "tucker", "cp"),
    "depthwise": ("spatial",),
    "transposed": ("output", "input", "spatial", "tucker", "cp"),
    "transposed and spread": ("spatial", "cp"),
    "transposed in groups": ("output", "input", "spatial", "tucker"),
    "transposed in one dimension": ("output", "input", "tucker", "cp"),
}


def model_of(name: str, opset: int = 17) -> ir.Model:
    signature, body, shape = KINDS[name]
    return build(signature, body, {"w": shape, "b": (20,), "c": (3, 1), "d": (24,)}, opset=opset)


def samples(model: ir.Model, count: int = 12, seed: int = 2) -> Dataset:
    def read() -> Iterator[Feed]:
        rng = np.random.default_rng(seed)
        for _ in range(count):
            yield {
                v.name: rng.standard_normal([d if isinstance(d, int) else 4 for d in v.shape]).astype(np.float32)
                for v in model.graph.inputs
            }

    return Dataset("random", None, read, stacked=False)


def run(model: ir.Model, data: Dataset | None = None, **options: Any) -> PassResult:
    ctx = Context(model, Target(name="ort", round_to=1), calibration=data)
    step = LowRank(**{"of": "params", "max_error": 0.0, **options})
    step.requires(model, ctx)
    return step.run(model, ctx)


def outputs(model: ir.Model) -> list[np.ndarray]:
    session = Reference(model)
    return [session.run(feed)["y"] for feed in samples(model, 4, seed=3).feeds()]


def relative(before: list[np.ndarray], after: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(before, after, strict=True))


def place_of(model: ir.Model, name: str = "a") -> Place:
    constants = Context(model, Target(name="ort")).fact(CONSTANTS)
    place = Place.of(next(node for node in model.graph if node.name == name), constants)
    assert isinstance(place, Place)
    return place


def make_low(model: ir.Model, rank: int = 2) -> None:
    """Make a weight the sum of a few outer products, in each part."""
    place, rng = place_of(model), np.random.default_rng(1)
    parts, (inputs, outs) = place.parts, place.sizes
    axes = [rng.standard_normal((parts, size, rank)) for size in (inputs, *place.kernel, outs)]
    letters = "iabo" if len(place.kernel) == 2 else "iao" if place.kernel else "io"
    terms = ",".join(f"p{letter}r" for letter in letters)
    place.put(np.einsum(f"{terms}->p{letters}", *axes).reshape(parts, -1, outs))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("data", [False, True], ids=["no data", "data"])
def test_every_kind_of_layer_is_factored_without_a_trace(name: str, data: bool) -> None:
    model = model_of(name)
    make_low(model)
    before, size = outputs(model), model.graph.initializers["w"].const_value.size
    result = run(model, samples(model) if data else None, energy=1 - 1e-8)
    assert [change.site for change in result.changes if change.done] == ["a"]
    assert relative(before, outputs(model)) < 1e-4
    assert "w" not in model.graph.initializers
    assert sum(v.const_value.size for k, v in model.graph.initializers.items() if "factor" in k) < size


@pytest.mark.parametrize(("name", "form"), [(name, form) for name, forms in FORMS.items() for form in forms])
def test_every_chain_computes_what_the_layer_did(name: str, form: Any) -> None:
    model = model_of(name)
    make_low(model, 1)
    before = outputs(model)
    result = run(model, samples(model) if name == "groups" else None, energy=0.99999, form=form)
    assert result.changes[0].details["form"] == form
    assert relative(before, outputs(model)) < 1e-4


@pytest.mark.parametrize("name", KINDS)
def test_places_give_back_what_was_put_there(name: str) -> None:
    model = model_of(name)
    whole = model.graph.initializers["w"].const_value.numpy().copy()
    place = place_of(model)
    place.put(place.matrices())
    np.testing.assert_allclose(model.graph.initializers["w"].const_value.numpy(), whole, rtol=1e-6)


@pytest.mark.parametrize("name", ["weight on the left", "batch", "groups", "transposed", "gemm of a turned input"])
def test_the_output_loses_what_the_report_says(name: str) -> None:
    model = model_of(name)
    data, zeros = samples(model, 24), np.zeros
    for bias in ("b", "d"):  # they are the same before and after
        value = model.graph.initializers[bias]
        value.const_value = ir.tensor(zeros(value.const_value.shape.numpy(), np.float32), name=bias)
    whole = Reference(model.clone())
    form = {"groups": "output", "transposed": "output"}.get(name, "auto")
    change = run(model, data, ratio=0.3, update=False, form=form).changes[0]
    factored, lost, kept = Reference(model), 0.0, 0.0
    for feed in data.feeds():
        wanted = whole.run(feed)["y"]
        lost += float(np.square(wanted - factored.run(feed)["y"]).sum())
        kept += float(np.square(wanted).sum())
    # moments know neither which of a batch a row is of, nor that kernels of a transposed convolution overlap
    near = 0.1 if name in ("batch", "transposed") else 0.02
    assert change.details["energy_lost"] == pytest.approx(lost / kept, rel=near)


SHARED = "[a] h = MatMul(x, w) r = Relu(h) [c] m = MatMul(r, w) y = Add(m, b)"


def test_layers_that_share_a_weight_share_its_factors() -> None:
    model = build("(float[N,24] x) => (float[N,24] y)", SHARED, {"w": (24, 24), "b": (24,)})
    make_low(model, 3)
    before = outputs(model)
    result = run(model, samples(model), energy=1 - 1e-8)
    assert [change.done for change in result.changes] == [True, True]
    assert result.changes[0].action.endswith("not solved anew: 2 layers share its weight")
    assert result.changes[1].action == "factored with 'a', whose weight it reads"
    assert sorted(model.graph.initializers) == ["b", "w_factor", "w_factor_1"]
    assert relative(before, outputs(model)) < 1e-4


def test_layers_that_share_a_weight_are_judged_by_what_all_of_them_read() -> None:
    model = build("(float[N,24] x) => (float[N,24] y)", SHARED, {"w": (24, 24), "b": (24,)})
    result = run(model, samples(model, 60), ratio=0.3, update=False)
    weight = np.random.default_rng(0).standard_normal((24, 24)).astype(np.float32)  # as `build` makes it
    left, right = (model.graph.initializers[name].const_value.numpy() for name in ("w_factor", "w_factor_1"))
    rows = np.concatenate([feed["x"] for feed in samples(model, 60).feeds()])
    read = np.concatenate([rows, np.maximum(rows @ weight, 0)])
    values = np.linalg.svd(read @ weight, compute_uv=False)
    bound = float(np.square(values[left.shape[1] :]).sum())
    assert float(np.square(read @ (weight - left @ right)).sum()) == pytest.approx(bound, rel=1e-3)
    assert result.changes[0].details["energy_lost"] == pytest.approx(bound / np.square(values).sum(), rel=1e-3)


def test_a_shared_weight_is_left_to_all_or_none() -> None:
    model = build("(float[N,24] x) => (float[N,24] y)", SHARED, {"w": (24, 24), "b": (24,)})
    reasons = {change.site: change.action for change in run(model, skip=("c",)).changes}
    assert reasons == dict.fromkeys("ac", "skipped: lowrank.skip names 'c', which shares its weight")
    other = build("(float[N,24] x) => (float[N,24] y)", SHARED.replace("MatMul(r, w)", "Gemm<transB=1>(r, w)"),
                  {"w": (24, 24), "b": (24,)})  # fmt: skip
    reasons = {change.site: change.action for change in run(other).changes}
    assert reasons == {
        "a": "skipped: others read its weight: Gemm 'c', in another way",
        "c": "skipped: others read its weight: MatMul 'a', in another way",
    }


BRANCHES = """
[if] y = If(c) <
    then_branch = g () => (float[N,20] t) { [a] t = MatMul(x, w) },
    else_branch = h () => (float[N,20] e) { u = Relu(x) [b] e = MatMul(u, w) }>
"""


@pytest.mark.parametrize("body", [BRANCHES, BRANCHES.replace("MatMul(u, w)", "MatMul(u, v)")])
def test_layers_in_branches_are_factored_by_their_weights(body: str) -> None:
    model = build("(float[N,24] x, bool c) => (float[N,20] y)", body, {"w": (24, 20), "v": (24, 20)})
    rng = np.random.default_rng(1)
    for name in ("w", "v"):
        low = rng.standard_normal((24, 2)) @ rng.standard_normal((2, 20))
        model.graph.initializers[name].const_value = ir.tensor(low.astype(np.float32), name=name)
    feeds = [{"x": rng.standard_normal((3, 24)).astype(np.float32), "c": np.array(i % 2 == 0)} for i in range(4)]
    before = [Reference(model).run(feed)["y"] for feed in feeds]
    data = Dataset("random", None, lambda: iter(feeds), stacked=False)
    result = run(model, data, energy=1 - 1e-8)
    assert {change.site: change.done for change in result.changes} == {"a": True, "b": True}
    assert "it is inside the subgraph of If 'if'" in result.changes[0].action
    assert "w" not in model.graph.initializers
    assert relative(before, [Reference(model).run(feed)["y"] for feed in feeds]) < 1e-4


@pytest.mark.parametrize("scope", ["auto", "uniform", "global"])
def test_a_layer_in_a_branch_that_no_sample_takes_stays(scope: str) -> None:
    body = BRANCHES.replace("MatMul(u, w)", "MatMul(u, v)")
    model = build("(float[N,24] x, bool c) => (float[N,20] y)", body, {"w": (24, 20), "v": (24, 20)})
    rng = np.random.default_rng(1)
    feeds = [{"x": rng.standard_normal((3, 24)).astype(np.float32), "c": np.array(True)} for _ in range(4)]
    others = [feed | {"c": np.array(False)} for feed in feeds]
    before = [Reference(model).run(feed)["y"] for feed in others]
    data = Dataset("random", None, lambda: iter(feeds), stacked=False)
    changes = {change.site: change for change in run(model, data, ratio=0.3, scope=scope).changes}
    assert changes["a"].done
    assert changes["b"].action == "skipped: no calibration sample feels it, so that nothing says what it may lose"
    assert relative(before, [Reference(model).run(feed)["y"] for feed in others]) == 0


def test_layers_whose_outputs_are_all_whole_numbers_are_factored_by_their_own_errors() -> None:
    body = "[a] h = MatMul(x, w) y = ArgMax<axis=1>(h)"
    model = build("(float[N,24] x) => (int64[N,1] y)", body, {"w": (24, 20)})
    assert run(model, samples(model), ratio=0.3).changes[0].done


def test_a_layer_in_a_loop_keeps_its_factors_outside() -> None:
    model = build(
        "(float[3,24] x, int64 n) => (float[3,24] y)",
        """
        [loop] y = Loop(n, , x) <body = turn (int64 i, bool more, float[3,24] s) => (bool go, float[3,24] out) {
            go = Identity(more) [a] m = MatMul(s, w) out = Tanh(m) }>
        """,
        {"w": (24, 24)},
    )
    rng = np.random.default_rng(1)
    low = rng.standard_normal((24, 2)) @ rng.standard_normal((2, 24))
    model.graph.initializers["w"].const_value = ir.tensor(low.astype(np.float32), name="w")
    feeds = [{"x": rng.standard_normal((3, 24)).astype(np.float32), "n": np.array(i)} for i in (0, 1, 2, 5)]
    before = [Reference(model).run(feed)["y"] for feed in feeds]
    assert run(model, energy=1 - 1e-8).modified
    assert sorted(model.graph.initializers) == ["w_factor", "w_factor_1"]
    assert relative(before, [Reference(model).run(feed)["y"] for feed in feeds]) < 1e-4


def test_a_layer_in_a_function_stays_and_says_so() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["" : 17, "own" : 1]> main (float[N,4] x) => (float[N,4] y) '
        "<float[4,4] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}> { y = own.layer(x, w) }\n"
        '<domain: "own", opset_import: ["" : 17]> layer (a, b) => (c) { [a] c = MatMul(a, b) }'
    )
    result = run(model)
    assert [(c.site, c.action) for c in result.changes] == [("layer/a", "skipped: inside a function; inline it first")]


def test_a_file_that_would_grow_stays() -> None:
    small = build("(float[N,10] x) => (float[N,10] y)", "[a] y = MatMul(x, w)", {"w": (10, 10)})
    make_low(small, 4)  # 20 numbers less are 80 bytes less, and half of a node with its names
    assert [c.action for c in run(small, energy=0.9999).changes] == [
        "skipped: no rank that saves anything keeps so much energy"
    ]
    make_low(small, 1)
    assert run(small, energy=0.9999).modified


def test_half_as_many_bytes_a_number_save_half_as_much() -> None:
    assert bytes_saved("product", Geometry(25, 20), (10,)) == 4 * 50 - 160
    assert bytes_saved("product", Geometry(25, 20, itemsize=2), (10,)) == 2 * 50 - 160
    ranks = []
    for kind, dtype in (("float", np.float32), ("float16", np.float16)):
        model = build(f"({kind}[N,25] x) => ({kind}[N,20] y)", "[a] y = MatMul(x, w)", {"w": (25, 20)})
        value = model.graph.initializers["w"]
        value.const_value = ir.tensor(value.const_value.numpy().astype(dtype), name="w")
        value.type = ir.TensorType(value.const_value.dtype)
        ranks.append(run(model, ratio=0.01).changes[0].details["rank"])
    assert ranks == [10, 9]


def test_without_shapes_padding_of_a_transposed_convolution_is_left() -> None:
    model = build(IMAGE, '[a] y = ConvTranspose<auto_pad="SAME_UPPER", strides=[2,2]>(x, w)', {"w": (12, 24, 3, 3)})
    assert run(model).changes[0].action == "skipped: its padding follows from the size of its output"
