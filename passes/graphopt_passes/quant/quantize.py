"""The pass: what is quantized how, checked before it replaces the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from graphopt.analyses import SHAPES, RangesAnalysis
from graphopt.errors import ModelError, OptionError, UsageError
from graphopt.model_io import input_specs, model_bytes, weight_bytes
from graphopt.opset import opset_version, raise_opset
from graphopt.options import opt
from graphopt.pass_base import Change, Context, Pass, PassResult
from graphopt.reference import Feed, Reference, random_feed
from graphopt_passes.fold._affine import fold_affine
from graphopt_passes.fold._rewiring import FreshNames
from graphopt_passes.quant.audit import layer_quality, output_quality, sample_feeds
from graphopt_passes.quant.builder import Builder
from graphopt_passes.quant.dynamic import quantize_dynamic, why_not_dynamic
from graphopt_passes.quant.plan import Plan, make_plan
from graphopt_passes.quant.sites import Site, choose, find_sites, keyed_nodes, unshared
from graphopt_passes.quant.static import apply_plan, make_grids, why_not_static
from graphopt_passes.quant.weight import quantize_weights

__all__ = ["Quant"]

Mode = Literal["static", "dynamic", "weight"]


@dataclass(frozen=True, kw_only=True)
class Quant(Pass):
    """Store weights in 8 bits and compute on 8-bit integers where that keeps the results."""

    name: ClassVar[str] = "quant"
    lossy: ClassVar[bool] = True

    mode: Literal["auto", "static", "dynamic", "weight"] = opt("auto", help="m")
    bits: Literal[8] = opt(8, help="bits")
    calibrator: Literal["minmax", "percentile", "mse"] = opt("minmax", help="c")
    per_channel: bool = opt(True, help="one scale for each output channel")
    min_sqnr: float = opt(10.0, help="dB")
    floor: float = opt(10.0, help="dB")
    only: tuple[str, ...] = opt((), help="only layers whose name matches one of these patterns")
    skip: tuple[str, ...] = opt((), help="leave layers alone whose name matches one of these patterns")

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        sites, changes = find_sites(model)
        work = model.clone()
        if opset_version(work) < 13:
            raise_opset(work, 13)
        inner = replace(ctx, model=work, _facts={})
        fold_affine(work, inner.fact(SHAPES), FreshNames(work), 0)
        inner.drop_facts()
        sites, changes = find_sites(work)
        rules = ctx.target.integers
        nodes = keyed_nodes(work)
        why = {s.key: why_not_static(s, nodes[s.key], rules, True) for s in sites}
        linear = [s for s in sites if not why[s.key]]
        plan = make_plan(work, linear, inner.fact(SHAPES), rules)
        ranges = inner.fact(RangesAnalysis(values=plan.touched(work)))
        grids = make_grids(work, plan, ranges, self.calibrator, rules)
        feeds = sample_feeds(ctx, 16)
        quality = layer_quality(work, plan, grids, linear, ranges, feeds, ctx, bits=rules.weight_bits, per_channel=True)
        for s in linear:
            if quality[s.key] < self.min_sqnr:
                why[s.key] = f"8 bits would leave {quality[s.key]:.1f} dB"
        linear = [s for s in sites if not why[s.key]]
        plan = make_plan(work, linear, inner.fact(SHAPES), rules)
        grids = make_grids(work, plan, ranges, self.calibrator, rules)
        result = work.clone()
        b = Builder(result, rules.weight_bits)
        done = apply_plan(b, plan, grids, linear, per_channel=True)
        changes = list(changes) + [Change(s.name, "int8", details={"sqnr": quality[s.key], "w": done[s.key]}) for s in linear]
        rest = [s for s in sites if why[s.key]]
        dyn = {}
        nodes = keyed_nodes(result)
        weightonly = []
        for s in rest:
            wd = why_not_dynamic(s, nodes[s.key], per_channel=True)
            if s.operator in ("MatMul", "Gemm") and not wd and self.mode == "auto":
                changes.append(quantize_dynamic(b, nodes[s.key], s, dyn, per_channel=True, why=why[s.key]))
            else:
                weightonly.append((s, why[s.key]))
        changes += quantize_weights(b, weightonly, per_channel=True)
        q = output_quality(Reference(model), Reference(result), feeds, ctx)
        model.graph = result.graph
        model.ir_version = result.ir_version
        return PassResult(True, tuple(changes), metrics={f"sqnr_{k}": v for k, v in q.items()})
