"""A kernel that runs only where a boolean says so: what one branch of a condition needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graphopt_backends.kernels.emit import Pointer, primitive, tirx, when
from graphopt_backends.kernels.kernel import Kernel

__all__ = ["Guarded"]


@dataclass(frozen=True)
class Guarded(Kernel):
    """Another kernel, if a condition is what is wanted.

    Attributes:
        kernel: What is computed.
        wanted: When.
    """

    kernel: Any
    wanted: bool

    @property
    def isa(self) -> Any:
        """The CPU."""
        return self.kernel.isa

    @property
    def scratch(self) -> int:
        """Bytes of memory that every task needs for itself."""
        return self.kernel.scratch

    @property
    def operations(self) -> int:
        """As if it ran always."""
        return self.kernel.operations

    def primitive(self, name: str) -> Any:
        """The function: (condition, the kernel's own parameters)."""
        inner = self.kernel.primitive(name)
        asked = primitive(
            name,
            [Pointer("condition", "bool", 1)],
            lambda frame: when(frame["condition"][(0,)], lambda: None),
        )
        declared, question = asked.body.seq
        holds = question.condition if self.wanted else tirx.Not(question.condition)
        body = tirx.SeqStmt([declared, tirx.IfThenElse(holds, inner.body, None)])
        return tirx.PrimFunc([asked.params[0], *inner.params], body, inner.ret_type, inner.attrs)
