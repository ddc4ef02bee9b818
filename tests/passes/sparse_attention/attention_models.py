"""Attention as exporters spell it, and what a dense model with a mask of the same band computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.analyses.attention import ATTENTION
from graphopt.model_io import ShapeBinding
from graphopt.pass_base import Context, PassResult
from graphopt.reference import Feed, Reference
from graphopt.targets import Target
from graphopt_passes.sparse_attention import SparseAttention
from graphopt_passes.sparse_attention._patterns import Band, visible

Array = np.ndarray[Any, np.dtype[Any]]
HEADS, WIDTH = 4, 8
HIDDEN = HEADS * WIDTH

_HEADS_OF = """
q0 = MatMul(x, wq) q4 = Reshape(q0, split) q = Transpose<perm=[0,2,1,3]>(q4)
k0 = MatMul(x, wk) k4 = Reshape(k0, split) k = Transpose<perm=[0,2,3,1]>(k4)
v0 = MatMul(x, wv) v4 = Reshape(v0, split) v = Transpose<perm=[0,2,1,3]>(v4)
"""
_JOINED = "o4 = Transpose<perm=[0,2,1,3]>(o) y = Reshape(o4, join)"
_PLACES = """
whole = Shape(x) length = Gather<axis=0>(whole, i1) places = Range(i0, length, i1)
at_key = Unsqueeze(places, front) at_query = Unsqueeze(places, back)
"""
_HIDDEN = """
real = Cast<to=1>(mask) gone = Sub(one, real) absent = Unsqueeze(gone, middle) hides = Mul(absent, minus)
"""
_ROTARY = """
line = Cast<to=1>(places) column = Unsqueeze(line, first) angle = Mul(column, frequencies)
angles = Concat<axis=-1>(angle, angle) cosine = Cos(angles) sine = Sin(angles)
"""


def _turned(to: str, of: str) -> str:
    """Queries or keys turned by their positions, as `rotate_half` does."""
    return f"""
    {of}_a = Slice({of}, zeroth, half, rest) {of}_b = Slice({of}, half, far, rest) {of}_c = Neg({of}_b)
    {of}_r = Concat<axis=-1>({of}_c, {of}_a) {of}_x = Mul({of}, cosine) {of}_y = Mul({of}_r, sine)
    {to} = Add({of}_x, {of}_y)"""


# torch.nn.MultiheadAttention, as the exporter that traces writes it: time first, shapes computed, samples and heads on
# one axis; where its weights are not asked for they come apart again ahead of the scores
_MODULE = """
xt = Transpose<perm=[1,0,2]>(x) given = Shape(xt) n = Gather<axis=0>(given, i0) samples = Gather<axis=0>(given, i1)
packed = MatMul(xt, w3) all = Shape(packed) lead = Slice(all, zeroth, second) three = Concat<axis=0>(lead, thrice)
p5 = Reshape(packed, three) p6 = Unsqueeze(p5, zeroth) p7 = Transpose<perm=[3,1,2,0,4]>(p6) p8 = Squeeze(p7, third)
q0 = Gather<axis=0>(p8, i0) k0 = Gather<axis=0>(p8, i1) v0 = Gather<axis=0>(p8, i2) rows = Mul(samples, many)
n_axis = Unsqueeze(n, zeroth) rows_axis = Unsqueeze(rows, zeroth) samples_axis = Unsqueeze(samples, zeroth)
merged = Concat<axis=0>(n_axis, rows_axis, eight) traced = Concat<axis=0>(rest, rows_axis, eight)
q3 = Reshape(q0, merged) qh = Transpose<perm=[1,0,2]>(q3) k3 = Reshape(k0, traced)
v3 = Reshape(v0, traced) vh = Transpose<perm=[1,0,2]>(v3)
flat4 = Concat<axis=0>(samples_axis, four, rest, n_axis)
"""
_MODULE_PADDING = """
seen = Cast<to=9>(mask) low = Where(seen, zero, inf) by_key = Concat<axis=0>(samples_axis, single, single, n_axis)
low4 = Reshape(low, by_key) lows = Expand(low4, by_head) by_row = Concat<axis=0>(rows_axis, single, n_axis)
pad = Reshape(lows, by_row)
"""
_MODULE_HEADS = """
kh = Transpose<perm=[1,0,2]>(k3) by_width = Concat<axis=0>(samples_axis, four, n_axis, eight)
qs = Reshape(qh, by_width) ks = Reshape(kh, by_width) vs = Reshape(vh, by_width)
r = Mul(qs, root) kt = Transpose<perm=[0,1,3,2]>(ks) l = Mul(kt, root)
"""
_MODULE_OUT = """
ot = Transpose<perm={perm}>(o) count = Mul(n, samples) count_axis = Unsqueeze(count, zeroth)
flat = Concat<axis=0>(count_axis, joined) o2 = Reshape(ot, flat) whole = Concat<axis=0>(n_axis, samples_axis, joined)
o3 = Reshape(o2, whole) y = Transpose<perm=[1,0,2]>(o3)
"""

# what stands between the weights and the result; `x` is [B, N, HIDDEN], `mask` [B, N] of ones and zeros
FORMS: dict[str, str] = {
    "scaled after, padding added": f"""{_HEADS_OF}
        real = Cast<to=1>(mask) gone = Sub(one, real) hidden = Unsqueeze(gone, middle) low = Mul(hidden, minus)
        s = MatMul(q, k) t = Mul(s, scale) u = Add(t, low) p = Softmax<axis=-1>(u) o = MatMul(p, v) {_JOINED}""",
    "scaled before, padding hidden": f"""{_HEADS_OF}
        seen = Cast<to=9>(mask) gone = Not(seen) hidden = Unsqueeze(gone, middle)
        r = Mul(q, root) l = Mul(k, root) s = MatMul(r, l) u = Where(hidden, least, s)
        p = Softmax<axis=-1>(u) o = MatMul(p, v) {_JOINED}""",
    "no mask": f"""{_HEADS_OF}
        s = MatMul(q, k) t = Div(s, width) p = Softmax<axis=-1>(t) o = MatMul(p, v) {_JOINED}
        unread = Cast<to=1>(mask)""",
    "causal by positions, padding": f"""{_HEADS_OF}{_PLACES}
        order = LessOrEqual(at_key, at_query) real = Cast<to=9>(mask) there = Unsqueeze(real, middle)
        both = And(order, there) low = Where(both, zero, minus)
        s = MatMul(q, k) t = Mul(s, scale) u = Add(t, low) p = Softmax<axis=-1>(u) o = MatMul(p, v) {_JOINED}""",
    "causal by a triangle": f"""{_HEADS_OF}{_PLACES}
        square = Expand(inf, shape_of) upper = Trilu<upper=1>(square, i1)
        s = MatMul(q, k) t = Mul(s, scale) u = Add(t, upper) p = Softmax<axis=-1>(u) o = MatMul(p, v) {_JOINED}
        unread = Cast<to=1>(mask)""".replace(
        "square =", "sides = Unsqueeze(length, zeroth) shape_of = Concat<axis=0>(sides, sides) square ="
    ),
    "relative bias": f"""{_HEADS_OF}{_PLACES}
        distance = Sub(at_key, at_query) near = Max(distance, i_4) nearer = Min(near, i4) bucket = Add(nearer, i4)
        looked = Gather<axis=0>(table, bucket) bias = Transpose<perm=[2,0,1]>(looked)
        s = MatMul(q, k) t = Mul(s, scale) u = Add(t, bias) p = Softmax<axis=-1>(u) o = MatMul(p, v) {_JOINED}
        unread = Cast<to=1>(mask)""",
    "batch and heads in one": f"""{_HEADS_OF}{_PLACES}
        long = Unsqueeze(length, zeroth) merged = Concat<axis=0>(rest, long, eight)
        q3 = Reshape(q, merged) kt = Transpose<perm=[0,1,3,2]>(k) k3 = Reshape(kt, merged) v3 = Reshape(v, merged)
        kk = Transpose<perm=[0,2,1]>(k3)
        s = MatMul(q3, kk) t = Mul(s, scale) p = Softmax<axis=-1>(t) o3 = MatMul(p, v3)
        size = Shape(v) o = Reshape(o3, size) {_JOINED}
        unread = Cast<to=1>(mask)""",
    "two heads of keys": f"""{_HEADS_OF}
        k2 = Reshape(k0, few) v2 = Reshape(v0, few)
        kk = Slice(k2, zeroth, second, second) vv = Slice(v2, zeroth, second, second)
        kt = Transpose<perm=[0,2,1,3]>(kk) vt = Transpose<perm=[0,2,1,3]>(vv)
        k5 = Unsqueeze(kt, second) v5 = Unsqueeze(vt, second) ke = Tile(k5, twice) ve = Tile(v5, twice)
        ks = Reshape(ke, heads) vs = Reshape(ve, heads) kx = Transpose<perm=[0,1,3,2]>(ks)
        s = MatMul(q, kx) t = Mul(s, scale) p = Softmax<axis=-1>(t) o = MatMul(p, vs) {_JOINED}
        unread = Cast<to=1>(mask)""",
    "script: a scale from the shape, padding": f"""{_HEADS_OF}{_HIDDEN}
        sizes = Shape(q) size = Slice(sizes, rest, far) wide = Cast<to=1>(size) length = Sqrt(wide)
        share = Div(one, length) part = Sqrt(share) r = Mul(q, part) l = Mul(k, part)
        s = MatMul(r, l) u = Add(s, hides) p = Softmax<axis=-1>(u) o = MatMul(p, v) {_JOINED}""",
    "dynamo: keys flattened, a guard against NaN": f"""{_HEADS_OF}{_PLACES}
        kh = Transpose<perm=[0,1,3,2]>(k) long = Unsqueeze(length, zeroth) flat = Concat<axis=0>(rest, long, eight)
        k3 = Reshape(kh, flat) turned = Transpose<perm=[0,2,1]>(k3) parted = Concat<axis=0>(rest, four, eight, long)
        kt = Reshape(turned, parted) r = Mul(q, root) l = Mul(kt, root) s = MatMul(r, l)
        real = Cast<to=9>(mask) there = Unsqueeze(real, middle) low = Where(there, zero, inf) u = Add(s, low)
        p = Softmax<axis=-1>(u) bad = IsNaN(p) sound = Where(bad, zero, p) o = MatMul(sound, v) {_JOINED}""",
    "causal Llama: rotary, heads of keys by Expand, padding": f"""{_PLACES}{_ROTARY}
        q0 = MatMul(x, wq) q4 = Reshape(q0, split) qn = Transpose<perm=[0,2,1,3]>(q4)
        k0 = MatMul(x, wk2) k4 = Reshape(k0, shared) kn = Transpose<perm=[0,2,1,3]>(k4)
        v0 = MatMul(x, wv2) v4 = Reshape(v0, shared) vn = Transpose<perm=[0,2,1,3]>(v4)
        {_turned("q", "qn")} {_turned("k", "kn")}
        k5 = Unsqueeze(k, second) ke = Expand(k5, twice) ks = Reshape(ke, heads)
        v5 = Unsqueeze(vn, second) ve = Expand(v5, twice) vs = Reshape(ve, heads)
        order = LessOrEqual(at_key, at_query) real = Cast<to=9>(mask) there = Unsqueeze(real, middle)
        both = And(order, there) low = Where(both, zero, least) kt = Transpose<perm=[0,1,3,2]>(ks)
        s = MatMul(q, kt) t = Mul(s, scale) u = Add(t, low) p = Softmax<axis=-1>(u) o = MatMul(p, vs) {_JOINED}""",
    "tf2onnx: Einsum, keys first, padding": f"""
        q0 = MatMul(x, wq) q4 = Reshape(q0, split) k0 = MatMul(x, wk) k4 = Reshape(k0, split)
        v0 = MatMul(x, wv) v4 = Reshape(v0, split) r = Mul(q4, scale) {_HIDDEN}
        s = Einsum<equation="aecd,abcd->acbe">(k4, r) u = Add(s, hides) p = Softmax<axis=-1>(u)
        o = Einsum<equation="acbe,aecd->abcd">(p, v4) y = Reshape(o, join)""",
    "T5: relative bias where padding leaves it": f"""{_HEADS_OF}{_PLACES}
        distance = Sub(at_key, at_query) near = Max(distance, i_4) nearer = Min(near, i4) bucket = Add(nearer, i4)
        looked = Gather<axis=0>(table, bucket) turned = Transpose<perm=[2,0,1]>(looked) bias = Unsqueeze(turned, zeroth)
        real = Cast<to=9>(mask) there = Unsqueeze(real, middle) low = Where(there, bias, lowest)
        s = MatMul(q, k) u = Add(s, low) p = Softmax<axis=-1>(u) o = MatMul(p, v) {_JOINED}""",
    "torch's module with its weights, padding": f"""{_MODULE}
        scaled = Mul(qh, scale) kt = Transpose<perm=[1,2,0]>(k3) s = MatMul(scaled, kt) {_MODULE_PADDING}
        u = Add(s, pad) p = Softmax<axis=-1>(u) o = MatMul(p, vh) {_MODULE_OUT.format(perm="[1,0,2]")}""",
    "torch's module, padding": f"""{_MODULE}{_MODULE_PADDING}
        mask4 = Reshape(pad, flat4) {_MODULE_HEADS}
        s = MatMul(r, l) u = Add(s, mask4) p = Softmax<axis=-1>(u) o = MatMul(p, vs)
        {_MODULE_OUT.format(perm="[2,0,1,3]")}""",
    "causal: torch's module, padding": f"""{_MODULE}{_MODULE_PADDING}
        sides = Concat<axis=0>(n_axis, n_axis) square = Expand(inf, sides) later = Trilu<upper=1>(square, i1)
        one_later = Unsqueeze(later, zeroth) both = Add(one_later, pad) mask4 = Reshape(both, flat4) {_MODULE_HEADS}
        s = MatMul(r, l) u = Add(s, mask4) p = Softmax<axis=-1>(u) o = MatMul(p, vs)
        {_MODULE_OUT.format(perm="[2,0,1,3]")}""",
}
_CONSTANTS: dict[str, Array] = {
    "split": np.array([0, 0, HEADS, WIDTH]),
    "few": np.array([0, 0, HEADS, WIDTH]),
    "join": np.array([0, 0, HIDDEN]),
    "heads": np.array([0, HEADS, -1, WIDTH]),
    "rest": np.array([-1]),
    "eight": np.array([WIDTH]),
    "twice": np.array([1, 1, 2, 1, 1]),
    "zeroth": np.array([0]),
    "first": np.array([1]),
    "second": np.array([2]),
    "third": np.array([3]),
    "thrice": np.array([3, HIDDEN]),
    "single": np.array([1]),
    "four": np.array([HEADS]),
    "many": np.array(HEADS),
    "joined": np.array([HIDDEN]),
    "half": np.array([WIDTH // 2]),
    "far": np.array([np.iinfo(np.int64).max]),
    "shared": np.array([0, 0, 2, WIDTH]),
    "by_head": np.array([1, HEADS, 1, 1]),
    "middle": np.array([1, 2]),
    "front": np.array([0, 1, 2]),
    "back": np.array([0, 1, 3]),
    "i0": np.array(0),
    "i1": np.array(1),
    "i2": np.array(2),
    "i4": np.array(4),
    "i_4": np.array(-4),
    "one": np.array(1, np.float32),
    "zero": np.array(0, np.float32),
    "minus": np.array(-10000, np.float32),
    "least": np.array(-60000, np.float32),
    "lowest": np.array(-3e38, np.float32),
    "frequencies": (100.0 ** -(np.arange(WIDTH // 2) * 2 / WIDTH)).astype(np.float32),
    "inf": np.array(-np.inf, np.float32),
    "scale": np.array(WIDTH**-0.5, np.float32),
    "root": np.array(WIDTH**-0.25, np.float32),
    "width": np.array(WIDTH**0.5, np.float32),
}


def attention(form: str, opset: int = 17, *, kind: type[np.floating[Any]] = np.float32) -> ir.Model:
    """A model of one attention; its mask says which positions count."""
    body, rng = FORMS[form], np.random.default_rng(0)
    if "relative bias" in form:
        body = body.replace("at_key = Unsqueeze(places, front)", "at_key = Unsqueeze(places, zeroth)")
        body = body.replace("at_query = Unsqueeze(places, back)", "at_query = Unsqueeze(places, first)")
    arrays = dict(_CONSTANTS) | {"table": rng.standard_normal((9, HEADS)).astype(np.float32)}
    arrays |= {name: (rng.standard_normal((HIDDEN, HIDDEN)) / 3).astype(np.float32) for name in ("wq", "wk", "wv")}
    arrays["w3"] = np.concatenate([arrays[name] for name in ("wq", "wk", "wv")], axis=1)
    arrays |= {f"{name}2": arrays[name][:, : HIDDEN // 2] for name in ("wk", "wv")}
    return _model(body, arrays, opset, kind)


def _model(body: str, arrays: dict[str, Array], opset: int, kind: type[np.floating[Any]]) -> ir.Model:
    words = set(body.replace(",", " ").replace(")", " ").replace("(", " ").split())
    used = {name: a.astype(kind) if a.dtype == np.float32 else a for name, a in arrays.items() if name in words}
    element = "float" if kind is np.float32 else "float16"
    body = body if kind is np.float32 else body.replace("Cast<to=1>", "Cast<to=10>")
    declared = ", ".join(
        f"{element if a.dtype == kind else 'int64'}[{','.join(map(str, a.shape))}] {name}" for name, a in used.items()
    )
    signature = f"({element}[B,N,{HIDDEN}] x, int64[B,N] mask) => ({element}[B,N,{HIDDEN}] y)"
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : {opset}]>\nmain {signature} <{declared}> {{\n{body}\n}}'
    )
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in used.items())
    return ir.from_proto(proto)


def rewrite(model: ir.Model, *, binding: ShapeBinding | None = None, **options: Any) -> PassResult:
    """Run the pass on a model in place."""
    ctx = Context(model, Target(name="ort"), binding=binding or ShapeBinding())
    step = SparseAttention(**options)
    step.requires(model, ctx)
    return step.run(model, ctx)


def banded_twin(model: ir.Model, band: Band, length: int) -> ir.Model:
    """A copy for one length whose softmax sees what the band lets it see."""
    floats = [value.dtype for value in model.graph.inputs if value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)]
    twin, kind = model.clone(), floats[0] if floats else ir.DataType.FLOAT
    assert kind is not None
    for i, node in enumerate([node for node in twin.graph if node.op_type == "Softmax"]):
        scores = node.inputs[0]
        assert scores is not None
        array = np.where(visible(band, length), 0, -np.inf).astype(kind.numpy())
        tensor = ir.tensor(array, name=f"band{i}")
        value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
        value.const_value = tensor
        twin.graph.register_initializer(value)
        add = ir.node("Add", [scores, value], outputs=[ir.Value(name=f"banded{i}")])
        twin.graph.insert_before(node, add)
        node.replace_input_with(0, add.outputs[0])
    return twin


def feeds(model: ir.Model, batch: int, length: int, count: int = 1, seed: int = 0) -> list[Feed]:
    """Random inputs; of each sample but the first the last positions are padding."""
    rng, kind = np.random.default_rng(seed), model.graph.inputs[0].dtype
    assert kind is not None
    found: list[Feed] = []
    for _ in range(count):
        mask = np.ones((batch, length), np.int64)
        for sample in range(1, batch):
            mask[sample, rng.integers(1, length + 1) :] = 0
        x = rng.standard_normal((batch, length, HIDDEN)).astype(kind.numpy())
        found.append({"x": x, "mask": mask})
    return found


def distance(one: ir.Model, other: ir.Model, given: list[Feed], *, optimize: bool = True) -> float:
    """Largest difference of the result at positions that count."""
    first, second = Reference(one, optimize=optimize), Reference(other, optimize=optimize)
    worst = 0.0
    for feed in given:
        a, b = (each.run(feed)["y"][feed["mask"] != 0].astype(np.float64) for each in (first, second))
        assert np.isfinite(a).all()
        assert np.isfinite(b).all()
        worst = max(worst, float(np.abs(a - b).max()))
    return worst


def is_causal(model: ir.Model) -> bool:
    """Whether the attention of a model is found to be causal."""
    return Context(model, Target(name="ort")).fact(ATTENTION)[0].causal == "yes"
