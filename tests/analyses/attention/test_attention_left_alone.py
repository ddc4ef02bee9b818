"""What is no attention is not found; what should not be replaced is found, and says why."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from attention_check import check_blocks
from small_models import context
from text_models import build

from graphopt.analyses import ATTENTION, AttentionBlock
from graphopt.model_io import ShapeBinding, input_specs
from graphopt.reference import random_feed

_QKV = "float[N,4,T,8] q, float[N,4,T,8] k, float[N,4,T,8] v"
_SCORES = "kt = Transpose<perm=[0,1,3,2]>(k)\n s = MatMul(q, kt)\n"
_END = "w = Softmax<axis=-1>(m)\n z = MatMul(w, v)"
_TURNED = """
    qt = Transpose<perm=[0,1,3,2]>(q)
    s = MatMul(k, qt)
    m = Add(s, mask)
    w = Softmax<axis=2>(m)
    vt = Transpose<perm=[0,1,3,2]>(v)
    z = MatMul(vt, w)
"""
_LINEAR = """m (float[N,T,8] x) => (float[N,T,8] y) {
    s = MatMul(x, w)
    p = Softmax<axis=-1>(s)
    k = MatMul(x, u)
    e = Softmax<axis=1>(k)
    et = Transpose<perm=[0,2,1]>(e)
    c = MatMul(et, x)
    y = MatMul(p, c)
}"""


def found(model: ir.Model) -> tuple[AttentionBlock, ...]:
    return context(model).fact(ATTENTION)


def number(value: float) -> np.ndarray:
    return np.array(value, np.float32)


@pytest.mark.parametrize(
    ("text", "weights", "opset"),
    [
        ("m (float[N,8] x) => (float[N,3] y) { s = MatMul(x, w)\n y = Softmax<axis=-1>(s) }", {"w": (8, 3)}, 17),
        ("m (float[N,8] x) => (float[N,8] y) { s = MatMul(x, w)\n g = Softmax<axis=-1>(s)\n y = MatMul(g, v) }",
         {"w": (8, 3), "v": (3, 8)}, 17),
        (_LINEAR, {"w": (8, 8), "u": (8, 8)}, 17),
        (f"m ({_QKV}) => (float[N,4,T,T] w) {{ {_SCORES} w = Softmax<axis=-1>(s) }}", {}, 17),
        (f"m ({_QKV}) => (float[N,4,T,8] z) {{ {_SCORES} w = Softmax<axis=1>(s)\n z = MatMul(w, v) }}", {}, 17),
        (f"m ({_QKV}) => (float[N,4,T,8] z) {{ {_SCORES} w = Softmax<axis=2>(s)\n z = MatMul(w, v) }}", {}, 17),
        (f"m ({_QKV}) => (float[N,4,T,8] z) {{ {_SCORES} w = Softmax<axis=1>(s)\n z = MatMul(w, v) }}", {}, 11),
        (f"m ({_QKV}) => (float[N,4,T,8] z) {{ {_SCORES} w = Sigmoid(s)\n z = MatMul(w, v) }}", {}, 17),
    ],
    ids=["a classifier", "a gate over experts", "linear attention", "weights alone", "softmax over heads",
         "softmax over queries", "an old softmax over all that follows", "a sigmoid"],
)  # fmt: skip
def test_what_is_no_attention_is_not_found(text: str, weights: dict[str, tuple[int, ...]], opset: int) -> None:
    assert found(build(text, opset, **weights)) == ()


@pytest.mark.parametrize(
    ("body", "outputs", "reason"),
    [
        (f"{_SCORES} m = Mul(s, half)\n {_END}", ", float[N,4,T,T] w", "its scores or weights are an output: 'w'"),
        (f"{_SCORES} m = Mul(s, half)\n {_END}\n e = ReduceMax(m)", ", float e",
         "its scores or weights are read by ReduceMax '' too"),
        (f"{_SCORES} m = Mul(s, half)\n p = Softmax<axis=-1>(m)\n w = Mul(p, head)\n z = MatMul(w, v)", "",
         "its weights go through Mul behind the softmax"),
        (f"{_SCORES} m = Mul(s, head)\n {_END}", "", "its scores go through Mul with a tensor"),
        (f"{_SCORES} a = Add(s, mask)\n m = Mul(a, half)\n {_END}", "",
         "its scores are scaled behind a mask"),
        (f"{_SCORES} size = ReduceMax(q)\n a = Mul(s, size)\n m = Mul(a, half)\n {_END}", "",
         "its scale is computed in several steps"),
        (_TURNED, "", "its masks lie across queries and keys"),
    ],
)  # fmt: skip
def test_what_a_description_cannot_say_is_a_reason(body: str, outputs: str, reason: str) -> None:
    weights = {"half": number(0.5), "head": np.ones((1, 4, 1, 1), np.float32) / 3, "mask": np.ones((1, 1), np.float32)}
    used = {name: array for name, array in weights.items() if name in body}
    (block,) = found(build(f"m ({_QKV}) => (float[N,4,a,b] z{outputs}) {{ {body} }}", **used))
    assert block.dropped == reason
    assert (block.heads, block.width) == (4, 8)


def test_a_scale_that_the_model_computes_is_a_value() -> None:
    model = build(f"m ({_QKV}, float t) => (float[N,4,T,8] z) {{ {_SCORES} m = Mul(s, t)\n {_END} }}")
    (block,) = found(model)
    assert isinstance(block.scale, ir.Value)
    assert block.scale.name == "t"
    assert block.dropped == ""
    feed = random_feed(input_specs(model), ShapeBinding(dims={"N": 2, "T": 5}), np.random.default_rng(0))
    assert check_blocks(model, [block], [feed], 1e-5) == 1


_WINDOWS = """m (float[N,12,32] x) => (float[N,12,32] y) {{
    parts = Reshape(x, cut)
    qm = MatMul(parts, wq)
    km = MatMul(parts, wk)
    q4 = Reshape(qm, split)
    k4 = Reshape(km, split)
    v4 = Reshape(parts, split)
    q = Transpose<perm=[0,2,1,3]>(q4)
    kt = Transpose<perm=[0,2,3,1]>(k4)
    v = Transpose<perm=[0,2,1,3]>(v4)
    s = MatMul(q, kt)
    {mask}
    w = Softmax<axis=-1>(m)
    z = MatMul(w, v)
    back = Transpose<perm=[0,2,1,3]>(z)
    y = Reshape(back, whole)
}}"""


@pytest.mark.parametrize(
    "mask",
    [
        "m = Add(s, bias)",
        "five = Reshape(s, windows)\n masked = Add(five, shifted)\n m = Reshape(masked, four)",
    ],
)
def test_windows_are_local_already(mask: str) -> None:
    ints = {"cut": (-1, 4, 32), "split": (0, 0, 4, 8), "whole": (-1, 12, 32), "windows": (-1, 3, 4, 4, 4),
            "four": (-1, 4, 4, 4)}  # fmt: skip
    weights = {name: np.array(shape, np.int64) for name, shape in ints.items() if name in _WINDOWS + mask}
    arrays = {"bias": np.ones((1, 4, 4, 4), np.float32), "shifted": np.ones((1, 3, 1, 4, 4), np.float32)}
    weights |= {name: array for name, array in arrays.items() if name in mask}
    weights |= {name: np.eye(32, dtype=np.float32) for name in ("wq", "wk")}
    (block,) = found(build(_WINDOWS.format(mask=mask), 17, **weights))
    assert (block.heads, block.queries, block.keys) == (4, 4, 4)
    assert block.dropped == "its windows of 4 are local already"


def test_attention_inside_a_branch_is_found() -> None:
    branch = f"g () => (float[N,4,T,8] z) {{ {_SCORES.replace('s =', 'm =')} {_END} }}"
    model = build(f"""m (bool[] c, {_QKV}) => (float[N,4,T,8] y) {{
        y = If (c) <then_branch = {branch}, else_branch = h () => (float[N,4,T,8] o) {{ o = Identity(q) }}>
    }}""")
    (block,) = found(model)
    assert (block.heads, block.width, block.query.name, block.dropped) == (4, 8, "q", "")


def test_blocks_come_in_graph_order_and_twice_the_same() -> None:
    body = "".join(f"""
        kt{i} = Transpose<perm=[0,1,3,2]>(k)
        m{i} = MatMul(q{i}, kt{i})
        w{i} = Softmax<axis=-1>(m{i})
        q{i + 1} = MatMul(w{i}, v)
    """ for i in range(3))  # fmt: skip
    model = build(f"m ({_QKV.replace(' q', ' q0')}) => (float[N,4,T,8] q3) {{ {body} }}")
    blocks = found(model)
    assert [block.output.name for block in blocks] == ["q1", "q2", "q3"]
    assert [block.query.name for block in blocks] == ["q0", "q1", "q2"]
    assert [block.name for block in blocks] == [block.name for block in found(model)]
