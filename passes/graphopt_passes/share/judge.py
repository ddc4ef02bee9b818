"""What codebooks of one weight do to the outputs of the model, beside those that have been settled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.pass_base import Context
from graphopt.reference import Feed
from graphopt_passes.quant.mixed.switchboard import Switchboard, Trial
from graphopt_passes.quant.sites import Site
from graphopt_passes.quant.switches import worst_noise
from graphopt_passes.share.tensors import WeightTensor

__all__ = ["Judge"]

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class _Place:
    """Where a weight is switched: a layer that reads it, and which of that layer's weights it is."""

    key: str
    place: int


class Judge:
    """Runs a model with other weights; all are float until they are settled.

    Args:
        model: The float model; it is not changed.
        tensors: Weights to be judged.
        ctx: Threads and custom operators.
        feeds: Samples to judge on.
    """

    def __init__(self, model: ir.Model, tensors: Sequence[WeightTensor], ctx: Context, feeds: Sequence[Feed]) -> None:
        switched, self._places = _switched(tensors)
        self._board, self._feeds = Switchboard(model, switched, ctx), feeds
        self._exact = [self._board.run(feed, {}) for feed in feeds]
        self._settled = dict[_Place, Array]()

    def knows(self, tensor: WeightTensor) -> bool:
        """Whether it is one of those."""
        return tensor.value.name in self._places

    def noise(self, tensor: WeightTensor, real: Array) -> float:
        """Mean power of the noise over that of the signal at the worst output."""
        weights = self._settled | {self._places[tensor.value.name or ""]: real}
        keys = dict.fromkeys(place.key for place in weights)
        trials = {key: Trial({p.place: array for p, array in weights.items() if p.key == key}) for key in keys}
        pairs = zip(self._feeds, self._exact, strict=True)
        return float(np.mean([worst_noise(exact, self._board.run(feed, trials)) for feed, exact in pairs]))

    def settle(self, tensor: WeightTensor, reals: Sequence[Array]) -> int:
        """Which of some arrays makes the least noise as the weight, the first of equals; it is that from now on."""
        best = int(np.argmin([self.noise(tensor, real) for real in reals]))
        self._settled[self._places[tensor.value.name or ""]] = reals[best]
        return best


def _switched(tensors: Sequence[WeightTensor]) -> tuple[list[Site], dict[str, _Place]]:
    """Layers with all of their weights, each weight at the first layer that reads it; and the places by its name."""
    found, places = dict[str, Site](), dict[str, _Place]()
    for tensor in tensors:
        first = tensor.sites[0]
        known = found.get(first.key, replace(first, weights=()))
        places[tensor.value.name or ""] = _Place(first.key, len(known.weights))
        found[first.key] = replace(known, weights=(*known.weights, *first.weights))
    return list(found.values()), places
