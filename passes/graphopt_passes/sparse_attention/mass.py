"""How much of what heads attend to a pattern keeps, measured on calibration data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.analyses.attention import AttentionBlock
from graphopt.analyses.padding import PADDING
from graphopt.analyses.streaming import stream
from graphopt.pass_base import Context
from graphopt_passes.sparse_attention._patterns import Band, visible

__all__ = ["Masses", "measured", "shares_of_heads", "weights_of"]

Array = np.ndarray[Any, np.dtype[Any]]
_SAMPLES = 32


@dataclass
class Masses:
    """Sums over the queries of one core.

    Attributes:
        kept: `[patterns, heads]`, attention that each pattern keeps, summed over queries.
        queries: How many there were.
        longest: Length of the longest sample.
    """

    kept: Array
    queries: int = 0
    longest: int = 0

    @property
    def shares(self) -> Array:
        """`[patterns, heads]`, mean share of a query's attention that is kept."""
        return self.kept / max(self.queries, 1)


def weights_of(block: AttentionBlock) -> ir.Value | None:
    """The attention of a core as the model computes it; None where nothing but an operator knows it."""
    found = [node.outputs[0] for node in block.nodes if node.op_type == "Softmax"]
    return found[0] if len(found) == 1 and "batch" in _lead(block)[:1] else None


def measured(
    model: ir.Model, blocks: Sequence[AttentionBlock], bands: Sequence[Sequence[Band]], ctx: Context
) -> list[Masses]:
    """What patterns keep of each core's attention.

    Padded queries do not count, where an input tells which they are. A mean of a far block counts as nothing.

    Args:
        model: The model; it does not change.
        blocks: Cores whose attention can be seen.
        bands: Patterns to try, for each of them as many.
        ctx: Holds the data.
    """
    padding, seen = ctx.fact(PADDING), dict[tuple[int, int, int], Array]()
    names = {value.name or "": i for i, block in enumerate(blocks) if (value := weights_of(block)) is not None}
    found = [Masses(np.zeros((len(bands[i]), block.heads))) for i, block in enumerate(blocks)]
    masks = dict[int, Array]()
    wanted = [*names, *(() if padding is None else (padding,))]
    for part in stream(model, wanted, ctx, "weighing attention", _SAMPLES):
        if padding is not None and padding in part.values:
            masks[part.batch] = part.values[padding] != 0
        for name, weights in part.values.items():
            if name in names:
                i = names[name]
                length = weights.shape[-1]
                for j, band in enumerate(bands[i]):
                    key = (i, j, length)
                    if key not in seen:
                        seen[key] = visible(band, length)
                maps = [seen[i, j, length] for j in range(len(bands[i]))]
                _add(found[i], _by_head(weights, blocks[i]), maps, masks.get(part.batch))
    return found


def _add(masses: Masses, weights: Array, maps: Sequence[Array], mask: Array | None) -> None:
    """Add samples `[samples, heads, queries, keys]`."""
    samples, _, length, _ = weights.shape
    real = np.ones((samples, length), bool) if mask is None or mask.shape != (samples, length) else mask
    together = np.einsum("bhqk,bq->hqk", weights, real, dtype=np.float32)
    for number, seen in enumerate(maps):
        masses.kept[number] += np.sum(together, axis=(1, 2), where=seen, dtype=np.float64)
    masses.queries += int(real.sum())
    masses.longest = max(masses.longest, length)


def _by_head(weights: Array, block: AttentionBlock) -> Array:
    return weights.astype(np.float32).reshape(weights.shape[0], block.heads, *weights.shape[-2:])


def _lead(block: AttentionBlock) -> Sequence[str]:
    return [axis for axis in block.score_axes[:-2] if axis != "one"]


def shares_of_heads(masses: Masses, number: int) -> Mapping[str, float]:
    """Share of the attention that a pattern keeps, by head."""
    return {f"head {head}": round(float(share), 4) for head, share in enumerate(masses.shares[number])}
