"""What compiling costs: python benchmarks/compile_cost.py [MODEL ...].

Seconds from a model on disk to its library, the largest resident memory of the process that compiles (what is in memory
of the mapped weights counts), and whether a second compilation in another folder gives the same bytes.
Models: `resnet50` and `bert_base` with random weights, and decoders whose weights take 1 and 3 GB.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import architectures
import tables
from quant_llama import Llama, make_llama

from graphopt.backend_base import BuildOptions
from graphopt.bench.child import peak_memory_mb
from graphopt.model_io import ShapeBinding, load_model, model_files
from graphopt.plugins import load_plugins

_LAYERS = {"decoder_1gb": 3, "decoder_3gb": 14}
_MODELS = ("resnet50", "bert_base", *_LAYERS)


def main() -> None:
    """Compile every model twice, in processes of their own."""
    if len(sys.argv) == 5 and sys.argv[1] == "--child":
        print(json.dumps(_compile(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(_MODELS))
    parser.add_argument("--target", default="x86")
    parser.add_argument("--name", default="compile_cost")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "graphopt-architectures")
    options = parser.parse_args()
    rows: list[tuple[object, ...]] = []
    for name in options.models or _MODELS:
        source = _model(name, options.cache)
        found: list[dict[str, object]] = []
        for _ in range(2):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, __file__, "--child", str(source), folder, options.target]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found.append(json.loads(done.stdout.splitlines()[-1]))
        size = sum(file.stat().st_size for file in model_files(source)) / 1e9
        same = "yes" if found[0]["digests"] == found[1]["digests"] else "no"
        times = sorted(float(str(one["seconds"])) for one in found)
        rows.append(
            (name, f"{size:.2f}", f"{times[0]:.1f} to {times[1]:.1f}", found[0]["peak_mb"], found[0]["kernels"], same)
        )
        print(*rows[-1], flush=True)
    head = ("model", "GB", "seconds", "peak MB", "kernels", "same bytes twice")
    tables.write(options.name, "What compiling costs", head, rows, f"Target `{options.target}`, batch 1.")


def _model(name: str, cache: Path) -> Path:
    if name not in _LAYERS:
        return architectures.export(name, "script", cache)
    path = cache / f"{name}.onnx"
    if not path.is_file():
        make_llama(path, Llama(layers=_LAYERS[name]))
    return path


def _compile(source: Path, folder: Path, wanted: str) -> dict[str, object]:
    registry = load_plugins()
    target = registry.targets.resolve(wanted)
    start = time.perf_counter()
    model = load_model(source)
    shapes = {"input_ids": (1, 1)} if source.stem in _LAYERS else {}
    options = BuildOptions(binding=ShapeBinding(shapes=shapes), cache=Path.home() / ".cache" / "graphopt")
    build = registry.backends[target.backend or ""].build(model, target, folder, options)
    seconds = time.perf_counter() - start
    digests = {}
    for name in build.files:
        with (folder / name).open("rb") as stream:
            digests[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    peak = round(peak_memory_mb())
    return {"seconds": seconds, "peak_mb": peak, "kernels": build.facts["kernels"], "digests": digests}


if __name__ == "__main__":
    main()
