"""A Llama-shaped network with random weights, written without ever being held in memory.

    python benchmarks/quant_llama.py FILE.onnx [--layers 22]

By default it has the widths of TinyLlama (Zhang et al. 2024): 22 layers, 1.1 billion parameters, 4.4 GB of float32 in
one external file. RMS norms, rotary positions, grouped-query attention with a causal mask, SiLU gates; input_ids
[batch, sequence] in, logits out, no cache. Speed and memory of quantizers depend on shapes alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["Llama", "make_llama"]

_OPSET = 17
_POSITIONS = 512
_FORBIDDEN = -1e9


@dataclass(frozen=True)
class Llama:
    """Sizes of the network."""

    layers: int = 22
    hidden: int = 2048
    inner: int = 5632
    heads: int = 32
    key_heads: int = 4
    vocabulary: int = 32000

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.hidden // self.heads

    @property
    def parameters(self) -> int:
        """Number of weights in matrices."""
        attention = 2 * self.hidden * (self.hidden + self.key_heads * self.head)
        return 2 * self.vocabulary * self.hidden + self.layers * (attention + 3 * self.hidden * self.inner)


def make_llama(path: Path, sizes: Llama) -> None:
    """Write the network to `path`, its matrices to `path.data` beside it."""
    with path.with_name(f"{path.name}.data").open("wb") as stream:
        writer = _Writer(sizes, stream.name, stream)
        logits = writer.network("input_ids")
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
    out = helper.make_tensor_value_info(logits, TensorProto.FLOAT, ["batch", "sequence", sizes.vocabulary])
    graph = helper.make_graph(writer.nodes, "llama", [ids], [out], writer.tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=8), path)


class _Writer:
    """Collects nodes, and streams matrices to the external file."""

    def __init__(self, sizes: Llama, location: str, stream: object) -> None:
        self.sizes, self.location, self.stream = sizes, Path(location).name, stream
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        rng = np.random.default_rng(0)
        self.noise = rng.standard_normal(1 << 22, dtype=np.float32)  # weights are turns of this much noise
        self.offset = 0

    def network(self, ids: str) -> str:
        """The whole of it; returns the name of the logits."""
        embedded = self.node("Gather", [self.matrix("embedding", (self.sizes.vocabulary, self.sizes.hidden)), ids])
        length = self.node("Gather", [self.node("Shape", [ids]), self.ints("one", [1])])
        self._positions(length)
        value = embedded
        for i in range(self.sizes.layers):
            value = self.node("Add", [value, self._attention(f"layer{i}", self._norm(value, f"layer{i}.before"), ids)])
            value = self.node("Add", [value, self._gate(f"layer{i}", self._norm(value, f"layer{i}.between"))])
        head = self.matrix("head", (self.sizes.hidden, self.sizes.vocabulary))
        return self.node("MatMul", [self._norm(value, "last"), head], output="logits")

    def _positions(self, length: str) -> None:
        """Cosines, sines and the causal mask for the sequence that is there."""
        zero = self.ints("zero", [0])
        angles = np.outer(np.arange(_POSITIONS), 10000.0 ** (-np.arange(0, self.sizes.head, 2) / self.sizes.head))
        angles = np.concatenate([angles, angles], axis=1).astype(np.float32)
        for name, table in (("cosine", np.cos(angles)), ("sine", np.sin(angles))):
            self.node("Slice", [self.constant(f"{name}.table", table), zero, length, zero], output=name)
        mask = np.triu(np.full((_POSITIONS, _POSITIONS), _FORBIDDEN, np.float32), 1)
        both = self.node("Concat", [length, length], axis=0)
        self.node(
            "Slice", [self.constant("mask.table", mask), self.ints("zeros", [0, 0]), both, self.ints("axes", [0, 1])],
            output="mask",
        )  # fmt: skip

    def _norm(self, value: str, name: str) -> str:
        two, tiny = self.constant("two", np.float32(2)), self.constant("tiny", np.float32(1e-5))
        mean = self.node("ReduceMean", [self.node("Pow", [value, two])], axes=[-1], keepdims=1)
        root = self.node("Sqrt", [self.node("Add", [mean, tiny])])
        gain = self.constant(f"{name}.gain", 1 + 0.1 * self.noise[: self.sizes.hidden])
        return self.node("Mul", [self.node("Div", [value, root]), gain])

    def _attention(self, name: str, value: str, ids: str) -> str:
        sizes = self.sizes
        query = self._rotated(self._heads(f"{name}.query", value, sizes.heads))
        key = self._repeated(self._rotated(self._heads(f"{name}.key", value, sizes.key_heads)), ids)
        worth = self._repeated(self._heads(f"{name}.value", value, sizes.key_heads), ids)
        scores = self.node("MatMul", [query, self.node("Transpose", [key], perm=[0, 1, 3, 2])])
        scaled = self.node("Mul", [scores, self.constant("scale", np.float32(sizes.head**-0.5))])
        weights = self.node("Softmax", [self.node("Add", [scaled, "mask"])], axis=-1)
        mixed = self.node("Transpose", [self.node("MatMul", [weights, worth])], perm=[0, 2, 1, 3])
        joined = self.node("Reshape", [mixed, self.ints("joined", [0, 0, sizes.hidden])])
        return self.node("MatMul", [joined, self.matrix(f"{name}.output", (sizes.hidden, sizes.hidden))])

    def _heads(self, name: str, value: str, heads: int) -> str:
        """[batch, heads, sequence, head]."""
        width = self.sizes.head
        made = self.node("MatMul", [value, self.matrix(name, (self.sizes.hidden, heads * width))])
        split = self.node("Reshape", [made, self.ints(f"split{heads}", [0, 0, heads, width])])
        return self.node("Transpose", [split], perm=[0, 2, 1, 3])

    def _rotated(self, value: str) -> str:
        half, last = self.sizes.head // 2, self.ints("last", [3])
        first = self.node("Slice", [value, self.ints("zero", [0]), self.ints("half", [half]), last])
        rest = self.node("Slice", [value, self.ints("half", [half]), self.ints("full", [2 * half]), last])
        turned = self.node("Concat", [self.node("Neg", [rest]), first], axis=-1)
        straight, across = self.node("Mul", [value, "cosine"]), self.node("Mul", [turned, "sine"])
        return self.node("Add", [straight, across])

    def _repeated(self, value: str, ids: str) -> str:
        """Keys and values of a group stand for all of its heads."""
        sizes = self.sizes
        times = sizes.heads // sizes.key_heads
        alone = self.node("Unsqueeze", [value, self.ints("two_axis", [2])])
        shape = self.node("Shape", [ids])
        parts = [
            self.node("Slice", [shape, self.ints("zero", [0]), self.ints("one", [1])]),
            self.ints("group", [sizes.key_heads, times]),
            self.node("Slice", [shape, self.ints("one", [1]), self.ints("two_end", [2])]),
            self.ints("head_width", [sizes.head]),
        ]
        wide = self.node("Expand", [alone, self.node("Concat", parts, axis=0)])
        return self.node("Reshape", [wide, self.ints("flat", [0, sizes.heads, -1, sizes.head])])

    def _gate(self, name: str, value: str) -> str:
        sizes = self.sizes
        gate = self.node("MatMul", [value, self.matrix(f"{name}.gate", (sizes.hidden, sizes.inner))])
        up = self.node("MatMul", [value, self.matrix(f"{name}.up", (sizes.hidden, sizes.inner))])
        bent = self.node("Mul", [gate, self.node("Sigmoid", [gate])])
        down = self.matrix(f"{name}.down", (sizes.inner, sizes.hidden))
        return self.node("MatMul", [self.node("Mul", [bent, up]), down])

    def node(self, operator: str, inputs: Sequence[str], output: str = "", **attributes: object) -> str:
        """Append a node; returns its output."""
        made = output or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [made], f"{operator}_{made}", **attributes))
        return made

    def constant(self, name: str, value: np.ndarray | np.floating) -> str:
        """A small tensor in the file itself; one name is one tensor."""
        if all(tensor.name != name for tensor in self.tensors):
            self.tensors.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def ints(self, name: str, values: Sequence[int]) -> str:
        """A small list of integers."""
        return self.constant(name, np.array(values, np.int64))

    def matrix(self, name: str, shape: tuple[int, int]) -> str:
        """A matrix in the external file."""
        size = shape[0] * shape[1]
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", self.location), ("offset", self.offset), ("length", 4 * size)):
            tensor.external_data.add(key=key, value=str(value))
        scaled = self.noise / np.float32(shape[0] ** 0.5)
        shift = (len(self.tensors) * 104729) % scaled.size
        turned = np.roll(scaled, shift)
        for start in range(0, size, scaled.size):
            self.stream.write(turned[: min(scaled.size, size - start)].tobytes())  # type: ignore[attr-defined]
        self.offset += 4 * size
        self.tensors.append(tensor)
        return name


def main() -> None:
    """Write a network."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--layers", type=int, default=Llama.layers)
    options = parser.parse_args()
    sizes = Llama(layers=options.layers)
    make_llama(options.file, sizes)
    print(f"{sizes.parameters / 1e9:.2f} billion parameters")


if __name__ == "__main__":
    main()
