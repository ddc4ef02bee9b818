"""Other quantizers beside ours: each in a virtual environment of its own, since their requirements clash.

    python benchmarks/quant_rivals.py [--environments FOLDER]          install all of them, and say which there are

`made` runs one of them in a child process (quant_driver.py) and returns the model it wrote, or the line that says why
there is none. Environments are created on first use; one that cannot be installed leaves its reason in the folder, so
that a long table does not try again in every row (`--reinstall` does).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["ENVIRONMENTS", "RIVALS", "Job", "Made", "interpreter", "last_line", "made", "version"]

ENVIRONMENTS = Path(tempfile.gettempdir()) / "graphopt-quant-rivals"
RIVALS: Mapping[str, tuple[str, ...]] = {
    "onnxruntime": ("onnxruntime", "onnx", "onnx-ir", "sympy", "torch"),  # torch: its HQQ
    # what onnx-neural-compressor imports and does not ask for
    "neural-compressor": ("onnx-neural-compressor", "prettytable", "psutil", "py-cpuinfo", "scipy", "sympy"),
    "nncf": ("nncf", "onnx", "onnxruntime"),
    "onnxsim": ("onnxsim", "onnx", "onnxruntime"),
}
_WANTED = {"neural-compressor": "onnx-neural-compressor"}
_LINE = 160
_LIMIT_SECONDS = 3 * 3600


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a quantizer is to do.

    Attributes:
        rival: One of `RIVALS`.
        mode: static, dynamic or int4.
        model: The float model.
        out: Where the result goes.
        calibration: Samples, an npz file; empty: none.
        samples: How many of them; 0: all.
        transformer: The model is one, for tools that want to be told.
        algorithm: How INT4 weights are found: rtn, gptq, awq, hqq.
        group_size: Weights that share an INT4 scale.
        symmetric: INT4 without zero points.
        format: How onnxruntime writes INT4 found by rounding: QDQ or QOperator.
        accuracy_level: Of MatMulNBits in onnxruntime: 4 computes on 8-bit activations; 0 leaves it to the runtime.
        external: Write weights beside the model.
    """

    rival: str
    mode: str
    model: str
    out: str
    calibration: str = ""
    samples: int = 0
    transformer: bool = False
    algorithm: str = "rtn"
    group_size: int = 32
    symmetric: bool = True
    format: str = "QDQ"
    accuracy_level: int = 0
    external: bool = False


@dataclass(frozen=True)
class Made:
    """What a quantizer made.

    Attributes:
        path: The model; None if there is none.
        seconds: What the quantizer took, imports left out.
        notes: What should be known of the figure.
        fault: Why there is no model.
    """

    path: Path | None
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    fault: str = ""


def interpreter(rival: str, folder: Path, *, again: bool = False) -> Path:
    """The Python of a rival's environment, installed now if it is not there.

    Raises:
        RuntimeError: It cannot be installed; with pip's last line.
    """
    home = folder / rival
    python, done, refused = home / "bin" / "python", home / "installed", folder / f"{rival}.refused"
    if done.exists() and not again:
        return python
    if refused.exists() and not again:
        raise RuntimeError(refused.read_text("utf8"))
    folder.mkdir(parents=True, exist_ok=True)
    refused.unlink(missing_ok=True)
    for command in (
        [sys.executable, "-m", "venv", str(home)],
        [str(python), "-m", "pip", "install", "--quiet", *RIVALS[rival]],
    ):
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            refused.write_text(f"not installed: {last_line(ran.stderr)}", "utf8")
            raise RuntimeError(refused.read_text("utf8"))
    done.touch()
    return python


def version(rival: str, folder: Path) -> str:
    """Name and version of the installed tool, or why there is none."""
    package = _WANTED.get(rival, rival)
    try:
        python = interpreter(rival, folder)
    except RuntimeError as e:
        return f"{package} ({e})"
    script = f"import importlib.metadata as m; print(m.version({package!r}), m.version('onnxruntime'))"
    ran = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True)
    own, runtime = ran.stdout.split()
    return f"{package} {own}" + ("" if rival == "onnxruntime" else f" (calibrating with onnxruntime {runtime})")


def made(job: Job, folder: Path = ENVIRONMENTS, threads: int = 0) -> Made:
    """Run a quantizer in a child process.

    Args:
        job: What it does.
        folder: Where the environments are.
        threads: OpenMP and BLAS threads of the child; 0: as it likes.
    """
    try:
        python = interpreter(job.rival, folder)
    except RuntimeError as e:
        return Made(None, fault=str(e))
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    if threads:
        environment |= {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    driver = Path(__file__).with_name("quant_driver.py")
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "job.json"
        file.write_text(json.dumps(asdict(job)), "utf8")
        try:
            ran = subprocess.run(
                [python, driver, file],
                cwd=scratch,  # tools leave files where they run
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=_LIMIT_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return Made(None, fault=f"not ready after {_LIMIT_SECONDS // 3600} hours")
    if ran.returncode:
        killed = f"ended by signal {-ran.returncode}" if ran.returncode < 0 else last_line(ran.stderr)
        return Made(None, fault=killed)
    answer = json.loads(ran.stdout.splitlines()[-1])
    if not Path(job.out).exists():
        return Made(None, fault="it wrote no model")
    return Made(Path(job.out), answer["seconds"], tuple(answer["notes"]))


def last_line(text: str) -> str:
    """The last line that says something, short and fit for a cell of a table."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[-1] if lines else "no message").replace("|", "/")[:_LINE]


def main() -> None:
    """Install every rival and print its version."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS)
    parser.add_argument("--reinstall", action="store_true")
    options = parser.parse_args()
    for rival in RIVALS:
        if options.reinstall:
            try:
                interpreter(rival, options.environments, again=True)
            except RuntimeError as e:
                print(rival, e)
        print(version(rival, options.environments), flush=True)


if __name__ == "__main__":
    main()
