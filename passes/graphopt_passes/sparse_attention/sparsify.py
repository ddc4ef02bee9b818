"""Sparse attention: every query sees a few keys instead of all of them, and nothing of the others is computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from glob import escape
from typing import ClassVar, Literal

import onnx_ir as ir

from graphopt.analyses import CONSTANTS, SHAPES
from graphopt.analyses.attention import ATTENTION, AttentionBlock
from graphopt.analyses.shapes import Shapes
from graphopt.errors import ModelError, OptionError, nearest
from graphopt.opset import opset_version, raise_opset
from graphopt.options import opt
from graphopt.pass_base import Change, Context, Pass, PassResult
from graphopt_passes.sparse_attention._patterns import Band, band_of
from graphopt_passes.sparse_attention.learned import settings
from graphopt_passes.sparse_attention.lowering import Lowering
from graphopt_passes.sparse_attention.mass import weights_of
from graphopt_passes.sparse_attention.plans import Plan, fixed_plans, learned_plans, mass_metrics
from graphopt_passes.sparse_attention.reasons import why_not, why_not_on, why_short
from graphopt_passes.sparse_attention.spelled import Spelled, spell_out, why_not_spelled
from graphopt_passes.sparse_attention.unit_axes import UnitAxes
from graphopt_passes.sparse_attention.windowed import narrow, takes_window

__all__ = ["SparseAttention"]

_OPSET = 13
_LAYERS = frozenset({"Attention", "Einsum", "FusedMatMul", "Gemm", "MatMul", "MultiHeadAttention"})
_UNSEEN = "no value of the model says what its heads attend to"
_NO_FASTER = "ONNX Runtime computes less with it on GPUs only"


@dataclass(frozen=True, kw_only=True)
class SparseAttention(Pass):
    """Let every query of an attention see nearby keys only, so that cost grows with the length and not its square.

    Whatever spells the attention, it is found by what it computes, and rewritten in standard operators for any length
    and batch: queries in blocks, each against the keys that its pattern lets it see. Masks of the model hold as before;
    of those that the graph computes only the band is made.

    Patterns, for a query at position q and a key at position k; causal attention keeps k <= q:
    window   |q - k| < width
    strided  these, and k a multiple of `stride` with |q - k| < stride * width
    block    k in the same block of `width` keys, or in one beside it; of every block further away the mean of its keys
             and values, which counts as often as the block has keys. The number of means still grows with the length
    learned  for every head one of these: windows from an eighth of `width` to twice that, strided ones, both with and
             without global tokens, or everything. All heads together compute as many scores as if each took the
             cheapest that keeps the share `keep` of its attention on calibration data; they are spent where they keep
             the outputs of layers closest to what they were: heads that matter keep more, others less
    In all of them the first `global_tokens` tokens are seen by all queries, and see all keys.

    Operators of ONNX Runtime are spelled out where they are rewritten; a causal GroupQueryAttention gets a window.

    Refused, and reported: cross-attention, caches, windows that are local already, sequences of a known length of at
    most twice the width, and masks that do not leave a band.
    """

    name: ClassVar[str] = "sparse-attention"
    lossy: ClassVar[bool] = True

    pattern: Literal["window", "strided", "block", "learned"] = opt("window", help="which keys a query sees")
    width: int = opt(256, help="a query sees keys at a distance below this", ge=1)
    global_tokens: int = opt(0, help="tokens at the start that see all, and that all see", ge=0)
    keep: float = opt(0.95, help="of pattern=learned: scores for all heads to keep this share of attention", gt=0, le=1)
    stride: int = opt(4, help="of pattern=strided: further away every so manyth key is seen", ge=2)
    loop: bool = opt(False, help="compute blocks one after another in a Loop: far less memory, but not every runtime")
    only: tuple[str, ...] = opt((), help="attentions to rewrite: names, with wildcards; none: all")
    skip: tuple[str, ...] = opt((), help="attentions to leave alone: names, with wildcards")

    def requires(self, model: ir.Model, ctx: Context) -> None:
        """Check that wildcards fit something, and that there are samples to learn from.

        Raises:
            OptionError: A wildcard fits no attention, or there is no calibration data.
        """
        if self.pattern == "learned" and ctx.calibration is None:
            raise OptionError("sparse-attention.pattern", "learned needs samples", "give --calibration, or use window")
        names = [block.name for block in ctx.fact(ATTENTION)] if self.only or self.skip else []
        for option, globs in (("only", self.only), ("skip", self.skip)):
            for glob in globs:
                if not any(fnmatchcase(name, glob) for name in names):
                    raise OptionError(f"sparse-attention.{option}", f"{glob!r} fits no attention", nearest(glob, names))

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Rewrite every attention that can see less."""
        before, to_spell = opset_version(model), self._to_spell(ctx)
        kept = _why_not_raised(model, ctx) if to_spell else ""
        spelled = [] if kept or not to_spell else spell_out(model, self._to_spell(ctx), ctx.fact(SHAPES))
        if spelled:
            ctx.drop_facts()
        blocks, plans = self._planned(model, ctx)
        if not all(plan.reason for plan in plans) and opset_version(model) < _OPSET:
            kept = kept or _why_not_raised(model, ctx)
            blocks, plans = (blocks, plans) if kept else self._planned(model, ctx)
        if kept:
            unread = {block.name for block in to_spell}
            plans = [
                Plan(reason=kept) if not plan.reason or block.name in unread else plan
                for block, plan in zip(blocks, plans, strict=True)
            ]
        blocks, plans = _put_back(spelled, blocks, plans, ctx)
        lowering = Lowering(model, ctx.fact(SHAPES), ctx.fact(CONSTANTS), loop=self.loop)
        changes, operators = dict[int, Change](), {each.name: each.node.op_type for each in spelled}
        for number in _in_order_of_outputs(blocks):
            block, plan = blocks[number], plans[number]
            skipped = Change.skipped(block.name, plan.reason) if plan.reason else None
            changes[number] = skipped or self._change(block, plan, lowering, operators.get(block.name))
        done = sum(not plan.reason for plan in plans)
        return PassResult(
            bool(done) or opset_version(model) != before,
            tuple(changes[i] for i in range(len(blocks))),
            metrics={"attentions": len(blocks), "rewritten": done} | mass_metrics(plans),
            notes=self._notes(plans),
        )

    def revertible(self, model: ir.Model, sites: Sequence[str]) -> tuple[str, ...]:
        """All of them: attentions are rewritten one by one."""
        return tuple(sites)

    def without(self, sites: Sequence[str]) -> SparseAttention:
        """The same step, leaving these attentions alone."""
        return replace(self, skip=(*self.skip, *(escape(site) for site in sites)))

    def _reasons(self, blocks: Sequence[AttentionBlock], ctx: Context) -> list[str]:
        """Why each is left alone; empty for those that are rewritten."""
        if not blocks:
            return []
        shapes, constants = ctx.fact(SHAPES), ctx.fact(CONSTANTS)
        units = UnitAxes(shapes, constants)
        return [
            self._left_out(block)
            or why_short(block.queries, self.width)
            or ("" if self._by_operator(block) else why_not(block, shapes) or _besides(block, shapes))
            or (_UNSEEN if self.pattern == "learned" and weights_of(block) is None else "")
            or why_not_on(block, self._band(block), units)
            for block in blocks
        ]

    def _to_spell(self, ctx: Context) -> list[AttentionBlock]:
        """Operators to spell out: for what they do besides attention, and so that what they attend to can be seen."""
        shapes, weighed = ctx.fact(SHAPES), self.pattern == "learned" or ctx.calibration is not None
        return [
            block
            for block in ctx.fact(ATTENTION)
            if block.form == "operator"
            and (block.besides or weighed)
            and not self._left_out(block)
            and not why_short(block.queries, self.width)
            and not self._by_operator(block)
            and not why_not(block, shapes)
            and not why_not_spelled(block, shapes)
        ]

    def _by_operator(self, block: AttentionBlock) -> bool:
        """Whether the operator has what it takes."""
        return self.pattern == "window" and not self.global_tokens and takes_window(block)

    def _left_out(self, block: AttentionBlock) -> str:
        if self.only and not any(fnmatchcase(block.name, glob) for glob in self.only):
            return "not in sparse-attention.only"
        if any(fnmatchcase(block.name, glob) for glob in self.skip):
            return "sparse-attention.skip names it"
        return ""

    def _band(self, block: AttentionBlock) -> Band:
        return band_of(
            "window" if self.pattern == "learned" else self.pattern,
            self.width,
            causal=block.causal == "yes",
            leading=self.global_tokens,
            stride=self.stride,
        )

    def _planned(self, model: ir.Model, ctx: Context) -> tuple[Sequence[AttentionBlock], list[Plan]]:
        """All cores, and what each is to compute."""
        blocks = ctx.fact(ATTENTION)
        reasons = self._reasons(blocks, ctx)
        left = [block for block, reason in zip(blocks, reasons, strict=True) if not reason]
        if self.pattern == "learned":
            tried = settings(self.width, self.global_tokens, self.stride)
            plans = learned_plans(model, left, tried, self.keep, ctx)
        else:
            plans = fixed_plans(model, left, [None if self._by_operator(b) else self._band(b) for b in left], ctx)
        return blocks, [plans.get(b) or Plan(reason=reason) for b, reason in zip(blocks, reasons, strict=True)]

    def _notes(self, plans: Iterable[Plan]) -> tuple[str, ...]:
        longest = max((plan.longest for plan in plans), default=0)
        if self.pattern != "learned" or not longest or longest > 2 * self.width:
            return ()
        return (f"the longest sample has {longest} positions: what heads attend to further away is not known",)

    def _change(self, block: AttentionBlock, plan: Plan, lowering: Lowering, operator: str | None) -> Change:
        if self._by_operator(block):
            narrow(block, self.width)
            return Change(block.name, f"window of {self.width}, causal, by the operator itself: {_NO_FASTER}")
        dense = lowering.replace(block, plan.parts)
        what = plan.text or f"{self.pattern} of {self.width}"
        action = f"{what}{', causal' if block.causal == 'yes' else ''}"
        action += f"; {operator} is spelled out" if operator else ""
        if dense:
            action += f"; the band is taken from {', '.join(map(repr, dense))}, which stays quadratic in the length"
        columns = max((part.band.columns for part in plan.parts if part.band is not None), default=0)
        details = {"heads": block.heads, "columns": columns, **plan.kept, **plan.sees}
        gone = (block.name,) if operator else _gone(block, lowering.labels)
        return Change(block.name, action, details=details, replaced=gone)


def _gone(block: AttentionBlock, labels: Mapping[ir.Node, str]) -> tuple[str, ...]:
    """What a core that was replaced had of layers that reports count."""
    layers = (node for node in block.nodes if node.op_type in _LAYERS and node.graph is None)
    return tuple(labels[node] for node in layers)


def _besides(block: AttentionBlock, shapes: Shapes) -> str:
    """Why an operator that does more than attention keeps doing it; empty for all others."""
    return why_not_spelled(block, shapes) or block.besides if block.besides else ""


def _put_back(
    spelled: Sequence[Spelled], blocks: Sequence[AttentionBlock], plans: list[Plan], ctx: Context
) -> tuple[Sequence[AttentionBlock], list[Plan]]:
    """Give attention that stays as it is its operators back; the cores and plans that there are then."""
    found = {block.name: plan for block, plan in zip(blocks, plans, strict=True)}
    staying = [each for each in reversed(spelled) if each.name not in found or found[each.name].reason]
    if not staying:
        return blocks, plans
    for each in staying:
        each.back()
    ctx.drop_facts()
    blocks = ctx.fact(ATTENTION)
    unknown = Plan(reason="it is not found any more where its operator is spelled out")
    return blocks, [found.get(block.name, unknown) for block in blocks]


def _why_not_raised(model: ir.Model, ctx: Context) -> str:
    """Raise the opset if it is too low; says why that cannot be done."""
    if opset_version(model) >= _OPSET:
        return ""
    if ctx.keep_opset:
        return f"opset {opset_version(model)} is kept, {_OPSET} would be needed"
    try:
        raise_opset(model, _OPSET)
    except ModelError as e:
        return e.fact
    ctx.drop_facts()
    return ""


def _in_order_of_outputs(blocks: Sequence[AttentionBlock]) -> list[int]:
    """Numbers of the blocks, those that end earlier in the graph first."""
    places = dict[ir.Node, int]()
    for graph in {block.output.graph: None for block in blocks}:
        places |= {node: place for place, node in enumerate(graph or ())}
    ends = [block.output.producer() for block in blocks]
    return sorted(range(len(blocks)), key=lambda i: places.get(end, 0) if (end := ends[i]) is not None else 0)
