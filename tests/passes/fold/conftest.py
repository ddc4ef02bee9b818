"""What the tests of `fold` share: small models, and the check that every one of them passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.model_io import ShapeBinding, input_specs, model_bytes
from graphopt.pass_base import Context, PassResult
from graphopt.reference import Reference
from graphopt.targets import Target
from graphopt_passes.fold import Fold

HEAD = '<ir_version: 8, opset_import: ["" : 17]>\n'


class Bench:
    """Builds models from text and folds them."""

    @staticmethod
    def model(body: str, head: str = HEAD) -> ir.Model:
        return ir.from_onnx_text(head + body)

    @staticmethod
    def with_weights(model: ir.Model, **arrays: np.ndarray) -> ir.Model:
        """Turn the inputs of these names into initializers."""
        for name, array in arrays.items():
            value = next(v for v in model.graph.inputs if v.name == name)
            model.graph.inputs.remove(value)
            value.const_value = ir.Tensor(array, name=name)
            value.shape, value.type = ir.Shape(array.shape), ir.TensorType(value.const_value.dtype)
            model.graph.register_initializer(value)
        return model

    @staticmethod
    def operators(model: ir.Model) -> list[str]:
        return [node.op_type for node in model.graph]

    @staticmethod
    def interface(model: ir.Model) -> list[tuple[str | None, str, str]]:
        return [(v.name, str(v.type), str(v.shape)) for v in (*model.graph.inputs, *model.graph.outputs)]

    @staticmethod
    def reasons(result: PassResult) -> dict[str, str]:
        return {change.site: change.action for change in result.changes if not change.done}

    @staticmethod
    def fold(model: ir.Model, **options: Any) -> PassResult:
        return Fold(**options).run(model, Context(model, Target(name="ort")))

    def check(self, model: ir.Model, tolerance: float = 1e-5, **options: Any) -> PassResult:
        """Fold; outputs and interface stay, `modified` is true to the bytes, a second run changes nothing."""
        runs = _feeds(model)
        wanted = [Reference(model, optimize=False).run(feed) for feed in runs]
        before, data = self.interface(model), model_bytes(model)
        result = self.fold(model, **options)
        assert self.interface(model) == before
        assert result.modified == (model_bytes(model) != data)
        folded = Reference(model, optimize=False)
        for feed, outputs in zip(runs, wanted, strict=True):
            for name, array in folded.run(feed).items():
                np.testing.assert_allclose(array, outputs[name], rtol=tolerance, atol=tolerance, err_msg=name)
                assert array.dtype == outputs[name].dtype
        again = self.fold(model, **options)
        assert not again.modified
        assert [change for change in again.changes if change.done] == []
        return result


def _feeds(model: ir.Model) -> list[dict[str, np.ndarray]]:
    rng, found = np.random.default_rng(1), []
    for dynamic in (2, 3):
        feed: dict[str, np.ndarray] = {}
        for spec in input_specs(model):
            shape, kind = spec.concrete(ShapeBinding(), default=dynamic), spec.dtype.numpy()
            values = rng.standard_normal(shape) if spec.dtype.is_floating_point() else rng.integers(0, 2, shape)
            feed[spec.name] = np.asarray(values).astype(kind)
        found.append(feed)
    return found


@pytest.fixture(scope="session")
def bench() -> Bench:
    return Bench()
