"""Speed of quantized models beside those of onnxruntime's own quantizers: python benchmarks/quant_speed.py [PART ...].

Parts: `resnet50` (224 x 224) in static INT8, `bert` (BERT-base, 128 tokens, fixed and open sizes) in static and dynamic
INT8, and `llama` (quant_llama.py, some layers of TinyLlama's widths), weight-only INT4 found by rounding. All have
random weights: speed depends on shapes alone. Float model, onnxruntime's and ours run in ONNX Runtime in child
processes, one sample, their rounds interleaved; `theirs / ours` of 1 and above means that ours is as fast or faster.
The layers that ONNX Runtime's fusions leave in float, dequantizing weights on every run, are counted beside it.

INT8 wants a CPU with VNNI: without it the rows say so and nothing is timed. About 20 minutes on two idle cores, most of
it quantizing; `--quick` (fewer rounds, two layers of BERT, one of Llama) about 5.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import architectures
import numpy as np
import onnx
import quant_rivals
import tables
from quant_figures import speed
from quant_llama import Llama, make_llama
from quant_rivals import Job, Made

import graphopt
from graphopt.errors import GraphoptError
from graphopt.targets import host_features

_PARTS = ("resnet50", "bert", "llama")
_VNNI = frozenset({"avx512_vnni", "avx_vnni"})
_THREADS = (1, 2)
_GROUP = 32
_LINEAR = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")
_LEAST_WEIGHTS = 1024
_NOTE = """One sample, medians of {rounds} interleaved rounds. `in float`: layers with constant weights that are still \
computed in float after ONNX Runtime's fusions, theirs and ours; each dequantizes its weights on every run. \
Theirs: {theirs}, QDQ with one scale a channel, MinMax ranges, after its own preparation."""
Row = tuple[object, ...]


def main() -> None:
    """Make the models, time them, and write the table."""
    options = _options()
    rows: list[Row] = []
    theirs = quant_rivals.version("onnxruntime", options.environments)
    notes = [_NOTE.format(rounds=options.rounds, theirs=theirs)]
    for part in options.parts or _PARTS:
        with tempfile.TemporaryDirectory() as name:
            if part == "llama":
                found, conversion = _llama(options, Path(name))
                notes.append(conversion)
            else:
                found = _integers(part, options, Path(name))
            for row in found:
                rows.append(row)
                print(*row, flush=True)
    head = (
        "model", "form", "threads", "float ms", "theirs ms", "ours ms", "theirs / ours", "float / ours", "in float",
        "remarks",
    )  # fmt: skip
    tables.write(options.name, "Speed of quantized models in ONNX Runtime", head, rows, "\n\n".join(notes))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(_PARTS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--layers", type=int, help="layers of Llama")
    parser.add_argument("--conversions", type=int, default=3, help="times that INT4 is made by each, interleaved")
    parser.add_argument("--target", default="ort", help="what graphopt makes models for")
    parser.add_argument("--int4", default="quant{bits=4 algorithm=rtn group_size=32}")
    parser.add_argument("--environments", type=Path, default=quant_rivals.ENVIRONMENTS)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "graphopt-architectures")
    parser.add_argument("--name", default="quant_speed")
    options = parser.parse_args()
    options.rounds = options.rounds or (3 if options.quick else 9)
    options.layers = options.layers or (1 if options.quick else 4)
    unknown = set(options.parts) - set(_PARTS)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    return options


# ---------------------------------------------------------------- INT8


def _integers(part: str, options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    bert = "bert" if options.quick else "bert_base"
    variants = [("resnet50", "script")] if part == "resnet50" else [(bert, "script"), (bert, "script-dynamic")]
    forms = ("static",) if part == "resnet50" else ("static", "dynamic")
    for name, variant in variants:
        if not _VNNI & host_features():
            yield (
                f"{name} {variant}",
                "INT8",
                "",
                "",
                "",
                "",
                "",
                "",
                "",
                "skipped: this CPU has no AVX512-VNNI or AVX-VNNI",
            )
            continue
        source = architectures.export(name, variant, options.cache)
        data = _samples(source, folder / f"{source.stem}.npz")
        for form in forms:
            theirs = _theirs(options, form, source, data, folder / f"theirs-{source.stem}-{form}.onnx")
            passes = "fold,quant" if form == "static" else "fold,quant{mode=dynamic}"
            ours = _ours(options, passes, source, data if form == "static" else None, folder / f"{source.stem}-{form}")
            yield from _rows(f"{name} {variant}", f"{form} INT8", source, theirs, ours, data, options.rounds)


def _samples(source: Path, path: Path) -> Path:
    """Noise for images, token ids and a mask of ones for text."""
    rng, arrays = np.random.default_rng(0), dict[str, np.ndarray]()
    for i, port in enumerate(onnx.load(source, load_external_data=False).graph.input):
        shape = [axis.dim_value or 128 for axis in port.type.tensor_type.shape.dim][1:]
        if port.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            arrays[port.name] = rng.standard_normal((16, *shape), dtype=np.float32)
        else:
            arrays[port.name] = rng.integers(0, 3000, (16, *shape)) if i == 0 else np.ones((16, *shape), np.int64)
    np.savez(path, **arrays)
    return path


def _theirs(options: argparse.Namespace, form: str, source: Path, data: Path, out: Path) -> Made:
    wanted = Job(rival="onnxruntime", mode=form, model=str(source), out=str(out), calibration=str(data))
    return quant_rivals.made(wanted, options.environments)


def _ours(options: argparse.Namespace, passes: str, source: Path, data: Path | None, out: Path) -> Made:
    start = time.perf_counter()
    try:
        graphopt.optimize(source, passes, options.target, calibration=data, out=out, check="none", overwrite=True)
    except GraphoptError as e:
        return Made(None, fault=quant_rivals.last_line(str(e)))
    return Made(out / "model.onnx", time.perf_counter() - start)


# ---------------------------------------------------------------- INT4


def _llama(options: argparse.Namespace, folder: Path) -> tuple[list[Row], str]:
    """Time conversion, both ways in turn, then the results on one token and on 64."""
    source, sizes = folder / "llama.onnx", Llama(layers=options.layers)
    make_llama(source, sizes)
    seconds: dict[str, list[float]] = {"theirs": [], "ours": []}
    theirs = ours = Made(None)
    for _ in range(options.conversions):
        theirs = quant_rivals.made(_int4_job(source, folder / "theirs.onnx", "QOperator"), options.environments)
        ours = _ours(options, options.int4, source, None, folder / "ours")
        seconds["theirs"].append(theirs.seconds)
        seconds["ours"].append(ours.seconds)
    name, rows = f"llama, {options.layers} layers", list[Row]()
    for tokens in (1, 64):
        data = folder / f"{tokens}.npz"
        np.savez(data, input_ids=np.random.default_rng(0).integers(0, sizes.vocabulary, (2, tokens)))
        rows += _rows(name, f"INT4 RTN, {tokens} tokens", source, theirs, ours, data, options.rounds)
    mine, other = (statistics.median(seconds[key]) for key in ("ours", "theirs"))
    if theirs.path is None or ours.path is None:
        return rows, f"INT4 of {name} was not made by both: {theirs.fault or ours.fault}."
    ratio = f"theirs / ours {other / mine:.2f}, medians of {options.conversions}"
    bytes_ = " and ".join(f"{_size(made.path) / 1e6:.0f} MB" for made in (theirs, ours))
    return rows, (
        f"`{options.int4}` of {name} ({sizes.parameters / 1e9:.2f} billion parameters), reading and writing included: "
        f"theirs {other:.1f} s, ours {mine:.1f} s, {ratio}; {bytes_}. Theirs is MatMulNBits with accuracy level 4, "
        "which ONNX Runtime's own fusion of standard blockwise INT4 also takes."
    )


def _int4_job(source: Path, out: Path, form: str) -> Job:
    return Job(
        rival="onnxruntime", mode="int4", model=str(source), out=str(out), group_size=_GROUP, format=form,
        accuracy_level=4, external=True,
    )  # fmt: skip


def _size(path: Path | None) -> int:
    """Bytes of a model with its weights beside it."""
    if path is None:
        return 0
    return sum(file.stat().st_size for file in path.parent.iterdir() if file.name.startswith(path.name))


# ---------------------------------------------------------------- rows


def _rows(name: str, form: str, source: Path, theirs: Made, ours: Made, data: Path, rounds: int) -> Iterator[Row]:
    """Time the three side by side; one that does not exist, or does not run, leaves its cells empty and says why."""
    models = {"float": source} | {
        key: made.path for key, made in (("theirs", theirs), ("ours", ours)) if made.path is not None
    }
    times = speed(models, data, _THREADS, rounds, 4.0)
    left = " / ".join(str(_in_float(models[key])) if key in models else "-" for key in ("theirs", "ours"))
    remarks = "; ".join(f"{key}: {made.fault}" for key, made in (("theirs", theirs), ("ours", ours)) if made.fault)
    for threads in _THREADS:
        whole, other, mine = (times.get(key, {}).get(threads) for key in ("float", "theirs", "ours"))
        shown = (f"{value:.2f}" if isinstance(value, float) else value or "" for value in (whole, other, mine))
        yield name, form, threads, *shown, _ratio(other, mine), _ratio(whole, mine), left, remarks


def _ratio(over: float | str | None, under: float | str | None) -> str:
    return f"{over / under:.2f}" if isinstance(over, float) and isinstance(under, float) else ""


def _in_float(model: Path) -> int:
    """Layers that read a large constant as floats after ONNX Runtime's fusions, itself or through DequantizeLinear."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = f"{folder}/optimized.onnx"
        options.log_severity_level = 3
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(f"{folder}/optimized.onnx", load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer if np.prod(tensor.dims) >= _LEAST_WEIGHTS}
    weights |= {
        node.output[0] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in weights
    }
    return Counter(_reads(node, weights) for node in graph.node)[True]


def _reads(node: onnx.NodeProto, weights: Sequence[str] | set[str]) -> bool:
    return node.op_type in _LINEAR and any(name in weights for name in node.input[:2])


if __name__ == "__main__":
    main()
