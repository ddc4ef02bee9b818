"""A model that runs calibration samples again with other weights, to see how far its outputs move."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.calibration import Dataset
from graphopt.pass_base import Context
from graphopt.reference import Feed, Reference
from graphopt_passes.prune.criteria.output import output_distance

__all__ = ["Rerun", "free_weight"]

_BATCH = 8
_KEPT_BYTES = 256 << 20


class Rerun:
    """Samples, and what the model makes of them.

    Args:
        model: What varies are inputs of it.
        inputs: Those inputs as they are at first.
        data: Samples for the others.
        samples: How many, as long as their outputs do not fill memory.
        ctx: How ONNX Runtime runs.
    """

    def __init__(self, model: ir.Model, inputs: Feed, data: Dataset, samples: int, ctx: Context) -> None:
        self._session = Reference(model, threads=ctx.threads, extensions=ctx.extensions)
        self._feeds, self._wanted = list[Feed](), list[Feed]()
        kept = 0
        for feed in data.batches(_BATCH, samples):
            outputs = self._session.run({**feed, **inputs})
            kept += sum(np.asarray(array).nbytes for array in outputs.values())
            if self._feeds and kept > _KEPT_BYTES:
                return
            self._feeds.append(feed)
            self._wanted.append(outputs)

    def moved(self, inputs: Feed) -> float:
        """How far the outputs are from what they were if inputs are others, in parts of their energy."""
        found = [self._session.run({**feed, **inputs}) for feed in self._feeds]
        changes = [output_distance([w[k] for w in self._wanted], [f[k] for f in found]) for k in self._wanted[0]]
        return float(np.mean(changes))


def free_weight(model: ir.Model, weight: ir.Value, inputs: Feed) -> None:
    """Make an initializer of the main graph an input of the model."""
    name, tensor = weight.name or "", weight.const_value
    assert tensor is not None
    inputs[name] = tensor.numpy()
    del model.graph.initializers[name]
    weight.const_value, weight.type, weight.shape = None, ir.TensorType(tensor.dtype), ir.Shape(inputs[name].shape)
    model.graph.inputs.append(weight)
