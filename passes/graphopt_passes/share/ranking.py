"""Which layers to leave alone first, when the outputs lose too much: those that make most of the noise there."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.pass_base import Context
from graphopt.reference import Feed
from graphopt_passes.quant.blockwise.layout import layout_of
from graphopt_passes.quant.sites import keyed_nodes
from graphopt_passes.share.cut import cut_of
from graphopt_passes.share.fit import Method, share_weight
from graphopt_passes.share.judge import Judge
from graphopt_passes.share.rewrite import Plan
from graphopt_passes.share.tensors import WeightTensor, find_tensors

__all__ = ["rank"]

Array = np.ndarray[Any, np.dtype[Any]]

_FEEDS = 4


def rank(model: ir.Model, ctx: Context, plan: Plan, sites: Collection[str], feeds: Sequence[Feed]) -> tuple[str, ...]:
    """Names of layers by the noise that codebooks of their weights make at the outputs while all others stay float.

    Codebooks are those of k-means alone, which are found quickly. Layers that share a weight count as one, and come
    together.

    Args:
        model: The model before the step.
        ctx: Threads and custom operators.
        plan: How weights are shared.
        sites: Names of the layers.
        feeds: Samples to judge on; a few are used.
    """
    tensors = [t for t in find_tensors(model)[0] if any(site.name in sites for site in t.sites)]
    judge, nodes, noise = Judge(model, tensors, ctx, feeds[:_FEEDS]), keyed_nodes(model), dict[str, float]()
    for tensor in ctx.progress(tensors, "finding sensitive layers"):
        own = judge.noise(tensor, _rounded(tensor, nodes, plan))
        for name in dict.fromkeys(site.name for site in tensor.sites):
            noise[name] = noise.get(name, 0.0) + own
    return tuple(sorted(sites, key=lambda name: -noise.get(name, 0.0)))


def _rounded(tensor: WeightTensor, nodes: Mapping[str, ir.Node], plan: Plan) -> Array:
    """A weight with codebooks of k-means alone; one that cannot have any as it is."""
    weight, array = tensor.weight, np.asarray(tensor.tensor.numpy())
    cut = cut_of(weight.shape, weight.axis, plan.channels, plan.width)
    if weight.size % plan.width:
        return array
    method = Method(plan.method.entries, "nearest")
    layout = layout_of(tensor.sites[0], weight, nodes[tensor.sites[0].key])
    return share_weight(array.astype(np.float32, copy=False), cut, layout, method, None).real(cut).astype(array.dtype)
