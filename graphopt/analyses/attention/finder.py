"""Attention cores spelled as a product, a softmax and a product."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.analyses.attention.block import AttentionBlock, Axes
from graphopt.analyses.attention.labels import Label, Labels, Parts, as_axes
from graphopt.analyses.attention.masks import Masks, causality
from graphopt.analyses.attention.past import cache_length
from graphopt.analyses.attention.product import Product
from graphopt.analyses.attention.roles import Roles, read_roles
from graphopt.analyses.attention.scoring import Scoring, read_steps
from graphopt.analyses.attention.sizes import Pair, Sizes
from graphopt.analyses.attention.softmax import Softmax
from graphopt.analyses.attention.strand import Strand, follow_back, packed_heads, preferred
from graphopt.analyses.attention.trail import Step, Trail, Weighing, scores_before, weights_after

__all__ = ["Core", "describe", "find_core"]


@dataclass(frozen=True, eq=False)
class Core:
    """The three pieces of an attention."""

    trail: Trail
    softmax: Softmax
    weighing: Weighing


@dataclass(frozen=True, eq=False)
class _Operand:
    """One of query, key and value: where it may be said to enter, and sizes of its parts."""

    places: list[Strand]
    parts: Parts

    def size(self, name: str) -> Pair | None:
        return self.parts.sizes.get(name)

    @property
    def groups(self) -> Pair | None:
        """Heads ahead of their repetition."""
        return self.size("kv_head") if any(place.repeats for place in self.places) else None


def find_core(softmax: Softmax, sizes: Sizes) -> Core | None:
    """The products around a softmax, None if there are none."""
    trail = scores_before(softmax.scores, sizes)
    weighing = None if trail is None else weights_after(softmax.weights, sizes)
    return None if trail is None or weighing is None else Core(trail, softmax, weighing)


def describe(core: Core, name: str, order: dict[ir.Node, int], sizes: Sizes) -> AttentionBlock | None:
    """Say what a core computes, None if it is no attention.

    Args:
        core: The products and the softmax.
        name: For reports.
        order: Places of all nodes.
        sizes: Sizes of the model's values.
    """
    roles = read_roles(core.trail, core.softmax, sizes)
    if roles is None:
        return None
    second = _second(core, roles, sizes)
    if second is None:
        return None
    product, labels = core.trail.product, roles.labels
    query = _operand(product, 1 - roles.keys, labels, roles, "query", sizes)
    key = _operand(product, roles.keys, labels, roles, "key", sizes)
    value = _operand(core.weighing.product, 1 - core.weighing.operand, second, roles, "key", sizes)
    heads = _heads(roles, (query, key, value), sizes)
    if heads is None:
        return None
    return _block(core, name, order, sizes, roles, second, (query, key, value), heads)


def _second(core: Core, roles: Roles, sizes: Sizes) -> dict[str, Label] | None:
    """Labels of the letters of the second product, None if it does not sum over keys."""
    labels: Labels | None = roles.softmax
    for step in core.weighing.steps:
        moves = step.kind == "layout" and labels is not None
        labels = roles.parts.step_on(step.node, labels, sizes) if moves and labels is not None else labels
    product, own = core.weighing.product, core.weighing.operand
    letters = product.letters[own]
    if labels is None or len(labels) != len(letters):
        return None
    found = dict(zip(letters, labels, strict=True))
    free = product.own(1 - own)
    if found.get(product.summed) != ("key",) or ("query",) not in found.values() or len(free) != 1:
        return None
    return found | {free: ("width",)}


def _operand(
    product: Product, index: int, letters: dict[str, Label], roles: Roles, length: str, sizes: Sizes
) -> _Operand:
    """Follow an operand of a product back."""
    value, word = product.operands[index], product.letters[index]
    parts = Parts({part: size for part, size in roles.parts.sizes.items() if part not in ("key", "query")})
    labels: list[Label] = []
    for axis, letter in enumerate(word):
        label, size = letters.get(letter, ("width",)), sizes.size(value, axis)
        if label in (("key",), ("query",)):
            label = ("length",)
        if label in (("length",), ("width",)):
            parts.sizes |= {} if size is None else {"".join(label): size}
        elif size == (1, 1) and any(parts.sizes.get(part, (1, 1)) != (1, 1) for part in label):
            label = _broadcast(label, parts, is_key=length == "key")
        labels.append(label)
    return _Operand(follow_back(Strand(value, tuple(labels)), parts, sizes), parts)


def _broadcast(label: Label, parts: Parts, *, is_key: bool) -> Label:
    """What lies on an axis of size 1 that the product repeats: one head of keys for all of queries, or nothing."""
    if label != ("head",) or not is_key:
        return ()
    parts.sizes["kv_head"] = (1, 1)
    return ("kv_head",)


def _heads(roles: Roles, operands: Sequence[_Operand], sizes: Sizes) -> int | None:
    """How many heads there are; one where nothing tells rows of heads from samples."""
    known = roles.parts.sizes
    if "kv_head" in known and "group" in known:
        return int(known["kv_head"][0] * known["group"][0])
    if "head" in known:
        return _whole(known["head"])
    if "rows" not in roles.names:
        return None if "head" in roles.names else 1
    told = [operand.size("head") for operand in operands]
    told += [packed_heads(operand.places[-1], sizes) for operand in operands]
    return next((_whole(pair) for pair in told if pair is not None), 1)


def _whole(pair: Pair) -> int | None:
    return int(pair[0]) if pair[0] == pair[1] else None


def _block(
    core: Core,
    name: str,
    order: dict[ir.Node, int],
    sizes: Sizes,
    roles: Roles,
    second: dict[str, Label],
    operands: tuple[_Operand, _Operand, _Operand],
    heads: int,
) -> AttentionBlock | None:
    grouped = operands[1].groups is not None and operands[1].groups == operands[2].groups
    chosen = [preferred(o.places, o.parts, repeats=grouped or i == 0) for i, o in enumerate(operands)]
    query, key, value = chosen
    past = cache_length(operands[1].places, sizes)
    scoring = read_steps(core.trail, roles, Masks(past or (0, 0)), query.factor * key.factor, sizes)
    made = core.weighing.product.node.outputs[0]
    out = tuple(("length",) if second[c] == ("query",) else second[c] for c in core.weighing.product.out)
    axes = [_axes(labels, heads) for labels in (query.labels, key.labels, value.labels, out, scoring.labels)]
    widths = [operand.size("width") for operand in operands]
    if None in axes or widths[1] is None or widths[2] is None or value.factor != 1:
        return None
    nodes = {node for place in chosen for node in place.nodes} | _own_nodes(core, scoring)
    lengths = [_fixed(roles.parts.sizes.get(part)) for part in ("query", "key")]
    kv_heads = heads
    if grouped and operands[1].groups is not None:
        kv_heads = int(operands[1].groups[0])
    reasons = (
        _local(roles, operands, heads, lengths, sizes), scoring.dropped, _turned(scoring), _left_alone(core, nodes)
    )  # fmt: skip
    return AttentionBlock(
        name=name,
        form="products",
        nodes=tuple(sorted(nodes, key=lambda node: order.get(node, -1))),
        query=query.value,
        key=key.value,
        value=value.value,
        output=made,
        query_axes=axes[0] or (),
        key_axes=axes[1] or (),
        value_axes=axes[2] or (),
        output_axes=axes[3] or (),
        score_axes=axes[4] or (),
        heads=heads,
        kv_heads=kv_heads,
        width=int(widths[1][0]),
        value_width=int(widths[2][0]),
        queries=lengths[0],
        keys=lengths[1],
        same_length=None is not roles.parts.sizes.get("query") == roles.parts.sizes.get("key"),
        scale=scoring.scale,
        masks=tuple(scoring.masks.masks),
        causal=causality(scoring.masks, sizes),
        softcap=scoring.softcap,
        zero_rows=bool(core.weighing.guard),
        score_type=sizes.shapes[0].dtype(core.softmax.scores) or ir.DataType.FLOAT,
        past=past is not None,
        dropped=next(filter(None, reasons), ""),
    )


def _axes(labels: Labels, heads: int) -> Axes | None:
    renamed: dict[Label, Label] = {("query",): ("length",), ("key",): ("length",)}
    if heads == 1:
        renamed[("rows",)] = ("batch",)
    return as_axes(tuple(renamed.get(label, label) for label in labels))


def _fixed(pair: Pair | None) -> int | None:
    return None if pair is None or pair[0] != pair[1] else int(pair[0])


def _own_nodes(core: Core, scoring: Scoring) -> set[ir.Node]:
    """Everything from the first product to the second."""
    steps: tuple[Step, ...] = (*core.trail.steps, *core.weighing.steps)
    nodes = {core.trail.product.node, core.weighing.product.node, *core.softmax.nodes, *core.weighing.guard}
    return nodes | {step.node for step in steps} | set(scoring.masks.nodes)


def _between(core: Core) -> Iterator[ir.Value]:
    """Values of the size of the scores, in order."""
    yield core.trail.product.node.outputs[0]
    yield from (step.made for step in core.trail.steps)
    yield from (node.outputs[0] for node in core.softmax.nodes)
    yield from (node.outputs[0] for node in core.weighing.guard)
    yield from (step.made for step in core.weighing.steps)


def _turned(scoring: Scoring) -> str:
    """Whether masks meet scores that are not `[..., queries, keys]`."""
    turned = scoring.labels[-2:] != (("query",), ("key",))
    return "its masks lie across queries and keys" if turned and scoring.masks.masks else ""


def _left_alone(core: Core, nodes: set[ir.Node]) -> str:
    """Why the scores have to be computed in any case, or what happens to the weights."""
    for value in _between(core):
        if value.is_graph_output():
            return f"its scores or weights are an output: {value.name!r}"
        for reader in value.consumers():
            if reader not in nodes:
                return f"its scores or weights are read by {reader.op_type} {reader.name!r} too"
    changed = [step for step in core.weighing.steps if step.kind not in ("layout", "cast")]
    return f"its weights go through {changed[0].node.op_type} behind the softmax" if changed else ""


def _local(roles: Roles, operands: Sequence[_Operand], heads: int, lengths: Sequence[int | None], sizes: Sizes) -> str:
    """Whether the batch consists of windows: more samples than the model is given, each of a fixed length."""
    if None in lengths:
        return ""
    if "window" in roles.parts.sizes:
        return f"its windows of {lengths[1]} are local already"
    known = roles.parts.sizes
    batch = known.get("batch") or next((size for o in operands if (size := o.size("batch")) is not None), None)
    rows = known.get("rows")
    if batch is None and rows is not None:
        batch = rows[0] // heads, rows[1] // heads
    if batch is None:
        return ""
    for side, inputs in enumerate(sizes.inputs):
        if batch[side] in {1, *(size for shape in inputs.values() for size in shape[:2])}:
            return ""
    return f"its windows of {lengths[1]} are local already"
