"""Operators that are an attention by themselves: described so that the description computes the same, or left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from attention_check import check_blocks
from small_models import context
from text_models import build

from graphopt.analyses import ATTENTION, AttentionBlock
from graphopt.model_io import ShapeBinding, input_specs
from graphopt.reference import Feed, random_feed

_FLAT = {"q": ("N", "T", 32), "k": ("N", "T", 32), "v": ("N", "T", 32)}
_WIDE = {"q": ("N", "T", 32), "k": ("N", "S", 16), "v": ("N", "S", 12)}
_SPLIT = {"q": ("N", 4, "T", 8), "k": ("N", 2, "S", 8), "v": ("N", 2, "S", 6)}


def model(
    operator: str,
    inputs: dict[str, tuple[int | str, ...]],
    domain: str = "",
    outputs: int = 1,
    **attributes: float,
) -> ir.Model:
    """One operator on these inputs; names with a number in front are of another type."""
    values = [
        None if name.startswith("-") else ir.val(name, dtype=_type(name), shape=ir.Shape(shape))
        for name, shape in inputs.items()
    ]
    node = ir.node(operator, values, attributes=attributes, domain=domain, num_outputs=outputs, name="all")
    for i, value in enumerate(node.outputs):
        value.name, value.dtype = f"y{i}", ir.DataType.FLOAT
    graph = ir.Graph([v for v in values if v is not None], node.outputs, nodes=[node],
                     opset_imports={"": 23, "com.microsoft": 1})  # fmt: skip
    return ir.Model(graph, ir_version=10)


def _type(name: str) -> ir.DataType:
    kinds = {"bool": ir.DataType.BOOL, "int": ir.DataType.INT32}
    return next((kind for start, kind in kinds.items() if name.startswith(start)), ir.DataType.FLOAT)


def found(model: ir.Model) -> AttentionBlock:
    (block,) = context(model).fact(ATTENTION)
    return block


def feeds(model: ir.Model) -> list[Feed]:
    rng = np.random.default_rng(5)
    sizes = ({"N": 1, "T": 5, "S": 5}, {"N": 3, "T": 4, "S": 7}, {"N": 2, "T": 7, "S": 3}, {"N": 2, "T": 1, "S": 2})
    made = [random_feed(input_specs(model), ShapeBinding(dims=s), rng) for s in sizes]
    for feed in made:
        for name, array in feed.items():
            if array.dtype == bool:
                array[..., 0] = True  # what a row without any key gives, runtimes see differently
                feed[name] = array
    return made


@pytest.mark.parametrize(
    ("inputs", "attributes", "expected"),
    [
        (_FLAT, {"q_num_heads": 4, "kv_num_heads": 4}, {"kv_heads": 4, "causal": "no", "same_length": True}),
        (_WIDE, {"q_num_heads": 4, "kv_num_heads": 2, "scale": 0.3}, {"kv_heads": 2, "value_width": 6, "scale": 0.3}),
        (_SPLIT, {"is_causal": 1}, {"heads": 4, "kv_heads": 2, "causal": "yes", "value_width": 6, "width": 8}),
        (_SPLIT, {"softcap": 0.7}, {"softcap": 0.7, "causal": "no"}),
        ({**_SPLIT, "m": ("N", 1, "T", "S")}, {}, {"causal": "unknown"}),
        ({**_SPLIT, "bool m": ("N", 4, "T", "S")}, {}, {"causal": "unknown"}),
        ({**_SPLIT, "bool m": ("T", "S")}, {"is_causal": 1}, {"causal": "yes"}),
    ],
)  # fmt: skip
def test_the_standard_operator_computes_what_its_description_says(
    inputs: dict[str, tuple[int | str, ...]], attributes: dict[str, Any], expected: dict[str, object]
) -> None:
    made = model("Attention", inputs, **attributes)
    block = found(made)
    told = {name: getattr(block, name) for name in expected}
    assert told == {name: pytest.approx(x) if isinstance(x, float) else x for name, x in expected.items()}
    assert (block.name, block.form, block.dropped) == ("all", "operator", "")
    assert check_blocks(made, [block], feeds(made), 1e-5) == 4


@pytest.mark.parametrize(
    ("inputs", "attributes"),
    [
        (_FLAT, {"num_heads": 4}),
        (_FLAT, {"num_heads": 4, "unidirectional": 1}),
        ({**_FLAT, "-b": (), "-m": (), "a": ("N", 4, "T", "T")}, {"num_heads": 4, "scale": 0.2}),
    ],
)
def test_multi_head_attention_computes_what_its_description_says(
    inputs: dict[str, tuple[int | str, ...]], attributes: dict[str, Any]
) -> None:
    made = model("MultiHeadAttention", inputs, "com.microsoft", **attributes)
    block = found(made)
    assert (block.heads, block.width, block.dropped) == (4, 8, "")
    assert check_blocks(made, [block], feeds(made), 1e-5) == 4


@pytest.mark.parametrize(
    ("operator", "domain", "inputs", "attributes", "heads", "reason"),
    [
        ("Attention", "", {**_SPLIT, "-m": (), "pk": ("N", 2, "P", 8), "pv": ("N", 2, "P", 6)}, {}, (4, 2),
         "a cache joins its keys"),
        ("MultiHeadAttention", "com.microsoft", {**_FLAT, "b": (96,)}, {"num_heads": 4}, (4, 4),
         "it adds a bias to query, key and value itself"),
        ("MultiHeadAttention", "com.microsoft", {**_FLAT, "-b": (), "int m": ("N", "T")}, {"num_heads": 4}, (4, 4),
         "it hides keys by a mask of samples and keys"),
        ("MultiHeadAttention", "com.microsoft", {"q": ("N", "T", 4, 3, 8)}, {"num_heads": 4}, (4, 4),
         "query, key and value come packed"),
        ("GroupQueryAttention", "com.microsoft",
         {"q": ("N", "T", 32), "k": ("N", "T", 16), "v": ("N", "T", 16), "-pk": (), "-pv": (), "int n": ("N",),
          "int t": (1,)}, {"num_heads": 4, "kv_num_heads": 2}, (4, 2), "it hides keys behind a length for each sample"),
        ("GroupQueryAttention", "com.microsoft",
         {"q": ("N", "T", 64), "-k": (), "-v": (), "-pk": (), "-pv": (), "int n": ("N",), "int t": (1,)},
         {"num_heads": 4, "kv_num_heads": 2, "local_window_size": 9}, (4, 2), "its window of 9 is local already"),
        ("Attention", "com.microsoft", {"x": ("N", "T", 20), "w": (20, 96), "b": (96,)},
         {"num_heads": 4, "unidirectional": 1}, (4, 4), "it projects its input itself"),
    ],
)  # fmt: skip
def test_what_an_operator_does_besides_is_said(
    operator: str,
    domain: str,
    inputs: dict[str, tuple[int | str, ...]],
    attributes: dict[str, Any],
    heads: tuple[int, int],
    reason: str,
) -> None:
    block = found(model(operator, inputs, domain, **attributes))
    assert (block.heads, block.kv_heads) == heads
    assert block.width == 8
    assert (block.dropped or block.besides) == reason
    assert bool(block.dropped) == (reason in _NOBODY)
    assert block.causal == ("yes" if "unidirectional" in attributes or operator.startswith("Group") else "no")


_NOBODY = ("a cache joins its keys", "its window of 9 is local already")


def test_scores_as_an_output_are_said() -> None:
    made = model("Attention", _SPLIT, outputs=4)
    assert found(made).dropped == "its keys or scores are outputs"


_BEHIND = """m (float[N,T,4,8] a, float[N,2,T,8] b, float[N,2,T,8] c{inputs}) => (float[N,4,T,8] y) {{
    q0 = Transpose<perm=[0,2,1,3]>(a)
    q = Mul(q0, third)
    {keys}
    k5 = Unsqueeze(kj, two)
    ke = Expand(k5, repeats)
    k = Reshape(ke, sizes)
    v5 = Unsqueeze(vj, two)
    ve = Expand(v5, repeats)
    v = Reshape(ve, sizes)
    y = Attention<{attributes}>(q, k, v)
}}"""
_NUMBERS = {"two": np.array([2]), "repeats": np.array([1, 1, 2, 1, 1]), "sizes": np.array([0, 4, -1, 8]),
            "third": np.array(1 / 3, np.float32)}  # fmt: skip


def test_the_standard_operator_is_followed_back_as_products_are() -> None:
    keys = "kj = Identity(b)\n vj = Identity(c)"
    made = build(_BEHIND.format(inputs="", keys=keys, attributes="is_causal=1, scale=0.5"), 23, **_NUMBERS)
    block = found(made)
    assert (block.query.name, block.key.name, block.value.name) == ("a", "b", "c")
    assert (block.heads, block.kv_heads, block.causal, block.same_length) == (4, 2, "yes", True)
    assert block.scale == pytest.approx(1 / 6)
    assert check_blocks(made, [block], feeds(made), 1e-5) == 4


def test_an_order_that_counts_from_the_first_key_of_a_cache_is_said() -> None:
    inputs = ", float[N,2,P,8] pk, float[N,2,P,8] pv"
    keys = "kj = Concat<axis=2>(pk, b)\n vj = Concat<axis=2>(pv, c)"
    block = found(build(_BEHIND.format(inputs=inputs, keys=keys, attributes="is_causal=1"), 23, **_NUMBERS))
    assert (block.past, block.dropped) == (True, "its order counts from the first key of a cache")
    free = found(build(_BEHIND.format(inputs=inputs, keys=keys, attributes="scale=0.5"), 23, **_NUMBERS))
    assert (free.past, free.causal, free.dropped) == (True, "no", "")
