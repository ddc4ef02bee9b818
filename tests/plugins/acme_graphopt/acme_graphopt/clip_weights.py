"""A pass: clip the outliers of each weight, so that INT8 has finer steps for all other values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.markers import hookimpl
from graphopt.options import opt
from graphopt.pass_base import Change, Context, Pass, PassResult


@dataclass(frozen=True, kw_only=True)
class ClipWeights(Pass):
    """Clip the weights of Conv, Gemm and MatMul to some standard deviations around their mean."""

    name: ClassVar[str] = "acme-clip-weights"
    lossy: ClassVar[bool] = True
    sigmas: float = opt(4.0, help="standard deviations that stay on either side", gt=0)

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Clip one weight after another, each once."""
        weights = {
            node.inputs[1]: node
            for node in model.graph
            if node.op_type in ("Conv", "Gemm", "MatMul") and node.inputs[1]
        }
        changes = [self._clip(weight, node.name or "") for weight, node in weights.items()]
        return PassResult(modified=any(change.done for change in changes), changes=tuple(changes))

    def _clip(self, weight: ir.Value, site: str) -> Change:
        if not weight.is_initializer() or weight.is_graph_input() or weight.const_value is None:
            return Change.skipped(site, "its weight is not a constant of the model")
        if weight.const_value.dtype != ir.DataType.FLOAT:
            return Change.skipped(site, f"its weight is {weight.const_value.dtype}, not FLOAT")
        array = weight.const_value.numpy()
        reach = self.sigmas * float(array.std())
        clipped = np.clip(array, array.mean() - reach, array.mean() + reach)
        count = int((clipped != array).sum())
        if count == 0:
            return Change.skipped(site, f"no weight lies beyond {self.sigmas:g} standard deviations")
        weight.const_value = ir.tensor(clipped, name=weight.name)
        return Change(site, f"clipped {count} of {array.size} weights", details={"clipped": count})


@hookimpl
def graphopt_passes() -> list[type[Pass]]:
    """Tell graphopt about the pass."""
    return [ClipWeights]
