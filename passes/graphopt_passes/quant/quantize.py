"""The pass: what is quantized how, and checked before it replaces the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import onnx_ir as ir

from graphopt.analyses import SHAPES, RangesAnalysis
from graphopt.errors import OptionError
from graphopt.model_io import model_bytes, weight_bytes
from graphopt.opset import opset_version
from graphopt.options import opt
from graphopt.pass_base import Change, Context, Pass, PassResult
from graphopt_passes.fold.affine import fold_affine
from graphopt_passes.fold.rewiring import FreshNames
from graphopt_passes.quant.audit import sample_feeds
from graphopt_passes.quant.decide import Decision, Settings, Workbench, first_choice, guard_layers, guard_outputs
from graphopt_passes.quant.plan import make_plan
from graphopt_passes.quant.prepare import (
    DYNAMIC_SINCE,
    PER_CHANNEL_SINCE,
    QUANTIZE_SINCE,
    drop_unread,
    lift_opset,
    needed_opset,
)
from graphopt_passes.quant.sites import Site, choose, find_sites, unshared

__all__ = ["Quant"]

_FEEDS = 8
_COMPARE_BYTES = 256 << 20  # smaller models are written out to compare sizes


@dataclass(frozen=True, kw_only=True)
class Quant(Pass):
    """Store weights in 8 bits, and compute on 8-bit integers where that keeps the results.

    With calibration data, Conv, Gemm and MatMul compute on integers with ranges fitted to the data, and so do the
    additions, concatenations and poolings between them; weights have one scale for each output channel, biases 32
    bits. Without data, MatMul and Gemm find the range of their input on every run, and all other layers store int8
    weights and compute in float. The result is plain ONNX: QuantizeLinear, DequantizeLinear and MatMulInteger.

    Batch norms are folded into the layers before them. Outputs of the model, Softmax, normalizations and everything
    else stay float. A layer whose result 8 bits would drown in noise, measured on the calibration data, takes the
    next weaker form. The opset is raised to what the form needs: 10, dynamic 11, one scale a channel 13.

    Leaves alone, with the reason: layers that are quantized already, weights that are computed, shared with other
    operators or replaceable by the caller, other types than float32, and tensors so small that scales would cost
    more than they save.
    """

    name: ClassVar[str] = "quant"
    lossy: ClassVar[bool] = True
    without_data: ClassVar[str] = (
        "activation ranges are unknown, so MatMul and Gemm find them on every run and the rest stores weights only"
    )

    mode: Literal["auto", "static", "dynamic", "weight"] = opt(
        "auto",
        help="static: calibrated ranges; dynamic: ranges found on every run; weight: float arithmetic; "
        "auto: the first of these that the data and the layer allow",
    )
    bits: Literal[8] = opt(8, help="bits of weights and activations")
    calibrator: Literal["minmax", "percentile", "mse"] = opt("minmax", help="how activation ranges are cut")
    per_channel: bool = opt(True, help="one weight scale for each output channel instead of one for the tensor")
    min_sqnr: float = opt(22.0, help="signal to noise in dB below which a layer leaves static int8")
    min_output_sqnr: float = opt(15.0, help="signal to noise in dB below which the noisiest layers step back")
    only: tuple[str, ...] = opt((), help="only layers whose name matches one of these patterns")
    skip: tuple[str, ...] = opt((), help="leave layers alone whose name matches one of these patterns")

    def requires(self, model: ir.Model, ctx: Context) -> None:
        """Check that data is there for static ranges, and that the patterns match something.

        Raises:
            OptionError: They are not, or do not.
        """
        if ctx.calibration is None and self.mode == "static":
            raise OptionError("quant.mode", "'static' needs calibration data", "give --calibration, or mode=auto")
        if ctx.target.integers.static_only:
            if self.mode in ("dynamic", "weight"):
                fact = f"{self.mode!r} does not run on {ctx.target}, which computes on static int8 only"
                raise OptionError("quant.mode", fact, "use mode=static with --calibration")
            if ctx.calibration is None:
                fact = f"{ctx.target} computes on static int8 only, which needs calibration data"
                raise OptionError("quant", fact, "give --calibration")
        choose(find_sites(model)[0], self.only, self.skip)

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Quantize a copy and, if it is better, let its graph replace the model's."""
        sites, skipped = self._sites(model)
        if not sites:
            return PassResult(False, skipped)
        work = model.clone()
        settings = self._settings(work, ctx)
        static = ctx.calibration is not None and self.mode in ("auto", "static")
        inner = replace(ctx, model=work, _facts={})
        if static:
            fold_affine(work, inner.fact(SHAPES), FreshNames(work), 0)
            drop_unread(work)
            inner.drop_facts()
            sites, skipped = self._sites(work)
        why = "no calibration data" if ctx.calibration is None and self.mode == "auto" else ""
        decisions = first_choice(work, sites, settings, static=static, why=why)
        bench = _bench(work, inner, settings, decisions)
        result, made, decisions, quality = guard_outputs(bench, guard_layers(bench, decisions))
        changes = (*skipped, *made)
        if all(d.kind == "float" for d in decisions):
            return PassResult(False, changes)
        grown = "" if settings.rules.static_only else _grown(model, result)
        if grown:
            return PassResult(False, tuple(Change.skipped(c.site, grown) if c.done else c for c in changes))
        model.graph, model.ir_version = result.graph, result.ir_version
        return PassResult(True, changes, metrics=_metrics(decisions, quality))

    def _sites(self, model: ir.Model) -> tuple[tuple[Site, ...], tuple[Change, ...]]:
        sites, skipped = find_sites(model)
        chosen, left = choose(sites, self.only, self.skip)
        kept, shared = unshared(model, chosen)
        return kept, (*skipped, *left, *shared)

    def _settings(self, work: ir.Model, ctx: Context) -> Settings:
        """Raise the opset of the copy as far as needed, and settle for less where that cannot be done."""
        rules = ctx.target.integers
        per_channel = self.per_channel and rules.per_channel
        refusal = lift_opset(work, needed_opset(self.mode, per_channel=per_channel), ctx)
        opset = opset_version(work)
        if refusal and opset < QUANTIZE_SINCE:
            raise self.fail(refusal, f"integers need opset {QUANTIZE_SINCE} at least")
        if refusal:
            ctx.log.warning("quant: %s; opset %d allows less", refusal, opset)
        return Settings(
            calibrator=self.calibrator,
            per_channel=per_channel and opset >= PER_CHANNEL_SINCE,
            bits=min(self.bits, rules.weight_bits),
            min_sqnr=self.min_sqnr,
            min_output_sqnr=self.min_output_sqnr,
            dynamic=self.mode in ("auto", "dynamic") and opset >= DYNAMIC_SINCE and not rules.static_only,
            weight_only=not rules.static_only,
            rules=rules,
        )


def _bench(work: ir.Model, inner: Context, settings: Settings, decisions: Sequence[Decision]) -> Workbench:
    """Calibrate what the static layers among the decisions touch."""
    shapes, static = inner.fact(SHAPES), [d.site for d in decisions if d.kind == "static"]
    ranges = None
    if static:
        touched = make_plan(work, static, shapes, settings.rules).touched(work)
        ranges = inner.fact(RangesAnalysis(values=touched))
    return Workbench(work, inner, shapes, ranges, sample_feeds(inner, _FEEDS), settings)


def _grown(before: ir.Model, after: ir.Model) -> str:
    """Says so if the file would not become smaller; large models always do."""
    if weight_bytes(before) > _COMPARE_BYTES:
        return ""
    old, new = len(model_bytes(before)), len(model_bytes(after))
    return f"the file would grow from {old} to {new} bytes" if new >= old else ""


def _metrics(decisions: Sequence[Decision], quality: dict[str, float]) -> dict[str, int | float | str | bool]:
    counts = {kind: sum(d.kind == kind for d in decisions) for kind in ("static", "dynamic", "weight", "float")}
    found: dict[str, int | float | str | bool] = {f"layers_{kind}": count for kind, count in counts.items()}
    if quality:
        found["output_sqnr_db"] = round(min(quality.values()), 1)
    return found
