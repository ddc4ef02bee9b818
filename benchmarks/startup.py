"""How long the command takes to start: python benchmarks/startup.py [--runs 15]."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

import tables

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import graphopt": [sys.executable, "-c", "import graphopt"],
    "graphopt --version": [sys.executable, "-m", "graphopt", "--version"],
    "graphopt --help": [sys.executable, "-m", "graphopt", "--help"],
    "graphopt completion bash": [sys.executable, "-m", "graphopt", "completion", "bash"],
    "graphopt list": [sys.executable, "-m", "graphopt", "list"],
}


def seconds(command: Sequence[str]) -> float:
    """Wall time of one run."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Time all commands in turn, round by round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(runs + 1):
        for name, command in COMMANDS.items():
            times[name].append(seconds(command))
    warm = {name: found[1:] for name, found in times.items()}
    base = statistics.median(warm["python -c pass"])
    rows = [
        (name, f"{statistics.median(t):.2f}", f"{min(t):.2f}", f"{max(t):.2f}", f"{statistics.median(t) / base:.1f}x")
        for name, t in warm.items()
    ]
    head = ("command", "median s", "min s", "max s", "of python alone")
    tables.write("startup", "Start-up", head, rows, f"{runs} runs each, taking turns, after one to warm up.")


if __name__ == "__main__":
    main()
