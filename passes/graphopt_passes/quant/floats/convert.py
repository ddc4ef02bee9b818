"""The entry: which format, which opset, which samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import onnx_ir as ir

from graphopt.analyses import SHAPES
from graphopt.errors import OptionError, PassError
from graphopt.pass_base import Context
from graphopt.reference import Feed
from graphopt_passes.fold.affine import fold_affine
from graphopt_passes.fold.rewiring import FreshNames
from graphopt_passes.quant.audit import sample_feeds
from graphopt_passes.quant.floats.half import half_noise, to_half
from graphopt_passes.quant.floats.narrow_weights import bfloat16_noise, float8_noise, to_bfloat16, to_float8
from graphopt_passes.quant.floats.outcome import Converted
from graphopt_passes.quant.floats.plan import Choice, matches
from graphopt_passes.quant.prepare import drop_unread, lift_opset
from graphopt_passes.quant.sites import keyed_nodes

__all__ = ["FloatSettings", "check_patterns", "convert", "noise_by_site"]

_FEEDS = 8
_SINCE = {"fp16": 7, "bf16": 13, "fp8": 19}
"""First opset that holds the format: Cast by number, bfloat16, and DequantizeLinear of E4M3."""


@dataclass(frozen=True)
class FloatSettings:
    """What the user asks for.

    Attributes:
        dtype: The format.
        choice: Which nodes are left to the pass.
        min_output_sqnr: Least signal to noise of every output in dB.
    """

    dtype: Literal["fp16", "bf16", "fp8"]
    choice: Choice
    min_output_sqnr: float


def check_patterns(model: ir.Model, choice: Choice) -> None:
    """Check that every pattern fits a node.

    Raises:
        OptionError: One fits none.
    """
    nodes = [node for node in keyed_nodes(model).values() if node.op_type != "Constant"]
    for option, patterns in (("only", choice.only), ("skip", choice.skip), ("keep", choice.keep)):
        for pattern in patterns:
            if not any(matches(node, (pattern,)) for node in nodes):
                kinds = ", ".join(sorted({node.op_type for node in nodes})[:6])
                hint = f"it has {len(nodes)} nodes, of types such as {kinds}" if nodes else "it has none"
                raise OptionError(f"quant.{option}", f"{pattern!r} matches no node of the model", hint)


def convert(model: ir.Model, ctx: Context, settings: FloatSettings) -> Converted:
    """Convert a copy of a model.

    Raises:
        PassError: The opset cannot be raised as far as the format needs.
    """
    work, inner = _prepared(model, ctx, settings)
    feeds = sample_feeds(inner, _FEEDS)
    make = {"fp16": to_half, "bf16": to_bfloat16, "fp8": to_float8}[settings.dtype]
    return make(work, inner, settings.choice, feeds, settings.min_output_sqnr)


def noise_by_site(model: ir.Model, ctx: Context, settings: FloatSettings, feeds: Sequence[Feed]) -> dict[str, float]:
    """How much noise each site of `convert` makes on some samples, by name; for comparisons only.

    Raises:
        PassError: As `convert`.
    """
    work, inner = _prepared(model, ctx, settings)
    make = {"fp16": half_noise, "bf16": bfloat16_noise, "fp8": float8_noise}[settings.dtype]
    return make(work, inner, settings.choice, feeds)


def _prepared(model: ir.Model, ctx: Context, settings: FloatSettings) -> tuple[ir.Model, Context]:
    """A copy in the form to convert, and a context for it."""
    work, since = model.clone(), _SINCE[settings.dtype]
    refusal = lift_opset(work, since, ctx)
    if refusal:
        raise PassError(f"quant{{dtype={settings.dtype}}}", refusal, f"{settings.dtype} needs opset {since} at least")
    if settings.dtype == "fp16" and not settings.choice.only:
        work = _folded(work, ctx, settings.choice)
    return work, replace(ctx, model=work, _facts={})


def _folded(work: ir.Model, ctx: Context, choice: Choice) -> ir.Model:
    """The model with its batch norms folded, unless the user names one of them."""
    folded = work.clone()
    fold_affine(folded, replace(ctx, model=folded, _facts={}).fact(SHAPES), FreshNames(folded), 0)
    drop_unread(folded)
    left = ({node.name for node in keyed_nodes(m).values() if choice.refusal(node)} for m in (work, folded))
    before, after = left
    return folded if before == after else work
