"""Memory of quantization: python benchmarks/quant_memory.py [calibration] [int4].

`calibration`: a ResNet-50 is quantized with 16 and with 512 images; memory must not grow with their number. Images come
from a function, one at a time, so that what is held is the quantizer's; `--npz` adds the same from one file.
`int4`: a Llama-shaped network of 1.1 billion parameters (quant_llama.py), 4.4 GB beside its file, gets INT4 weights.

Everything runs in child processes whose anonymous memory is read from /proc every 10 ms, children included: pages of
mapped files can be dropped at any time. The check in ONNX Runtime is a process of its own and has a row of its own.
Linux only. About 25 minutes on two idle cores and 10 GB of disk; `--quick` (16 and 64 images, two layers) about 5.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import architectures
import numpy as np
import quant_rivals
import tables
from prune_memory import watched
from quant_llama import Llama, make_llama
from quant_rivals import Job

_PARTS = ("calibration", "int4")
_INT4 = "quant{bits=4 algorithm=rtn group_size=32}"
_DISK = 2.5  # of the float model: results of several tools lie beside it
_FUNCTION = """
import numpy as np

def images():
    rng = np.random.default_rng(0)
    for _ in range({count}):
        yield {{"input0": rng.standard_normal((1, 3, 224, 224), dtype=np.float32)}}
"""
_HEAD = (
    "model", "run", "peak anonymous, GB", "of children", "together", "mapped", "seconds", "result, MB", "exit code",
)  # fmt: skip
Row = tuple[object, ...]


def main() -> None:
    """Run what was asked for and write the table."""
    options = _options()
    rows: list[Row] = []
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        for part in options.parts or _PARTS:
            runs = _calibration if part == "calibration" else _int4
            for row in runs(options, Path(name), notes):
                rows.append(row)
                print(*row, flush=True)
    tables.write(options.name, "Memory of quantization", _HEAD, rows, "\n\n".join(notes))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=" or ".join(_PARTS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--samples", type=int, nargs="*", help="calibration images, a row each")
    parser.add_argument("--calibrators", nargs="*", help="of graphopt, rows each")
    parser.add_argument("--npz", action="store_true", help="images from one file as well, which is held whole")
    parser.add_argument("--layers", type=int, help="layers of Llama")
    parser.add_argument("--passes", default=_INT4, help="of the INT4 part")
    parser.add_argument("--no-rivals", action="store_true")
    parser.add_argument("--environments", type=Path, default=quant_rivals.ENVIRONMENTS)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "graphopt-architectures")
    parser.add_argument("--name", default="quant_memory")
    options = parser.parse_args()
    options.samples = options.samples or ([16, 64] if options.quick else [16, 512])
    options.calibrators = options.calibrators or (["minmax"] if options.quick else ["minmax", "percentile"])
    options.layers = options.layers or (2 if options.quick else Llama.layers)
    unknown = set(options.parts) - set(_PARTS)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    return options


def _calibration(options: argparse.Namespace, folder: Path, notes: list[str]) -> Iterator[Row]:
    """ResNet-50 with few and with many images."""
    source = architectures.export("resnet50", "script", options.cache)
    for calibrator in options.calibrators:
        peaks: list[int] = []
        for count in options.samples:
            (folder / f"images{count}.py").write_text(_FUNCTION.format(count=count), "utf8")
            passes = f"fold,quant{{calibrator={calibrator}}}"
            row, peak = _graphopt(source, passes, folder, ["--calibration", f"images{count}:images"])
            yield source.stem, f"{calibrator}, {count} images", *row
            peaks.append(peak)
        if all(peaks):
            grown = f"{options.samples[-1]} images over {options.samples[0]}: {peaks[-1] / peaks[0]:.2f} times"
            notes.append(f"{calibrator}, {grown} the anonymous memory, children included.")
    for count in options.samples:
        npz = folder / f"images{count}.npz"
        if options.npz or not options.no_rivals:
            rng = np.random.default_rng(0)
            np.savez(npz, input0=rng.standard_normal((count, 3, 224, 224), dtype=np.float32))
        if options.npz:
            row, _ = _graphopt(source, "fold,quant", folder, ["--calibration", str(npz)])
            yield source.stem, f"minmax, {count} images in one file of {npz.stat().st_size / 1e9:.2f} GB", *row
        if not options.no_rivals:
            out = folder / "theirs.onnx"
            job = Job(rival="onnxruntime", mode="static", model=str(source), out=str(out), calibration=str(npz))
            yield source.stem, f"onnxruntime, minmax, {count} images held as above", *_rival(job, folder, options)
        npz.unlink(missing_ok=True)


def _int4(options: argparse.Namespace, folder: Path, notes: list[str]) -> Iterator[Row]:
    """A large network, weight after weight."""
    source, sizes = folder / "llama.onnx", Llama(layers=options.layers)
    needed, free = _DISK * 4 * sizes.parameters, shutil.disk_usage(folder).free
    if free < needed:
        notes.append(
            f"INT4 was left out: it needs {needed / 1e9:.0f} GB of disk in {folder}, {free / 1e9:.0f} GB are free."
        )
        return
    make_llama(source, sizes)
    name = f"llama, {sizes.parameters / 1e9:.2f} billion parameters"
    for check in ("none", "auto"):
        row, _ = _graphopt(source, options.passes, folder, [], check=check)
        yield name, f"`{options.passes}`, --check {check}", *row
    if not options.no_rivals:
        out = folder / "theirs" / "model.onnx"
        job = Job(rival="onnxruntime", mode="int4", model=str(source), out=str(out), format="QOperator", external=True)
        yield name, "onnxruntime, matmul_nbits, rounding, groups of 32", *_rival(job, folder, options)


def _graphopt(source: Path, passes: str, folder: Path, more: list[str], *, check: str = "none") -> tuple[Row, int]:
    """Cells of a run of the command, and its peak, 0 if it failed; functions are found in the folder."""
    out = folder / "out"
    command = ["env", f"PYTHONPATH={folder}", sys.executable, "-m", "graphopt", str(source), "--passes", passes]
    command += ["--check", check, "-o", str(out), "--overwrite", *more]
    row, peak = _watched(command, out)
    shutil.rmtree(out, ignore_errors=True)
    return row, peak


def _rival(job: Job, folder: Path, options: argparse.Namespace) -> Row:
    """Cells of a run of another quantizer in its environment."""
    try:
        python = quant_rivals.interpreter(job.rival, options.environments)
    except RuntimeError as e:
        return "", "", "", "", "", "", str(e)
    file = folder / "job.json"
    file.write_text(json.dumps(asdict(job)), "utf8")
    driver = Path(__file__).with_name("quant_driver.py")
    return _watched([str(python), str(driver), str(file)], Path(job.out))[0]


def _watched(command: list[str], out: Path) -> tuple[Row, int]:
    peaks, seconds, code = watched(command)
    files = [out, *out.parent.glob(f"{out.name}.*")] if out.is_file() else list(out.glob("model.*"))
    size = sum(file.stat().st_size for file in files)
    figures = (f"{peaks[key] / 1e9:.2f}" for key in ("anonymous", "children", "together", "mapped"))
    return (*figures, f"{seconds:.0f}", f"{size / 1e6:.0f}", code), 0 if code else peaks["together"]


if __name__ == "__main__":
    main()
