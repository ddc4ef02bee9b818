"""The part of onnx-graphsurgeon that graphopt uses, typed; the package itself has no annotations."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import onnx

class Tensor:
    name: str
    inputs: list[Node]
    outputs: list[Node]
    dtype: Any
    shape: Sequence[int | str | None] | None

class Variable(Tensor):
    def __init__(self, name: str, dtype: Any = None, shape: Sequence[int | str | None] | None = None) -> None: ...

class Constant(Tensor):
    values: np.ndarray[Any, np.dtype[Any]]
    def __init__(self, name: str, values: np.ndarray[Any, np.dtype[Any]]) -> None: ...

class Node:
    op: str
    name: str
    attrs: dict[str, Any]
    inputs: list[Tensor]
    outputs: list[Tensor]
    domain: str | None
    def __init__(
        self,
        op: str,
        name: str | None = None,
        attrs: dict[str, Any] | None = None,
        inputs: list[Tensor] | None = None,
        outputs: list[Tensor] | None = None,
        domain: str | None = None,
    ) -> None: ...

class Graph:
    nodes: list[Node]
    inputs: list[Tensor]
    outputs: list[Tensor]
    name: str
    opset: int
    def tensors(self) -> dict[str, Tensor]: ...
    def cleanup(self) -> Graph: ...
    def toposort(self) -> Graph: ...
    def fold_constants(
        self,
        fold_shapes: bool = True,
        recurse_subgraphs: bool = True,
        partitioning: Literal["basic", "recursive"] | None = None,
        error_ok: bool = True,
        flatten_subgraphs: bool = True,
        size_threshold: int | None = None,
        should_exclude_node: Callable[[Node], bool] | None = None,
        recurse_functions: bool = True,
    ) -> Graph: ...

def import_onnx(onnx_model: onnx.ModelProto) -> Graph: ...
def export_onnx(graph: Graph, do_type_check: bool = True) -> onnx.ModelProto: ...
