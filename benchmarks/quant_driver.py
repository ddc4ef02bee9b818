"""Runs one other quantizer once, inside that quantizer's own environment: python quant_driver.py JOB.json.

The job says what to do (see `quant_rivals.Job`); the last line on stdout is `{"seconds": ..., "notes": [...]}`. Nothing
but the standard library, numpy and onnx is imported before the quantizer itself: graphopt is not installed here.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter

Feed = dict[str, np.ndarray]
Job = dict[str, Any]


def main(path: str) -> None:
    """Do a job."""
    job: Job = json.loads(Path(path).read_text("utf8"))
    answer = os.fdopen(os.dup(1), "w")  # tools print, and their prints go to stderr
    os.dup2(2, 1)
    Path(job["out"]).parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    notes = _WAYS[job["rival"], job["mode"]](job) or []
    seconds = time.perf_counter() - start
    answer.write(json.dumps({"seconds": seconds, "notes": notes}) + "\n")
    answer.flush()


def feeds(job: Job) -> list[Feed]:
    """Calibration samples: an array with the rank of its input stacks them, one with one axis more holds whole ones."""
    graph = onnx.load(job["model"], load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    ranks = {port.name: len(port.type.tensor_type.shape.dim) for port in graph.input if port.name not in weights}
    with np.load(job["calibration"]) as stored:
        arrays = {name: stored[name] for name in stored.files if name in ranks}
    count = min(len(array) for array in arrays.values())
    count = min(count, job["samples"] or count)

    def sample(name: str, i: int) -> np.ndarray:
        return arrays[name][i : i + 1] if arrays[name].ndim == ranks[name] else arrays[name][i]

    return [{name: sample(name, i) for name in arrays} for i in range(count)]


class _Reader:
    """Samples one after the other, as onnxruntime and neural-compressor ask for them."""

    def __init__(self, samples: Sequence[Feed]) -> None:
        self._samples = samples
        self._rest: Iterator[Feed] = iter(samples)

    def get_next(self) -> Feed | None:
        """The next sample."""
        return next(self._rest, None)

    def rewind(self) -> None:
        """Start again."""
        self._rest = iter(self._samples)

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[Feed]:
        return iter(self._samples)


def _prepared(job: Job, folder: str) -> tuple[str, list[str]]:
    """The model after onnxruntime's own preparation, or as it is where that fails."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = f"{folder}/prepared.onnx"
    try:
        quant_pre_process(job["model"], prepared)
    except Exception as e:  # whatever it is, the quantizer gets its chance on the plain model
        return job["model"], [f"without quant_pre_process: {type(e).__name__}"]
    return prepared, []


def _ort_static(job: Job) -> list[str]:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    with tempfile.TemporaryDirectory() as folder:
        model, notes = _prepared(job, folder)
        quantize_static(
            model,
            job["out"],
            _Reader(feeds(job)),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )
    return notes


def _ort_dynamic(job: Job) -> list[str]:
    from onnxruntime.quantization import quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        model, notes = _prepared(job, folder)
        quantize_dynamic(model, job["out"], per_channel=True)
    return notes


def _ort_int4(job: Job) -> None:
    """matmul_nbits: QDQ where the algorithm can write it, MatMulNBits where it cannot (GPTQ)."""
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits
    from onnxruntime.quantization.quant_utils import QuantFormat

    group, symmetric, algorithm = job["group_size"], job["symmetric"], job["algorithm"]
    level, form = job["accuracy_level"] or None, QuantFormat[job["format"]]
    if algorithm == "rtn":
        config = nbits.DefaultWeightOnlyQuantConfig(group, symmetric, level, quant_format=form)
    elif algorithm == "hqq":
        config = nbits.HQQWeightOnlyQuantConfig(group, 4)
    elif algorithm == "k_quant":
        config = nbits.KQuantWeightOnlyQuantConfig()
    else:
        config = nbits.GPTQWeightOnlyQuantConfig(_Reader(feeds(job)))
    quantizer = nbits.MatMulNBitsQuantizer(onnx.load(job["model"]), 4, group, symmetric, level, algo_config=config)
    quantizer.process()
    quantizer.model.save_model_to_file(job["out"], job["external"])


def _inc_static(job: Job) -> None:
    from onnx_neural_compressor.quantization import QuantFormat, config, quantize

    settings = config.StaticQuantConfig(_Reader(feeds(job)), quant_format=QuantFormat.QDQ, per_channel=True)
    quantize(job["model"], job["out"], settings)


def _inc_dynamic(job: Job) -> None:
    from onnx_neural_compressor.quantization import config, quantize

    quantize(job["model"], job["out"], config.DynamicQuantConfig(per_channel=True))


def _inc_int4(job: Job) -> None:
    """By the algorithms' own entries: `quantize` takes static and dynamic settings only."""
    from onnx_neural_compressor.quantization import algorithm_entry, config

    algorithm, shared = job["algorithm"], {"weight_group_size": job["group_size"], "weight_sym": job["symmetric"]}
    if algorithm == "rtn":
        made = algorithm_entry.rtn_quantize_entry(job["model"], config.RTNConfig(**shared))
    elif algorithm == "gptq":
        made = algorithm_entry.gptq_quantize_entry(job["model"], config.GPTQConfig(**shared), _Reader(feeds(job)))
    else:
        made = algorithm_entry.awq_quantize_entry(job["model"], config.AWQConfig(**shared), _Reader(feeds(job)))
    onnx.save(made, job["out"])


def _lifted(job: Job) -> onnx.ModelProto:
    """The model in opset 21, which standard INT4 needs; these tools do not raise it themselves."""
    model = onnx.load(job["model"])
    version = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    return onnx.version_converter.convert_version(model, 21) if version < 21 else model


def _nncf_static(job: Job) -> None:
    import nncf

    kind = nncf.ModelType.TRANSFORMER if job["transformer"] else None
    samples = feeds(job)
    data = nncf.Dataset(samples)
    made = nncf.quantize(onnx.load(job["model"]), data, subset_size=len(samples), model_type=kind)
    onnx.save(made, job["out"])


def _nncf_int4(job: Job) -> None:
    """Data-aware ways take samples; `awq` is AWQ with scale estimation, the best it offers besides GPTQ."""
    import nncf

    mode = nncf.CompressWeightsMode.INT4_SYM if job["symmetric"] else nncf.CompressWeightsMode.INT4_ASYM
    extra: dict[str, Any] = {}
    if job["algorithm"] != "rtn":
        extra = {"dataset": nncf.Dataset(feeds(job)), job["algorithm"]: True}
    if job["algorithm"] == "awq":
        extra["scale_estimation"] = True
    model = _lifted(job)
    onnx.save(nncf.compress_weights(model, mode=mode, group_size=job["group_size"], **extra), job["out"])


def _onnxsim_static(job: Job) -> None:
    import onnxsim

    simplified, _ = onnxsim.simplify(onnx.load(job["model"]))  # folds batch norms, which its quantizers expect
    onnx.save(onnxsim.quantize_static(simplified, feeds(job)), job["out"])


def _onnxsim_dynamic(job: Job) -> None:
    import onnxsim

    simplified, _ = onnxsim.simplify(onnx.load(job["model"]))
    onnx.save(onnxsim.quantize_dynamic(simplified), job["out"])


def _onnxsim_int4(job: Job) -> None:
    import onnxsim

    if job["group_size"] != 32:
        raise ValueError("onnxsim has groups of 32 only")
    model = _lifted(job)
    if job["algorithm"] == "hqq":
        onnx.save(onnxsim.quantize_weight_only_int4_hqq(model), job["out"])
        return
    made = onnxsim.quantize_weight_only_int4(model)
    if job["algorithm"] != "rtn":
        made = {"gptq": onnxsim.apply_gptq, "awq": onnxsim.apply_awq}[job["algorithm"]](model, made, feeds(job))
    onnx.save(made, job["out"])


_WAYS = {
    ("onnxruntime", "static"): _ort_static,
    ("onnxruntime", "dynamic"): _ort_dynamic,
    ("onnxruntime", "int4"): _ort_int4,
    ("neural-compressor", "static"): _inc_static,
    ("neural-compressor", "dynamic"): _inc_dynamic,
    ("neural-compressor", "int4"): _inc_int4,
    ("nncf", "static"): _nncf_static,
    ("nncf", "int4"): _nncf_int4,
    ("onnxsim", "static"): _onnxsim_static,
    ("onnxsim", "dynamic"): _onnxsim_dynamic,
    ("onnxsim", "int4"): _onnxsim_int4,
}


if __name__ == "__main__":
    main(sys.argv[1])
