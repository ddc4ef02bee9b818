"""The pass: what is quantized how, and checked before it replaces the model."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import onnx_ir as ir

from graphopt.analyses import SHAPES
from graphopt.errors import OptionError, nearest
from graphopt.opset import opset_version
from graphopt.options import opt
from graphopt.pass_base import Change, Context, Pass, PassResult
from graphopt.reference import Feed
from graphopt.targets import IntegerRules
from graphopt_passes.fold.affine import fold_affine
from graphopt_passes.fold.rewiring import FreshNames
from graphopt_passes.quant.adjust.steps import Help, adjust_floats, adjust_integers
from graphopt_passes.quant.blockwise import Method, needs_data, quantize_blocks
from graphopt_passes.quant.blockwise.store import BLOCKWISE_SINCE
from graphopt_passes.quant.decide import Decision, Settings, Workbench, first_choice
from graphopt_passes.quant.dynamic import note_ranks
from graphopt_passes.quant.existing import as_floats
from graphopt_passes.quant.few_values import have_few_values
from graphopt_passes.quant.floats import Choice, FloatSettings, check_patterns, convert, noise_by_site
from graphopt_passes.quant.gemm import plain_gemms
from graphopt_passes.quant.guards import fit_ranges, guard_layers, guard_outputs
from graphopt_passes.quant.limits import LAYER_SQNR, OUTPUT_SQNR, limit_of, metrics_of, notes_of
from graphopt_passes.quant.mixed.auto import Aim, Mixed, mix
from graphopt_passes.quant.mixed.forms import current_forms, switchboard
from graphopt_passes.quant.mixed.ranking import rank_alone, rank_by_leaving_out
from graphopt_passes.quant.plan import CURVES
from graphopt_passes.quant.prepare import (
    DYNAMIC_SINCE,
    PER_CHANNEL_SINCE,
    QUANTIZE_SINCE,
    drop_unread,
    grown_file,
    lift_opset,
    needed_opset,
)
from graphopt_passes.quant.products import PRODUCTS, find_products, judge_products, told_before
from graphopt_passes.quant.seen import hidden_layers, with_data, workbench
from graphopt_passes.quant.sites import Site, choose, find_sites, keep_named, keyed_nodes, tell_apart, usable

__all__ = ["Quant"]

_SIZE = 0.2  # between 8 bits and 4 in blocks of 32
_LEAST_GROUP = 8
Narrow = Literal["fp16", "bf16", "fp8"]


@dataclass(frozen=True, kw_only=True)
class Quant(Pass):
    """Store weights in 8 bits, and compute on 8-bit integers where that keeps the results.

    With calibration data, Conv, Gemm and MatMul compute on integers with ranges fitted to the data, and so do the
    additions, concatenations and poolings between them; weights have one scale for each output channel, biases 32
    bits. Without data, MatMul and Gemm find the range of their input on every run, and all other layers store int8
    weights and compute in float. The result is plain ONNX: QuantizeLinear, DequantizeLinear and MatMulInteger.

    On a target that computes on integers only, such as an NPU, everything that it can compute stands between integers,
    results of the model included: layers, sums, products, tables of functions of one number. What it cannot compute
    stays in float for another processor. There no layer steps back unless `min_sqnr` or `min_output_sqnr` asks for it.

    Before that, channels whose ranges differ are scaled in one layer and scaled back in the next (`equalize`,
    `smooth`); afterwards biases take up what rounding adds to the mean of a result (`bias_correction`). On a target
    that computes on integers only, weights of few values (see `share`) have one scale for the tensor and no channel is
    scaled: as few integers come of them, which its compiler codes in few bits.

    Batch norms are folded into the layers before them. Outputs of the model and everything else stay float, Softmax
    and normalizations unless `also` names them. A layer whose result 8 bits would drown in noise, measured on the
    calibration data, takes the next weaker form, and so do the layers that make most of the noise at an output. The
    opset is raised to what the form needs: 10, dynamic 11, one scale a channel 13.

    With `bits=auto` each layer stays float, takes 8 bits or, where runtimes compute on them, blocks of 4: whatever
    makes least noise at the outputs within `size`, by a table of every layer and form measured on calibration data.

    With `dtype=fp16` the whole model computes in fp16 between casts at its inputs and outputs, except where constants,
    ranges on the calibration data or the operator's definition forbid it, or where an output would suffer. bf16 and
    fp8 (E4M3, one scale a channel) store weights only. `keep` names what stays float32.

    Leaves alone, with the reason: layers that are quantized already, by whomever (with `requantize` they become floats
    first), weights that are computed, shared with other operators or replaceable by the caller, other types than
    float32, and tensors so small that scales would cost more than they save.
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
    bits: Literal[8, 4, 2, "auto"] = opt(8, help="8; 4 or 2: weights only; auto: float, 8 or 4, chosen layer by layer")
    size: float | None = opt(
        _SIZE, help="bits=auto: bytes of weights, as a fraction of float's; none: the least that keeps min_output_sqnr",
        gt=0, le=1,
    )  # fmt: skip
    dtype: Literal["int", "fp16", "bf16", "fp8"] = opt("int", help="integers, or a narrower float type")
    calibrator: Literal["auto", "minmax", "percentile", "mse", "entropy"] = opt(
        "minmax", help="how activation ranges are cut; auto: for each the way that leaves its layers least noise"
    )
    also: tuple[str, ...] = opt(
        (), help="operators to compute on static int8 that else stay float: Softmax, ...; MatMul: of two activations"
    )
    dynamic_convs: bool = opt(False, help="ranges found on every run for Conv too; ONNX Runtime is slower that way")
    per_channel: bool = opt(True, help="one weight scale for each output channel instead of one for the tensor")
    min_sqnr: float | None = opt(
        None,
        help="signal to noise in dB below which a layer leaves static int8; none: 22, and no limit on targets that "
        "compute on integers only, where such a layer would leave the target",
    )
    min_output_sqnr: float | None = opt(
        None,
        help="signal to noise of outputs in dB below which the noisiest layers step back; none: 16, and no limit on "
        "targets that compute on integers only; class scores: 8 less, and 4 more where weights are stored in blocks",
    )
    equalize: bool = opt(True, help="move ranges of channels between layers, so that 8 bits fit them all")
    smooth: bool = opt(True, help="move outliers of activations into weights, by data, normalizations included")
    requantize: bool = opt(False, help="make floats of layers that are quantized already, and quantize them anew")
    rounding: Literal["nearest", "gptq", "adaround"] = opt(
        "nearest", help="how weights are rounded: each by itself, or by what the layer makes of the errors on the data"
    )
    group_size: int | None = opt(
        None, help="weights in blocks: inputs with a scale of their own; 0: all of an output, none: 32", ge=0
    )
    symmetric: bool = opt(False, help="weights in blocks: no zero points")
    algorithm: Literal["auto", "rtn", "gptq", "awq", "hqq"] = opt(
        "auto", help="weights in blocks: how they are rounded; auto: gptq with data, else least squares"
    )
    damping: float = opt(0.05, help="gptq: share of the mean moment added to all moments", gt=0, le=1)
    act_order: bool = opt(True, help="gptq: round the weights of the strongest inputs first")
    bias_correction: bool = opt(True, help="take out of biases what rounding adds to the mean of a layer's result")
    outliers: float = opt(
        0.0, help="part of a MatMul's input channels that may stay float where they dominate its range", ge=0, le=0.5
    )
    only: tuple[str, ...] = opt((), help="only layers whose name matches one of these patterns")
    skip: tuple[str, ...] = opt((), help="leave layers alone whose name matches one of these patterns")
    keep: tuple[str, ...] = opt((), help="with dtype: nodes that stay float32, patterns of names or operator types")

    def requires(self, model: ir.Model, ctx: Context) -> None:
        """Check that data is there for static ranges, and that the patterns match something.

        Raises:
            OptionError: They are not, or do not.
        """
        self._check_combination()
        if self.dtype != "int":
            if ctx.target.integers.static_only:
                fact = f"{self.dtype!r} does not run on {ctx.target}, which computes on static int8 only"
                raise OptionError("quant.dtype", fact, "leave dtype out")
            check_patterns(model, self._float_choice())
            return
        if ctx.calibration is None and needs_data(self.algorithm):
            fact = f"{self.algorithm!r} needs calibration data"
            raise OptionError("quant.algorithm", fact, "give --calibration, or algorithm=hqq, which does without")
        if ctx.calibration is None and self.mode == "static":
            raise OptionError("quant.mode", "'static' needs calibration data", "give --calibration, or mode=auto")
        if ctx.target.integers.static_only:
            if self.bits != 8:
                fact = f"{self.bits!r} does not run on {ctx.target}, which computes on static int8 only"
                raise OptionError("quant.bits", fact, "use bits=8 with --calibration")
            if self.mode in ("dynamic", "weight"):
                fact = f"{self.mode!r} does not run on {ctx.target}, which computes on static int8 only"
                raise OptionError("quant.mode", fact, "use mode=static with --calibration")
            if ctx.calibration is None:
                fact = f"{ctx.target} computes on static int8 only, which needs calibration data"
                raise OptionError("quant", fact, "give --calibration")
        if self._blocks() is None:  # blocks see layers behind a Transpose as well, and check by themselves
            self._choose(self._floats(model), ctx.target.integers)

    def _check_combination(self) -> None:
        if self.dtype != "int":
            taken = (("mode", self.mode != "auto"), ("bits", self.bits != 8), ("requantize", self.requantize))
            for option, value in taken:
                if value:
                    fact = f"belongs to integers, and dtype={self.dtype} stores floats"
                    raise OptionError(f"quant.{option}", fact, f"leave {option} or dtype out")
        elif self.keep:
            raise OptionError("quant.keep", "belongs to narrow floats, and dtype=int stores integers", "use skip")
        for name in self.also:
            if name not in CURVES | PRODUCTS:
                raise OptionError("quant.also", f"{name!r} has no int8 form", nearest(name, CURVES | PRODUCTS))
        if self.bits in (4, 2) and self.mode in ("static", "dynamic"):
            fact = f"{self.mode!r} computes on 8-bit integers, {self.bits} bits store weights only"
            raise OptionError("quant.mode", fact, "leave mode out, or use bits=8")
        if self.bits == 8 and (self.mode != "weight" or self.dtype != "int"):
            asked = (("group_size", self.group_size is not None), ("symmetric", self.symmetric))
            for option, value in (*asked, ("algorithm", self.algorithm != "auto")):
                if value:
                    hint = "add bits=4, or mode=weight"
                    raise OptionError(f"quant.{option}", "belongs to weights stored in blocks", hint)
        if self.size != _SIZE and self.bits != "auto":
            raise OptionError("quant.size", "belongs to bits chosen layer by layer", "add bits=auto")
        if self.group_size is not None and 0 < self.group_size < _LEAST_GROUP:
            fact = f"{self.group_size} weights would share a scale as large as they are"
            raise OptionError("quant.group_size", fact, f"use {_LEAST_GROUP} at least, or 0 for one group")

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Quantize what is float, which with `requantize` is everything."""
        if self.dtype != "int":
            return self._narrow(model, ctx, self.dtype)
        if not self.requantize:
            return self._quantize(model, ctx)
        floats, undone = as_floats(model)
        result = self._quantize(floats, replace(ctx, model=floats, _facts={}))
        if result.modified:
            model.graph, model.ir_version = floats.graph, floats.ir_version
        return replace(result, changes=undone.told(result.changes))

    def _narrow(self, model: ir.Model, ctx: Context, dtype: Narrow) -> PassResult:
        """Convert a copy to narrower floats and, if that saves something, let its graph replace the model's."""
        found = convert(model, ctx, self._float_settings(dtype))
        if found.model is None:
            return PassResult(False, found.changes)
        grown = grown_file(model, found.model)
        if grown:
            return PassResult(False, tuple(Change.skipped(c.site, grown) if c.done else c for c in found.changes))
        model.graph, model.ir_version = found.model.graph, found.model.ir_version
        return PassResult(True, found.changes, metrics=found.metrics)

    def _blocks(self) -> Method | None:
        """How weights are stored in blocks; None where they are not."""
        asked = self.group_size is not None or self.symmetric or self.algorithm != "auto"
        if self.bits == "auto" or (self.bits == 8 and not (self.mode == "weight" and asked)):
            return None
        group = 32 if self.group_size is None else self.group_size
        return Method(self.bits, group, self.symmetric, self.algorithm, self.damping, self.act_order)

    def _output_floor(self) -> float:
        return OUTPUT_SQNR if self.min_output_sqnr is None else self.min_output_sqnr

    def _float_settings(self, dtype: Narrow) -> FloatSettings:
        return FloatSettings(dtype, self._float_choice(), self._output_floor())

    def _float_choice(self) -> Choice:
        return Choice(only=self.only, skip=self.skip, keep=self.keep)

    def _quantize(self, model: ir.Model, ctx: Context) -> PassResult:
        """Quantize a copy and, if it is better, let its graph replace the model's."""
        method = self._blocks()
        if method is not None:
            return quantize_blocks(model, ctx, method, only=self.only, skip=self.skip, floor=self._output_floor())
        sites, skipped = self._sites(model, ctx.target.integers)
        if not sites and not ctx.target.integers.integers_only:
            return PassResult(False, skipped)
        bench, decisions, told = self._prepare(model.clone(), ctx)
        settings = bench.settings
        if self.bits == "auto":
            return self._take_mixed(model, mix(bench, decisions, self._aim(bench)), told)
        result, made, decisions, quality = guard_outputs(bench, decisions)
        changes = (*told, *made)
        if not any(change.done for change in made):
            return PassResult(False, changes)
        grown = "" if settings.rules.static_only else grown_file(model, result)
        if grown:
            return PassResult(False, tuple(Change.skipped(c.site, grown) if c.done else c for c in changes))
        model.graph, model.ir_version = result.graph, result.ir_version
        return PassResult(
            True, changes, metrics=metrics_of(decisions, quality), notes=notes_of(quality, settings.rules)
        )

    def _aim(self, bench: Workbench) -> Aim:
        """What `bits=auto` is to reach."""
        group = 32 if self.group_size is None else self.group_size
        method = Method(4, group, self.symmetric, self.algorithm, self.damping, self.act_order)
        opset = opset_version(bench.model)
        few = "" if opset >= BLOCKWISE_SINCE else f"blocks of 4 bits need opset {BLOCKWISE_SINCE}, this is {opset}"
        return Aim(self.size, self._output_floor(), method, few)

    def _take_mixed(self, model: ir.Model, mixed: Mixed, told: tuple[Change, ...]) -> PassResult:
        """Let the mixed model replace the model, if it is smaller."""
        changes = (*told, *mixed.changes)
        if not any(change.done for change in mixed.changes):
            return PassResult(False, changes, notes=mixed.notes)
        grown = grown_file(model, mixed.model)
        if grown:
            return PassResult(False, tuple(Change.skipped(c.site, grown) if c.done else c for c in changes))
        model.graph, model.ir_version = mixed.model.graph, mixed.model.ir_version
        return PassResult(True, changes, metrics=mixed.metrics, notes=mixed.notes)

    def _prepare(self, work: ir.Model, ctx: Context) -> tuple[Workbench, list[Decision], tuple[Change, ...]]:
        """Bring a copy into the form to quantize, in place; returns it with the form that each site allows."""
        settings = self._settings(work, ctx)
        static = ctx.calibration is not None and self.mode in ("auto", "static")
        inner = replace(ctx, model=work, _facts={})
        if static:
            if settings.rules.integers_only:
                keep_named(work, self.skip)
            fold_affine(work, inner.fact(SHAPES), FreshNames(work), 0)
            drop_unread(work)
            tell_apart(work)
            plain_gemms(work, self._sites(work, settings.rules)[0])
            inner.drop_facts()
        sites, skipped = self._sites(work, settings.rules)
        asked = Help(self.equalize, self.smooth, self.bias_correction, self.rounding, self.outliers)
        if settings.rules.integers_only and have_few_values(work, sites):
            settings, asked = replace(settings, per_channel=False), replace(asked, equalize=False, smooth=False)
            ctx.log.info("quant: weights have few values each and keep them: one scale a tensor, no channel is scaled")
        adjusted = adjust_floats(work, inner, sites, settings, self.mode, asked)
        sites, skipped = self._sites(work, settings.rules)
        why = "no calibration data" if ctx.calibration is None and self.mode == "auto" else ""
        if settings.dynamic:
            note_ranks(work, sites, inner.fact(SHAPES))
        hidden = hidden_layers(work, sites, inner.fact(SHAPES)) if static else {}
        decisions = first_choice(work, sites, settings, static=static, why=why, hidden=hidden)
        asks = static and self.bits == 8 and ("MatMul" in self.also or settings.rules.static_only)
        products = find_products(work, inner.fact(SHAPES), self.only, self.skip) if asks else {}
        bench = workbench(work, inner, settings, decisions, products)
        decisions = with_data(bench, decisions)
        bench = fit_ranges(bench, decisions)
        decisions = guard_layers(bench, decisions)
        bench = judge_products(bench, decisions)
        adjusted += adjust_integers(bench, decisions, asked)
        return bench, decisions, (*adjusted, *told_before(skipped, bench, decisions))

    def revertible(self, model: ir.Model, sites: Sequence[str]) -> tuple[str, ...]:
        """Layers whose weights are stored in integers; with `dtype`, nodes."""
        if self.dtype != "int":
            known = {node.name for node in keyed_nodes(model).values()}
        else:
            known = {site.name for site in find_sites(self._floats(model))[0]}
        return tuple(site for site in sites if site in known)

    def worst_first(
        self, model: ir.Model, ctx: Context, sites: Sequence[str], reverted: Sequence[str], feeds: Sequence[Feed]
    ) -> tuple[str, ...]:
        """Order layers by the noise that they make at the outputs; see `mixed.ranking`.

        With `dtype=fp16` nodes by the noise that they add to their own results, otherwise as above.
        """
        if self.dtype != "int":
            settings = self._float_settings(self.dtype)
            settings = replace(settings, choice=replace(settings.choice, skip=self.without(reverted).skip))
            noise = noise_by_site(model, ctx, settings, feeds)
            return tuple(sorted(sites, key=lambda name: -noise.get(name, 0.0)))
        method, step = self._blocks(), self
        if method is not None:  # weights alone are rounded, and nothing is adjusted before
            step = Quant(mode="weight", equalize=False, smooth=False, only=self.only, skip=self.skip)
        floats = self._floats(model)
        bench, decisions, _ = step._prepare(floats.clone(), replace(ctx, model=floats, _facts={}))
        forms = current_forms(bench, [d for d in decisions if d.site.name in {*sites, *reverted}], method)
        board = switchboard(bench, decisions)
        if reverted:
            ranked = rank_by_leaving_out(bench.model, forms, reverted, feeds, board)
        else:
            ranked = rank_alone(bench.model, forms, feeds, bench.context, board)
        ranked = tuple(name for name in ranked if name in sites)
        return (*ranked, *(name for name in sites if name not in ranked))

    def _floats(self, model: ir.Model) -> ir.Model:
        """What is quantized: the model, or what `requantize` makes of it."""
        return as_floats(model)[0] if self.requantize else model

    def without(self, sites: Sequence[str]) -> Self:
        """The same with these layers among `skip`."""
        return replace(self, skip=(*self.skip, *map(glob.escape, sites)))

    def _sites(self, model: ir.Model, rules: IntegerRules) -> tuple[tuple[Site, ...], tuple[Change, ...]]:
        chosen, skipped = self._choose(model, rules)
        kept, shared = usable(model, chosen)
        return kept, (*skipped, *shared)

    def _choose(self, model: ir.Model, rules: IntegerRules) -> tuple[tuple[Site, ...], tuple[Change, ...]]:
        """Find the sites that `only` and `skip` leave.

        The patterns may name products of activations if asked for, and all nodes where all are to compute on integers.
        """
        wanted, (sites, skipped) = PRODUCTS & frozenset(self.also), find_sites(model)
        nodes = (node for node in model.graph.all_nodes() if rules.integers_only or node.op_type in wanted)
        others = tuple(node.name or "" for node in nodes)
        kept, left = choose(sites, self.only, self.skip, others)
        return kept, (*skipped, *left)

    def _settings(self, work: ir.Model, ctx: Context) -> Settings:
        """Raise the opset of the copy as far as needed, and settle for less where that cannot be done."""
        rules = replace(ctx.target.integers, operators=ctx.target.integers.operators | frozenset(self.also))
        per_channel = self.per_channel and rules.per_channel
        needed = needed_opset(self.mode, per_channel=per_channel)
        if self.bits == "auto" and lift_opset(work, BLOCKWISE_SINCE, ctx):
            ctx.log.warning("quant: opset %d has no blocks of 4 bits", opset_version(work))
        refusal = lift_opset(work, needed, ctx)
        opset = opset_version(work)
        if refusal and opset < QUANTIZE_SINCE:
            raise self.fail(refusal, f"integers need opset {QUANTIZE_SINCE} at least")
        if refusal:
            ctx.log.warning("quant: %s; opset %d allows less", refusal, opset)
        return Settings(
            calibrator=self.calibrator,
            per_channel=per_channel and opset >= PER_CHANNEL_SINCE,
            bits=rules.weight_bits,
            min_sqnr=limit_of(self.min_sqnr, LAYER_SQNR, rules),
            min_output_sqnr=limit_of(self.min_output_sqnr, OUTPUT_SQNR, rules),
            dynamic=self.mode in ("auto", "dynamic") and opset >= DYNAMIC_SINCE and not rules.static_only,
            weight_only=not rules.static_only,
            rules=rules,
            dynamic_convs=self.dynamic_convs,
        )
