"""Compiles a drawn network and compares it: with what it must give, with itself run again, and with other threads."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
from network_case import FEEDS, Case

from graphopt.model_io import ShapeBinding
from graphopt.targets import Isa
from graphopt_backends._engine import Engine
from graphopt_backends._library import Made, compile_network
from graphopt_backends._link import known_linkers
from graphopt_backends._lower import lower
from graphopt_backends.network import assemble
from graphopt_backends.network.blockwise import keeps
from graphopt_backends.network.convert import unsupported

__all__ = ["Finding", "check"]

_THREADS = (1, 2, 3)


@dataclass(frozen=True)
class Finding:
    """What is wrong with a network.

    Attributes:
        kind: refused, broken (an error of the compiler), wrong, changed (by running again, or by threads), unequal
            (libraries of the same network), dead (the process ended).
        text: Where, and how much.
    """

    kind: str
    text: str


def check(case: Case, isa: Isa, cache: Path, *, again: bool = False) -> Finding | None:
    """Compile a network and run it.

    Args:
        case: The network.
        isa: The CPU, which this machine has.
        cache: Where compiled runtimes are kept.
        again: Compile it twice; the libraries must be equal.
    """
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        path, twin = (Path(folder) / name / "model.so" for name in ("first", "second"))
        try:
            made = _compiled(case, isa, path, cache)
            if isinstance(made, Finding):
                return made
            if again:
                _compiled(case, isa, twin, cache)
        except Exception as e:  # whatever it is, it is what is looked for
            return Finding("broken", f"{type(e).__name__}: {str(e)[-300:]}")
        if again and path.read_bytes() != twin.read_bytes():
            return Finding("unequal", "two libraries of one network differ")
        return _compared(case, path, path.with_suffix(".weights") if made.separate else None)


def _compiled(case: Case, isa: Isa, path: Path, cache: Path) -> Made | Finding:
    path.parent.mkdir()
    lowered = lower(case.model(), ShapeBinding(), isa.name, keeps).model
    refused = Counter(node.op_type for node in unsupported(lowered))
    if refused:
        return Finding("refused", ", ".join(sorted(refused)))
    # in every other network tasks share what is not worth it, or hardly anything of so small ones would be shared
    with patch.object(assemble, "_ALONE", 0 if case.seed % 2 else assemble._ALONE):
        return compile_network(lowered, isa, isa.name, path, known_linkers(isa)[0], cache)


def _compared(case: Case, path: Path, weights: Path | None) -> Finding | None:
    feeds = [list(case.feed(i).values()) for i in range(FEEDS)]
    first: list[list[np.ndarray]] = []
    for threads in _THREADS:
        engine = Engine(path, weights, threads)
        for i in (*range(FEEDS), 0):
            given = [array.copy() for array in feeds[i]]
            got = engine.run(given)
            if any(a.tobytes() != b.tobytes() for a, b in zip(given, feeds[i], strict=True)):
                return Finding("changed", "an input")
            if len(first) <= i:
                first.append(got)
                for (name, expected, tolerance), array in zip(case.expected(i), got, strict=True):
                    text = _difference(array, expected, tolerance)
                    if text:
                        return Finding("wrong", f"{name}: {text}")
            for name, a, b in zip(case.outputs, first[i], got, strict=True):
                if a.tobytes() != b.tobytes():
                    return Finding("changed", f"{name} with {threads} threads: {_difference(b, a, 0.0)}")
    return None


def _difference(got: np.ndarray, expected: np.ndarray, tolerance: float) -> str:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return f"{got.dtype}{list(got.shape)} instead of {expected.dtype}{list(expected.shape)}"
    wide = got.astype(np.float64), expected.astype(np.float64)
    apart = np.abs(wide[0] - wide[1])
    bad = ~(apart <= tolerance)
    if not bad.any():
        return ""
    place = tuple(int(i) for i in np.argwhere(bad)[0])
    return (
        f"{np.count_nonzero(bad)} of {bad.size} numbers, first {wide[0][place]:.7g} instead of {wide[1][place]:.7g} "
        f"at {list(place)}, at most {np.max(apart, initial=0):.3g} off, {tolerance:.1g} allowed"
    )
