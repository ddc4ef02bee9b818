"""Operators in half precision, with inputs that come packed, and without the bias that ONNX Runtime needs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from passes.sparse_attention.attention_models import banded_twin, rewrite
from passes.sparse_attention.operator_models import (
    HEADS,
    HIDDEN,
    NAMES,
    QKV,
    WIDTH,
    counting,
    difference,
    feed_of,
    is_causal,
    model,
    operator,
    spelled,
)

from graphopt.errors import ModelError
from graphopt.reference import Reference
from graphopt_passes.sparse_attention._patterns import band_of

_SIZES = ((1, 37), (3, 37), (1, 50), (3, 50))
_HALF = 2e-3  # relative to the largest number: about two steps of float16
_WIDTH = 6


def compare(dense: ir.Model, whole: ir.Model, narrow: ir.Model, twin: ir.Model, limit: float) -> None:
    """Compare what sees everything with dense attention, and a narrow window with a dense model that hides the rest.

    Args:
        dense: What was rewritten, or the same on inputs that are not packed.
        whole: Rewritten with a window that is wider than the sequence.
        narrow: Rewritten with a window of `_WIDTH`.
        twin: Dense, in operators that a mask can be put into.
        limit: Relative to the largest number.
    """
    band = band_of("window", _WIDTH, causal=is_causal(twin))
    sessions = [Reference(each) for each in (dense, whole, narrow)]
    banded = {length: Reference(banded_twin(twin, band, length)) for _, length in _SIZES}
    for seed, (batch, length) in enumerate(_SIZES):
        feed = feed_of(whole, batch, length, seed)
        if "packed" in feed and feed["packed"].ndim == 5:
            parts = [part.reshape(batch, length, HIDDEN) for part in np.moveaxis(feed["packed"], 3, 0)]
            feed |= dict(zip("qkv"[-len(parts) :], parts, strict=True))
        assert difference(sessions[0], sessions[1], feed) < limit
        assert difference(banded[length], sessions[2], feed, counting(feed, _WIDTH)) < limit


@pytest.mark.parametrize("name", [name for name in NAMES if name != "QAttention" and not name.startswith("24 ")])
def test_operators_in_half_precision_become_bands_in_half_precision(name: str) -> None:
    dense, whole, narrow = (operator(name, "float16") for _ in range(3))
    assert rewrite(whole, width=64).modified
    assert rewrite(narrow, width=_WIDTH).modified
    compare(dense, whole, narrow, spelled(operator(name, "float16")), _HALF)


_PACKED_ALL = f"float[B,N,{HEADS},3,{WIDTH}] packed"
_PACKED_KEYS = f"float[B,N,{HIDDEN}] q, float[B,N,{HEADS},2,{WIDTH}] packed"
_MANY = f"MultiHeadAttention<num_heads={HEADS}"


@pytest.mark.parametrize("element", ["float", "float16"])
@pytest.mark.parametrize(
    ("inputs", "body", "same"),
    [
        (_PACKED_ALL, f"{_MANY}>(packed)", f"{_MANY}>(q, k, v)"),
        (_PACKED_ALL, f"{_MANY}, unidirectional=1>(packed)", f"{_MANY}, unidirectional=1>(q, k, v)"),
        (f"{_PACKED_ALL}, int32[B,N] mask", f"{_MANY}>(packed, , , b, mask)", f"{_MANY}>(q, k, v, b, mask)"),
        (_PACKED_KEYS, f"{_MANY}>(q, packed)", f"{_MANY}>(q, k, v)"),
        (f"{_PACKED_KEYS}, int32[B] ends", f"{_MANY}, unidirectional=1>(q, packed, , , ends)",
         f"{_MANY}, unidirectional=1>(q, k, v, , ends)"),
    ],
)  # fmt: skip
def test_packed_inputs_are_taken_apart(inputs: str, body: str, same: str, element: str) -> None:
    """ONNX Runtime takes packed inputs on GPUs only: the operator on inputs that were taken apart is the reference."""
    apart = ", ".join([QKV, *(part for part in inputs.split(", ") if "int32" in part)])
    plain, whole, narrow = model(same, apart, element=element), *(model(body, inputs, element=element) for _ in "ab")
    assert rewrite(whole, width=64).modified
    assert rewrite(narrow, width=_WIDTH).modified
    limit = 1e-5 if element == "float" else _HALF
    compare(plain, whole, narrow, spelled(model(same, apart, element=element)), limit)


@pytest.mark.parametrize("mask", ["", ", , mask"])
def test_a_projection_without_a_bias_is_refused_to_onnx_runtime_and_rewritten_all_the_same(mask: str) -> None:
    inputs = f"float[B,N,{HIDDEN}] x" + (", int32[B,N] mask" if mask else "")
    bare, body = f"Attention<num_heads=4>(x, w{mask})", f"Attention<num_heads=4>(x, w, b{mask.replace(' ,', '')})"
    with pytest.raises(ModelError, match="has no bias, on which ONNX Runtime crashes; give it a bias of zeros"):
        Reference(model(bare, inputs))
    dense, whole, narrow = model(body, inputs), model(bare, inputs), model(bare, inputs)
    dense.graph.initializers["b"].const_value = ir.tensor(np.zeros(3 * HIDDEN, np.float32), name="b")
    assert rewrite(whole, width=64).modified
    assert rewrite(narrow, width=_WIDTH).modified
    compare(dense, whole, narrow, spelled(model(bare, inputs)), 1e-5)
