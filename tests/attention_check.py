"""Proof that a description of attention is right: what it says, done in numpy on values that ONNX Runtime computes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.analyses.attention import AttentionBlock, Axes, Mask
from graphopt.reference import Feed, Reference

__all__ = ["attention", "check_blocks", "operands"]

Array = np.ndarray[Any, np.dtype[Any]]


def operands(block: AttentionBlock) -> list[ir.Value]:
    """Every value that a description refers to."""
    found = [block.query, block.key, block.value, block.output]
    found += [block.scale] if isinstance(block.scale, ir.Value) else []
    for mask in block.masks:
        found += [mask.value] if mask.value is not None else []
        found += [condition.value for condition in mask.conditions]
    return found


def check_blocks(model: ir.Model, blocks: Sequence[AttentionBlock], feeds: Iterable[Feed], tolerance: float) -> int:
    """Compare what blocks of the main graph are said to compute with what they compute.

    Returns:
        How many comparisons were made.
    """
    probe = model.clone()
    names = {value.name for block in blocks for value in operands(block) if value.name}
    taken = {value.name for value in (*probe.graph.outputs, *probe.graph.inputs)} | set(probe.graph.initializers)
    made = {output.name: output for node in probe.graph for output in node.outputs}
    extra = sorted(names & set(made) - taken)
    probe.graph.outputs.extend(made[name] for name in extra)
    stored = {name: value.const_value for name, value in model.graph.initializers.items() if name in names}
    fixed = {name: tensor.numpy() for name, tensor in stored.items() if tensor is not None}
    session, compared = Reference(probe, optimize=False), 0
    for feed in feeds:
        wanted = [value.name for value in probe.graph.outputs if value.name and value.name in names]
        seen = {**fixed, **feed, **session.run(feed, wanted)}
        for block in blocks:
            theirs = np.asarray(seen[block.output.name or ""], np.float64)
            _compare(attention(block, seen), theirs, block, tolerance)
            if block.causal == "yes":
                ours = attention(block, seen, in_order=True)
                _compare(np.where(np.isnan(ours), theirs, ours), theirs, block, tolerance)
            compared += 1
    return compared


def _compare(ours: Array, theirs: Array, block: AttentionBlock, tolerance: float) -> None:
    assert ours.shape == theirs.shape, (block.name, ours.shape, theirs.shape)
    both_nan = np.isnan(ours) & np.isnan(theirs)
    error = np.abs(np.where(both_nan, 0, ours) - np.where(both_nan, 0, theirs)).max()
    assert error <= tolerance * max(1.0, np.nanmax(np.abs(theirs))), (block.name, float(error))


def attention(block: AttentionBlock, seen: Feed, *, in_order: bool = False) -> Array:
    """The output of a block, from the values that its description refers to.

    Args:
        block: The description.
        seen: Values by name.
        in_order: Leave masks away that say nothing but the causal order, and keep the order here; rows that see no key
            become NaN.
    """
    q, k, v = (
        _spread(seen[value.name or ""].astype(np.float64), axes, heads)
        for value, axes, heads in (
            (block.query, block.query_axes, block.heads),
            (block.key, block.key_axes, block.kv_heads),
            (block.value, block.value_axes, block.kv_heads),
        )
    )  # fmt: skip
    k, v = (np.repeat(x, block.heads // block.kv_heads, axis=1) if x.shape[1] == block.kv_heads else x for x in (k, v))
    scale = float(seen[block.scale.name or ""]) if isinstance(block.scale, ir.Value) else block.scale
    scores = np.einsum("bhqd,bhkd->bhqk", *_same_batch(q, k)) * scale
    if block.softcap:
        scores = block.softcap * np.tanh(scores / block.softcap)
    for mask in block.masks:
        if not (mask.causal and in_order):
            scores = _masked(scores, mask, block, seen, in_order)
    itself = block.form == "operator" and block.causal == "yes"
    if in_order or (itself and not any(_orders(mask) for mask in block.masks)):
        rows, columns = scores.shape[-2:]
        scores = np.where(np.tri(rows, columns, columns - rows if block.past else 0, dtype=bool), scores, -np.inf)
    if in_order:
        scores = np.where(scores.max(axis=-1, keepdims=True) > -900, scores, np.nan)
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
    if block.zero_rows and not in_order:
        weights = np.nan_to_num(weights)
    return _gathered(np.einsum("bhqk,bhkd->bhqd", *_same_batch(weights, v)), block.output_axes)


def _same_batch(a: Array, b: Array) -> tuple[Array, Array]:
    shape = np.broadcast_shapes(a.shape[:2], b.shape[:2])
    return np.broadcast_to(a, shape + a.shape[2:]), np.broadcast_to(b, shape + b.shape[2:])


def _orders(mask: Mask) -> bool:
    return mask.causal or any(condition.causal for condition in mask.conditions)


def _masked(scores: Array, mask: Mask, block: AttentionBlock, seen: Feed, in_order: bool) -> Array:
    if mask.value is not None:
        return scores + _over_scores(seen[mask.value.name or ""].astype(np.float64), block)
    keep = np.ones((), bool)
    for condition in mask.conditions:
        if not (condition.causal and in_order):
            keep = keep & (_over_scores(seen[condition.value.name or ""].astype(bool), block) != condition.negated)
    with np.errstate(invalid="ignore"):
        return np.where(keep, scores, scores + mask.fill if mask.added else mask.fill)


def _over_scores(array: Array, block: AttentionBlock) -> Array:
    """A mask as `[batch, heads, queries, keys]`, each of them possibly 1."""
    shape = (1,) * (len(block.score_axes) - array.ndim) + array.shape
    found: list[int] = []
    for axis, size in zip(block.score_axes[:-2], shape[:-2], strict=True):
        if axis == "batch*head":
            found += [1, 1] if size == 1 else [size // block.heads, block.heads]
        elif axis != "one":
            found.append(size)
    if block.score_axes[:-2] == ("batch", "kv_head", "group"):
        return np.broadcast_to(array, (shape[0], block.kv_heads, block.heads // block.kv_heads, *shape[-2:])).reshape(
            shape[0], block.heads, *shape[-2:]
        )
    if block.score_axes[:-2] == ("batch",):
        found.append(1)
    return array.reshape((1,) * (2 - len(found)) + tuple(found) + shape[-2:])


def _spread(array: Array, axes: Axes, heads: int) -> Array:
    """`[batch, heads, length, width]`."""
    sizes: list[int] = []
    names: list[str] = []
    for axis, size in zip(axes, array.shape, strict=True):
        if axis == "batch*head":
            names, sizes = [*names, "batch", "head"], [*sizes, size // heads, heads]
        elif axis == "head*width":
            names, sizes = [*names, "head", "width"], [*sizes, heads, size // heads]
        elif axis != "one":
            names, sizes = [*names, axis], [*sizes, size]
    array = array.reshape(sizes)
    wanted = [name for name in ("batch", "head", "kv_head", "group", "length", "width") if name in names]
    array = array.transpose([names.index(name) for name in wanted])
    present = dict(zip(wanted, array.shape, strict=True))
    own = present.get("head", 1) * present.get("kv_head", 1) * present.get("group", 1)
    return array.reshape(present.get("batch", 1), own, present["length"], present["width"])


def _gathered(array: Array, axes: Axes) -> Array:
    """`[batch, heads, length, width]` as the block has it."""
    batch, heads, length, width = array.shape
    assert "kv_head" not in axes, "heads on two axes are not put together again here"
    order = [name for axis in axes for name in axis.split("*") if name != "one"]
    places = {"batch": 0, "head": 1, "length": 2, "width": 3}
    kept = [places[name] for name in order]
    shape = {"batch": batch, "head": heads, "length": length, "width": width}
    array = array.transpose([*(i for i in range(4) if i not in kept), *kept])
    sizes = [int(np.prod([shape[name] for name in axis.split("*") if name != "one"])) for axis in axes]
    return array.reshape(sizes)
