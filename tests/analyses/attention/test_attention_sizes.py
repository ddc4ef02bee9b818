"""Sizes at two settings: models whose inputs have to fit each other, large images, sizes that the user fixed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from attention_check import check_blocks
from attention_forms import CASES
from small_models import context
from text_models import build

from graphopt.analyses import ATTENTION
from graphopt.analyses.attention.settings import settings
from graphopt.model_io import InputSpec, ShapeBinding, input_specs, load_model
from graphopt.reference import random_feed

_DECODER = """m (float[N,T,32] x, float[N,4,P,8] ok, float[N,4,P,8] ov, int64[N,{mask}] mask) => (float[N,T,32] y) {{
    a4 = Reshape(x, split)
    q = Transpose<perm=[0,2,1,3]>(a4)
    k = Concat<axis=2>(ok, q)
    v = Concat<axis=2>(ov, q)
    kt = Transpose<perm=[0,1,3,2]>(k)
    s = MatMul(q, kt)
    kshape = Shape(k)
    total = Gather(kshape, two)
    pshape = Shape(ok)
    past = Gather(pshape, two)
    line = Range(zero, total, one)
    rows = Range(past, total, one)
    below = Unsqueeze(rows, last)
    order = LessOrEqual(line, below)
    present = Cast<to=9>(mask)
    wide = Unsqueeze(present, middle)
    seen = And(order, wide)
    m = Where(seen, s, low)
    w = Softmax<axis=-1>(m)
    z = MatMul(w, v)
    back = Transpose<perm=[0,2,1,3]>(z)
    y = Reshape(back, flat)
}}"""
_NUMBERS = {
    "split": np.array([0, 0, 4, 8]), "flat": np.array([0, 0, 32]), "two": np.array(2), "zero": np.array(0),
    "one": np.array(1), "last": np.array([1]), "middle": np.array([1, 2]), "low": np.array(-1e9, np.float32),
}  # fmt: skip


def spec(name: str, *shape: int | str, kind: ir.DataType = ir.DataType.FLOAT) -> InputSpec:
    return InputSpec(name, kind, shape)


@pytest.mark.parametrize("mask", ["M", "total_sequence_length"])
def test_a_mask_over_cache_and_tokens_gets_the_length_of_both(mask: str) -> None:
    model = build(_DECODER.format(mask=mask), **_NUMBERS)
    (block,) = context(model).fact(ATTENTION)
    assert (block.causal, block.past, block.heads, block.dropped) == ("yes", True, 4, "")
    assert [condition.causal for condition in block.masks[0].conditions] == [True, False]
    binding = ShapeBinding(dims={"N": 3, "T": 4, "P": 6, mask: 10})
    feeds = [random_feed(input_specs(model), binding, np.random.default_rng(seed)) for seed in range(4)]
    assert check_blocks(model, [block], feeds, 1e-5) == 4


def test_names_that_are_sums_are_sums() -> None:
    inputs = [
        spec("x", "batch", "sequence"),
        spec("mask", "batch", "past + sequence"),
        spec("k", "batch", 2, "past", 8),
    ]
    first, second = next(iter(settings(inputs, ShapeBinding())))
    for setting in (first, second):
        sizes = setting.dims
        assert sizes["past + sequence"] == sizes["past"] + sizes["sequence"]
        assert len({sizes["batch"], sizes["past"], sizes["sequence"]}) == 3
    assert all(first.dims[name] != second.dims[name] for name in first.dims)


def test_masks_of_another_name_are_tried_at_the_length_of_the_tokens() -> None:
    ids = [spec(name, "batch", f"length of {name}", kind=ir.DataType.INT64) for name in ("ids", "mask")]
    apart, tied = settings(ids, ShapeBinding())
    assert apart[0].dims["length of ids"] != apart[0].dims["length of mask"]
    assert tied[0].dims["length of ids"] == tied[0].dims["length of mask"]


def test_images_that_are_halved_are_tried_larger() -> None:
    halves = "".join(f"x{i + 1} = MaxPool<kernel_shape=[2,2],strides=[2,2]>(x{i})\n" for i in range(4))
    model = build(f"""m (float[N,8,H,W] x0) => (float[N,A,8] y) {{
        {halves}
        rows = Reshape(x4, flat)
        q = Transpose<perm=[0,2,1]>(rows)
        s = MatMul(q, rows)
        w = Softmax<axis=-1>(s)
        y = MatMul(w, q)
    }}""", flat=np.array([0, 8, -1]))  # fmt: skip
    (block,) = context(model).fact(ATTENTION)
    assert (block.heads, block.width, block.queries, block.same_length) == (1, 8, None, True)


def test_sizes_that_the_user_fixed_are_lengths() -> None:
    model = CASES["a triangle of -inf"].model()
    (block,) = context(model, binding=ShapeBinding(dims={"N": 1, "T": 9})).fact(ATTENTION)
    assert (block.queries, block.keys, block.causal) == (9, 9, "yes")


@pytest.mark.parametrize(
    ("case", "blocks", "heads", "causal"),
    [("minilm", 6, (12, 12), "no"), ("stories260k", 5, (8, 4), "yes"), ("tiny_kws", 0, (), ""),
     ("magika_v3_3", 0, (), "")],
)  # fmt: skip
def test_attention_of_trained_models_is_found_block_by_block(
    case: str, blocks: int, heads: tuple[int, ...], causal: str, zoo: Callable[[str], Path]
) -> None:
    model = load_model(zoo(case) / "model.onnx")
    found = context(model).fact(ATTENTION)
    assert len(found) == blocks
    assert all((block.heads, block.kv_heads) == heads and not block.dropped for block in found)
    assert all(block.causal == causal and block.same_length for block in found)
    binding = ShapeBinding(dims={"N": 2, "T": 9})
    feeds = [random_feed(input_specs(model), binding, np.random.default_rng(seed)) for seed in range(2)]
    assert check_blocks(model, found, feeds if found else (), 1e-4) == 2 * blocks
