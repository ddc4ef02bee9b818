"""Where temporary tensors lie: offsets in one workspace, so that tensors that live at the same time do not overlap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graphopt_backends.network.views import Buffer

__all__ = ["Lifetime", "lay_out", "lifetimes"]

_ALIGNMENT = 64


@dataclass(frozen=True)
class Lifetime:
    """First and last step that needs a buffer."""

    first: int
    last: int


def lifetimes(used: Sequence[Sequence[Buffer]]) -> dict[Buffer, Lifetime]:
    """From the first to the last step that touches each temporary buffer.

    Args:
        used: Buffers of each step.
    """
    found: dict[Buffer, Lifetime] = {}
    for step, buffers in enumerate(used):
        for buffer in buffers:
            if buffer.origin == "temporary":
                first = found[buffer].first if buffer in found else step
                found[buffer] = Lifetime(first, step)
    return found


def lay_out(lives: Mapping[Buffer, Lifetime]) -> tuple[dict[Buffer, int], int]:
    """Offsets of buffers and the bytes that all of them need.

    The largest first, each at the lowest place where nothing that lives at the same time is (greedy by size, Pisarchyk
    and Lee 2020).
    """
    placed: list[tuple[int, int, Lifetime]] = []
    offsets: dict[Buffer, int] = {}
    for buffer in sorted(lives, key=lambda b: (-b.nbytes, lives[b].first)):
        life, size = lives[buffer], -(-buffer.nbytes // _ALIGNMENT) * _ALIGNMENT
        taken = sorted(
            (start, end) for start, end, other in placed if life.first <= other.last and other.first <= life.last
        )
        at = 0
        for start, end in taken:
            if at + size <= start:
                break
            at = max(at, end)
        offsets[buffer] = at
        placed.append((at, at + size, life))
    return offsets, max((end for _, end, _ in placed), default=0)
