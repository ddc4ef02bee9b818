"""What every family of kernels is: a value that describes a piece of work, and makes the function that does it."""

from __future__ import annotations

import abc
from typing import Any

__all__ = ["Kernel"]


class Kernel(abc.ABC):
    """A family of kernels; its members are frozen dataclasses, and equal ones are one function."""

    @property
    def scratch(self) -> int:
        """Bytes of memory that every task needs for itself."""
        return 0

    @property
    @abc.abstractmethod
    def operations(self) -> int:
        """How much work it is: multiplications and additions, or elements where it does none."""

    @abc.abstractmethod
    def primitive(self, name: str) -> Any:
        """The function, on pointers, then scratch memory if it needs some, then (task, tasks)."""
