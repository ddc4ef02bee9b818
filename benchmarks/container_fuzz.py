"""Damaged containers: python benchmarks/container_fuzz.py [--mutants 10000].

Flips bits, cuts, moves and overwrites bytes, and changes index and blocks with checksums that fit the change. Every
mutant must be refused, or give the model as it was; half of them are read without the native library. Ten thousand
take some minutes.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import tables

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from packed_models import container, mutant, outcome

_SECONDS = 10.0


def main() -> None:
    """Read all mutants and write the table; exits with 1 if one was decoded wrongly or took too long."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutants", type=int, default=10_000)
    count = parser.parse_args().mutants
    found: Counter[str] = Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        originals = [container(folder / str(seed), seed) for seed in range(4)]
        for seed in range(count):
            content, files = originals[seed % len(originals)]
            damaged = mutant(content, np.random.default_rng(seed))
            start = time.perf_counter()
            found[outcome(damaged, files, folder / "mutant", native=seed % 8 < 4)] += 1
            slowest = max(slowest, time.perf_counter() - start)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    row = (count, found["refused"], found["right"], found["wrong"], f"{slowest:.2f}", f"{memory:.0f}")
    head = ("mutants", "refused", "the model as it was", "decoded wrongly", "slowest, s", "peak memory, MB")
    tables.write("container_fuzz", "Damaged containers", head, [row])
    sys.exit(int(found["wrong"] > 0 or slowest > _SECONDS))


if __name__ == "__main__":
    main()
