"""Reads assembly listings of 64-bit ARM code: its innermost loops, what they do, and how fast a model says they run."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Loop", "cycles", "innermost_loops", "mca"]

_LABEL = re.compile(r"^(\.?\w[\w.$]*):")
_BRANCH = re.compile(r"^(?:b|b\.\w+|cbn?z|tbn?z)$")
_MULTIPLY = re.compile(r"^(?:fmla|fmls|fmlal2?|bfmmla|sdot|udot|usdot|sudot|smmla|ummla|usmmla)$")
_CYCLES = re.compile(r"^Total Cycles:\s+(\d+)", re.MULTILINE)
_TURNS = (100, 300)
_VERSIONS = (19, 20, 21, 22, 18, 17)
"""Of LLVM, those with a model of neoverse-v1, and that first with which limits were set."""


@dataclass(frozen=True)
class Loop:
    """A loop with no loop inside.

    Attributes:
        function: Where it is.
        lines: Instructions, the branch back last.
    """

    function: str
    lines: tuple[str, ...]

    @property
    def multiplications(self) -> tuple[str, ...]:
        """Multiply-accumulates of vectors."""
        return tuple(line for line in self.lines if _MULTIPLY.match(_words(line)[0]))

    @property
    def share(self) -> float:
        """Part of the instructions that multiply and accumulate."""
        return len(self.multiplications) / len(self.lines)

    @property
    def spills(self) -> tuple[str, ...]:
        """Instructions that write to the stack or read from it."""
        return tuple(line for line in self.lines if "[sp" in line)


def innermost_loops(listing: str) -> Iterator[Loop]:
    """Every natural loop without another inside, function by function."""
    for name, blocks in _functions(listing):
        after = _successors(blocks)
        bodies = _natural_loops(after)
        for header, body in bodies.items():
            if not any(other in body for other in bodies if other != header):
                yield Loop(name, tuple(line for block in sorted(body) for line in blocks[block][1]))


Block = tuple[str, list[str]]
"""A label and the instructions up to the next label or branch."""


def _functions(listing: str) -> Iterator[tuple[str, list[Block]]]:
    """Functions as basic blocks, without directives and comments."""
    name, blocks = "", list[Block]()
    for text in listing.splitlines():
        line = text.split("//")[0].strip()
        label = _LABEL.match(line)
        if label and not label[1].startswith("."):
            yield name, blocks
            name, blocks = label[1], [("", [])]
        elif label and label[1].startswith(".LBB"):
            blocks.append((label[1], []))
        elif line and not line.startswith(".") and blocks:
            blocks[-1][1].append(line)
            if _BRANCH.match(_words(line)[0]):
                blocks.append(("", []))
    yield name, blocks


def _successors(blocks: Sequence[Block]) -> list[list[int]]:
    """Blocks that each block may go on with."""
    labels = {label: i for i, (label, _) in enumerate(blocks) if label}
    found: list[list[int]] = []
    for i, (_, lines) in enumerate(blocks):
        words = _words(lines[-1]) if lines else [""]
        targets = [labels[words[-1]]] if _BRANCH.match(words[0]) and words[-1] in labels else []
        if words[0] not in ("b", "ret", "br") and i + 1 < len(blocks):
            targets.append(i + 1)
        found.append(targets)
    return found


def _natural_loops(after: Sequence[Sequence[int]]) -> Mapping[int, set[int]]:
    """Blocks of every loop by the block that it is entered at: the one that all others are reached through."""
    before: list[list[int]] = [[] for _ in after]
    for block, targets in enumerate(after):
        for target in targets:
            before[target].append(block)
    bodies: dict[int, set[int]] = {}
    for header in range(len(after)):
        outside = _reached(after, 0, header)
        for last in before[header]:
            if last not in outside:
                bodies.setdefault(header, {header}).update(_reached(before, last, header) | {last})
    return {header: body for header, body in bodies.items() if header in _reached(after, 0, None)}


def _reached(after: Sequence[Sequence[int]], first: int, without: int | None) -> set[int]:
    """Blocks that can be reached from one without passing another."""
    found, open_blocks = set[int](), [first]
    while open_blocks:
        block = open_blocks.pop()
        if block != without and block not in found:
            found.add(block)
            open_blocks += after[block]
    return found


def _words(line: str) -> list[str]:
    return line.replace(",", " ").split()


def mca() -> str | None:
    """LLVM's machine code analyser."""
    return next((path for version in _VERSIONS if (path := shutil.which(f"llvm-mca-{version}"))), None)


def cycles(lines: Sequence[str], cpu: str, features: str = "") -> float:
    """Cycles that one turn of a loop takes by LLVM's model of a CPU, in which caches always hit.

    Args:
        lines: Instructions; branches are taken for nothing.
        cpu: LLVM's name.
        features: LLVM's flags, joined by commas.

    Raises:
        FileNotFoundError: `llvm-mca` is missing.
        subprocess.CalledProcessError: It does not know an instruction or the CPU.
    """
    program = mca()
    if program is None:
        raise FileNotFoundError("llvm-mca")
    few, many = (_total(program, lines, cpu, features, turns) for turns in _TURNS)
    return (many - few) / (_TURNS[1] - _TURNS[0])


def _total(program: str, lines: Sequence[str], cpu: str, features: str, turns: int) -> int:
    command = [
        program, "-mtriple=aarch64-linux-gnu", f"-mcpu={cpu}", f"-mattr={features}", f"-iterations={turns}",
        "-instruction-info=false", "-resource-pressure=false",
    ]  # fmt: skip
    text = "\n".join(line for line in lines if not _BRANCH.match(_words(line)[0])) + "\n"
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    found = _CYCLES.search(done.stdout)
    assert found is not None, done.stdout
    return int(found[1])
