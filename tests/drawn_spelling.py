"""ONNX text in the spelling of every operator set, with weights and numbers that are made as they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


class Spelling:
    """Lines of a network, and the constants that they read.

    Args:
        pick: Picks one of several.
        opset: Version of the operator set.
    """

    def __init__(self, pick: Callable[[Sequence], object], opset: int) -> None:
        self.pick, self.opset, self.made = pick, opset, 0
        self.lines, self.arrays = list[str](), dict[str, np.ndarray]()
        self.rng = np.random.default_rng(0)

    def value(self, text: str) -> str:
        self.made += 1
        self.lines.append(f"v{self.made} = {text}")
        return f"v{self.made}"

    def values(self, count: int, text: str) -> list[str]:
        self.made += 1
        names = [f"v{self.made}_{i}" for i in range(count)]
        self.lines.append(f"{', '.join(names)} = {text}")
        return names

    def weight(self, *shape: int) -> str:
        """A weight, sometimes one that is there already."""
        same = [name for name, array in self.arrays.items() if array.shape == shape and array.dtype == np.float32]
        if same and self.pick([False] * 5 + [True]):
            return same[0]
        name = f"w{len(self.arrays)}"
        self.arrays[name] = (0.4 * self.rng.standard_normal(shape)).astype(np.float32)
        return name

    def ints(self, *numbers: int, scalar: bool = False) -> str:
        """A list of numbers, mostly one that others read as well."""
        name = f"i_{'_'.join(map(str, numbers))}{'_only' * scalar}".replace("-", "m")
        if self.opset < 9 or self.pick([False, True]):  # before, Constant made floats only
            self.arrays[name] = np.array(numbers[0] if scalar else numbers, np.int64)
            return name
        array = f"int64 {{{numbers[0]}}}" if scalar else f"int64[{len(numbers)}] {{{','.join(map(str, numbers))}}}"
        return self.value(f"Constant<value = {array}>()")

    def number(self, number: float) -> str:
        return self.value(f"Constant<value = float {{{number:.6f}}}>()")

    # operators whose spelling depends on the operator set

    def axes(self, operator: str, source: str, axes: Sequence[int], since: int, more: str = "") -> str:
        """An operator that lists axes: as an attribute, and from some version on as an input."""
        if self.opset < since:
            return self.value(f"{operator}<axes=[{','.join(map(str, axes))}]{more}>({source})")
        attributes = f"<{more[1:]}>" if more else ""
        return self.value(f"{operator}{attributes}({source}, {self.ints(*axes)})")

    def mean(self, source: str, axes: Sequence[int], operator: str = "ReduceMean", keep: int = 1) -> str:
        more = ",keepdims=0" if not keep else self.pick(["", ",keepdims=1"])
        return self.axes(operator, source, axes, 13 if operator == "ReduceSum" else 18, str(more))

    def split(self, source: str, sizes: Sequence[int], axis: int) -> list[str]:
        equal = len(set(sizes)) == 1
        if self.opset < 13:
            stated = "" if equal and self.pick([False, True]) else f",split=[{','.join(map(str, sizes))}]"
            return self.values(len(sizes), f"Split<axis={axis}{stated}>({source})")
        if equal and self.pick([False, True]):
            count = f",num_outputs={len(sizes)}" if self.opset >= 18 else ""
            return self.values(len(sizes), f"Split<axis={axis}{count}>({source})")
        return self.values(len(sizes), f"Split<axis={axis}>({source}, {self.ints(*sizes)})")

    def slice(self, source: str, start: int, stop: int, axis: int) -> str:
        if self.opset < 10:
            return self.value(f"Slice<axes=[{axis}],starts=[{start}],ends=[{stop}]>({source})")
        return self.value(f"Slice({source}, {self.ints(start)}, {self.ints(stop)}, {self.ints(axis)})")

    def reshape(self, source: str, *shape: int) -> str:
        """A target as numbers, or with the first two computed from the sizes of the source's first two axes."""
        if len(shape) < 2 or shape[:2] != (0, 0) or self.pick([True, True, False]):
            return self.value(f"Reshape({source}, {self.ints(*shape)})")
        sizes = self.value(f"Shape({source})")
        parts = [
            self.axes("Unsqueeze", self.value(f"Gather<axis=0>({sizes}, {self.ints(i, scalar=True)})"), [0], 13)
            for i in (0, 1)
        ]
        rest = [self.ints(size) for size in shape[2:]]
        joined = self.value(f"Concat<axis=0>({', '.join([*parts, *rest])})")
        return self.value(f"Reshape({source}, {joined})")
