"""QDQ graphs written by hand: operators on integers with random grids, zero points and weights."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from graphopt.session import Session

__all__ = ["Drawing", "run_node"]

Array = np.ndarray[Any, np.dtype[Any]]
OPSET = 21


class Drawing:
    """Writes a QDQ graph operator by operator, and follows it with samples, so that every grid fits what it holds.

    Names of integers are what its methods take and give; every reader of integers has its own DequantizeLinear.
    """

    def __init__(self, seed: int = 0, dtype: str = "int8") -> None:
        self.rng, self.dtype = np.random.default_rng(seed), dtype
        self.nodes, self.tensors = list[onnx.NodeProto](), list[onnx.TensorProto]()
        self.inputs, self.outputs = list[str](), list[str]()
        self.samples = dict[str, Array]()
        self.grids = dict[str, tuple[np.float32, int]]()
        self.dtypes = dict[str, str]()

    def input(self, *shape: int, zero: int | None = None, dtype: str | None = None) -> str:
        """Integers that the model starts from."""
        name, kind = f"x{len(self.inputs)}", dtype or self.dtype
        info = np.iinfo(kind)
        point = 0 if kind == "int16" else int(self.rng.integers(-100, 100)) if zero is None else zero
        self.grids[name] = np.float32(self.rng.uniform(0.5, 2.0) / 2 ** (4 if kind == "int8" else 11)), point
        self.inputs.append(name)
        self.dtypes[name] = kind
        self.samples[name] = self.rng.integers(info.min, info.max, shape, dtype=kind, endpoint=True)
        return name

    def constant(self, array: Any, dtype: str = "float32") -> str:
        """A constant as it is."""
        name = f"c{len(self.tensors)}"
        held = np.asarray(array, dtype)
        self.tensors.append(numpy_helper.from_array(held, name))
        self.samples[name] = held
        return name

    def weight(self, *shape: int, axis: int | None = None, span: float = 1.0) -> str:
        """A dequantized int8 weight; with an axis, of one scale for each of its indices."""
        integers = self.rng.integers(-127, 127, shape, endpoint=True)
        scales = self.rng.uniform(0.2, 1.0, 1 if axis is None else shape[axis]) * span / 127
        return self.dequantized(integers, "int8", scales, axis)

    def bias(self, source: str, weight: str, size: int, axis: int = 0, limit: int = 8000) -> str:
        """A dequantized int32 bias on the grid of the sums."""
        scales = next(n for n in self.nodes if n.output[0] == weight).input[1]
        steps = (self.samples[scales] * self.grids[source][0]).reshape(-1)
        return self.dequantized(
            self.rng.integers(-limit, limit, size), "int32", steps, axis if steps.size > 1 else None
        )

    def dequantized(self, integers: Array, dtype: str, scales: Any, axis: int | None = None, zero: int = 0) -> str:
        """A constant of integers behind a DequantizeLinear."""
        steps = np.asarray(scales, np.float32)
        steps = steps if axis is not None else steps.reshape(())
        names = [self.constant(integers, dtype), self.constant(steps)]
        names.append(self.constant(np.full(steps.shape, zero), dtype))
        return self._float("DequantizeLinear", names, {} if axis is None else {"axis": axis})[0]

    def op(
        self,
        kind: str,
        *names: str,
        act: tuple[str, dict[str, Any]] | None = None,
        results: int = 1,
        grid: str | tuple[float, int] | None = None,
        dtype: str | None = None,
        **attributes: Any,
    ) -> str:
        """A float operator, the activation behind it, and the rounding of its results.

        Args:
            kind: Operator type.
            names: Integers, which are dequantized, constants, or "".
            act: Relu or Clip with its bounds.
            results: Number of outputs; the first one's name is given back, the others follow by `.1`, `.2`.
            grid: Integers with whose grid the result is rounded, or a grid; else one that fits.
            dtype: Of the result.
            attributes: Of the operator.
        """
        found = self._float(kind, [self.read(name) for name in names], attributes, results)
        if act is not None:
            found = [self.activation(found[0], *act)]
        made = [self.rounded(name, f"q{len(self.nodes)}", grid, dtype) for name in found]
        return made[0]

    def activation(self, name: str, kind: str, bounds: dict[str, Any]) -> str:
        ends = [self.constant(bounds[end]) if end in bounds else "" for end in ("min", "max")] if bounds else []
        return self._float(kind, [name, *ends], {})[0]

    def chain(self, name: str, *kinds: tuple[str, Sequence[Any], dict[str, Any]]) -> str:
        """Float operators one behind the other, `x` being the first one's input; one rounding at the end."""
        first = current = self.read(name)
        for kind, others, attributes in kinds:
            operands = [first if o == "x" else self.constant(o) for o in others]
            current = self._float(kind, [current, *operands], attributes)[0]
        return self.rounded(current, f"q{len(self.nodes)}")

    def read(self, name: str) -> str:
        """The real numbers of integers."""
        if name not in self.grids:
            return name
        scale, zero = self.grids[name]
        kind = self.dtypes[name]
        return self._float("DequantizeLinear", [name, self.constant(scale), self.constant(zero, kind)], {})[0]

    def rounded(
        self, name: str, result: str, grid: str | tuple[float, int] | None = None, dtype: str | None = None
    ) -> str:
        """Integers of real numbers; those of ArgMax are integers already."""
        real, kind = self.samples[name], dtype or self.dtype
        if real.dtype != np.float32:
            return name
        if isinstance(grid, tuple):
            scale, zero = np.float32(grid[0]), grid[1]
        elif grid is not None:
            (scale, zero), kind = self.grids[grid], self.dtypes[grid]
        elif kind == "int8":
            low, high = min(float(real.min()), 0.0), max(float(real.max()), 0.0)
            scale = np.float32((max(high - low, 1e-3) / 255) * self.rng.uniform(0.8, 1.1))
            zero = int(np.clip(round(-128 - low / float(scale)), -128, 127))
        else:
            scale, zero = np.float32(max(float(np.abs(real).max()), 1e-3) / 32000), 0
        names = [name, self.constant(scale), self.constant(zero, kind)]
        self._float("QuantizeLinear", names, {}, names=[result])
        self.grids[result], self.dtypes[result] = (scale, zero), kind
        return result

    def output(self, *names: str) -> ir.Model:
        """The model that makes these."""
        self.outputs += names
        known = [helper.make_tensor_value_info(n, _kind(a), a.shape) for n, a in self.samples.items()]
        by_name = {value.name: value for value in known}
        constants = {tensor.name for tensor in self.tensors}
        graph = helper.make_graph(
            self.nodes, "drawn", [by_name[n] for n in self.inputs], [by_name[n] for n in self.outputs], self.tensors,
            value_info=[v for n, v in by_name.items() if n not in {*self.inputs, *self.outputs, *constants}],
        )  # fmt: skip
        return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10))

    def _float(
        self, kind: str, inputs: Sequence[str], attributes: dict[str, Any], results: int = 1, names: Sequence[str] = ()
    ) -> list[str]:
        """A node, and samples of what it makes."""
        names = names or [f"f{len(self.nodes)}{f'.{index}' if index else ''}" for index in range(results)]
        node = helper.make_node(kind, inputs, names, name=f"n{len(self.nodes)}", **attributes)
        self.nodes.append(node)
        found = run_node(node, [self.samples[name] if name else None for name in inputs])
        self.samples.update(zip(names, found, strict=True))
        return list(names)


def run_node(node: onnx.NodeProto, inputs: Sequence[Array | None]) -> list[Array]:
    """What ONNX Runtime makes of one node."""
    shapes = tuple((_kind(array), array.shape) if array is not None else None for array in inputs)
    bare = onnx.NodeProto(op_type=node.op_type, attribute=node.attribute)
    session = _session(bare.SerializeToString(), shapes, len(node.output))
    feed = {f"i{index}": np.ascontiguousarray(a) for index, a in enumerate(inputs) if a is not None}
    found = session.run(feed)
    return [found[f"o{index}"] for index in range(len(node.output))]


@functools.lru_cache(1024)
def _session(node: bytes, shapes: tuple[tuple[int, tuple[int, ...]] | None, ...], results: int) -> Session:
    bare = onnx.NodeProto.FromString(node)
    given = [(f"i{index}", shape) for index, shape in enumerate(shapes)]
    bare.input.extend(name if shape is not None else "" for name, shape in given)
    bare.output.extend(f"o{index}" for index in range(results))
    inputs = [helper.make_tensor_value_info(name, *shape) for name, shape in given if shape is not None]
    graph = helper.make_graph([bare], "node", inputs, [onnx.ValueInfoProto(name=name) for name in bare.output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    return Session(model.SerializeToString(), "node", optimize=False)


def _kind(array: Array) -> int:
    return helper.np_dtype_to_tensor_dtype(array.dtype)
