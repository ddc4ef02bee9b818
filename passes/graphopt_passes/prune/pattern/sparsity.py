"""Sparsity inside weights: `prune{pattern=2:4}` and `prune{pattern=unstructured}`. Shapes stay as they are."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import numpy as np
import onnx_ir as ir

from graphopt.calibration import Dataset
from graphopt.errors import OptionError, nearest
from graphopt.pass_base import Change, Context, PassResult
from graphopt.reference import Feed
from graphopt_passes.prune.pattern.bench import Bench
from graphopt_passes.prune.pattern.densities import by_sensitivity, spread
from graphopt_passes.prune.pattern.fit import Fitted, Method, Refitter, Shifter, layer_of
from graphopt_passes.prune.pattern.obs import Rule, norm_scores
from graphopt_passes.prune.pattern.sites import Site, find_sites, write
from graphopt_passes.prune.refit.linear_layers import LinearLayer

__all__ = ["PATTERN_CRITERIA", "Sparsity"]

PATTERN_CRITERIA: Mapping[str, Method] = {"l1": "magnitude", "l2": "magnitude", "wanda": "wanda", "obs": "obs"}
"""Criteria that judge single weights."""

_RUNS = re.compile(r"([1-9][0-9]{0,3}):([1-9][0-9]{0,3})")
_ENOUGH = "it is as sparse already"
_SPARED = "other layers can spare weights better"
_NOTE = (
    "zeros make the file smaller only once it is compressed, and nothing faster without a sparse kernel: "
    "ONNX Runtime has none on CPUs; NVIDIA's tensor cores from Ampere on run 2:4 with TensorRT"
)


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """Set the weights to zero that matter least, in a pattern.

    With calibration data the layers are visited in order, and what is left of each is re-solved so that its output
    comes as close as it can to what the whole model computes. Biases make up for the mean.

    Attributes:
        pattern: `unstructured`, or N:M: of M neighbouring inputs at most N are not zero.
        ratio: Fraction of zeros for `unstructured`.
        default_ratio: What `ratio` is where the user asks for none.
        criterion: auto, l1, l2, wanda or obs.
        scope: uniform: the same fraction of every layer; global: more where weights matter less; sensitivity: more
            where the model's outputs lose less; auto: the last with data, else global.
        refit: Re-solve what is left on calibration data.
        only: Layers: names or operators, with wildcards; none: all.
        skip: Layers to leave alone.
        spared: Names of layers that stay as they are, while the others lose what they lose beside them.
    """

    pattern: str
    ratio: float
    default_ratio: float
    criterion: str = "auto"
    scope: str = "auto"
    refit: bool = True
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    spared: tuple[str, ...] = ()

    def requires(self, model: ir.Model, ctx: Context) -> None:
        """Check the options against each other and the model.

        Raises:
            OptionError: The pattern is none, options contradict each other, or a wildcard fits no layer.
        """
        keep, of = self._runs()
        if self.scope == "search":
            raise OptionError("prune.scope", "search spreads channels, not single weights", "use sensitivity")
        if self.scope == "sensitivity" and ctx.calibration is None:
            raise OptionError("prune.scope", "sensitivity needs samples", "give --calibration, or use global")
        if of and self.scope in ("global", "sensitivity"):
            raise OptionError("prune.scope", f"{self.pattern} is the same for every layer", "leave scope out")
        if of and self.ratio not in (self.default_ratio, 1 - keep / of):
            fact = f"{self.pattern} makes {1 - keep / of:g} of the weights zero, not {self.ratio:g}"
            raise OptionError("prune.ratio", fact, "leave ratio out")
        if self.criterion != "auto" and self.criterion not in PATTERN_CRITERIA:
            fact = f"{self.criterion!r} does not judge single weights"
            raise OptionError("prune.criterion", fact, f"use one of auto, {', '.join(PATTERN_CRITERIA)}")
        if self.criterion in ("wanda", "obs") and ctx.calibration is None:
            raise OptionError("prune.criterion", f"{self.criterion} needs samples", "give --calibration, or use l2")
        sites, skipped = find_sites(model, ctx)
        operators = {change.site: "" for change in skipped} | {site.name: site.node.op_type for site in sites}
        for option, globs in (("only", self.only), ("skip", self.skip)):
            for glob in globs:
                if not any(_matches(name, operator, (glob,)) for name, operator in operators.items()):
                    hint = nearest(glob, {*operators, *operators.values()})
                    raise OptionError(f"prune.{option}", f"{glob!r} fits no layer with weights", hint)

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Choose the zeros and write them."""
        chosen, skipped = self._choose(model, ctx)
        rules, method = self._rules(model, chosen, ctx), self._method(ctx)
        fitter = self._fitter(model, ctx) if chosen else None
        before, after, changes = _Amount(), _Amount(), list[Change]()
        for site, rule in zip(ctx.progress(chosen, "sparsifying"), rules, strict=True):
            old = _Amount.of(site)
            if site.name in self.spared:
                changes.append(Change.skipped(site.name, "left alone, as asked"))
            else:
                changes.append(_sparsify(model, site, method, rule, fitter, ctx))
            before, after = before + old, after + (_Amount.of(site) if changes[-1].done else old)
        metrics: dict[str, int | float | str | bool] = {
            "pattern": self.pattern,
            "scope": self._scope(ctx),
            "layers": sum(change.done for change in changes),
            "weights": after.weights,
            "zeros_before": before.zeros,
            "zeros_after": after.zeros,
            "sparsity": round(after.zeros / max(1, after.weights), 6),
            "weight_bytes": after.plain,
            "compressed_bytes_before": before.compressed,
            "compressed_bytes_after": after.compressed,
            "note": _NOTE,
        }
        return PassResult(any(change.done for change in changes), (*changes, *skipped), metrics=metrics)

    def worst_first(
        self, model: ir.Model, ctx: Context, names: Sequence[str], feeds: Sequence[Feed]
    ) -> tuple[str, ...]:
        """Order layers by what each alone, made sparse, costs the outputs, most first.

        Weights inside subgraphs, and those beyond what memory holds twice, come last: no run tells of them.

        Args:
            model: The model before the step; it does not change.
            ctx: Holds the samples that layers are fitted to.
            names: Names of the layers.
            feeds: What the outputs are judged on.
        """
        ctx = replace(ctx, model=model, _facts={})
        chosen, _ = self._choose(model, ctx)
        rules = self._rules(model, chosen, ctx)
        judged_on = Dataset("what is checked", None, lambda: iter(feeds))
        bench = Bench.of(model, chosen, self._method(ctx), ctx, len(chosen), judged_on)
        costs = {
            site.name: bench.alone(site, rule)
            for site, rule in zip(ctx.progress(chosen, "finding sensitive layers"), rules, strict=True)
            if site.name in names
        }
        return tuple(sorted(names, key=lambda name: -costs.get(name, 0.0)))

    def _choose(self, model: ir.Model, ctx: Context) -> tuple[list[Site], list[Change]]:
        """Weights that become sparse, and why others do not."""
        sites, skipped = find_sites(model, ctx)
        judged = [(site, self._refusal(site)) for site in sites]
        skipped += [Change.skipped(site.name, reason) for site, reason in judged if reason]
        return [site for site, reason in judged if not reason], skipped

    def _fitter(self, model: ir.Model, ctx: Context) -> Refitter | Shifter | None:
        if ctx.calibration is None:
            return None
        whole = model.clone()
        return Refitter(whole, model, ctx.calibration, ctx) if self.refit else Shifter(whole, ctx)

    def _runs(self) -> tuple[int, int]:
        """N and M; zeros for `unstructured`."""
        if self.pattern == "unstructured":
            return 0, 0
        match = _RUNS.fullmatch(self.pattern)
        if match is None or int(match[1]) >= int(match[2]):
            fact = f"{self.pattern!r} is not channels, unstructured or N:M with N less than M"
            raise OptionError("prune.pattern", fact, "write pattern=2:4")
        return int(match[1]), int(match[2])

    def _refusal(self, site: Site) -> str:
        """Why a site stays as it is; empty where it does not."""
        of, run = self._runs()[1], site.layout.run
        if self.only and not _matches(site.name, site.node.op_type, self.only):
            return "not in prune.only"
        if _matches(site.name, site.node.op_type, self.skip):
            return f"prune.skip names {site.name!r}"
        if of and run % of:
            return f"its outputs read {run} input channels, no multiple of {of}"
        return ""

    def _rules(self, model: ir.Model, sites: Sequence[Site], ctx: Context) -> list[Rule]:
        """What each site loses."""
        keep, of = self._runs()
        if of:
            return [Rule(keep=keep, of=of)] * len(sites)
        scope = self._scope(ctx)
        zeros = [int(np.count_nonzero(site.tensor.numpy() == 0)) for site in sites] if scope != "uniform" else []
        if zeros and sum(zeros) >= round(self.ratio * sum(site.size for site in sites)):
            return [Rule(count=count) for count in zeros]
        if scope == "global":
            return [Rule(count=count) for count in spread(sites, self.ratio)]
        if scope == "sensitivity":
            counts = by_sensitivity(model, sites, self.ratio, self._method(ctx), ctx)
            return [Rule(count=count) for count in counts]
        return [Rule(count=round(self.ratio * site.size)) for site in sites]

    def _scope(self, ctx: Context) -> str:
        if self._runs()[1]:
            return "uniform"
        if self.scope != "auto":
            return self.scope
        return "global" if ctx.calibration is None else "sensitivity"

    def _method(self, ctx: Context) -> Method:
        if self.criterion != "auto":
            return PATTERN_CRITERIA[self.criterion]
        return "obs" if ctx.calibration is not None else "magnitude"


@dataclass(frozen=True)
class _Amount:
    """Weights, zeros and bytes, as they are and compressed with zlib."""

    weights: int = 0
    zeros: int = 0
    plain: int = 0
    compressed: int = 0

    @classmethod
    def of(cls, site: Site) -> _Amount:
        array = np.ascontiguousarray(site.tensor.numpy())
        packed = len(zlib.compress(array.tobytes(), 1))
        return cls(array.size, int(np.count_nonzero(array == 0)), array.nbytes, packed)

    def __add__(self, other: _Amount) -> _Amount:
        return _Amount(
            self.weights + other.weights,
            self.zeros + other.zeros,
            self.plain + other.plain,
            self.compressed + other.compressed,
        )


def _sparsify(
    model: ir.Model, site: Site, method: Method, rule: Rule, fitter: Refitter | Shifter | None, ctx: Context
) -> Change:
    """Make one weight sparse, by magnitude where samples are of no use."""
    why = ""
    if not rule.of and not rule.count:
        return Change.skipped(site.name, _SPARED)
    if fitter is not None:
        layer = layer_of(site, ctx)
        found = layer if isinstance(layer, str) else fitter.fit(site, layer, method, rule)
        if isinstance(layer, LinearLayer) and isinstance(found, Fitted):
            return _put(model, site, layer, found, method)
        why = f": {found}"
    if rule.fits(site.matrix()):
        return Change.skipped(site.name, _ENOUGH)

    def sparse(tensor: ir.TensorProtocol) -> np.ndarray:
        weight = site.layout.matrix(tensor.numpy().astype(np.float64))
        return np.where(rule.drop(norm_scores(weight)), 0.0, weight)

    write(site, sparse)
    return Change(site.name, f"made sparse by magnitude{why}", details=_details(site, "magnitude"))


def _put(model: ir.Model, site: Site, layer: LinearLayer, found: Fitted, method: Method) -> Change:
    """Write what was fitted."""
    if not found.done:
        return Change.skipped(site.name, _ENOUGH)
    if found.bias.any():
        layer.add(model.graph, np.zeros(layer.matrix().shape), found.bias)
    write(site, found.weight)
    action, details = f"made sparse by {method}", _details(site, method)
    if found.before is not None and found.after is not None:
        action += f": output error {found.before:.3f} -> {found.after:.3f}"
        details |= {"error_before": round(found.before, 6), "error_after": round(found.after, 6)}
    return Change(site.name, action, details=details)


def _details(site: Site, method: str) -> dict[str, int | float | str | bool]:
    zeros = int(np.count_nonzero(site.tensor.numpy() == 0))
    return {"method": method, "weights": site.size, "zeros": zeros, "sparsity": round(zeros / site.size, 6)}


def _matches(name: str, operator: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(word, glob) for glob in globs for word in (name, operator))
