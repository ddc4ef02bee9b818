"""Thousands of kernels of drawn shapes against NumPy: python benchmarks/kernel_fuzz.py [--cases 2000] [--seed N].

The strategies are those of the tests (tests/kernel_cases.py), for every family of kernels, on every kind of CPU: those
of x86 natively, where this machine has the instructions, those of ARM under qemu. Every array lies right before a page
that is not there. Sums of integers must be equal bit by bit. Exits with 1 if a case fails. 2000 cases take about half
an hour on one core.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import tables

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from kernel_case import Case, check, drawn
from kernel_cases import FAMILIES
from kernel_program import ISAS, ProgramError, command_of, run_all

from graphopt.targets import Isa

_SHARES = {"gemm": 3, "conv": 3, "depthwise": 2, "batched": 2, "blockwise": 2}
"""Parts of the cases that families get; the others get one."""

_AT_ONCE = 25
Failure = tuple[Case, str]


def main() -> None:
    """Draw cases, run them, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--families", nargs="*", default=sorted(FAMILIES), choices=sorted(FAMILIES))
    parser.add_argument("--devices", nargs="*", default=list(ISAS), choices=list(ISAS))
    parser.add_argument("--name", default="kernel_fuzz")
    options = parser.parse_args()
    devices = [device for device in options.devices if command_of(ISAS[device]) is not None]
    absent = sorted(set(options.devices) - set(devices))
    shares = {family: _SHARES.get(family, 1) for family in options.families}
    part = options.cases / (sum(shares.values()) * max(1, len(devices)))
    counts, failures = Counter[tuple[str, str, str]](), list[Failure]()
    for device in devices:
        for family, share in shares.items():
            number = options.seed * len(ISAS) + list(ISAS).index(device)
            cases = drawn(FAMILIES[family](ISAS[device]), -int(-part * share // 1), number)
            found = list(_failures(cases, ISAS[device]))
            counts.update((family, case.dtype, device) for case in cases)
            failures += found
            print(f"{device} {family}: {len(cases)} cases, {len(found)} failures", flush=True)
    _write(options.name, counts, failures, devices, absent)
    sys.exit(1 if failures else 0)


def _failures(cases: Sequence[Case], isa: Isa) -> Iterator[Failure]:
    """Cases that went wrong, and how."""
    for first in range(0, len(cases), _AT_ONCE):
        some = cases[first : first + _AT_ONCE]
        try:
            yield from _wrong(some, isa)
        except ProgramError:
            for case in some:  # one by one, so that the others are checked too
                try:
                    yield from _wrong([case], isa)
                except ProgramError as e:
                    yield case, str(e)


def _wrong(cases: Sequence[Case], isa: Isa) -> list[Failure]:
    """Cases whose results differ.

    Raises:
        ProgramError: A kernel touched memory that is not its own.
    """
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        results = run_all(cases, isa, Path(folder))
    found: list[Failure] = []
    for case, got in zip(cases, results, strict=True):
        try:
            check(case, got)
        except AssertionError as e:
            found.append((case, str(e)))
    return found


def _write(
    name: str, counts: Counter[tuple[str, str, str]], failures: Sequence[Failure], devices: Sequence[str],
    absent: Sequence[str],
) -> None:  # fmt: skip
    rows = [
        (family, dtype, *(counts[family, dtype, device] for device in devices))
        for family, dtype in dict.fromkeys((family, dtype) for family, dtype, _ in sorted(counts))
    ]
    rows.append(("all", "", *(sum(n for key, n in counts.items() if key[2] == device) for device in devices)))
    notes = [f"Cases: {counts.total()}. Failures: {len(failures)}."]
    notes += [f"- {case.name}: {' '.join(text.split())[:300]}" for case, text in failures]
    if absent:
        notes.append(f"Not run, because this machine neither has nor emulates them: {', '.join(absent)}.")
    head = ("family", "elements", *(f"{device} ({_how(ISAS[device])})" for device in devices))
    tables.write(name, "Kernels of drawn shapes against NumPy", head, rows, "\n".join(notes))


def _how(isa: Isa) -> str:
    return "emulated" if command_of(isa) else "executed"


if __name__ == "__main__":
    main()
