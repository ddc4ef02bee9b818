"""Passes written against onnx-graphsurgeon: the adapter that keeps what graphsurgeon would lose."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

import onnx_ir as ir

from graphopt.errors import ModelError
from graphopt.pass_base import Change, Context, Pass, PassResult
from graphopt.surgeon import operate

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

__all__ = ["SurgeonPass"]


class SurgeonPass(Pass):
    """Base of passes that edit a `gs.Graph` instead of an `onnx_ir` model.

    Subclasses implement `rewrite`. The adapter converts there and back, gives metadata and doc strings back to what
    kept its name, keeps weights above 16 MiB out of graphsurgeon's memory, and refuses models that graphsurgeon
    would damage (4-bit and 8-bit floats, bfloat16, functions, quantization annotations).
    """

    @abc.abstractmethod
    def rewrite(self, graph: gs.Graph, ctx: Context) -> bool | tuple[Change, ...]:
        """Edit the graph in place; dead nodes are removed and the graph is sorted afterwards.

        Returns:
            Whether the graph changed, or one `Change` for every site looked at.
        """

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Convert, rewrite, convert back.

        Raises:
            PassError: graphsurgeon would damage the model.
        """
        try:
            result = operate(model, lambda graph: self.rewrite(graph, ctx), _changed)
        except ModelError as e:
            raise self.fail(f"{e.subject} {e.fact}", e.hint) from e
        return PassResult(modified=_changed(result), changes=result if isinstance(result, tuple) else ())


def _changed(result: bool | tuple[Change, ...]) -> bool:
    return result if isinstance(result, bool) else any(change.done for change in result)
