"""Products of two tensors, however spelled: which axes meet, which are shared, which are left."""

from __future__ import annotations

import re
import string
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.analyses.attention.sizes import Sizes

__all__ = ["Product", "read_product"]

_EQUATION = re.compile(r"^([a-zA-Z]*),([a-zA-Z]*)->([a-zA-Z]*)$")


@dataclass(frozen=True, eq=False)
class Product:
    """A sum of products over one axis.

    Attributes:
        node: The node.
        operands: The two tensors.
        letters: What lies along their axes; equal letters are multiplied with each other.
        out: What lies along the axes of the result.
        summed: The letter that is summed over.
        factor: What the result is multiplied with besides.
    """

    node: ir.Node
    operands: tuple[ir.Value, ir.Value]
    letters: tuple[str, str]
    out: str
    summed: str
    factor: float = 1.0

    @property
    def shared(self) -> str:
        """Letters of both operands that are left in the result, in its order."""
        return "".join(c for c in self.out if c in self.letters[0] and c in self.letters[1])

    def own(self, operand: int) -> str:
        """Letters of the result that only one operand has."""
        return "".join(c for c in self.out if c in self.letters[operand] and c not in self.letters[1 - operand])


def read_product(node: ir.Node | None, sizes: Sizes) -> Product | None:
    """Understand a node as a product; None if it is something else, or sums over more than one axis."""
    if node is None or len(node.inputs) < 2 or node.inputs[0] is None or node.inputs[1] is None:
        return None
    if node.op_type == "Einsum" and len(node.inputs) == 2:
        return _einsum(node, node.inputs[0], node.inputs[1])
    plain = node.op_type == "MatMul" and node.domain in ("", "ai.onnx")
    if plain or (node.op_type == "FusedMatMul" and not _flags(node, "transBatchA", "transBatchB")):
        return _matmul(node, node.inputs[0], node.inputs[1], sizes)
    if node.op_type == "Gemm" and (len(node.inputs) < 3 or node.inputs[2] is None):
        return _matmul(node, node.inputs[0], node.inputs[1], sizes)
    return None


def _flags(node: ir.Node, *names: str) -> bool:
    return any(node.attributes.get_int(name, 0) for name in names)


def _einsum(node: ir.Node, left: ir.Value, right: ir.Value) -> Product | None:
    match = _EQUATION.match(node.attributes.get_string("equation", "").replace(" ", ""))
    if match is None:
        return None
    a, b, out = match.groups()
    summed = [c for c in dict.fromkeys(a + b) if c not in out]
    plain = all(len(set(word)) == len(word) for word in (a, b, out))
    if not plain or len(summed) != 1 or summed[0] not in a or summed[0] not in b:
        return None
    return Product(node, (left, right), (a, b), out, summed[0])


def _matmul(node: ir.Node, left: ir.Value, right: ir.Value, sizes: Sizes) -> Product | None:
    ranks = sizes.rank(left), sizes.rank(right)
    if ranks[0] is None or ranks[1] is None or min(ranks[0], ranks[1]) < 2 or max(ranks[0], ranks[1]) > 9:
        return None
    batch = string.ascii_lowercase[: max(ranks[0], ranks[1]) - 2]
    row, column, summed = "x", "y", "z"
    a = batch[len(batch) - (ranks[0] - 2) :] + (summed + row if _flags(node, "transA") else row + summed)
    b = batch[len(batch) - (ranks[1] - 2) :] + (column + summed if _flags(node, "transB") else summed + column)
    return Product(node, (left, right), (a, b), batch + row + column, summed, node.attributes.get_float("alpha", 1.0))
