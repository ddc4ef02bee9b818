"""How fast ONNX Runtime computes one layer with float, dynamic INT8 and weight-only INT8 arithmetic.

    python benchmarks/dynamic_layers.py [--seconds 0.3]

Best of interleaved runs, one thread, random weights: the figures that decide which layers the pass `quant` puts on
dynamic integers, and that weights of Conv and LSTM are written as Cast and Mul where a runtime computes these at load.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir
import onnxruntime

from graphopt.model_io import save_model
from graphopt_passes.quant.builder import Builder
from graphopt_passes.quant.dynamic import Rounding, quantize_dynamic
from graphopt_passes.quant.sites import find_sites, keyed_nodes
from graphopt_passes.quant.weight import quantize_weights

Shape = tuple[int, ...]
FORMS = ("float", "dynamic", "DequantizeLinear", "Cast and Mul")


def _conv(inputs: int, outputs: int, kernel: int, size: int, groups: int = 1) -> tuple[str, str, dict[str, Shape]]:
    sizes = f"[1,{inputs},{size},{size}]"
    pads = ",".join([str(kernel // 2)] * 4)
    body = f"[it] y = Conv<pads = [{pads}], group = {groups}>(x, w)"
    weight = (outputs, inputs // groups, kernel, kernel)
    return f"conv {kernel}x{kernel} {inputs}->{outputs} of {size}x{size}", sizes + body, {"w": weight}


def _right(rows: int, deep: int, wide: int) -> tuple[str, str, dict[str, Shape]]:
    return f"matmul {rows} x [{deep} x {wide}]", f"[{rows},{deep}][it] y = MatMul(x, w)", {"w": (deep, wide)}


def _left(outputs: int, inputs: int, columns: int) -> tuple[str, str, dict[str, Shape]]:
    text = f"[{inputs},{columns}][it] y = MatMul(w, x)"
    return f"matmul [{outputs} x {inputs}] x {columns}", text, {"w": (outputs, inputs)}


def _batch(count: int, rows: int, deep: int, wide: int) -> tuple[str, str, dict[str, Shape]]:
    text = f"[{count},{rows},{deep}][it] y = MatMul(x, w)"
    return f"batch of {count}: {rows} x [{deep} x {wide}]", text, {"w": (count, deep, wide)}


def _lstm(steps: int, inputs: int, hidden: int) -> tuple[str, str, dict[str, Shape]]:
    text = f"[{steps},1,{inputs}][it] y = LSTM<hidden_size = {hidden}>(x, w, r)"
    return f"lstm {inputs}->{hidden}, {steps} steps", text, {"w": (1, 4 * hidden, inputs), "r": (1, 4 * hidden, hidden)}


LAYERS = (
    *(_right(*sizes) for sizes in ((1, 384, 384), (1, 768, 3072), (128, 384, 384), (128, 768, 3072))),
    *(_right(*sizes) for sizes in ((128, 384, 2), (128, 384, 16), (128, 384, 32), (128, 16, 384), (1000, 64, 64))),
    *(_left(*sizes) for sizes in ((512, 512, 49), (256, 256, 196), (96, 192, 400), (64, 64, 1000))),
    *(_batch(*sizes) for sizes in ((8, 16, 384, 384), (8, 128, 64, 256))),
    *(_conv(*sizes) for sizes in ((64, 64, 3, 56), (512, 512, 3, 7), (256, 64, 1, 56), (1024, 256, 1, 14))),
    _conv(64, 64, 3, 32, 64),
    *(_lstm(*sizes) for sizes in ((1, 128, 128), (50, 128, 128))),
)


def _model(text: str, weights: dict[str, Shape]) -> ir.Model:
    sizes, body = text[: text.index("[it]")], text[text.index("[it]") :]
    declared = "".join(f", float {name}" for name in weights)
    model = ir.from_onnx_text(
        f'<ir_version: 8, opset_import: ["" : 17]> g (float{sizes} x{declared}) => (float y) {{ {body} }}'
    )
    model.graph.outputs[0].shape = None
    rng = np.random.default_rng(0)
    for value in list(model.graph.inputs)[1:]:
        array = (rng.standard_normal(weights[value.name or ""]) / 8).astype(np.float32)
        value.const_value, value.shape = ir.tensor(array, name=value.name), ir.Shape(array.shape)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    return model


def _quantized(model: ir.Model, form: str) -> ir.Model | None:
    """The layer in one form, whether it pays or not; None if it has none."""
    (site,), _ = find_sites(model)
    builder = Builder(model)
    if form == "dynamic":
        if site.operator not in ("Conv", "Gemm", "MatMul"):
            return None
        quantize_dynamic(Rounding(builder), keyed_nodes(model)[site.key], site, per_channel=True)
    elif form != "float":
        quantize_weights(builder, [(site, "")], per_channel=True, at_load=form == "Cast and Mul")
    return model


def _session(model: ir.Model, folder: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    save_model(model, folder / "model.onnx")
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


def _best(sessions: Sequence[onnxruntime.InferenceSession], seconds: float) -> list[float]:
    """Least microseconds of a run for each session, run in turns."""
    entry = sessions[0].get_inputs()[0]
    feed = {entry.name: np.random.default_rng(1).standard_normal(entry.shape).astype(np.float32)}
    best = [float("inf")] * len(sessions)
    end = time.perf_counter() + seconds * len(sessions)
    while time.perf_counter() < end:
        for i, session in enumerate(sessions):
            start = time.perf_counter()
            session.run(None, feed)
            best[i] = min(best[i], 1e6 * (time.perf_counter() - start))
    return best


def main() -> None:
    """Print one line a layer: microseconds in float, and the speed of the other forms against it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.3, help="time for each form")
    seconds = parser.parse_args().seconds
    print(f"| layer | float, us | {' | '.join(FORMS[1:])} |\n|---|---|{'---|' * (len(FORMS) - 1)}")
    for name, text, weights in LAYERS:
        with TemporaryDirectory() as folder:
            made = {form: _quantized(_model(text, weights), form) for form in FORMS}
            sessions = {form: _session(model, Path(folder)) for form, model in made.items() if model is not None}
        times = dict(zip(sessions, _best(list(sessions.values()), seconds), strict=True))
        cells = (f"{times['float'] / times[form]:.2f}x" if form in times else "" for form in FORMS[1:])
        print(f"| {name} | {times['float']:.1f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
