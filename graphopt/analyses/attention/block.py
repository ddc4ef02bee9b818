"""What an attention core consists of, whatever operators spell it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

__all__ = ["AttentionBlock", "Axes", "Axis", "Condition", "Mask"]

Axis = Literal[
    "batch", "head", "kv_head", "group", "length", "width", "window", "batch*head", "head*width", "one"
]  # fmt: skip
"""What lies along an axis.

`batch*head` and `head*width` are two in one, the first of them the slower; `one` has size 1, `window` is a second axis
of samples that do not see each other.

Keys and values with fewer heads than the queries have `kv_head`: head `h` of the queries reads head
`h // (heads // kv_heads)`. Where heads of the queries come as two axes they are `kv_head` and `group`. The `head*width`
of keys and values has `kv_heads` heads.
"""

Axes = tuple[Axis, ...]


@dataclass(frozen=True, eq=False)
class Condition:
    """A boolean that a key must meet to be seen.

    Attributes:
        value: Broadcasts to the scores.
        negated: Whether False is what meets it.
        causal: Whether it says nothing but that no query sees a later key.
    """

    value: ir.Value
    negated: bool = False
    causal: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Mask:
    """Something that the scores meet between their scale and the softmax.

    Attributes:
        kind: `add`: the float `value` is added. `keep`: where one of the `conditions` is not met, scores become `fill`,
            or have `fill` added.
        value: What is added; broadcasts to the scores, whose axes are `AttentionBlock.score_axes`. None for `keep`.
        conditions: Of `keep`: what must hold together. They broadcast to the scores each by itself, and are as small as
            the graph has them.
        fill: What hidden scores become, or have added; a causal `add` has it behind the query, and 0 up to it.
        added: Of `keep`: whether `fill` is added.
        causal: Whether it says nothing but that no query sees a later key: it may go where that is seen to otherwise.
    """

    kind: Literal["add", "keep"]
    value: ir.Value | None = None
    conditions: tuple[Condition, ...] = ()
    fill: float = -math.inf
    added: bool = False
    causal: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionBlock:
    """softmax(mask(scale * query key^T)) value, as it stands in a graph.

    Attributes:
        name: For reports: of the softmax, or of the operator that does all.
        form: `products`: MatMul or Einsum, softmax, MatMul or Einsum. `operator`: one node.
        nodes: From what is read (query, key, value, scale, masks) to the output, in graph order. Some may be read by
            others too: whoever gives `output` another producer leaves to them what they read.
        query: As it enters the core: before scaling, casts, transposition and repetition for groups of heads.
        key: As it enters the core.
        value: As it enters the core.
        output: The weighted values.
        query_axes: What lies along the axes of `query`.
        key_axes: What lies along the axes of `key`.
        value_axes: What lies along the axes of `value`.
        output_axes: What lies along the axes of `output`; `length` is that of the queries.
        score_axes: What lies along the axes of the scores, the last two those of queries and keys, both `length`.
        heads: Heads of the queries.
        kv_heads: Heads of keys and values; divides `heads`.
        width: Of a head's queries and keys.
        value_width: Of a head's values.
        queries: Length of the queries, None where it is open.
        keys: Length of the keys, caches included.
        same_length: Whether there are as many keys as queries, whatever sizes the inputs have.
        scale: Everything that multiplies the scores ahead of the masks, also from query and key before they meet; a
            scalar value where the graph computes it.
        masks: What the scores meet next, in this order.
        causal: `yes`: a query provably sees no later key; query i of m sees keys up to i + keys - m where `past`, else
            up to i. `no`: nothing can hide a later key more than any other. `unknown`: a mask decides that is not known
            before the model runs.
        softcap: `softcap * tanh(scores / softcap)` stands between scale and masks; 0: it does not.
        zero_rows: True: a query whose keys are all hidden by infinity gets zeros. False: NaN, as the formula says.
        score_type: Type that the softmax is computed in.
        past: Whether caches of earlier tokens join keys and values.
        besides: What an operator does that is not said here, and that whoever replaces it must spell out: masks that it
            makes itself, projections, ...; empty where it does nothing else.
        dropped: Why nobody should replace the core: its scores are an output, windows make it local already, ...; empty
            where nothing speaks against it.
    """

    name: str
    form: Literal["products", "operator"]
    nodes: tuple[ir.Node, ...]
    query: ir.Value
    key: ir.Value
    value: ir.Value
    output: ir.Value
    query_axes: Axes
    key_axes: Axes
    value_axes: Axes
    output_axes: Axes
    score_axes: Axes
    heads: int
    kv_heads: int
    width: int
    value_width: int
    queries: int | None
    keys: int | None
    same_length: bool
    scale: float | ir.Value
    masks: tuple[Mask, ...]
    causal: Literal["no", "yes", "unknown"]
    softcap: float = 0.0
    zero_rows: bool = False
    score_type: ir.DataType
    past: bool = False
    besides: str = ""
    dropped: str = ""
