"""Random networks against ONNX Runtime: python benchmarks/network_fuzz.py [--cases 1000] [--seed N] [--device NAME].

Networks are those of the tests (tests/network_cases.py). Each is compiled as a whole and compared on two feeds with
what ONNX Runtime gives without its optimizations, with itself run again, and with one, two and three threads; every
tenth is compiled twice. A network that fails is made smaller as long as it fails alike, and printed with its seed;
`--models FOLDER` writes it there. Exits with 1 if one fails. A thousand networks take about half an hour on one core.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import tables

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from kernel_runner import runnable
from network_case import Case
from network_cases import drawn
from network_check import Finding, check

from graphopt.model_io import save_model

_TWICE = 10
_SECONDS = 60  # for one network; most take one or two
_SMALLER = 150  # tries to make one network smaller


@dataclass(frozen=True)
class _Job:
    """A network, or some of its nodes, on a CPU."""

    seed: int
    most: int
    device: str
    kept: tuple[int, ...] | None = None

    def case(self) -> Case:
        case = drawn(self.seed, most=self.most)
        return case if self.kept is None else case.part(self.kept)


def main() -> None:
    """Draw networks, check them, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first network")
    parser.add_argument("--nodes", type=int, default=40, help="most nodes of a network")
    parser.add_argument("--device", nargs="*", default=[isa.name for isa in runnable()], help="CPUs, in turn")
    parser.add_argument("--models", type=Path, help="folder for networks that fail")
    parser.add_argument("--name", default="network_fuzz")
    options = parser.parse_args()
    counts, failures = Counter[str](), list[tuple[_Job, Finding, Case]]()
    with tempfile.TemporaryDirectory(prefix="graphopt-") as cache, _Worker(Path(cache)) as worker:
        for seed in range(options.seed, options.seed + options.cases):
            job = _Job(seed, options.nodes, options.device[seed % len(options.device)])
            finding, operators = worker.examined(job)
            counts.update(operators)
            if finding is not None:
                job, finding = _smallest(worker, job, finding, len(operators))
                case = job.case()
                failures.append((job, finding, case))
                print(f"seed {seed} {job.device}: {finding.kind}: {finding.text}\n{case.text()}\n", flush=True)
                if options.models is not None:
                    options.models.mkdir(parents=True, exist_ok=True)
                    save_model(case.model(), options.models / f"{seed}.onnx")
            elif (seed + 1) % 100 == 0:
                print(f"{seed + 1 - options.seed} networks, {len(failures)} failures", flush=True)
    _write(options.name, options.cases, options.device, counts, failures)
    sys.exit(1 if failures else 0)


class _Worker:
    """A process that checks networks; another one if it ends, or does not."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._begin()

    def _begin(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, end = context.Pipe()
        self._process = context.Process(target=_serve, args=(end, self._cache), daemon=True)
        self._process.start()
        end.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    def examined(self, job: _Job) -> tuple[Finding | None, list[str]]:
        """What is wrong with a network, and its operators."""
        self._pipe.send(job)
        text = f"more than {_SECONDS} seconds"
        try:
            if self._pipe.poll(_SECONDS):
                return self._pipe.recv()
        except (EOFError, ConnectionError):
            text = "the process ended"
        self._process.kill()
        self._process.join()
        self._begin()
        return Finding("dead", text), [step.op for step in job.case().steps]


def _serve(pipe: Any, cache: Path) -> None:
    """Check what is sent, until nobody is there."""
    while True:
        pipe.send(_examined(pipe.recv(), cache))


def _examined(job: _Job, cache: Path) -> tuple[Finding | None, list[str]]:
    case = job.case()
    isa = next(isa for isa in runnable() if isa.name == job.device)
    return check(case, isa, cache, again=job.seed % _TWICE == 0), [step.op for step in case.steps]


def _smallest(worker: _Worker, job: _Job, finding: Finding, count: int) -> tuple[_Job, Finding]:
    """The least nodes that fail alike: halves are left out first, then fewer and fewer."""
    kept, tries, piece = tuple(range(count)), 0, max(1, count // 2)
    while tries < _SMALLER:
        smaller = False
        for first in range(len(kept) - 1, -1, -piece):
            rest = kept[: max(0, first - piece + 1)] + kept[first + 1 :]
            if rest and tries < _SMALLER:
                tries += 1
                found, _ = worker.examined(_Job(job.seed, job.most, job.device, rest))
                if found is not None and _alike(found, finding):
                    job, finding, kept, smaller = _Job(job.seed, job.most, job.device, rest), found, rest, True
                    break
        if not smaller and piece == 1:
            break
        piece = piece if smaller else piece // 2
        piece = max(1, min(piece, len(kept) // 2))
    return job, finding


def _alike(a: Finding, b: Finding) -> bool:
    return a.kind == b.kind and (a.kind != "broken" or a.text.partition(":")[0] == b.text.partition(":")[0])


def _write(
    name: str, cases: int, devices: Sequence[str], counts: Counter[str],
    failures: Sequence[tuple[_Job, Finding, Case]],
) -> None:  # fmt: skip
    rows = [(operator, count) for operator, count in sorted(counts.items())]
    notes = [f"Networks: {cases}, on {', '.join(devices)} in turn. Failures: {len(failures)}."]
    notes += [f"- seed {job.seed}: {finding.kind}: {finding.text}" for job, finding, _ in failures]
    head = ("operator", "nodes")
    tables.write(name, "Random networks against ONNX Runtime", head, [*rows, ("all", counts.total())], "\n".join(notes))


if __name__ == "__main__":
    main()
