"""Operators that are an attention by themselves, each alone in a model, and what to feed them."""

from __future__ import annotations

import re
from types import EllipsisType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.analyses import SHAPES
from graphopt.analyses.attention import ATTENTION
from graphopt.pass_base import Context
from graphopt.reference import Feed, Reference
from graphopt.targets import Target
from graphopt_passes.sparse_attention.spelled import spell_out

__all__ = ["HEADS", "HIDDEN", "NAMES", "OPERATORS", "QKV", "WIDTH", "counting", "difference", "feed_of", "is_causal",
           "model", "operator", "spelled"]  # fmt: skip

Array = np.ndarray[Any, np.dtype[Any]]
HEADS, WIDTH = 4, 8
HIDDEN = HEADS * WIDTH
QKV = f"float[B,N,{HIDDEN}] q, float[B,N,{HIDDEN}] k, float[B,N,{HIDDEN}] v"
_MANY = f"<num_heads={HEADS}"
OPERATORS: dict[str, tuple[str, str]] = {
    "MultiHeadAttention, bias": (QKV, f"MultiHeadAttention{_MANY}>(q, k, v, b)"),
    "MultiHeadAttention, mask": (f"{QKV}, int32[B,N] mask", f"MultiHeadAttention{_MANY}>(q, k, v, , mask)"),
    "MultiHeadAttention, lengths": (f"{QKV}, int32[B] ends", f"MultiHeadAttention{_MANY}>(q, k, v, , ends)"),
    "MultiHeadAttention, square mask": (
        f"{QKV}, int32[B,N,N] square", f"MultiHeadAttention{_MANY}>(q, k, v, , square)"),
    "MultiHeadAttention, all": (
        f"{QKV}, int32[B,N] mask, float[1,{HEADS},N,N] added",
        f"MultiHeadAttention{_MANY}, scale=0.2, unidirectional=1>(q, k, v, b, mask, added)"),
    "MultiHeadAttention, keys by head": (
        f"float[B,N,{HIDDEN}] q, float[B,{HEADS},N,{WIDTH}] ks, float[B,{HEADS},N,{WIDTH}] vs, int32[B,N] mask",
        f"MultiHeadAttention{_MANY}>(q, ks, vs, , mask)"),
    "Attention": (f"float[B,N,{HIDDEN}] x", f"Attention{_MANY}>(x, w, b)"),
    "Attention, causal, mask": (
        f"float[B,N,{HIDDEN}] x, int32[B,N] mask", f"Attention{_MANY}, unidirectional=1>(x, w, b, mask)"),
    "Attention, lengths": (
        f"float[B,N,{HIDDEN}] x, int32[B] ends", f"Attention{_MANY}, mask_filter_value=-3e4>(x, w, b, ends)"),
    "Attention, added": (
        f"float[B,N,{HIDDEN}] x, float[B,{HEADS},N,N] added", f"Attention{_MANY}>(x, w, b, , , added)"),
    "QAttention": (
        f"uint8[B,N,{HIDDEN}] bytes, int32[B,N] mask",
        f"QAttention{_MANY}>(bytes, weight, b, scale, scales, mask, zero)"),
    "GroupQueryAttention": (
        f"float[B,N,{HIDDEN}] q, float[B,N,{HIDDEN // 2}] k2, float[B,N,{HIDDEN // 2}] v2, int32[B] last, int32 total",
        f"GroupQueryAttention{_MANY}, kv_num_heads=2>(q, k2, v2, , , last, total)"),
    "GroupQueryAttention, packed": (
        f"float[B,N,{2 * HIDDEN}] packed, int32[B] last, int32 total",
        f"GroupQueryAttention{_MANY}, kv_num_heads=2, softcap=2.0>(packed, , , , , last, total)"),
}  # fmt: skip
"""Those of ONNX Runtime: inputs, and what stands behind `com.microsoft.`."""

_BY_HEAD = f"float[B,{HEADS},N,{WIDTH}] q, float[B,2,N,{WIDTH}] k2, float[B,2,N,{WIDTH}] v2"
STANDARD: dict[str, tuple[str, str]] = {
    "flat": (
        f"float[B,N,{HIDDEN}] q, float[B,N,{HIDDEN // 2}] k2, float[B,N,{HIDDEN // 2}] v2",
        f"Attention<q_num_heads={HEADS}, kv_num_heads=2>(q, k2, v2)"),
    "causal": (_BY_HEAD, "Attention<is_causal=1, scale=0.3>(q, k2, v2)"),
    "capped": (_BY_HEAD, "Attention<is_causal=1, softcap=2.0>(q, k2, v2)"),
    "hidden": (f"{_BY_HEAD}, bool[B,1,N,N] seen", "Attention(q, k2, v2, seen)"),
    "causal, hidden": (f"{_BY_HEAD}, bool[B,1,N,N] seen", "Attention<is_causal=1>(q, k2, v2, seen)"),
    "added": (f"{_BY_HEAD}, float[1,{HEADS},N,N] added", "Attention(q, k2, v2, added)"),
}  # fmt: skip
"""Those of ONNX itself, from operator set 23 on."""

NAMES = (*OPERATORS, *(f"{opset} {name}" for opset in (23, 24) for name in STANDARD))
"""All of them, as `operator` takes them."""


def model(
    body: str, inputs: str, outputs: str = "y", opset: int = 17, domain: str = "com.microsoft.", element: str = "float"
) -> ir.Model:
    """A model of one operator.

    Args:
        body: The operator with its inputs; weights are drawn.
        inputs: Inputs of the model; `B` is the batch, `N` the length.
        outputs: Names of its outputs.
        opset: Operator set.
        domain: Of the operator.
        element: Takes the place of `float`.
    """
    rng = np.random.default_rng(3)
    arrays: dict[str, Array] = {
        "w": (rng.standard_normal((HIDDEN, 3 * HIDDEN)) / 4).astype(np.float32),
        "b": rng.standard_normal(3 * HIDDEN).astype(np.float32),
        "weight": rng.integers(-90, 90, (HIDDEN, 3 * HIDDEN)).astype(np.int8),
        "scale": np.array(0.02, np.float32),
        "scales": np.array(0.004, np.float32),
        "zero": np.array(131, np.uint8),
    }
    words = set(re.split(r"\W+", body[body.index("(") :]))
    used = {name: array for name, array in arrays.items() if name in words}
    if element == "float16":
        used = {name: a.astype(np.float16) if a.dtype == np.float32 else a for name, a in used.items()}
    kinds = {np.dtype(np.float32): "float", np.dtype(np.float16): "float16", np.dtype(np.int8): "int8",
             np.dtype(np.uint8): "uint8"}  # fmt: skip
    declared = ", ".join(f"{kinds[a.dtype]}[{','.join(map(str, a.shape))}] {n}" for n, a in used.items())
    results = ", ".join(f"{element} {name}" for name in outputs.split(", ") if name)
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>
        main ({inputs.replace("float[", f"{element}[")}) => ({results}) <{declared}> {{ {outputs} = {domain}{body} }}"""
    )
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in used.items())
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")
    return ir.from_proto(proto)


def operator(name: str, element: str = "float") -> ir.Model:
    """One of `OPERATORS`, or of `STANDARD` with the operator set in front: `24 causal`."""
    if name in OPERATORS:
        inputs, body = OPERATORS[name]
        return model(body, inputs, element=element)
    opset, _, rest = name.partition(" ")
    inputs, body = STANDARD[rest]
    return model(body, inputs, opset=int(opset), domain="", element=element)


def feed_of(made: ir.Model, batch: int, length: int, seed: int) -> Feed:
    """Random inputs; masks leave every sample and every query something to see."""
    rng, found = np.random.default_rng(seed), dict[str, Array]()
    for value in made.graph.inputs:
        sizes = {"B": batch, "N": length}
        shape = [d if isinstance(d, int) else sizes[str(d.value)] for d in value.shape or ()]
        name = value.name or ""
        if name in ("mask", "square"):
            found[name] = (rng.random(shape) < 0.7).astype(np.int32)
            found[name][..., 0] = 1
        elif name == "ends":
            found[name] = rng.integers(1, length + 1, shape).astype(np.int32)
        elif name == "last":
            found[name] = np.full(shape, length - 1, np.int32)
        elif name == "total":
            found[name] = np.array(length, np.int32)
        elif name == "bytes":
            found[name] = rng.integers(0, 256, shape).astype(np.uint8)
        elif name == "seen":
            found[name] = (rng.random(shape) < 0.7) | np.eye(length, dtype=bool)
        else:
            assert value.dtype is not None
            found[name] = rng.standard_normal(shape).astype(value.dtype.numpy())
    return found


def counting(feed: Feed, width: int) -> Array | EllipsisType:
    """Positions whose window shows them a key that no mask hides; at all others any result will do."""
    masks = [feed[name].astype(bool) for name in ("mask", "square") if name in feed]
    if "ends" in feed:
        length = next(feed[name].shape[1] for name in ("q", "x") if name in feed)
        masks.append(np.arange(length) < feed["ends"][:, None])
    counts: Array | EllipsisType = ...
    for mask in masks:
        place = np.arange(mask.shape[-1])
        near = np.abs(place[:, None] - place) < width
        seen = ((mask if mask.ndim == 3 else mask[:, None]) & near).any(axis=2)
        counts = seen if counts is ... else counts & seen
    return counts


def difference(one: Reference, other: Reference, feed: Feed, counts: Array | EllipsisType = ...) -> float:
    """Largest difference at positions that count, relative to the largest number if that is above 1."""
    a, b = (each.run(feed)["y"].astype(np.float64) for each in (one, other))
    assert np.isfinite(b).all()
    a, b = a[counts], b[counts]
    assert np.isfinite(a).all()
    return float(np.abs(a - b).max(initial=0) / max(1.0, np.abs(a).max(initial=0)))


def is_causal(made: ir.Model) -> bool:
    """Whether the attention of a model is found to be causal."""
    return Context(made, Target(name="ort")).fact(ATTENTION)[0].causal == "yes"


def spelled(made: ir.Model) -> ir.Model:
    """The same with its operators spelled out."""
    ctx = Context(made, Target(name="ort"))
    spell_out(made, ctx.fact(ATTENTION), ctx.fact(SHAPES))
    return made
