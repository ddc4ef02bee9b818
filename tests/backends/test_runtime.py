"""The runtime of compiled models, driven hard under gcc's sanitizers around a small network written in C."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from graphopt_backends._library import SOURCES

_CASES = ("many_runs", "open_and_close", "two_callers", "two_models", "profiles", "no_threads")
_FORKS = ("forks", "forks_without_threads")
"""Not followed by the sanitizer of threads; that of addresses holds a lock when another thread forks."""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None or platform.system() != "Linux":
        pytest.skip("no C compiler for Linux")
    folder, made = tmp_path_factory.mktemp("team"), dict[str, Path]()

    def build(sanitizer: str) -> Path:
        if sanitizer not in made:
            made[sanitizer] = folder / sanitizer.partition(",")[0]
            sources = [Path(__file__).with_name("team.c"), SOURCES / "runtime.c", SOURCES / "cpu.c"]
            options = ["-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{SOURCES}"]
            options += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-Wl,--wrap=pthread_create"]
            command = [compiler, *options, *map(str, sources), "-o", str(made[sanitizer])]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if "san" in done.stderr and "cannot find" in done.stderr:
                pytest.skip(f"the compiler has no -fsanitize={sanitizer}")
            assert done.returncode == 0, done.stderr
        return made[sanitizer]

    return build


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize(
    ("sanitizer", "case"),
    [
        *(("thread", case) for case in _CASES),
        *(("address,undefined", case) for case in _CASES),
        *(("undefined", case) for case in _FORKS),
    ],
)
def test_runtime_gives_right_results_without_races(sanitizer: str, case: str, threads: int, program) -> None:
    options = {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run(
        [program(sanitizer), case, str(threads)], env={**os.environ, **options}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_threads_without_cores_of_their_own_finish_too(program) -> None:
    core = min(os.sched_getaffinity(0))
    done = subprocess.run(
        [program("address,undefined"), "many_runs", "4"], preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
